"""What can be adapted: one file per kind of place a frozen weight lives in."""

from .base import Site, site_for, supported
from .parameter import ParameterSite

__all__ = ["ParameterSite", "Site", "site_for", "supported"]
