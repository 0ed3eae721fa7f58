"""How a frozen weight is stored: one codec per storage."""

from .base import Codec, codec_for
from .plain import Plain

__all__ = ["Codec", "Plain", "codec_for"]
