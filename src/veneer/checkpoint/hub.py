"""The Hugging Face Hub: nothing else loads from there what is not a local folder, and only `push_to_hub` writes to it."""

from __future__ import annotations

import json
import os
import re
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..errors import LoadError

_REPO_ID = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")


def resolve_file(
    model_id: str | os.PathLike[str],
    filename: str,
    *,
    subfolder: str | None = None,
    revision: str | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    token: str | bool | None = None,
    local_files_only: bool = False,
    force_download: bool = False,
    **hub_kwargs: Any,
) -> Path | None:
    """The path of a file of an adapter: in the local folder if there is one of that name, else from the Hub or its cache.

    HF_HUB_OFFLINE and `local_files_only` keep it to the cache.

    Args:
        hub_kwargs: further arguments of `huggingface_hub.hf_hub_download`, such as `repo_type`, `endpoint`.

    Returns:
        None if the folder or repository exists, but not the file in it.

    Raises:
        LoadError: if there is neither such a folder nor such a repository, or it cannot be reached.
        ImportError: if it would have to come from the Hub and huggingface_hub is not installed.
    """
    given = os.fspath(model_id)
    if given and os.path.exists(given):
        path = Path(given, subfolder or "", filename)
        return path if path.is_file() else None
    if not _REPO_ID.fullmatch(given):
        raise LoadError(
            f"There is no folder {given!r}, and it is no name on the Hub (`owner/name`). Check the path; it is relative to {os.getcwd()!r}."
        )
    try:
        from huggingface_hub import hf_hub_download
        from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
    except ImportError as e:
        raise ImportError(f"There is no folder {given!r}. To look for it on the Hub, run `pip install huggingface_hub`.") from e
    try:
        found = hf_hub_download(
            given,
            filename,
            subfolder=subfolder,
            revision=revision,
            cache_dir=os.fspath(cache_dir) if cache_dir is not None else None,
            token=token,
            local_files_only=local_files_only,
            force_download=force_download,
            **hub_kwargs,
        )
    except LocalEntryNotFoundError as e:  # offline: the cache does not tell whether the repository has it
        if _cached_anything(given, cache_dir):
            return None
        raise LoadError(f"There is no folder {given!r}, and it is not in the cache of the Hub, which cannot be reached now: {e}") from e
    except EntryNotFoundError:
        return None
    except TypeError:
        raise  # an argument that hf_hub_download does not take
    except Exception as e:  # whatever the Hub or the network answers
        raise LoadError(f"There is no folder {given!r}, and the Hub gave no {filename!r}: {type(e).__name__}: {e}") from e
    return Path(str(found))


def upload(
    save: Callable[..., Any],
    repo_id: str,
    message: str,
    token: bool | str | None = None,
    *,
    commit_message: str | None = None,
    commit_description: str | None = None,
    private: bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    **for_saving: Any,
) -> str:
    """Let `save` write into a temporary folder, and upload that; returns the commit's address.

    Args:
        save: called with the folder and `for_saving`, before anything is made on the Hub.
        message: where there is no `commit_message`.
    """
    from huggingface_hub import HfApi

    api = HfApi(token=token)
    with tempfile.TemporaryDirectory() as folder:
        save(folder, **for_saving)
        repo = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        if revision is not None and not create_pr:
            api.create_branch(repo, branch=revision, exist_ok=True)
        return str(
            api.upload_folder(
                repo_id=repo, folder_path=folder, revision=revision, create_pr=create_pr,
                commit_message=commit_message or message, commit_description=commit_description,
            )
        )  # fmt: skip


def _cached_anything(repo_id: str, cache_dir: str | os.PathLike[str] | None) -> bool:
    from huggingface_hub.constants import HF_HUB_CACHE

    return Path(cache_dir or HF_HUB_CACHE, f"models--{repo_id.replace('/', '--')}", "snapshots").is_dir()


def local_config(model_id: str | os.PathLike[str], revision: str | None = None) -> dict[str, Any] | None:
    """The config.json of a base model, from its folder or from the Hub's cache. Never asks the network; None if it is not here."""
    path = Path(os.fspath(model_id), "config.json")
    if not path.is_file():
        if not _REPO_ID.fullmatch(os.fspath(model_id)):
            return None
        try:
            from huggingface_hub import try_to_load_from_cache

            found = try_to_load_from_cache(os.fspath(model_id), "config.json", revision=revision)
        except (ImportError, ValueError):  # the latter: no name that a repository may have, as of a folder that is gone
            return None
        if not isinstance(found, str):  # not cached, or known not to exist
            return None
        path = Path(found)
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):  # an unreadable file is as good as none here: it only decides whether embeddings are saved
        return None
    return values if isinstance(values, dict) else None
