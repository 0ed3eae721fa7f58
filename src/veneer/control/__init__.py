"""Control over training: learning rates by layer, clipping by layer, freezing by step, accumulation, statistics, pictures of them.

Plain parameter groups, and controls that act in the hooks of any optimizer: in a loop of one's own (`control.attach(optimizer)`), in transformers'
Trainer (`callbacks=[trainer_callback([control])]`), and in the YAML of `veneer train`.
"""

from .accumulation import Accumulation as Accumulation
from .clipping import LayerClipping as LayerClipping
from .depth import Depths as Depths
from .depth import trained as trained
from .freezing import FreezingSchedule as FreezingSchedule
from .freezing import Phase as Phase
from .freezing import unfreezing as unfreezing
from .hooks import Control as Control
from .hooks import attached as attached
from .hooks import trainer_callback as trainer_callback
from .pictures import picture_of_schedule as picture_of_schedule
from .pictures import picture_of_statistics as picture_of_statistics
from .rates import Rates as Rates
from .rates import parameter_groups as parameter_groups
from .spectra import effective_rank as effective_rank
from .spectra import singular_values as singular_values
from .statistics import LayerStatistics as LayerStatistics
