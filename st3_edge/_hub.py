"""Files of Hugging Face repositories, for `Llava.from_pretrained`."""

from __future__ import annotations

import fnmatch
import os
from pathlib import Path
from typing import Any

import huggingface_hub as hub

from .errors import ModelError, St3Error, one_line


def file(
    repo_id: str,
    name: str,
    *,
    revision: str | None,
    cache_dir: str | os.PathLike[str] | None,
    local_files_only: bool,
) -> str:
    """The path of a file in the cache, downloaded where it is not there; `name` may hold wildcards.

    Raises ModelError where there is none, or several fit.
    """
    where: dict[str, Any] = {"revision": revision, "cache_dir": None if cache_dir is None else os.fspath(cache_dir)}
    try:
        if any(c in name for c in "*?["):
            found = fnmatch.filter(_names(repo_id, name, where, local_files_only), name)
            if len(found) != 1:
                raise ModelError(f"{len(found)} files of {repo_id} fit {name!r}, not one")
            name = found[0]
        return str(hub.hf_hub_download(repo_id, name, local_files_only=local_files_only, **where))
    except St3Error:
        raise
    except Exception as e:  # its own errors, and those of the network libraries below it
        raise ModelError(f"{name!r} of {repo_id!r} cannot be downloaded, and is not in the cache: {one_line(e)}") from e


def _names(repo_id: str, pattern: str, where: dict[str, Any], local_files_only: bool) -> list[str]:
    """The repository's files; where it cannot be asked, those in the cache that fit the pattern."""
    try:
        if not local_files_only:
            return list(hub.HfApi().list_repo_files(repo_id, revision=where["revision"]))
    except Exception as e:
        try:
            return _cached(repo_id, pattern, where)
        except Exception:
            raise e from None  # why it could not be asked says more than that the cache is empty
    return _cached(repo_id, pattern, where)


def _cached(repo_id: str, pattern: str, where: dict[str, Any]) -> list[str]:
    folder = Path(hub.snapshot_download(repo_id, allow_patterns=pattern, local_files_only=True, **where))
    return [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]
