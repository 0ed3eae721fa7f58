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
_ENDINGS = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet", ".txt", ".md")
_UTF8 = "utf-8-sig"  # a mark at the beginning is no text


def read_rows(source: str) -> list[Row]:
    """The rows of a file, of all files in a folder, or of a data set on the Hub (`datasets` reads it).

    jsonl (ndjson), json, csv, tsv and parquet, in any case, give their columns; any other file is one row with the column `text`.

    Raises:
        ConfigError: if there is nothing there, it cannot be read, or it is empty.
    """
    path = Path(source)
    if path.is_dir():
        files = sorted(p for p in path.rglob("*") if p.suffix.lower() in _ENDINGS)
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
        raise ConfigError(f"{source!r} is empty: there is nothing in it to read.")
    for i, row in enumerate(rows, 1):
        if not isinstance(row, Mapping):
            raise ConfigError(f'{source!r}: row {i} has to be a table of columns, such as {{"text": "..."}}, and is {str(row)[:40]!r}.')
    return rows


def _read(path: Path) -> list[Row]:
    ending = path.suffix.lower()
    if ending in (".jsonl", ".ndjson"):
        rows = []
        for i, line in enumerate(
            path.read_text(encoding=_UTF8).split("\n"), 1
        ):  # splitlines cuts at U+2028 and its like, which stand in texts
            if line.strip():
                try:
                    rows.append(json.loads(line))
                except json.JSONDecodeError as e:
                    raise ValueError(f"line {i}: {e}") from e
        return rows
    if ending == ".json":
        found = json.loads(path.read_text(encoding=_UTF8))
        return list(found) if isinstance(found, list) else [found]
    if ending in (".csv", ".tsv", ".parquet") and path.stat().st_size == 0:
        return []
    if ending == ".parquet":
        from pyarrow import parquet

        table: list[Row] = parquet.read_table(path).to_pylist()  # pandas makes arrays of lists, and 1.0 of 1 beside a missing one
        return table
    if ending in (".csv", ".tsv"):
        import pandas

        as_written: dict[str, Any] = {"dtype": str, "keep_default_na": False, "na_values": [""]}  # "007" and "None" are texts, too
        frame = pandas.read_csv(path, sep="," if ending == ".csv" else "\t", **as_written)
        out: list[Row] = frame.to_dict("records")
        return out
    text = path.read_text(encoding=_UTF8)
    return [{"text": text}] if text.strip() else []


def _from_hub(name: str) -> list[Row]:
    if "/" not in name or name.startswith((".", "/", "~")) or Path(name).suffix.lower() in _ENDINGS:
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
    chat = bool(getattr(tokenizer, "chat_template", None))
    if columns == ["messages"] and not chat:
        raise ConfigError(
            "The data are chat messages, and the model's tokenizer has no chat template. Give `prompt` and `completion`, or `text`."
        )
    end = [tokenizer.eos_token_id] if tokenizer.eos_token_id is not None else []
    out = []
    for i, row in enumerate(rows, 1):
        where = f"{source}: row {i}"
        if columns == ["messages"]:
            out += _chat(row["messages"], tokenizer, where)
            continue
        for name in columns:
            if not isinstance(row[name], str):
                raise ConfigError(f"{where} has no text in the column {name!r}, but {str(row[name])[:40]}. Write it in quotes.")
            _check_whole(row[name], where)
        if columns == ["text"]:
            ids = tokenizer(row["text"], add_special_tokens=True)["input_ids"] + end
            out.append(Example(ids, [True] * len(ids)))
        elif chat:
            turns = [{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": row["completion"]}]
            out += _chat(turns, tokenizer, where)
        else:
            asked = tokenizer(row["prompt"], add_special_tokens=True)["input_ids"]
            said = tokenizer(row["completion"], add_special_tokens=False)["input_ids"] + end
            out.append(Example(asked + said, [False] * len(asked) + [True] * len(said)))
    return out


def _check_whole(text: str, where: str) -> None:
    """Raise ConfigError for half a character, which JSON can write and no tokenizer takes."""
    try:
        text.encode()
    except UnicodeEncodeError as e:
        raise ConfigError(
            f"{where}: {text[e.start]!r} in {text[max(e.start - 20, 0) : e.start]!r}… is half a character. Take it out."
        ) from None


def _chat(messages: Any, tokenizer: Any, where: str) -> list[Example]:
    """One example; more where the template writes an earlier turn otherwise once others follow: then each turn stands as the model is to say it.

    Only beginnings that end before or after a turn of the assistant are asked of the template: it may refuse others.
    """
    if not isinstance(messages, (list, tuple)) or not all(isinstance(turn, Mapping) and "role" in turn for turn in messages):
        raise ConfigError(f"{where}: messages are a list of turns with `role` and `content`, not {str(messages)[:60]!r}.")
    out: list[Example] = []
    for i, turn in enumerate(messages):
        if turn["role"] != "assistant":
            continue
        try:
            given = _tokens(tokenizer.apply_chat_template(messages[:i], tokenize=True, add_generation_prompt=True))
            upto = _tokens(tokenizer.apply_chat_template(messages[: i + 1], tokenize=True))
        except Exception as e:  # a template is a program of its own
            raise ConfigError(f"{where}: the model's chat template does not take the messages: {type(e).__name__}: {e}") from e
        start = next((n for n, (a, b) in enumerate(zip(given, upto, strict=False)) if a != b), min(len(given), len(upto)))
        if not out or upto[: len(out[-1].ids)] != out[-1].ids:
            out.append(Example([], []))
        counts = out[-1].counts  # the opening of the turn is given, not said
        start = max(start, len(counts))
        out[-1] = Example(upto, counts + [False] * (start - len(counts)) + [True] * (len(upto) - start))
    return out


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
    for i, r in enumerate(rows, 1):
        _check_whole(str(r["text"]), f"{source}: row {i}")
    texts = tokenizer([str(r["text"]) for r in rows], truncation=True, max_length=length)["input_ids"]
    empty = next((i for i, ids in enumerate(texts, 1) if not ids), None)
    if empty is not None:
        raise ConfigError(f"{source}: row {empty} has no tokens in the column 'text': {str(rows[empty - 1]['text'])[:40]!r}. Leave it out.")
    return [{"input_ids": t, "labels": number[str(r["label"])]} for t, r in zip(texts, rows, strict=True)]


def collate(pad: int) -> Any:
    """A function that makes tensors of examples, padded to the longest of the batch.

    A row's first token is predicted by nothing, so its label does not count: of some models the Trainer counts labels before they are shifted.
    """

    def join(batch: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        longest = max(len(b["input_ids"]) for b in batch)
        out: dict[str, Any] = {"input_ids": [], "attention_mask": [], "labels": []}
        for b in batch:
            gap = longest - len(b["input_ids"])
            out["input_ids"].append(list(b["input_ids"]) + [pad] * gap)
            out["attention_mask"].append(list(b.get("attention_mask") or [1] * len(b["input_ids"])) + [0] * gap)
            out["labels"].append(b["labels"] if isinstance(b["labels"], int) else [-100, *b["labels"][1:]] + [-100] * gap)
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
