"""Files of Hugging Face repositories, for `Llava.from_pretrained` and `st3-edge serve --hf`."""

from __future__ import annotations

import fnmatch
import os
import re
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


def pair(name: str) -> tuple[str, str]:
    """Text model and mmproj of a repository that is named as "owner/repo" or "owner/repo:QUANT", as llama.cpp names it:
    QUANT is a part of the text model's file name, in any case.

    Without one it is Q4_K_M, and where there is none the first of the files, by name; of several mmproj files, one in
    F16. Raises ModelError where there is nothing to choose from, and as `file` does.
    """
    repo_id, _, quant = name.partition(":")
    where: dict[str, Any] = {"revision": None, "cache_dir": None}
    try:
        names = sorted(n for n in _names(repo_id, "*.gguf", where, False) if n.lower().endswith(".gguf"))
    except Exception as e:
        raise ModelError(f"{repo_id!r} cannot be read, and is not in the cache: {one_line(e)}") from e
    halves = [n for n in names if "mmproj" in n.lower()]
    models = [n for n in names if n not in halves]
    if quant and not any(quant.lower() in n.lower() for n in models):
        raise ModelError(f"{repo_id} has no {quant}: {', '.join(models) or 'no text model in GGUF at all'}")
    if not halves or not models:
        raise ModelError(f"{repo_id} does not hold both halves of a LLaVA in GGUF: {', '.join(names) or 'nothing'}")
    model = next((n for n in models if (quant or "Q4_K_M").lower() in n.lower()), models[0])
    mmproj = next((n for n in halves if "f16" in n.lower() and "bf16" not in n.lower()), halves[0])
    parts = [model]
    if found := re.search(r"-00001-of-(\d{5})\.gguf$", model):  # llama.cpp finds the others beside the first
        parts = [f"{model[: found.start()]}-{i:05}-of-{found[1]}.gguf" for i in range(1, int(found[1]) + 1)]
    paths = [file(repo_id, n, **where, local_files_only=False) for n in (*parts, mmproj)]
    return paths[0], paths[-1]


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
