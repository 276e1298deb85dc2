"""Questions about scenes, captions, and how answers to them are judged.

Answers are bare: lowercase words (`red`, `top left`, `yes`), digits for counts (`3`), and the
glyph as drawn (`A`, `7`).
"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass

import numpy as np
from scenes import SPLITS, STYLES, scene
from things import COLORS, PLACES, SHAPES, Scene, Thing

CAPTION_QUESTION = "Describe the image."


def _article(word: str) -> str:
    return ("an " if word[0] in "aeiou" else "a ") + word


def caption(picture: Scene) -> str:
    """One sentence for each thing, in reading order, after a fixed opening and before, for few, a fixed close."""
    n = len(picture.things)
    out = [f"The image shows {n} {'shape' if n == 1 else 'shapes'} on a {picture.ground} ground."]
    for t in picture.things:
        mark = f"with the {t.glyph_kind} {t.glyph}" if t.glyph else "without a letter"
        out.append(f"{_article(t.color).capitalize()} {t.shape} {mark} is at the {t.place}.")
    if n <= 2:
        out.append("Nothing else can be seen in the rest of the image.")
    if n == 1:
        out.append("All the other places are empty.")
    return " ".join(out)


_WORDS = {
    "color": (
        "What color is the {x}?",
        "What colour is the {x}?",
        "Which color is the {x}?",
        "What is the color of the {x}?",
        "What color does the {x} have?",
        "The {x} is what color?",
        "Tell me the color of the {x}.",
        "What is the {x}'s color?",
    ),
    "shape at": (
        "What shape is at the {x}?",
        "Which shape is at the {x}?",
        "What is at the {x}?",
        "What shape is in the {x}?",
        "What shape do you see at the {x}?",
        "Name the shape at the {x}.",
        "What object is at the {x}?",
        "What is the shape at the {x}?",
        "What is in the {x}?",
    ),
    "shape of": (
        "What shape is {x}?",
        "Which shape is {x}?",
        "What is the shape of the {x} object?",
        "What shape is the {x} object?",
        "What shape is the {x} one?",
        "What is the {x} shape?",
    ),
    "glyph": (
        "What {k} is in the {x}?",
        "Which {k} is in the {x}?",
        "What {k} is on the {x}?",
        "What {k} does the {x} have?",
        "What {k} is inside the {x}?",
        "What {k} is written in the {x}?",
        "Which {k} does the {x} show?",
        "Read the {k} in the {x}.",
        "What is the {k} in the {x}?",
        "What is written in the {x}?",
        "What character is in the {x}?",
    ),
    "glyph at": (
        "What {k} is at the {x}?",
        "What {k} is in the shape at the {x}?",
        "Which {k} is at the {x}?",
    ),
    "count": (
        "How many {x} are there?",
        "How many {x} do you see?",
        "How many {x} are in the image?",
        "Count the {x}.",
        "How many {x} are in the picture?",
        "How many {x} can you see?",
        "What is the number of {x}?",
        "How many {x} does the image contain?",
    ),
    "position": (
        "Where is the {x}?",
        "Where is the {x} in the image?",
        "In which place is the {x}?",
        "What is the position of the {x}?",
        "Where can the {x} be found?",
        "Where is the {x} located?",
    ),
    "presence": (
        "Is there {x}?",
        "Is there {x} in the image?",
        "Do you see {x}?",
        "Can you see {x}?",
        "Does the image show {x}?",
        "Is there {x} in the picture?",
        "Does the image contain {x}?",
    ),
    "any": ("Are there any {x}?", "Are there {x} in the image?", "Do you see any {x}?"),
    "is it": ("Is the {x} {y}?",),
    "is there at": ("Is there {x} at the {y}?", "Do you see {x} at the {y}?"),
}
CAPTION_WORDS = (
    CAPTION_QUESTION,
    "Describe the picture.",
    "What do you see?",
    "What is in the image?",
    "Describe this image in detail.",
    "What does the image show?",
    "Describe the scene.",
    "Describe what you see.",
    "Give a description of the image.",
)
_FORMAT_HINTS = (
    " Answer with one word.",
    " Answer in one word.",
    " Answer the question using a single word or phrase.",
)
KINDS = ("color", "shape", "glyph", "count", "position", "presence")


@dataclass(frozen=True)
class Question:
    """A question of one kind, with the one answer that is right, and the things that the answer rests on."""

    kind: str
    text: str
    answer: str
    about: tuple[Thing, ...] = ()


def _fill(form: str, rng: np.random.Generator, plain: bool, **words: str) -> str:
    forms = _WORDS[form]
    if plain:
        return forms[0].format(**words)
    # half of the time the issue's own wording: it is the one people see first
    text = forms[0 if rng.random() < 0.5 else rng.integers(len(forms))].format(**words)
    if rng.random() < 0.25:
        text = text.replace("center", "centre" if rng.random() < 0.5 else "middle")
    if rng.random() < 0.12:
        text = re.sub(r"\bshape(s?)\b(?! of)", r"object\1", text)
    if rng.random() < 0.05:
        text = text[0].lower() + text[1:]
    if rng.random() < 0.04:
        text = text.rstrip("?.")
    if rng.random() < 0.06:
        text += _FORMAT_HINTS[rng.integers(len(_FORMAT_HINTS))]
    return text


def caption_question(rng: np.random.Generator) -> str:
    """One wording of the request for a description."""
    return CAPTION_WORDS[0 if rng.random() < 0.6 else rng.integers(len(CAPTION_WORDS))]


def _names(things: tuple[Thing, ...], t: Thing, given: tuple[str, ...]) -> list[str]:
    """Descriptions from the `given` attributes that fit this thing and no other."""
    same = {a: [o for o in things if getattr(o, a) == getattr(t, a)] for a in ("shape", "color", "place", "glyph")}
    out = []
    if "shape" in given and len(same["shape"]) == 1:
        out.append(t.shape)
    if "color" in given and "shape" in given and sum(o in same["color"] for o in same["shape"]) == 1:
        out.append(f"{t.color} {t.shape}")
    if "color" in given and len(same["color"]) == 1:
        out.append(f"{t.color} shape")
    if "place" in given and len(same["place"]) == 1:
        out.append(f"shape at the {t.place}")
        if "shape" in given:
            out.append(f"{t.shape} at the {t.place}")
    if "glyph" in given and t.glyph and len(same["glyph"]) == 1:
        out.append(f"{t.shape if 'shape' in given else 'shape'} with the {t.glyph_kind} {t.glyph}")
    return out


def ask(picture: Scene, kind: str, rng: np.random.Generator, plain: bool = True) -> Question | None:
    """A question of that kind whose answer is unique in the scene, or None where the scene has none.

    `plain` keeps to the issue's wordings; else the wording varies, as in training.
    """
    things = picture.things
    t = things[rng.integers(len(things))]

    def pick(names: list[str]) -> str | None:
        if plain and kind != "position":
            names = names[:1]
        return names[rng.integers(len(names))] if names else None

    if kind == "color":
        x = pick(_names(things, t, ("shape", "place", "glyph")))
        return x and Question(kind, _fill("color", rng, plain, x=x), t.color, (t,))
    if kind == "shape":
        alone = sum(o.place == t.place for o in things) == 1
        if alone and (plain or rng.random() < 0.65):
            return Question(kind, _fill("shape at", rng, plain, x=t.place), t.shape, (t,))
        if plain or sum(o.color == t.color for o in things) > 1:
            return None
        return Question(kind, _fill("shape of", rng, plain, x=t.color), t.shape, (t,))
    if kind == "glyph":
        marked = [o for o in things if o.glyph]
        if not marked:
            return None
        t = marked[rng.integers(len(marked))]
        if not plain and rng.random() < 0.2 and sum(o.place == t.place for o in things) == 1:
            return Question(kind, _fill("glyph at", rng, plain, x=t.place, k=t.glyph_kind), t.glyph, (t,))
        names = _names(things, t, ("color", "shape"))
        if plain:
            names = [f"{t.color} {t.shape}"] if f"{t.color} {t.shape}" in names else []
        x = pick(names)
        word = t.glyph_kind if plain or t.glyph_kind == "letter" or rng.random() < 0.7 else "number"
        return x and Question(kind, _fill("glyph", rng, plain, x=x, k=word), t.glyph, (t,))
    if kind == "count":
        if rng.random() < 0.3:
            return Question(kind, _fill("count", rng, plain, x="shapes"), str(len(things)), things)
        if not plain and rng.random() < 0.3:
            color = t.color if rng.random() < 0.8 else str(COLORS[rng.integers(8)])
            same = tuple(o for o in things if o.color == color)
            return Question(kind, _fill("count", rng, plain, x=f"{color} shapes"), str(len(same)), same)
        shape = t.shape if rng.random() < 0.8 else SHAPES[rng.integers(7)]
        same = tuple(o for o in things if o.shape == shape)
        return Question(kind, _fill("count", rng, plain, x=_plural(shape)), str(len(same)), same)
    if kind == "position":
        x = pick(_names(things, t, ("color", "shape", "glyph")))
        return x and Question(kind, _fill("position", rng, plain, x=x), t.place, (t,))
    yes = rng.random() < 0.5
    if not plain and rng.random() < 0.3:
        return _ask_about_one(things, t, yes, rng)
    form = 0 if plain else rng.choice(3, p=[0.65, 0.2, 0.15])
    color, shape = t.color, t.shape
    if not yes:
        # half of the absent ones share a colour or a shape with something that is there
        hard = rng.random()
        color = color if hard < 0.35 else COLORS[rng.integers(8)]
        shape = shape if 0.35 <= hard < 0.7 else SHAPES[rng.integers(7)]
    found = tuple(o for o in things if (o.color == color or form == 1) and (o.shape == shape or form == 2))
    what = (f"{color} {shape}", shape, f"{color} shape")[form]
    return Question(kind, _fill("presence", rng, plain, x=_article(what)), "yes" if found else "no", found)


def _plural(shape: str) -> str:
    return "crosses" if shape == "cross" else shape + "s"


def _ask_about_one(things: tuple[Thing, ...], t: Thing, yes: bool, rng: np.random.Generator) -> Question | None:
    """Yes-or-no questions beyond `Is there a blue triangle?`."""
    form = rng.integers(3)
    if form == 0:
        shape = t.shape if yes else SHAPES[rng.integers(7)]
        found = tuple(o for o in things if o.shape == shape)
        text = _fill("any", rng, False, x=_plural(shape))
        return Question("presence", text, "yes" if found else "no", found)
    if form == 1:
        if sum(o.shape == t.shape for o in things) > 1:
            return None
        color = t.color if yes else COLORS[rng.integers(8)]
        text = _fill("is it", rng, False, x=t.shape, y=color)
        return Question("presence", text, "yes" if color == t.color else "no", (t,))
    place = t.place if yes else PLACES[rng.integers(9)]
    found = tuple(o for o in things if o.place == place and o.shape == t.shape)
    text = _fill("is there at", rng, False, x=_article(t.shape), y=place)
    return Question("presence", text, "yes" if found else "no", found)


def ask_several(
    picture: Scene,
    rng: np.random.Generator,
    n: int,
    plain: bool = True,
    weights: tuple[float, ...] | None = None,
) -> list[Question]:
    """Up to n different questions; `weights` (over KINDS) sets how often each kind is tried."""
    p = None if weights is None else np.asarray(weights) / np.sum(weights)
    out: dict[str, Question] = {}
    for _ in range(6 * n):
        q = ask(picture, str(rng.choice(KINDS, p=p)), rng, plain)
        if q:
            out.setdefault(q.text, q)
        if len(out) == n:
            break
    return list(out.values())


def held_out_questions(index: int, style: str = "known", split: str = "held-out") -> list[Question]:
    """At most one question of each kind for a held-out scene, in the issue's wordings."""
    picture = scene(index, split, style)
    rng = np.random.default_rng([SPLITS[split], 7, STYLES[style], index])
    asked = (next(filter(None, (ask(picture, kind, rng) for _ in range(8))), None) for kind in KINDS)
    return [q for q in asked if q]


def held_out_pair(index: int, style: str = "known") -> tuple[Question, Question] | None:
    """Two questions about different things of a held-out scene, the kinds in turns; None if it has none."""
    asked = held_out_questions(index, style)
    pairs = [(a, b) for a in asked for b in asked if a.about and b.about and not set(a.about) & set(b.about)]
    return pairs[index % len(pairs)] if pairs else None


def answer_right(said: str, answer: str) -> bool:
    """Exact match; only surrounding blanks and one closing full stop are forgiven."""
    return said.strip().removesuffix(".") == answer


_SAID = re.compile(
    r"\b("
    + "|".join(COLORS)
    + r") ("
    + "|".join(SHAPES)
    + r")\b[^.]*? at the ("
    + "|".join(sorted(PLACES, key=len, reverse=True))
    + r")\b",
    re.IGNORECASE,
)


def caption_objects(said: str, picture: Scene) -> tuple[int, int, int]:
    """(things whose colour, shape and place a caption names right, things that it names, things in the scene).

    A thing that a caption names once counts as right once, however often the scene repeats it; what it repeats or
    invents counts as named.
    """
    told = Counter(tuple(part.lower() for part in m.groups()) for m in _SAID.finditer(said))
    there = Counter((t.color, t.shape, t.place) for t in picture.things)
    return (told & there).total(), told.total(), there.total()
