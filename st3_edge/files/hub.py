"""Files of Hugging Face repositories, for `Llava.from_pretrained`."""

from __future__ import annotations

import fnmatch
import os
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import huggingface_hub as hub

from ..errors import ModelError, St3Error, one_line

# As llama-gguf-split names the parts of a model; the loader finds the others beside the first.
_PART = re.compile(r"(?P<stem>.*)-(?P<part>\d{5})-of-(?P<count>\d{5})\.gguf")
_MAX_PARTS = 1000
_WILD = "*?["
_QUANT = "Q4_K_M"
_TIMEOUT = 10.0  # seconds


def file(
    repo_id: str,
    name: str,
    *,
    revision: str | None,
    cache_dir: str | os.PathLike[str] | None,
    local_files_only: bool,
) -> str:
    """The path of a file in the cache, downloaded where it is not there; `name` may hold wildcards, and be one of a
    model's several parts, of which all are downloaded: the path is the first one's then.

    What the cache holds is not asked for again. A pattern that fits no file of that name fits those that hold it, in
    any case, as Q4_K_M for a file. Raises ModelError where there is none, or several fit.
    """
    where: dict[str, Any] = {"revision": revision, "cache_dir": None if cache_dir is None else os.fspath(cache_dir)}
    try:
        if any(c in name for c in _WILD):
            name = _match(repo_id, name, where, local_files_only)
        parts = [_get(repo_id, part, where, local_files_only) for part in _parts(name)]
    except St3Error:
        raise
    except Exception as e:  # its own errors, and those of the network libraries below it
        raise ModelError(f"{name!r} of {repo_id!r} cannot be downloaded, and is not in the cache: {one_line(e)}") from e
    return parts[0]


def pair(name: str) -> tuple[str, str]:
    """Text model and mmproj of a repository that is named as "owner/repo" or "owner/repo:QUANT", as llama.cpp names it:
    QUANT is a part of the text model's file name, in any case.

    Without one it is Q4_K_M, and where there is none the first of the files, by name; of several mmproj files, one in
    F16. What the cache holds of these is not asked for again. Raises ModelError where there is nothing to choose from,
    and as `file` does.
    """
    repo_id, _, quant = name.partition(":")
    where: dict[str, Any] = {"revision": None, "cache_dir": None}
    names = _cached(repo_id, where)
    models, halves = _halves(names)
    if not halves or not any((quant or _QUANT).lower() in model.lower() for model in models):
        try:
            names = _listed(repo_id, where)
        except Exception as e:
            if not halves or not models:
                raise ModelError(f"{repo_id!r} cannot be read, and is not in the cache: {one_line(e)}") from e
        models, halves = _halves(names)
    if quant and not any(quant.lower() in model.lower() for model in models):
        raise ModelError(f"{repo_id} has no {quant}: {', '.join(models) or 'no text model in GGUF at all'}")
    if not halves or not models:
        raise ModelError(f"{repo_id} does not hold both halves of a LLaVA in GGUF: {', '.join(names) or 'nothing'}")
    model = next((n for n in models if (quant or _QUANT).lower() in n.lower()), models[0])
    mmproj = next((n for n in halves if "f16" in n.lower() and "bf16" not in n.lower()), halves[0])
    paths = [file(repo_id, n, **where, local_files_only=False) for n in (model, mmproj)]
    return paths[0], paths[1]


def _halves(names: Iterable[str]) -> tuple[list[str], list[str]]:
    """The text models and the vision halves among files, by name; of a model in parts, the first one."""
    files = sorted({_parts(name)[0] for name in names if name.lower().endswith(".gguf")})
    halves = [name for name in files if "mmproj" in name.lower()]
    return [name for name in files if name not in halves], halves


def _get(repo_id: str, name: str, where: dict[str, Any], local_files_only: bool) -> str:
    # Without this a file that is there is asked for all the same, and without a network that takes its time.
    held = hub.try_to_load_from_cache(repo_id, name, **where)
    if isinstance(held, str):
        return held
    return str(hub.hf_hub_download(repo_id, name, local_files_only=local_files_only, **where))


def _parts(name: str) -> list[str]:
    """All files of the model that a file is of, in order."""
    found = _PART.fullmatch(name)
    if not found:
        return [name]
    count = int(found["count"])
    if not 0 < count <= _MAX_PARTS:
        raise ModelError(f"{name!r} is one of {count} parts: no model has so many")
    return [f"{found['stem']}-{i:05}-of-{found['count']}.gguf" for i in range(1, count + 1)]


def _match(repo_id: str, pattern: str, where: dict[str, Any], local_files_only: bool) -> str:
    """The one file that a pattern is meant for: of the cache, and where none fits there, of the repository."""
    names = _cached(repo_id, where)
    found = _fitting(pattern, names)
    if len(found) != 1 and not local_files_only:
        try:
            names = _listed(repo_id, where)
        except Exception as e:
            if not found:
                raise ModelError(
                    f"{repo_id!r} cannot be asked for {pattern!r}, and none is in the cache: {one_line(e)}"
                ) from e
        else:
            found = _fitting(pattern, names)
    if len(found) == 1:
        return found[0]
    if not names:
        raise ModelError(f"{pattern!r} of {repo_id!r} cannot be downloaded, and is not in the cache")
    shown = found or [name for name in names if name.lower().endswith(".gguf")] or names
    more = f" and {len(shown) - 12} more" if len(shown) > 12 else ""
    there = f"{', '.join(sorted(shown)[:12])}{more}"
    raise ModelError(f"{len(found)} files of {repo_id} fit {pattern!r}, not one; there are: {there}")


def _fitting(pattern: str, names: Iterable[str]) -> list[str]:
    """The names that a pattern fits, as far as that goes: by the letter; in any case; as a part of the name, in any
    folder. Of a model in parts, the first one."""
    names = list(names)
    low = pattern.lower()
    ways: tuple[Callable[[str], bool], ...] = (
        lambda name: fnmatch.fnmatchcase(name, pattern),
        lambda name: fnmatch.fnmatchcase(name.lower(), low),
        lambda name: fnmatch.fnmatchcase(name.rpartition("/")[2].lower(), f"*{low}"),
    )
    for fits in ways:
        if found := [name for name in names if fits(name)]:
            return sorted({_parts(name)[0] for name in found})
    return []


def _listed(repo_id: str, where: dict[str, Any]) -> list[str]:
    """The files of a repository. One request: `list_repo_files` tries again for most of a minute."""
    api: Any = hub.HfApi()
    info = api.model_info(repo_id, revision=where["revision"], timeout=_TIMEOUT)
    return [file.rfilename for file in info.siblings or ()]


def _cached(repo_id: str, where: dict[str, Any]) -> list[str]:
    """The files of a repository that the cache holds."""
    try:
        folder = Path(hub.snapshot_download(repo_id, local_files_only=True, **where))
    except Exception:  # not there, or no name of a repository: the download says which
        return []
    return [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]
