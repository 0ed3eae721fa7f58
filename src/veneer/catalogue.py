"""What there is: every method with its formula, paper, size and abilities, read off the code."""

from __future__ import annotations

import inspect
import re
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from .config import PeftConfig
from .errors import PeftError, hint
from .mapping import get_peft_model
from .method import Method, load_methods
from .variants import VARIANTS

_PAPER = re.compile(r"(?:arXiv:\s?(\d{4}\.\d{4,5}))|(?:openreview[ :](\w+))|(?:doi[ :](10\.[^\s,;]+[^\s,;.]))")
_LINKS = ("https://arxiv.org/abs/", "https://openreview.net/forum?id=", "https://doi.org/")


@dataclass(frozen=True)
class Entry:
    """One method, or one option of LoRA that makes another method of it.

    Attributes:
        name: as in adapter_config.json, or `LORA use_dora` and the like.
        config: the name of its config's class.
        formula: what it does.
        papers: (text, address) of its sources.
        numbers: how many numbers train on one linear layer with the default options; None where it does not act on single layers.
        sites: the kinds of site it adapts.
        merge, rows, to_lora: whether it merges, mixes in a batch, becomes a LoRA; or in words, why not.
    """

    name: str
    config: str
    formula: str
    papers: tuple[tuple[str, str], ...]
    numbers: int | None
    sites: tuple[str, ...]
    merge: bool | str
    rows: bool | str
    to_lora: bool | str


def catalogue(n_out: int = 4096, n_in: int = 4096) -> list[Entry]:
    """Every method there is, those of the user included, by name.

    Args:
        n_out, n_in: the linear layer that `numbers` are given for.
    """
    return sorted(_entries(n_out, n_in), key=lambda e: e.name)


def entry(name: str, n_out: int = 4096, n_in: int = 4096) -> Entry:
    """One method by its name, in any case.

    Raises:
        PeftError: if there is none; names the nearest.
    """
    found = {e.name.lower(): e for e in catalogue(n_out, n_in)}
    if name.lower() not in found:
        raise PeftError(f"There is no method {name!r}.{hint(name, [e.name for e in found.values()])}")
    return found[name.lower()]


def markdown(n_out: int = 4096, n_in: int = 4096) -> str:
    """The catalogue as a page of the docs."""
    lines = [
        "# Methods",
        "",
        "Made by `make docs` from the code; `veneer methods` tells the same for any size. *Numbers* train on one linear layer of",
        f"{n_out} x {n_in} with the default options. *Rows*: the rows of one batch may have different adapters.",
        "",
        "| method | what it does | source | numbers | sites | merges | rows | to LoRA |",
        "|---|---|---|---:|---|---|---|---|",
    ]
    for e in catalogue(n_out, n_in):
        papers = ", ".join(f"[{text}]({address})" for text, address in e.papers) or "–"
        cells = [
            f"{e.name}<br>`{e.config}`", e.formula, papers, "–" if e.numbers is None else f"{e.numbers:,}", ", ".join(e.sites),
            *("yes" if v is True else "no" if v is False else f"no: {v}" for v in (e.merge, e.rows, e.to_lora)),
        ]  # fmt: skip
        lines.append("| " + " | ".join(c.replace("|", "\\|") for c in cells) + " |")
    return "\n".join(lines) + "\n"


def _entries(n_out: int, n_in: int) -> Iterator[Entry]:
    for name, method in load_methods().items():
        if not issubclass(method, Method):
            yield Entry(name, method.__name__, *_described(method), None, ("whole model",), "it changes no weight", True, False)
            continue
        yield _weights(name, method, method, {}, n_out, n_in)
        if name == "LORA":
            for field, variant in VARIANTS.items():
                yield _weights(f"{name} {field}", method, type(variant), dict(variant.example), n_out, n_in)


def _weights(name: str, method: Any, described: type, fields: dict[str, Any], n_out: int, n_in: int) -> Entry:
    config = _made(method, fields)
    sites = getattr(described, "kinds", config.kinds)
    return Entry(
        name, method.__name__, *_described(described), _numbers(method, fields, n_out, n_in), tuple(sorted(sites)),
        config.unmergeable or True, config.exceptions.get("mixed_batch_equals_one_by_one", True), config.has_delta(),
    )  # fmt: skip


def _described(cls: type) -> tuple[str, tuple[tuple[str, str], ...]]:
    """(formula, papers) from a docstring: what comes before its first three blanks, paper or end of paragraph."""
    text = inspect.cleandoc(cls.__doc__ or "")
    first = text.split("\n\n")[0].replace("\n", " ")
    formula = re.split(r" {3,}|\. [A-Z]\w+ (?:et al\.|& \w+) \d{4}", first)[0]
    found = [(m, i) for m in _PAPER.finditer(text) for i in range(3) if m.group(i + 1)]
    papers = dict.fromkeys((m.group(i + 1) if i else f"arXiv {m.group(1)}", _LINKS[i] + m.group(i + 1)) for m, i in found)
    return formula.rstrip(" .,").replace("  ", " "), tuple(papers)


def _made(method: Any, fields: dict[str, Any]) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for given in (fields, {**method.examples[0], **fields}):
            try:
                config: PeftConfig = method(**given)
            except PeftError:
                continue
            return config
    raise PeftError(f"{method.__name__} takes neither its defaults nor its first example.")


def _numbers(method: Any, fields: dict[str, Any], n_out: int, n_in: int) -> int | None:
    config = _made(method, fields)
    if not hasattr(config, "target_modules"):
        return None
    config.target_modules = ["site"]
    with warnings.catch_warnings(), torch.device("meta"):
        warnings.simplefilter("ignore")
        try:
            model = get_peft_model(nn.ModuleDict({"site": nn.Linear(n_in, n_out)}), config, low_cpu_mem_usage=True)
        except (PeftError, NotImplementedError):
            return None
    return sum(p.numel() for p in model.parameters() if p.requires_grad)
