"""A drop-in: importing this package makes `import peft` mean veneer in this process.

Import it before transformers, diffusers and whatever else asks whether PEFT is there; or run a program with `python -m veneer.compat script.py …`.
Every module under `peft` then is a table of names that stand elsewhere in veneer (`names.py`); nothing is computed here. The version that
`importlib.metadata` tells is that of the PEFT whose files and names veneer has.
"""

from __future__ import annotations

from .finder import install

__all__ = ["install"]

install()
