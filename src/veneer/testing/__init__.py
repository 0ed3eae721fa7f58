"""The conformance kit: the laws that every method keeps on every site it claims. `check_method(MyConfig(...))` runs them all."""

from .case import Case, Exempt, cases, examples, sites_of
from .laws import LAWS, check_method, hold
from .packed import packed_sites
from .sites import SITES

__all__ = ["LAWS", "SITES", "Case", "Exempt", "cases", "check_method", "examples", "hold", "packed_sites", "sites_of"]
