"""Pictures in what a person types: names of files that were dropped or pasted, among the words of a question."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path

from ...errors import ImageError
from ...prompts.image_files import SUFFIXES

_NAME = re.compile(rf".+({'|'.join(map(re.escape, SUFFIXES))})", re.IGNORECASE | re.DOTALL)

# As a shell reads a word, and terminals write the name of a file that is dropped on them: pieces in quotes, and with
# backslashes before spaces.
_QUOTED = r"""'[^']*'|"(?:[^"\\]|\\.)*\""""
_SHELL = re.compile(rf"""(?:{_QUOTED}|\\.|[^\s\\'"])+""", re.DOTALL)
_PIECE = re.compile(r"""'([^']*)'|"((?:[^"\\]|\\.)*)"|((?:\\.|[^\\'"])+)""", re.DOTALL)
# As a person writes it: an apostrophe opens no quotation.
_WORD = re.compile(rf"""(?:{_QUOTED})(?:{_QUOTED}|\\.|[^\s\\'"])*|(?:\\.|[^\s\\])+""", re.DOTALL)
_ESCAPE = re.compile(r"\\(.)", re.DOTALL)
_WINDOWS = re.compile(r"""["']?([A-Za-z]:\\.*?)["']?""", re.DOTALL)

_BEFORE, _MARKS, _BEHIND = "([“‘", "?!.,:;", "?!.,:;)]}”’\"'"


def split(text: str) -> tuple[list[str], str]:
    """The pictures of what was typed, in order, and its other words, line by line.

    A picture is a URL, or a path with the suffix of a picture, that is there or can be nothing else than a path: it has
    a slash in it, or nothing but names of pictures was typed. Raises ImageError for a path that is not there.
    """
    whole = _path(text.strip())
    if whole and _is_file(whole):  # a name with spaces that nobody quoted
        return [whole], ""
    alone = all(_NAME.fullmatch(_bare(word[0])) for word in _WORD.finditer(text))
    found, kept = list[str](), list[str]()
    for line in text.split("\n"):
        of_line, rest = _split_line(line, alone)
        found += of_line
        if rest or not of_line:
            kept.append(rest)
    return found, "\n".join(kept).strip()


def _split_line(line: str, alone: bool) -> tuple[list[str], str]:
    found, rest, last = [], "", 0
    for word in _WORD.finditer(line):
        if word.start() < last:  # a part of the picture before
            continue
        end, path, marks = _picture(line, word, alone)
        if path:
            found.append(path)
            before = line[last : word.start()]
            rest += before.rstrip() + marks if before.strip() else before
            last = end
    if not found:
        return [], line
    return found, " ".join((rest + line[last:]).split())


def unquoted(text: str) -> list[str]:
    """The names of files that are written behind a command, as a shell or a terminal writes them."""
    whole = _path(text.strip())
    if whole and _is_file(whole):
        return [whole]
    names, last = [], 0
    for word in _WORD.finditer(text):
        if word.start() >= last:
            readings = list(_readings(text, word))
            last, name = next((of for of in readings if _is_file(_path(of[1]))), readings[-1])
            names.append(_path(name))
    return names


def one(text: str) -> str:
    """The name of the one file that is written behind a command: quoted or with backslashes, or as it is."""
    quoted = _WORD.fullmatch(text) or _SHELL.fullmatch(text)
    return _path(_bare(text) if quoted and not os.path.exists(_path(text)) else text)  # noqa: PTH110


def _readings(line: str, word: re.Match[str]) -> Iterator[tuple[int, str]]:
    """Where a word ends, and what it says: as a shell reads it, and as a person writes it."""
    shell = _SHELL.match(line, word.start())
    if shell:
        yield shell.end(), _joined(shell[0])
    yield word.end(), _bare(word[0])


def _bare(word: str) -> str:
    if windows := _WINDOWS.fullmatch(word):  # its backslashes stay
        return windows[1]
    return _joined(word) if re.match(_QUOTED, word) else _ESCAPE.sub(r"\1", word)


def _joined(word: str) -> str:
    pieces = (found.groups() for found in _PIECE.finditer(word))
    return "".join(
        single if single is not None else _ESCAPE.sub(r"\1", double or plain or "") for single, double, plain in pieces
    )


def _picture(line: str, word: re.Match[str], alone: bool) -> tuple[int, str, str]:
    """Where the name of a picture ends that begins with a word, its path, and the marks of the sentence behind it; the
    path is "" where there is none."""
    for end, bare in _readings(line, word):
        plain = bare.rstrip(_BEHIND)
        for name in (bare, plain, plain.lstrip(_BEFORE)):
            if _is_file(_path(name)):
                return end, _path(name), "" if name is bare else _marks(bare)
    if bare[:11].lower() == "data:image/":
        return end, bare, ""
    name, marks = (bare, "") if _NAME.fullmatch(bare) else (plain.lstrip(_BEFORE), _marks(bare))
    if name[:7].lower() == "file://":
        return (end, name, marks) if _NAME.fullmatch(name) else (end, bare, "")
    if not _NAME.fullmatch(_path(name)):
        return end, "", ""
    if re.match(r"(?:https?|ftp)://", name, re.IGNORECASE):
        return end, name, marks
    if alone or re.search(r"/|^[A-Za-z]:\\", name):
        raise ImageError(f"there is no picture {_path(name)!r}")
    return end, "", ""  # as in "what is photo.jpg?"


def _marks(word: str) -> str:
    return "".join(c for c in word[len(word.rstrip(_BEHIND)) :] if c in _MARKS)


def _path(text: str) -> str:
    """The name with the person's home in place of ~; raises nothing where there is no such person."""
    return os.path.expanduser(text)  # noqa: PTH111


def _is_file(path: str) -> bool:
    try:
        return bool(_NAME.fullmatch(path)) and Path(path).is_file()
    except (OSError, ValueError):
        return False
