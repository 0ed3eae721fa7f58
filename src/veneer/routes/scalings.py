"""What a router has said lately, and, if it is asked to keep it, all it has said."""

from __future__ import annotations

from typing import Any

from torch import Tensor


class Scalings:
    """Tensors (rows, tokens, layers, experts)."""

    def __init__(self) -> None:
        self._latest: Tensor | None = None
        self._log: list[Tensor] = []
        self._logging = False

    def __getstate__(self) -> dict[str, Any]:
        return {"_latest": None, "_log": [], "_logging": self._logging}  # they may belong to a graph, which is not copied

    def note(self, scalings: Tensor) -> None:
        self._latest = scalings
        if self._logging:
            self._log.append(scalings)

    def latest(self) -> Tensor | None:
        """Those of the last call; None before the first."""
        return self._latest

    def log(self) -> list[Tensor]:
        """Those of all calls while logging was enabled, in a new list."""
        return list(self._log)

    def bucketed(self) -> dict[int, tuple[list[int], list[Tensor]]]:
        """The log by number of tokens: (places in the log, scalings)."""
        out: dict[int, tuple[list[int], list[Tensor]]] = {}
        for i, t in enumerate(self._log):
            places, scalings = out.setdefault(t.shape[1], ([], []))
            places.append(i)
            scalings.append(t)
        return out

    def clear(self) -> None:
        """Empty the log."""
        self._log.clear()

    def enable(self) -> None:
        """Log from now on."""
        self._logging = True

    def disable(self) -> None:
        """Log no more; the log stays."""
        self._logging = False
