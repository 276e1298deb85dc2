"""Which pictures and questions a schedule is measured on."""

from __future__ import annotations

import random
from collections.abc import Collection, Sequence
from pathlib import Path

from ...errors import ImageError, PromptError, one_line
from ...prompts.image_files import SUFFIXES

# Both what a picture shows as a whole and what hangs on a few of its tokens.
QUESTIONS = (
    "Describe the image.",
    "What is in the foreground, and what is behind it?",
    "How many objects are there, and what colors do they have?",
    "Is there any text in the image? What does it say?",
)
_MAX_BYTES = 2**20

# A question, and the name of the picture that it is about; None: of every picture.
Question = tuple[str | None, str]


def pictures_in(folder: str) -> list[Path]:
    """The picture files of a folder, by their names' endings, in the order of their names; not of folders in it.

    Raises ImageError where there is no folder, or none in it.
    """
    try:
        found = sorted(p for p in Path(folder).iterdir() if p.suffix.lower() in SUFFIXES and p.is_file())
    except (OSError, ValueError) as e:
        reason = one_line(getattr(e, "strerror", None) or e)
        raise ImageError(f"folder {folder!r} cannot be read: {reason}") from e
    if not found:
        raise ImageError(f"folder {folder!r} holds no picture ({' '.join(SUFFIXES)})")
    return found


def read_questions(path: str, names: Collection[str]) -> list[Question]:
    """The questions of a UTF-8 text file, as `parse_questions` reads them. Raises PromptError."""
    try:
        with Path(path).open("rb") as file:
            data = file.read(_MAX_BYTES + 1)
        if len(data) > _MAX_BYTES:
            raise PromptError(f"questions {path!r} are longer than {_MAX_BYTES >> 20} MiB")
        return parse_questions(data.decode("utf-8-sig"), names)
    except UnicodeDecodeError as e:
        raise PromptError(f"questions {path!r} are not UTF-8 text") from e
    except (OSError, ValueError) as e:
        reason = one_line(getattr(e, "strerror", None) or e)
        raise PromptError(f"questions {path!r} cannot be read: {reason}") from e


def parse_questions(text: str, names: Collection[str]) -> list[Question]:
    """One question a line, of every picture, or of the one whose name and a tab stand before it; blank lines are
    nothing. Raises PromptError for a picture that is not among `names`, or where there is no question."""
    questions: list[Question] = []
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        name, tab, question = line.partition("\t")
        if not tab:
            questions.append((None, line.strip()))
            continue
        name, question = name.strip(), question.strip()
        if name not in names:
            raise PromptError(f"questions, line {number}: there is no picture {name!r} in the folder")
        if not question:
            raise PromptError(f"questions, line {number}: nothing is asked about {name!r}")
        questions.append((name, question))
    if not questions:
        raise PromptError("there is no question")
    return questions


def choose(pictures: Sequence[Path], questions: Sequence[Question], n: int) -> list[tuple[Path, str]]:
    """At most n pairs of a picture and a question, picture by picture.

    Every picture is asked one question before any is asked a second, and the general ones take turns. Of more than n
    pictures, n are drawn, always the same ones.
    """
    asked = {}
    for i, picture in enumerate(pictures):
        general = [q for name, q in questions if name is None]
        turned = general[i % len(general) :] + general[: i % len(general)] if general else []
        own = [q for name, q in questions if name == picture.name]
        if own or turned:
            asked[picture] = list(dict.fromkeys([*own, *turned]))
    drawn = sorted(random.Random(0).sample(list(asked), min(n, len(asked))))
    rounds = range(max(map(len, asked.values())))
    pairs = [(picture, k) for k in rounds for picture in drawn if k < len(asked[picture])][:n]
    return [(picture, asked[picture][k]) for picture, k in sorted(pairs)]
