"""README.md beside an adapter: a model card with the front matter that the Hub reads. Plain text; the user's words are kept."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from pathlib import Path

from ..errors import SaveError
from .save import replacing

_PLAIN = re.compile(r"[A-Za-z0-9_./][A-Za-z0-9_./-]*")
_OTHER_LIBRARY = re.compile(r"^(library_name\s*:\s*)['\"]?transformers['\"]?\s*$")
_NOT_TEXT = {"true", "false", "null", "yes", "no", "on", "off", "y", "n", "~"}


def update_card(
    directory: str | os.PathLike[str],
    *,
    base_model: str | None = None,
    tags: Iterable[str] = (),
    pipeline_tag: str | None = None,
    title: str | None = None,
    description: str = "",
) -> Path:
    """Make README.md, or add to the front matter of the one that is there what it lacks. An existing text is never changed.

    A card that transformers' Trainer wrote says `library_name: transformers`, by which the Hub takes the adapter for a whole model: that becomes `peft`.

    Args:
        directory: the adapter's folder.
        base_model: name of the base model.
        tags: tags such as `lora`, `transformers`; `base_model:adapter:<base_model>` and `veneer` are added.
        pipeline_tag: the Hub's task, such as `text-generation`.
        title, description: of a new card; a Markdown text.

    Returns:
        The path of the card.

    Raises:
        SaveError: if it cannot be written.
    """
    path = Path(directory, "README.md")
    wanted: dict[str, str | list[str]] = {"library_name": "peft"}
    if base_model:
        wanted["base_model"] = base_model
    if pipeline_tag:
        wanted["pipeline_tag"] = pipeline_tag
    wanted["tags"] = list(dict.fromkeys([*([f"base_model:adapter:{base_model}"] if base_model else []), *tags, "veneer"]))
    try:
        old, line_end = _read(path) if path.exists() else (None, "\n")
        head, body = _split(old) if old is not None else ([], _new_body(base_model, title, description))
        head = [_OTHER_LIBRARY.sub(r"\1peft", line) for line in head]
        text = "---\n" + "".join(f"{line}\n" for line in _merged(head, wanted)) + "---\n" + body
        if text != old:
            path.parent.mkdir(parents=True, exist_ok=True)
            with replacing(path) as beside:
                beside.write_text(text, encoding="utf-8", newline=line_end)
    except OSError as e:
        raise SaveError(f"The model card {str(path)!r} could not be written: {e}") from e
    return path


def _read(path: Path) -> tuple[str, str]:
    """The text of a card, without a byte order mark, and what its lines end with."""
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as e:
        raise SaveError(
            f"{str(path)!r} is no UTF-8 ({e}), so nothing was added to it. Save it as UTF-8. The adapter itself is written."
        ) from e
    return text.replace("\r\n", "\n"), "\r\n" if "\r\n" in text else "\n"


def _split(text: str) -> tuple[list[str], str]:
    """The lines of the front matter, and the rest."""
    lines = text.split("\n")
    if lines[0].rstrip() == "---":
        end = next((i for i, line in enumerate(lines[1:], 1) if line.rstrip() == "---"), None)
        if end is not None:
            return lines[1:end], "\n".join(lines[end + 1 :])
    return [], text


def _merged(head: list[str], wanted: dict[str, str | list[str]]) -> list[str]:
    """The front matter with what it lacks; what the user wrote stays, in the user's form."""
    lines = list(head)
    for key, value in wanted.items():
        at = next((i for i, line in enumerate(lines) if re.match(rf"{key}\s*:", line)), None)
        if at is None:
            lines += [f"{key}: {_quoted(value)}"] if isinstance(value, str) else [f"{key}:", *(f"- {_quoted(v)}" for v in value)]
        elif isinstance(value, list):
            _add_items(lines, at, value)
    return lines


def _add_items(lines: list[str], at: int, items: list[str]) -> None:
    """Add items to the list that begins in line `at`, in either of its two YAML forms."""
    inline = lines[at].partition(":")[2].strip()
    if inline.startswith("[") and inline.endswith("]"):
        have = {p.strip().strip("'\"") for p in inline[1:-1].split(",")} - {""}
        new = [_quoted(i) for i in items if i not in have]
        inner = ", ".join([*([inline[1:-1].strip()] if have else []), *new])
        lines[at] = f"{lines[at].partition(':')[0]}: [{inner}]"
    elif not inline:
        end = next((i for i in range(at + 1, len(lines)) if not re.match(r"\s*-\s|\s*$|\s*#", lines[i])), len(lines))
        block = [line for line in lines[at + 1 : end] if line.strip().startswith("-")]
        have = {line.strip()[1:].strip().strip("'\"") for line in block}
        indent = block[0][: len(block[0]) - len(block[0].lstrip())] if block else ""
        lines[end:end] = [f"{indent}- {_quoted(i)}" for i in items if i not in have]


def _quoted(text: str) -> str:
    if _PLAIN.fullmatch(text) and text.lower() not in _NOT_TEXT and not re.fullmatch(r"[\d.]+", text):
        return text
    return "'" + text.replace("'", "''").replace("\n", " ") + "'"


def _new_body(base_model: str | None, title: str | None, description: str) -> str:
    of = f" for {base_model}" if base_model else ""
    load = """
```python
from veneer import PeftModel

model = PeftModel.from_pretrained(base_model, "path/to/this/folder")
```
"""
    return f"\n# {title or f'Adapter{of}'}\n\n{description.strip() or f'A PEFT adapter{of}, made with veneer.'}\n{load}"
