"""The conformance kit: the laws that every method keeps on every site it claims. `check_method(MyConfig(...))` runs them all."""

from .laws import LAWS, Case, Exempt, cases, check_method, examples, hold, sites_of
from .packed import packed_sites
from .sites import SITES

__all__ = ["LAWS", "SITES", "Case", "Exempt", "cases", "check_method", "examples", "hold", "packed_sites", "sites_of"]
