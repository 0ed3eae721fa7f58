"""From files to batches: reading, checking columns, tokens, packing."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import ConfigError, hint

Row = dict[str, Any]
_ENDINGS = (".jsonl", ".json", ".csv", ".parquet", ".txt", ".md")


def read_rows(source: str) -> list[Row]:
    """The rows of a file, of all files in a folder, or of a data set on the Hub (`datasets` reads it).

    jsonl, csv and parquet give their columns; a text file is one row with the column `text`.

    Raises:
        ConfigError: if there is nothing there, it cannot be read, or it is empty.
    """
    path = Path(source)
    if path.is_dir():
        files = sorted(p for p in path.rglob("*") if p.suffix in _ENDINGS)
        if not files:
            raise ConfigError(f"The folder {source!r} holds no data: none of its files ends in {', '.join(_ENDINGS)}.")
        return [row for f in files for row in read_rows(str(f))]
    if not path.exists():
        return _from_hub(source)
    try:
        rows = _read(path)
    except (ValueError, UnicodeDecodeError) as e:
        raise ConfigError(f"{source!r} cannot be read as {path.suffix or 'text'}: {e}") from e
    if not rows:
        raise ConfigError(f"{source!r} is empty: there is nothing to train on.")
    return rows


def _read(path: Path) -> list[Row]:
    if path.suffix == ".jsonl":
        rows = []
        for i, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            if line.strip():
                try:
                    rows.append(json.loads(line))
                except json.JSONDecodeError as e:
                    raise ValueError(f"line {i}: {e}") from e
        return rows
    if path.suffix == ".json":
        found = json.loads(path.read_text(encoding="utf-8"))
        return list(found) if isinstance(found, list) else [found]
    if path.suffix in (".csv", ".parquet"):
        import pandas

        if path.stat().st_size == 0:
            return []
        frame = pandas.read_csv(path) if path.suffix == ".csv" else pandas.read_parquet(path)
        out: list[Row] = frame.to_dict("records")
        return out
    text = path.read_text(encoding="utf-8")
    return [{"text": text}] if text.strip() else []


def _from_hub(name: str) -> list[Row]:
    if "/" not in name or name.startswith((".", "/", "~")) or Path(name).suffix in _ENDINGS:
        raise ConfigError(
            f"There is no file or folder {name!r}.{hint(name, [str(p) for p in Path(name).parent.glob('*')] if Path(name).parent.is_dir() else [])}"
        )
    try:
        import datasets
    except ImportError as e:
        raise ConfigError(f'{name!r} is no local file, and reading it from the Hub needs `datasets`: pip install "veneer[train]"') from e
    try:
        found = datasets.load_dataset(name, split="train")
    except Exception as e:
        raise ConfigError(f"{name!r} is no local file or folder, and the Hub does not give it: {e}") from e
    return [dict(r) for r in found]


def check_columns(rows: Sequence[Row], wanted: Sequence[Sequence[str]], source: str) -> list[str]:
    """The first of the wanted sets of columns that the rows have.

    Raises:
        ConfigError: if they have none of them; names what is there and the nearest.
    """
    have = set(rows[0])
    for columns in wanted:
        if set(columns) <= have:
            for i, row in enumerate(rows):
                gone = [c for c in columns if row.get(c) is None or row[c] != row[c]]
                if gone:
                    raise ConfigError(f"{source}: row {i + 1} has nothing in the column {gone[0]!r}.")
            return list(columns)
    forms = " or ".join("+".join(map(repr, c)) for c in wanted)
    raise ConfigError(f"{source}: the data need the column {forms}; there are {sorted(have)}.{hint(wanted[-1][0], have)}")


@dataclass
class Example:
    """Token numbers and, for each, whether its prediction counts."""

    ids: list[int]
    counts: list[bool]


def language_examples(rows: Sequence[Row], tokenizer: Any, source: str) -> list[Example]:
    """Rows with `messages`, `prompt` + `completion` or `text` as tokens; only what the model is to say counts.

    Chat messages go through the tokenizer's chat template, and the turns of the assistant count.
    """
    columns = check_columns(rows, [["messages"], ["prompt", "completion"], ["text"]], source)
    end = [tokenizer.eos_token_id] if tokenizer.eos_token_id is not None else []
    out = []
    for row in rows:
        if columns == ["text"]:
            ids = tokenizer(row["text"], add_special_tokens=True)["input_ids"] + end
            out.append(Example(ids, [True] * len(ids)))
        elif columns == ["messages"]:
            out.append(_chat(row["messages"], tokenizer))
        elif getattr(tokenizer, "chat_template", None):
            turns = [{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": row["completion"]}]
            out.append(_chat(turns, tokenizer))
        else:
            asked = tokenizer(row["prompt"], add_special_tokens=True)["input_ids"]
            said = tokenizer(row["completion"], add_special_tokens=False)["input_ids"] + end
            out.append(Example(asked + said, [False] * len(asked) + [True] * len(said)))
    return out


def _chat(messages: Sequence[Mapping[str, str]], tokenizer: Any) -> Example:
    if not getattr(tokenizer, "chat_template", None):
        raise ConfigError(
            "The data are chat messages, and the model's tokenizer has no chat template. Give `prompt` and `completion`, or `text`."
        )
    ids: list[int] = []
    counts: list[bool] = []
    for i, turn in enumerate(messages):
        upto = _tokens(tokenizer.apply_chat_template(messages[: i + 1], tokenize=True))
        if turn["role"] == "assistant":  # the opening of the turn is given, not said
            given = len(_tokens(tokenizer.apply_chat_template(messages[:i], tokenize=True, add_generation_prompt=True)))
            counts += [False] * (given - len(ids)) + [True] * (len(upto) - max(given, len(ids)))
        else:
            counts += [False] * (len(upto) - len(ids))
        ids = upto
    return Example(ids, counts)


def _tokens(out: Any) -> list[int]:
    return list(out["input_ids"] if isinstance(out, Mapping) or hasattr(out, "input_ids") else out)


def pack(examples: Iterable[Example], length: int, pad: int) -> list[dict[str, list[int]]]:
    """One stream of all examples cut into blocks of `length`; the rest is filled up with padding that does not count."""
    ids: list[int] = []
    labels: list[int] = []
    for e in examples:
        ids += e.ids
        labels += [t if c else -100 for t, c in zip(e.ids, e.counts, strict=True)]
    blocks = []
    for i in range(0, len(ids), length):
        part, mark = ids[i : i + length], labels[i : i + length]
        gap = length - len(part)
        blocks.append({"input_ids": part + [pad] * gap, "labels": mark + [-100] * gap, "attention_mask": [1] * len(part) + [0] * gap})
    return [b for b in blocks if any(x != -100 for x in b["labels"][1:])]


def whole(examples: Iterable[Example], length: int) -> list[dict[str, list[int]]]:
    """Each example as a row of its own, cut at `length`; those without a label that counts are left out."""
    rows = []
    for e in examples:
        ids = e.ids[:length]
        rows.append({"input_ids": ids, "labels": [t if c else -100 for t, c in zip(ids, e.counts, strict=False)]})
    return [r for r in rows if any(x != -100 for x in r["labels"][1:])]


def classification_examples(rows: Sequence[Row], tokenizer: Any, length: int, names: Sequence[str], source: str) -> list[dict[str, Any]]:
    """Rows with `text` and `label` as tokens and the number of the label."""
    check_columns(rows, [["text", "label"]], source)
    number = {n: i for i, n in enumerate(names)}
    unknown = sorted({str(r["label"]) for r in rows} - set(number))
    if unknown:
        raise ConfigError(f"{source}: the label {unknown[0]!r} does not occur in the training data, which have {list(names)[:12]}.")
    texts = tokenizer([str(r["text"]) for r in rows], truncation=True, max_length=length)["input_ids"]
    return [{"input_ids": t, "labels": number[str(r["label"])]} for t, r in zip(texts, rows, strict=True)]


def collate(pad: int) -> Any:
    """A function that makes tensors of examples, padded to the longest of the batch."""

    def join(batch: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        longest = max(len(b["input_ids"]) for b in batch)
        out: dict[str, Any] = {"input_ids": [], "attention_mask": [], "labels": []}
        for b in batch:
            gap = longest - len(b["input_ids"])
            out["input_ids"].append(list(b["input_ids"]) + [pad] * gap)
            out["attention_mask"].append(list(b.get("attention_mask") or [1] * len(b["input_ids"])) + [0] * gap)
            out["labels"].append(b["labels"] if isinstance(b["labels"], int) else list(b["labels"]) + [-100] * gap)
        tensors = {k: torch.tensor(v) for k, v in out.items()}
        if bool(tensors["attention_mask"].all()):
            del tensors["attention_mask"]  # full blocks need no mask
        return tensors

    return join


def end_to_end(batch: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
    """Rows one after the other as a single row without padding: positions start anew with each, and no row's first token is predicted."""
    ids = torch.tensor([[t for b in batch for t in b["input_ids"]]])
    labels = torch.tensor([[t for b in batch for t in (-100, *b["labels"][1:])]])
    return {"input_ids": ids, "labels": labels, "position_ids": torch.tensor([[i for b in batch for i in range(len(b["input_ids"]))]])}
