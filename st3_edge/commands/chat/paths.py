"""Pictures in what a person types: names of files that were dropped or pasted, among the words of a question."""

from __future__ import annotations

import os
import re
from pathlib import Path

from ...errors import ImageError
from ...prompts.image_files import SUFFIXES

_NAME = re.compile(rf".+({'|'.join(map(re.escape, SUFFIXES))})", re.IGNORECASE | re.DOTALL)

# A word, as terminals write the name of a file that is dropped on them: in quotes, or with backslashes before spaces.
_WORD = re.compile(r"""'([^']*)'|"((?:[^"\\]|\\.)*)"|((?:\\.|[^\s\\])+)""")
_ESCAPE = re.compile(r"\\(.)")


def split(line: str) -> tuple[list[str], str]:
    """The pictures of a line, in order, and its other words.

    A picture is a URL, or a path with the suffix of a picture, that is there or can be nothing else than a path: it has
    a slash in it, or the line holds nothing but names of pictures. Raises ImageError for a path that is not there.
    """
    whole = _path(line.strip())
    if whole and _is_file(whole):  # a name with spaces that nobody quoted
        return [whole], ""
    found, rest, last = [], [], 0
    words = list(_WORD.finditer(line))
    alone = all(_NAME.fullmatch(_bare(word)) for word in words)
    for word in words:
        path = _picture(word, alone)
        if path:
            found.append(path)
            rest.append(line[last : word.start()])
            last = word.end()
    if not found:
        return [], line.strip()
    return found, " ".join(" ".join([*rest, line[last:]]).split())


def unquoted(text: str) -> list[str]:
    """The names of files that are written behind a command, as a shell or a terminal writes them."""
    whole = _path(text.strip())
    if whole and _is_file(whole):
        return [whole]
    return [_path(_bare(word)) for word in _WORD.finditer(text)]


def _bare(word: re.Match[str]) -> str:
    single, double, plain = word.groups()
    if single is not None:
        return single
    text = double if double is not None else plain
    # Backslashes of a Windows path stay.
    return text if re.match(r"[A-Za-z]:\\", text) else _ESCAPE.sub(r"\1", text)


def _picture(word: re.Match[str], alone: bool) -> str | None:
    bare = _bare(word)
    path = _path(bare)
    if bare[:11].lower() == "data:image/" or bare[:7].lower() == "file://":
        return path
    if not _NAME.fullmatch(path):
        return None
    if _is_file(path) or re.match(r"(?:https?|ftp)://", bare, re.IGNORECASE):
        return path
    if alone or re.search(r"/|^[A-Za-z]:\\", bare):
        raise ImageError(f"there is no picture {path!r}")
    return None  # as in "what is photo.jpg?"


def _path(text: str) -> str:
    """The name with the person's home in place of ~; raises nothing where there is no such person."""
    return os.path.expanduser(text)  # noqa: PTH111


def _is_file(path: str) -> bool:
    try:
        return bool(_NAME.fullmatch(path)) and Path(path).is_file()
    except (OSError, ValueError):
        return False
