"""Questions, descriptions and two-turn talks about a scene, in plain English, and how answers are scored.

Short answers are bare: lowercase names and colours, `yes` and `no`, digits for counts, print as it is drawn.
A question is asked only where the scene has one right answer to it.
"""

from __future__ import annotations

import random
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

from pictures import SIDE, Scene, Thing

KINDS = ("what", "where", "count", "color", "relation", "presence", "read", "price", "cell", "size")
NUMBERS = ("no", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
_SINGULAR = ("ss", "us", "dress", "bus", "glass", "compass", "United States", "Netherlands", "abacus", "cactus")
_SAME = {"sheep", "fish", "blowfish", "jellyfish", "deer", "moose", "bison", "squid", "shrimp", "rhinoceros"}
_IRREGULAR = {"mouse": "mice", "goose": "geese", "snowman": "snowmen", "scarf": "scarves", "knife": "knives"}
_IRREGULAR |= {"wolf": "wolves", "leaf": "leaves", "die": "dice", "tomato": "tomatoes", "potato": "potatoes"}
_IRREGULAR |= {"mosquito": "mosquitoes"}
_MASS = {"bread", "butter", "salt", "popcorn", "bacon", "spaghetti", "sushi", "corn", "garlic", "fire", "ice", "yarn"}
_MASS |= {"thread", "dna", "bowling", "tennis", "lacrosse", "badminton", "broccoli", "luggage", "soap", "canned food"}
_MASS |= {"cooked rice", "curry rice", "green salad", "leafy green", "baguette bread"}


@dataclass(frozen=True)
class Question:
    """One question with its right answer."""

    kind: str
    text: str
    answer: str


def is_plural(name: str) -> bool:
    """Whether a name is a plural already: `grapes`, `fork and knife` is not."""
    head = name.split(" of ")[0]
    return head.endswith("s") and not head.endswith(_SINGULAR)


def plural(name: str) -> str:
    """`foxes`, `cups of coffee`, `flags of Japan`, `grapes`, `faces with medical mask`."""
    head, link, tail = re.fullmatch(r"(.+?)(?:( of | with | in )(.+))?", name).groups(default="")
    *before, last = head.split()
    if last in _SAME or is_plural(head):
        return name
    if last.endswith("y") and last[-2] not in "aeiou":
        many = last[:-1] + "ies"
    else:
        many = _IRREGULAR.get(last) or last + ("es" if last.endswith(("s", "x", "ch", "sh")) else "s")
    return " ".join([*before, many]) + link + tail


def a(name: str) -> str:
    """The name with its indefinite article, where it takes one."""
    if is_plural(name) or name in _MASS:
        return name
    if name.startswith(("flag of", "Statue of", "sun", "full moon")) and name not in ("sunflower", "sun hat"):
        return name if name == "sunglasses" else f"the {name}"
    an = name[0].lower() in "aeiou" and not name.startswith(("unicorn", "ewe", "one", "uni"))
    return f"{'an' if an or name.startswith(('hourglass', 'x-ray')) else 'a'} {name}"


def the(name: str) -> str:
    """The name with `the`."""
    return f"the {name}"


def are(name: str) -> str:
    """`is` or `are`."""
    return "are" if is_plural(name) else "is"


def pick(rng: random.Random, *templates: str) -> str:
    """One of the wordings."""
    return rng.choice(templates)


class Facts:
    """A scene as its questions see it: what is plain to see, and what there is one of."""

    def __init__(self, s: Scene) -> None:
        self.s = s
        self.seen = [t for t in s.things if t.hidden < 0.5]
        self.things = [t for t in self.seen if not t.word]
        self.words = [t for t in self.seen if t.word]
        self.names = Counter(t.name for t in s.things if not t.word)
        self.single = [t for t in self.things if self.names[t.name] == 1]
        spelled = Counter(t.name.lower() for t in s.things if t.word)
        self.single_words = [t for t in self.words if spelled[t.name.lower()] == 1]

    @staticmethod
    def clear(t: Thing) -> bool:
        """Whether the centre is not near a border of the ninths."""
        return all(min(abs(c - SIDE / 3), abs(c - 2 * SIDE / 3)) > 12 for c in t.center)


def ask_what(f: Facts, rng: random.Random) -> Question | None:
    """What is at a place, or on a card, or alone in the picture."""
    if len(f.s.things) == 1 and f.things:
        text = pick(rng, "What is this?", "What is in the picture?", "What does the image show?", "What do you see?")
        return Question("what", text, f.things[0].name)
    cards = Counter(t.color for t in f.s.things if not t.word and t.color)
    choices = []
    for t in f.things:
        if t.color and cards[t.color] == 1:
            choices.append((f"on the {t.color} card", t))
        near = [u for u in f.s.things if u.place == t.place]
        if f.clear(t) and len(near) == 1 and not f.s.lines:
            choices.append((f"at the {t.place}" if t.place != "center" else "in the center", t))
    if not choices:
        return None
    where, t = rng.choice(choices)
    text = pick(rng, "What is {}?", "What can you see {}?", "What thing is {} of the picture?", "Name the thing {}.")
    if "card" in where:
        text = text.replace(" of the picture", "")
    return Question("what", text.format(where), t.name)


def ask_where(f: Facts, rng: random.Random) -> Question | None:
    """In which ninth of the picture a thing is."""
    fitting = [t for t in f.single if f.clear(t)] + [t for t in f.single_words if f.clear(t) and not f.s.lines]
    if not fitting:
        return None
    t = rng.choice(fitting)
    name = f'the word "{t.name}"' if t.word else the(t.name)
    verb = "is" if t.word else are(t.name)
    return Question(
        "where", pick(rng, f"Where {verb} {name}?", f"In which part of the picture {verb} {name}?"), t.place
    )


def ask_count(f: Facts, rng: random.Random) -> Question | None:
    """How many there are of a thing, or of things at all, or of words."""
    if any(t.hidden > 0.4 for t in f.s.things) or f.s.lines:
        return None
    names = [n for n in f.names if not is_plural(n) and " and " not in n and n not in _MASS]
    if names and rng.random() < 0.7:
        name = rng.choices(names, [f.names[n] ** 2 for n in names])[0]
        many = plural(name)
        text = pick(rng, f"How many {many} are there?", f"Count the {many}.", f"How many {many} do you see?")
        return Question("count", text, str(f.names[name]))
    if any(t.word for t in f.s.things) or not f.names:
        return None
    text = pick(rng, "How many things are in the picture?", "How many objects are there in all?")
    return Question("count", text, str(sum(f.names.values())))


def ask_color(f: Facts, rng: random.Random) -> Question | None:
    """The colour of a card or of ink."""
    fitting = [t for t in [*f.single, *f.single_words] if t.color and f.s.layout != "receipt"]
    if not fitting:
        return None
    t = rng.choice(fitting)
    if t.word:
        text = pick(rng, f'What color is the word "{t.name}"?', f'In which color is "{t.name}" written?')
    else:
        text = pick(rng, f"What color is the card behind the {t.name}?", f"On what color {are(t.name)} the {t.name}?")
    return Question("color", text, t.color or "")


def ask_relation(f: Facts, rng: random.Random) -> Question | None:
    """Which of two is further left, or higher; or whether one is."""
    pairs = [(t, u, k) for t in f.single for u in f.single for k in (0, 1) if t.center[k] + 30 < u.center[k]]
    if not pairs:
        return None
    first, second, k = rng.choice(pairs)
    x, y = rng.sample([first, second], 2)
    if rng.random() < 0.6:
        word = (("further left", "further right"), ("higher up", "lower down"))[k]
        way = rng.randrange(2)
        text = pick(rng, "Which is {}, the {} or the {}?", "Which one is {}: the {} or the {}?")
        return Question("relation", text.format(word[way], x.name, y.name), (first, second)[way].name)
    word = (("left of", "right of"), ("above", "below"))[k]
    way = rng.randrange(2)
    text = f"Is the {x.name} {word[way]} the {y.name}?"
    return Question("relation", text, "yes" if (x is first) == (way == 0) else "no")


def ask_presence(f: Facts, rng: random.Random, names: list[str]) -> Question | None:
    """Whether there is such a thing or word."""
    there = rng.random() < 0.5
    known = sorted({t.name for t in f.seen if not t.word})
    if there and not known:
        return None
    name = rng.choice(known) if there else rng.choice(names)
    if not there and name in f.names:
        return None
    one = plural(name) if is_plural(name) else a(name)
    verb = "Are" if is_plural(name) else "Is"
    text = pick(rng, f"{verb} there {one} in the picture?", f"{verb} there {one}?", f"Can you see {one}?")
    return Question("presence", text, "yes" if there else "no")


def ask_read(f: Facts, rng: random.Random) -> Question | None:
    """Print: a sign, a line of it, the one word, a word by its colour or place."""
    s, choices = f.s, []
    if s.layout == "sign" and s.lines and all(t.hidden < 0.2 for t in s.things if t.word):
        lines = [row[0] for row in s.lines]
        choices.append(
            (pick(rng, "What does the sign say?", "Read the sign.", "What is written here?"), " ".join(lines))
        )
        k = rng.randrange(len(lines))
        choices.append((f"What is on the {('first', 'second', 'third')[k]} line of the sign?", lines[k]))
    elif s.layout == "receipt" and s.lines:
        choices.append(("What is on the first line of the receipt?", " ".join(s.lines[0])))
    elif f.single_words and not s.lines:
        inks = Counter(t.color for t in s.things if t.word)
        for t in f.single_words:
            if t.hidden > 0.15:
                continue
            if len([u for u in s.things if u.word]) == 1:
                choices.append((pick(rng, "What does it say?", "What is written in the picture?"), t.name))
            if inks[t.color] == 1:
                choices.append((f"What is written in {t.color}?", t.name))
            if f.clear(t) and len([u for u in s.things if u.word and u.place == t.place]) == 1:
                choices.append((f"What is written at the {t.place}?".replace("at the center", "in the center"), t.name))
    return Question("read", *rng.choice(choices)) if choices else None


def ask_price(f: Facts, rng: random.Random) -> Question | None:
    """A receipt's prices."""
    rows = [r for r in f.s.lines if len(r) == 2] if f.s.layout == "receipt" else []
    if not rows:
        return None
    name, price = rng.choice(rows)
    if name == "TOTAL":
        return Question("price", pick(rng, "What is the total?", "How much is it in all?"), price)
    if rng.random() < 0.25:
        return Question("price", pick(rng, f"What costs {price}?", f"Which item is {price}?"), name)
    return Question("price", pick(rng, f"How much is the {name}?", f"What does the {name} cost?"), price)


def ask_cell(f: Facts, rng: random.Random) -> Question | None:
    """A table's size or one of its cells."""
    s = f.s
    if s.layout != "table" or not s.lines:
        return None
    if rng.random() < 0.25:
        way = rng.choice(("rows", "columns"))
        return Question(
            "cell", f"How many {way} does the table have?", str(len(s.lines if way == "rows" else s.lines[0]))
        )
    r, c = rng.randrange(len(s.lines)), rng.randrange(len(s.lines[0]))
    if not s.lines[r][c]:
        return None
    text = pick(rng, f"What is in row {r + 1}, column {c + 1}?", f"What does column {c + 1} of row {r + 1} show?")
    return Question("cell", text, s.lines[r][c])


def ask_size(f: Facts, rng: random.Random) -> Question | None:
    """Which of two is bigger."""

    def size(t: Thing) -> float:
        return max(t.box[2] - t.box[0], t.box[3] - t.box[1])

    pairs = [(t, u) for t in f.single for u in f.single if size(t) > 1.4 * size(u) and u.hidden < 0.2]
    if not pairs:
        return None
    big, small = rng.choice(pairs)
    x, y = rng.sample([big, small], 2)
    way = rng.randrange(2)
    text = f"Which is {('bigger', 'smaller')[way]}, the {x.name} or the {y.name}?"
    return Question("size", text, (big, small)[way].name)


ASK: dict[str, Callable] = {
    "what": ask_what,
    "where": ask_where,
    "count": ask_count,
    "color": ask_color,
    "relation": ask_relation,
    "read": ask_read,
    "price": ask_price,
    "cell": ask_cell,
    "size": ask_size,
}


def questions(s: Scene, rng: random.Random, names: list[str], n: int) -> list[Question]:
    """Up to n different questions; `names` are all things that may be asked for."""
    facts, out, texts = Facts(s), [], set()
    for _ in range(6 * n):
        kind = rng.choice(KINDS)
        q = ask_presence(facts, rng, names) if kind == "presence" else ASK[kind](facts, rng)
        if q and q.text not in texts:
            texts.add(q.text)
            out.append(q)
            if len(out) == n:
                break
    return out


def held_out_questions(s: Scene, index: int, style: str, names: list[str]) -> list[Question]:
    """The questions that go with held-out scene `index` of a style: always the same ones."""
    return questions(s, random.Random(f"talk held-out {style} {index}"), names, 8)


def describe_question(rng: random.Random) -> str:
    """A wording that asks for a description."""
    return pick(
        rng,
        "Describe the image.",
        "Describe the picture.",
        "What is going on in this picture?",
        "Tell me what you see.",
    )


def listed(parts: list[str]) -> str:
    """`a, b and c`."""
    return parts[0] if len(parts) == 1 else ", ".join(parts[:-1]) + " and " + parts[-1]


def located(t: Thing, subject: str, verb: str) -> str:
    """`The fox is at the top left, on a blue card.`"""
    place = "in the center" if t.place == "center" else f"at the {t.place}"
    card = f", on {a(t.color)} card" if t.color and not t.word else ""
    ink = f", in {t.color}" if t.word and t.color else ""
    return f"{subject} {verb} {place}{card}{ink}."


def description(s: Scene) -> str:
    """Two to four sentences about a scene, always the same for the same scene."""
    f = Facts(s)
    counts = Counter(t.name for t in f.things)
    names = [a(n) if k == 1 else f"{NUMBERS[min(k, 10)]} {plural(n)}" for n, k in counts.items()]
    if s.layout == "receipt" and s.lines:
        rows = [r for r in s.lines if len(r) == 2 and r[0] != "TOTAL"]
        out = [f"This is a receipt with {NUMBERS[len(rows)]} items."]
        out += [" ".join(f"{n} costs {p}." for n, p in rows[:2])]
        total = [p for r in s.lines if r[0] == "TOTAL" for p in r[1:]]
        return " ".join(out + ([f"The total is {total[0]}."] if total else []))
    if s.layout == "table" and s.lines:
        first = listed([c or "an empty cell" for c in s.lines[0]])
        size = f"{NUMBERS[len(s.lines)]} rows and {NUMBERS[len(s.lines[0])]} columns"
        return f"This is a table with {size}. The first row shows {first}."
    if s.layout == "sign" and s.lines:
        out = [f'A sign says "{" ".join(r[0] for r in s.lines)}".']
        out += [f"The picture also shows {listed(names)}."] if names else ["There is nothing else in the picture."]
        return " ".join(out)
    quoted = [f'the word "{t.name}"' for t in f.words]
    if not names + quoted:
        return "The picture is empty. There is nothing to see but the background."
    out = [f"The picture shows {listed(names + quoted)}."]
    told = [t for t in [*f.single, *f.words] if Facts.clear(t)][:3]
    for t in told:
        out.append(located(t, f'The word "{t.name}"' if t.word else f"The {t.name}", "is" if t.word else are(t.name)))
    if len(out) == 1:
        total = sum(counts.values())
        out.append(f"There {'is one thing' if total == 1 else f'are {NUMBERS[min(total, 10)]} things'} in all.")
    return " ".join(out)


def normal(text: str) -> str:
    """An answer without case, articles, quotes and the final stop."""
    text = re.sub(r"[\"“”]", "", text.strip().rstrip(".").lower())
    return re.sub(r"^(a|an|the) ", "", re.sub(r"\s+", " ", text))


def answer_right(said: str, answer: str) -> bool:
    """Whether an answer is the right one."""
    return normal(said) == normal(answer)


def named(text: str, names: list[str]) -> set[str]:
    """Which of the names a description has, in singular or plural; within a longer name they do not count."""
    found, left = set(), f" {re.sub(r'[^a-z0-9 ]', ' ', text.lower())} "
    for name in sorted(names, key=len, reverse=True):
        for form in {plural(name), name}:
            plain = re.sub(r"[^a-z0-9 ]", " ", form.lower())
            if f" {plain} " in left:
                found.add(name)
                left = left.replace(f" {plain} ", "  ")
    return found


def caption_objects(said: str, s: Scene, names: list[str]) -> tuple[int, int, int]:
    """Names in a description that are right, names in it, and names that it should have."""
    there = named(description(s), names)
    found = named(said, names)
    return len(found & there), len(found), len(there)
