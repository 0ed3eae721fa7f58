"""Files of PEFT's that lack layers of X-LoRA's classifier: those whose number is an expert's name. Nobody knows their values."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..errors import LoadError, PeftWarning, SaveError


class Unfilled:
    """The parameters that a file lacked: NaN stands there until somebody fills them in."""

    def __init__(self) -> None:
        self.names: list[str] = []

    def found(self, tensors: dict[str, Tensor], shapes: Mapping[str, tuple[int, ...]], classifier: str) -> dict[str, Tensor]:
        """The file's tensors, with NaN for what it lacks. `shapes`: of what it may lack."""
        start = next((k.partition(classifier)[0] for k in tensors if classifier in k), None)
        self.names = [n for n in shapes if start is not None and start + n not in tensors]
        if self.names:
            warnings.warn(
                f"The file lacks a part of X-LoRA's classifier, which PEFT does not save: {', '.join(self.names)}. Fill these parameters in before "
                "the model runs, or save the adapter again with veneer from where it was trained.",
                PeftWarning,
                stacklevel=6,
            )
        return {**tensors, **{f"{start}{n}": torch.full(shapes[n], torch.nan) for n in self.names}}

    def check_saving(self, tensors: Mapping[str, Tensor]) -> None:
        """Raise SaveError while one has not been filled in."""
        if gone := [n for n in self.names for k, t in tensors.items() if k.endswith(n) and bool(t.isnan().any())]:
            raise SaveError(
                f"The classifier was loaded from a file of PEFT's that lacks {', '.join(gone)}, and they have not been filled in."
            )

    def check_running(self, place: Any) -> None:
        """Raise LoadError while one has not been filled in; it is asked no more once all have."""
        gone = [n for n in self.names if bool(place.tensor(n).isnan().any())]
        if gone:
            raise LoadError(
                f"The adapter {place.adapter!r} was loaded from a file of PEFT's that lacks a part of its classifier: {', '.join(gone)}. Fill these "
                "parameters in (they are NaN), or load an adapter that was saved whole."
            )
        self.names = []
