"""Adapter files of other libraries: PEFT, diffusers, kohya, GGUF (llama.cpp) and MLX, read into one form and written from it."""

from __future__ import annotations

from .adapter import Factors, Part
from .convert import FORMATS, Conversion, Format, convert, detect
from .runtimes import RUNTIMES, Finding, check

__all__ = ["FORMATS", "RUNTIMES", "Conversion", "Factors", "Finding", "Format", "Part", "check", "convert", "detect"]
