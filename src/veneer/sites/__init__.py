"""What can be adapted: one file per kind of place a frozen weight lives in."""

from .base import Adaptable, Site, adaptable, site_for, supported
from .parameter import ParameterSite

__all__ = ["Adaptable", "ParameterSite", "Site", "adaptable", "site_for", "supported"]
