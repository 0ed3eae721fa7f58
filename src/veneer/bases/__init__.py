"""How a frozen weight is stored: one codec per storage."""

from .base import Codec, Stored, codec_for, codecs, stored_bytes
from .plain import Plain

__all__ = ["Codec", "Plain", "Stored", "codec_for", "codecs", "stored_bytes"]
