"""What a law is held to: a config on a site in a dtype, and all of those that a method claims."""

from __future__ import annotations

import copy
import dataclasses
import functools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ConfigError
from ..mapping import get_peft_model
from ..method import Method
from ..methods.lora import LoraConfig
from ..model import PeftModel
from .packed import packed_sites
from .sites import SITES, SiteCase

ROWS = 4


class Exempt(Exception):  # noqa: N818  no error: the law does not speak of this case
    """Raised by a law that says nothing about a case, with the reason."""


@dataclass
class Case:
    """A config on a site in a dtype."""

    config: Method
    site: str
    dtype: torch.dtype = torch.float32

    def __str__(self) -> str:
        return f"{type(self.config).__name__}-{self.site}-{str(self.dtype).removeprefix('torch.')}"

    @property
    def place(self) -> SiteCase:
        return SITES[self.site] if self.site in SITES else packed_sites()[self.site]

    def base(self) -> nn.Module:
        """The site's model, the same every time."""
        torch.manual_seed(1)
        model = self.place.model()
        return model.to(self.dtype) if self.site in SITES else model  # what is packed has its own

    def inputs(self, rows: int = ROWS) -> Tensor:
        """A batch, the same every time."""
        torch.manual_seed(2)
        x = self.place.inputs(rows)
        return x.to(self.dtype) if x.is_floating_point() else x

    def targeted(self) -> Method:
        """The config, told where the site is."""
        known = {f.name for f in dataclasses.fields(self.config)}
        fields = dict(self.place.fields)
        if self.mixes:  # it may act wherever its experts do, without a target of its own
            width = self.base()(self.inputs()).shape[-1]
            fields = {k: v for k, v in {**fields, "hidden_size": width}.items() if k in known}
        missing = set(fields) - known
        if missing:
            raise Exempt(f"{type(self.config).__name__} has no {sorted(missing)}")
        return dataclasses.replace(copy.deepcopy(self.config), **copy.deepcopy(fields))

    @property
    def mixes(self) -> list[str]:
        """The LoRA adapters that it mixes."""
        return list(self.config.experts())

    def fresh(self, **kwargs: Any) -> PeftModel:
        """The site's model with the adapter as it starts, and before it those that it mixes, trained. `kwargs`: for `get_peft_model`."""
        torch.manual_seed(3)
        if not self.mixes:
            return get_peft_model(self.base(), self.targeted(), **kwargs)
        model: Any = None
        for i, name in enumerate(self.mixes):
            config = LoraConfig(r=2 + i % 2, lora_alpha=4 + i, **self.place.fields)
            if model is None:
                model = get_peft_model(self.base(), config, name, mixed=True)
            else:
                model.add_adapter(name, config)
            model.set_adapter(name)
            move(model, seed=20 + i, size=0.5)
        model.add_adapter("default", self.targeted(), **kwargs)
        model.set_adapter("default")
        return model  # type: ignore[no-any-return]

    def trained(self) -> PeftModel:
        """The same with every trained number moved, in eval mode."""
        model = self.fresh()
        move(model)
        return model.eval()

    def extra(self, row: int | None = None) -> dict[str, Any]:
        """What a call takes beside the inputs, of all rows or of one."""
        given = self.config.example_call(ROWS)
        return given if row is None else {k: v[row : row + 1] for k, v in given.items()}

    def run(self, model: nn.Module, x: Tensor | None = None) -> Tensor:
        """The output for the usual batch, or for `x` of as many rows."""
        extra = self.extra() if isinstance(model, PeftModel) else {}
        y: Tensor = model(self.inputs() if x is None else x, **extra)
        return y

    @torch.no_grad()
    def output(self, model: nn.Module, x: Tensor | None = None) -> Tensor:
        """The same without gradients: torch takes other paths where some are wanted, which differ in the last bit."""
        return self.run(model, x)

    @functools.cached_property
    def refused(self) -> str:
        """Why the method does not take the site with these options; empty if it does."""
        try:
            self.fresh()
        except ConfigError as e:
            return str(e) or type(e).__name__
        return ""

    def close(self, a: Tensor, b: Tensor, loose: float = 1.0) -> None:
        """Equal up to what the dtype can carry."""
        tolerance = {torch.float64: 1e-10, torch.float32: 2e-5, torch.bfloat16: 6e-2}[self.dtype] * loose * self.place.loose
        torch.testing.assert_close(a, b, atol=tolerance * float(b.detach().float().abs().max().clamp_min(1)), rtol=0)


def move(model: nn.Module, seed: int = 4, size: float = 0.1) -> None:
    """Add noise to every number that trains."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(torch.randn(p.shape, generator=generator).to(p.dtype) * size)


def sites_of(config: Method) -> list[str]:
    """The sites that the config's method claims."""
    known = {f.name for f in dataclasses.fields(config)}
    return [n for n, s in SITES.items() if s.kind in config.kinds and (set(s.fields) <= known or config.experts())]


def cases(
    configs: Iterable[Method], sites: Iterable[str] | None = None, dtypes: Iterable[torch.dtype] = (torch.float32,)
) -> Iterator[Case]:
    """Every config on every site it claims in every dtype; on packed ones (see `packed_sites`) where they are asked for by name."""
    for config in configs:
        claimed = sites_of(config)
        if sites is not None:
            packed = packed_sites() if "linear" in config.kinds else {}
            claimed = [s for s in [*claimed, *packed] if s in set(sites)]
        for site in claimed:
            for dtype in dtypes:
                yield Case(config, site, dtype)


def examples(method: type[Method]) -> list[Method]:
    """The configs that a method is checked with: see `Method.examples`."""
    return [method(**copy.deepcopy(dict(fields))) for fields in method.examples]
