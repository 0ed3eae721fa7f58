"""What a variant of LoRA is: a field of `LoraConfig`, and what it does to LoRA's tensors, start and change."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, ClassVar, Literal

from torch import Tensor

from ..change import Change
from ..errors import ConfigError
from ..method import Leaf
from ..ops import LowRank


class Variant:
    """One variant, without state. Subclasses are final; every method has LoRA's own behaviour as its default.

    Class attributes:
        field: the field of `LoraConfig` that turns it on.
        options: the class of the field's value, if it is not a plain one.
        kinds: the kinds of site it acts on.
        starts: the `init_lora_weights` it goes with; None: any.
        starts_as_identity: whether a fresh adapter changes nothing.
        stacking: how it acts on a layer together with other adapters; see `Method`.
        acts: whether it does something when an optimizer steps.
        example, exceptions, unmergeable, routes, takes: as of a method, `example` being the one field's value or all it takes.
    """

    field: ClassVar[str]
    options: ClassVar[type[Any] | None] = None
    kinds: ClassVar[frozenset[str]] = frozenset({"linear"})
    starts: ClassVar[tuple[bool | str, ...] | None] = (True, False, "gaussian", "orthogonal")
    starts_as_identity: ClassVar[bool] = True
    stacking: ClassVar[Literal["sum", "chain"]] = "sum"
    acts: ClassVar[bool] = False
    example: ClassVar[Mapping[str, Any]] = MappingProxyType({})
    exceptions: ClassVar[Mapping[str, str]] = MappingProxyType({})
    unmergeable: ClassVar[str] = ""
    in_pieces: ClassVar[bool] = False
    routes: ClassVar[bool] = False
    takes: ClassVar[tuple[str, ...]] = ()

    def read(self, value: Any) -> Any:
        """The field's value, as a user or a file gives it, as the variant wants it.

        Raises:
            ConfigError: if it cannot be that.
        """
        if self.options is None or isinstance(value, self.options):
            return value
        if not isinstance(value, Mapping):
            raise ConfigError(f"`{self.field}` takes a {self.options.__name__}, got {value!r}.")
        return self.options(**value)

    def check(self, config: Any, site: Any) -> None:
        """Raise ConfigError if the variant cannot act at `site`."""
        if site.kind not in self.kinds:
            raise ConfigError(
                f"`{self.field}` acts on {sorted(self.kinds)} layers, and {site.name!r} is a {site.kind} one. Leave it out of target_modules."
            )

    def leaves(self, config: Any, site: Any, leaves: Mapping[str, Leaf]) -> Mapping[str, Leaf]:
        """The tensors kept at `site`; `leaves`: LoRA's own."""
        return leaves

    def start(self, config: Any, site: Any, given: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Further start values, of the tensors that train; `given`: LoRA's, as far as they are not its leaves' own."""
        return {}

    def change(self, config: Any, p: Any, site: Any, add: LowRank) -> Change:
        """The change of the frozen weight; `add`: LoRA's own."""
        return Change(add=add)

    def facts(self, config: Any, call: Any) -> Mapping[str, Tensor]:
        """What `change` has to know of a call of the model; see `Method.facts`."""
        return {}

    def experts(self, config: Any) -> Mapping[str, str | None]:
        """Other adapters that it needs; see `Method.experts`."""
        return {}

    def example_call(self, rows: int) -> dict[str, Tensor]:
        """Arguments for the laws; see `Method.example_call`."""
        return {}

    def before_step(self, config: Any, sites: Sequence[Any]) -> None:
        """Act when an optimizer is about to step."""

    def penalty(self, config: Any, p: Any, site: Any) -> Tensor | None:
        """A term whose gradient is added to that of the loss, per layer."""
        return None


class Plain(Variant):
    """LoRA itself."""

    kinds: ClassVar[frozenset[str]] = frozenset({"linear", "embedding", "conv", "attention", "parameter"})
    in_pieces: ClassVar[bool] = True
