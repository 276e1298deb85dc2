"""Models of Hugging Face repositories: downloaded once, then opened from the cache without asking anybody."""

from __future__ import annotations

import fnmatch
import importlib
import inspect
import os
import re
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import huggingface_hub as hub
from huggingface_hub import constants

from ..errors import ModelError, St3Error, one_line
from . import choose

_WILD = "*?["
# owner/repo or owner/repo:QUANT, also as the address of its page
_REPOSITORY = re.compile(
    r"(?:(?:https?://)?(?:www\.)?(?:huggingface\.co|hf\.co)/)?(?P<repository>[\w.-]+/[\w.-]+)"
    r"(?:/tree/main)?/?(?::(?P<quant>[\w.-]+))?"
)
_TIMEOUT = 10.0  # seconds
_SPARE = 2**26  # bytes that a disk should have left after a download

Progress = Callable[[int, "int | None"], None]  # bytes that are there, of how many (None: unknown)


class Pair(NamedTuple):
    """A model and its mmproj in the cache, and what of the repository they are ("owner/repo:Q4_K_M")."""

    model: str
    mmproj: str
    name: str


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
        paths = [_get(repo_id, part, where, local_files_only) for part in choose.parts(name)]
    except St3Error:
        raise
    except Exception as e:  # its own errors, and those of the network libraries below it
        raise ModelError(f"{name!r} of {repo_id!r} cannot be downloaded, and is not in the cache: {_why(e)}") from e
    return paths[0]


def pair(
    name: str,
    *,
    revision: str | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    local_files_only: bool = False,
    progress: Progress | None = None,
) -> Pair:
    """Text model and mmproj of a repository that is named as "owner/repo" or "owner/repo:QUANT", as llama.cpp names it:
    QUANT is a part of the text model's file name, in any case.

    Without one it is what the cache holds, else Q4_K_M or what comes near; of several mmproj files, the one whose name
    is like the model's, in F16. What the cache holds is not asked for again; what is missing is downloaded, and of
    a download that breaks off the files stay that are complete. Raises ModelError where there is nothing to choose
    from, or it cannot be downloaded.
    """
    found = _REPOSITORY.fullmatch(name)
    if not found:
        raise ModelError(f"a repository is named as OWNER/REPO or OWNER/REPO:QUANT, not {name!r}")
    repo_id, quant = found["repository"], found["quant"] or ""
    where: dict[str, Any] = {"revision": revision, "cache_dir": None if cache_dir is None else os.fspath(cache_dir)}
    cached = _cached(repo_id, where)
    chosen = _choose(cached, quant)
    if chosen is None and local_files_only:
        raise ModelError(f"{name!r} is not in the cache")
    if chosen is None:
        try:
            sizes = _listed(repo_id, where)
        except Exception as e:
            raise ModelError(f"{repo_id!r} cannot be read, and is not in the cache: {_why(e)}") from e
        chosen = _choose(sizes, quant)
        if chosen is None:
            raise ModelError(_lacks(repo_id, list(sizes), quant))
        files = [part for one in chosen for part in choose.parts(one)]
        missing = {part: dict(sizes).get(part) for part in files if part not in cached}
        _check_room(repo_id, missing, where)
        bar = _bar(missing, progress)
    else:
        bar = None
        files = [part for one in chosen for part in choose.parts(one)]
    try:
        paths = {part: _get(repo_id, part, where, local_files_only, bar) for part in files}
    except Exception as e:
        raise ModelError(f"{repo_id!r} cannot be downloaded: {_why(e)}; files that are complete are kept") from e
    return Pair(paths[chosen[0]], paths[chosen[1]], f"{repo_id}:{choose.quant_of(chosen[0]) or chosen[0]}")


def _choose(names: Iterable[str], quant: str) -> tuple[str, str] | None:
    """A model of which all parts are there, and its mmproj."""
    names = set(names)
    models, vision = choose.halves(names)
    model = choose.model([m for m in models if names.issuperset(choose.parts(m))], quant)
    return (model, choose.half(model, vision)[0]) if model and vision else None


def _lacks(repo_id: str, names: list[str], quant: str) -> str:
    models, vision = choose.halves(names)
    if models and vision:
        there = ", ".join(dict.fromkeys(choose.quant_of(m) or m for m in models))
        return f"{repo_id} has no {quant}: there are {there}"
    kind = "a text model but no mmproj" if models else "an mmproj but no text model" if vision else "no model in GGUF"
    return f"{repo_id} does not hold both halves of a model in GGUF, but {kind}: {', '.join(names[:12]) or 'nothing'}"


def _why(e: Exception) -> str:
    """One line that a person can act on."""
    name = type(e).__name__
    if name == "GatedRepoError":
        return "its owner asks you to accept terms on its page first; then log in (hf auth login, or HF_TOKEN)"
    if name == "RepositoryNotFoundError":
        return "there is no such repository, or it is private (hf auth login, or HF_TOKEN, logs you in)"
    return one_line(str(e).partition("\n")[0] or name)


def _check_room(repo_id: str, missing: dict[str, int | None], where: dict[str, Any]) -> None:
    folder = Path(where["cache_dir"] or constants.HF_HUB_CACHE)
    try:
        while not folder.exists() and folder != folder.parent:
            folder = folder.parent
        need, free = sum(size or 0 for size in missing.values()), shutil.disk_usage(folder).free
    except OSError as e:
        raise ModelError(f"the cache folder {str(folder)!r} cannot be read: {one_line(e.strerror or e)}") from e
    if need + _SPARE > free:
        raise ModelError(f"{repo_id} needs {need / 1e9:.1f} GB, and the disk of {folder} has {free / 1e9:.1f} GB left")


def _bar(missing: dict[str, int | None], progress: Progress | None) -> Any:
    """A class that huggingface_hub takes for its progress bars, which calls `progress` with all downloads together."""
    if progress is None or "tqdm_class" not in inspect.signature(hub.hf_hub_download).parameters:
        return None
    show, utils = progress, importlib.import_module("huggingface_hub.utils")
    total = None if None in missing.values() else sum(size or 0 for size in missing.values())
    done = 0

    class Bar(utils.tqdm):  # type: ignore[misc, name-defined]
        def __init__(self, *args: Any, **options: Any) -> None:
            super().__init__(*args, **{**options, "disable": True})
            self.update(options.get("initial") or 0)

        def update(self, n: float | None = 1) -> bool | None:
            nonlocal done
            done += int(n or 0)
            show(done, total)
            return None

    return Bar


def _get(repo_id: str, name: str, where: dict[str, Any], local_files_only: bool, bar: Any = None) -> str:
    # Without this a file that is there is asked for all the same, and without a network that takes its time.
    cached = hub.try_to_load_from_cache(repo_id, name, **where)
    if isinstance(cached, str):
        return cached
    options = {"tqdm_class": bar} if bar else {}
    return str(hub.hf_hub_download(repo_id, name, local_files_only=local_files_only, **options, **where))


def _match(repo_id: str, pattern: str, where: dict[str, Any], local_files_only: bool) -> str:
    """The one file that a pattern is meant for: of the cache, and where none fits there, of the repository."""
    names = _cached(repo_id, where)
    found = _fitting(pattern, names)
    if len(found) != 1 and not local_files_only:
        try:
            names = list(_listed(repo_id, where))
        except Exception as e:
            if not found:
                raise ModelError(
                    f"{repo_id!r} cannot be asked for {pattern!r}, and none is in the cache: {_why(e)}"
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
            return sorted({choose.parts(name)[0] for name in found})
    return []


def _listed(repo_id: str, where: dict[str, Any]) -> dict[str, int | None]:
    """The files of a repository, and their bytes. One request: `list_repo_files` tries again for most of a minute."""
    api: Any = hub.HfApi()
    info = api.model_info(repo_id, revision=where["revision"], timeout=_TIMEOUT, files_metadata=True)
    return {file.rfilename: getattr(file, "size", None) for file in info.siblings or ()}


def _cached(repo_id: str, where: dict[str, Any]) -> list[str]:
    """The files of a repository that the cache holds."""
    try:
        folder = Path(hub.snapshot_download(repo_id, local_files_only=True, **where))
    except Exception:  # not there, or no name of a repository: the download says which
        return []
    return [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]


def snapshots() -> list[tuple[str, Path]]:
    """The repositories in the cache that hold GGUF files, each with the folder of its newest state."""
    try:
        found = hub.scan_cache_dir()
    except hub.CacheNotFound:
        return []
    except (OSError, ValueError) as e:
        raise ModelError(f"the cache of Hugging Face cannot be read: {one_line(e)}") from e
    newest = []
    for repo in found.repos:
        revisions = sorted(repo.revisions, key=lambda revision: ("main" in revision.refs, revision.last_modified))
        if repo.repo_type == "model" and revisions and any(f.file_name.endswith(".gguf") for f in revisions[-1].files):
            newest.append((repo.repo_id, revisions[-1].snapshot_path))
    return newest
