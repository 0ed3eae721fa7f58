"""Before anything trains: what a configuration would do, what it costs and what is wrong with it; and which configuration to take."""

from .footprint import LiveBytes as LiveBytes
from .inspection import Inspection as Inspection
from .inspection import inspect_adapter as inspect_adapter
from .plan import Hit as Hit
from .plan import Plan as Plan
from .plan import plan as plan
from .problems import Problem as Problem
