"""Scenes, labels, questions and descriptions that SmolLM2 learns to see by. Needs numpy and Pillow only."""

from __future__ import annotations

import random
import re
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageFont

FOLDER = Path(__file__).parents[2] / "scripts" / "smol_llava"
sys.path.insert(0, str(FOLDER))
assets = pytest.importorskip("assets")
layouts = pytest.importorskip("layouts")
pictures = pytest.importorskip("pictures")
talk = pytest.importorskip("talk")

NAMES = [
    "red apple",
    "cup of coffee",
    "fox",
    "glasses",
    "flag of Japan",
    "sunflower",
    "owl",
    "butterfly",
    "bus",
    "wolf",
]
WORDS = [
    "market",
    "open",
    "water",
    "history",
    "paper",
    "green",
    "house",
    "winter",
    "coffee",
    "letter",
    "music",
    "bridge",
]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory):
    """Ten things that are discs of ten colours, and Pillow's own typeface."""
    shapes = []
    for i in range(len(NAMES)):
        image = Image.new("RGBA", (120, 120))
        ImageDraw.Draw(image).ellipse((0, 0, 119, 119), fill=(25 * i, 250 - 20 * i, 40 * (i % 5), 255))
        shapes.append(image)
    file = tmp_path_factory.mktemp("fonts") / "Aileron-Regular.ttf"
    face = ImageFont.load_default(20)
    if not getattr(face, "font_bytes", None):
        pytest.skip("Pillow without FreeType")
    file.write_bytes(face.font_bytes)
    return assets.Assets(NAMES, shapes, [str(file)], WORDS)


@pytest.fixture(scope="module")
def scenes(made):
    """Sixty held-out scenes."""
    return [pictures.scene(made, i) for i in range(60)]


def test_a_number_always_gives_the_same_picture(made, scenes):
    # broken by any random draw that does not come from the scene's own generator
    again = pictures.scene(made, 7)
    assert np.array_equal(np.asarray(again.image), np.asarray(scenes[7].image))
    assert again.things == scenes[7].things
    assert talk.questions(again, random.Random(3), NAMES, 8) == talk.questions(scenes[7], random.Random(3), NAMES, 8)


def test_splits_and_styles_share_no_picture(made):
    # broken if split or style stopped being part of the seed
    seen = {
        pictures.scene(made, i, split, style).image.tobytes()
        for i in range(4)
        for split in pictures.SPLITS
        for style in pictures.STYLES
    }
    assert len(seen) == 4 * len(pictures.SPLITS) * len(pictures.STYLES)


def test_what_is_kept_out_is_kept_out(made):
    # broken if a known scene could pair a thing with a card, or draw a word, that only the other style shows
    words = Counter()
    for style in pictures.STYLES:
        for i in range(40):
            for t in pictures.scene(made, i, "train", style, "crowd").things:
                if not t.word and t.color:
                    assert assets.kept_out(f"{t.color} {t.name}") == (style == "other")
                if t.word and not t.name.isdigit():
                    words[assets.kept_out(t.name.lower()), style] += 1
    assert not words[True, "known"]
    assert words[False, "known"]


@pytest.mark.parametrize("layout", layouts.DRAW)
def test_labels_say_what_patches_show(made, layout):
    # broken by an offset between the picture and its owner map, or by characters that go astray
    letters = 0
    for i in range(6):
        s = pictures.scene(made, i, layout=layout)
        assert s.image.size == (336, 336) and s.image.mode == "RGB"
        found = pictures.labels(s)
        assert found.thing.shape == (24, 24) and found.chars.shape == (24, 24, pictures.SLOTS)
        assert found.thing.max() <= len(s.things)
        for k, t in enumerate(s.things, 1):
            rows, columns = np.nonzero(found.thing == k)
            left, top, right, bottom = t.box
            assert ((columns + 1) * 14 > left).all() and (columns * 14 < right).all()
            assert ((rows + 1) * 14 > top).all() and (rows * 14 < bottom).all()
            toward = found.offset[rows, columns, 0].astype(float) * 12 * 14 + columns * 14 + 7
            assert np.allclose(toward, t.center[0], atol=1)
        text = Counter(c for t in s.things if t.word for c in t.name)
        read = Counter(pictures.CHARS[c - 1] for c in found.chars.ravel() if c)
        assert not read - text
        letters += sum(read.values())
    assert letters or layout in ("things", "count")


def test_print_is_read_in_order(made):
    # broken by slots that are not sorted from left to right, or by letters that do not turn with their card
    for i in range(12):
        s = pictures.scene(made, i, layout="sign")
        chars = pictures.labels(s).chars
        for t in (t for t in s.things if t.word and t.hidden < 0.01):
            left, top, right, bottom = (int(c) for c in t.box)
            if bottom - top > 30:  # turned: its row of patches holds other words too
                continue
            inside = [(x, c) for x, y, c in s.letters if left <= x <= right and top <= y <= bottom]
            assert "".join(pictures.CHARS[c - 1] for _, c in sorted(inside)) == t.name
        assert chars.max() <= len(pictures.CHARS)


def test_boxes_and_hiding(scenes):
    # broken if things that later ones cover still counted as plain to see
    for s in scenes:
        for k, t in enumerate(s.things, 1):
            assert 0 <= t.hidden <= 1
            if not (s.owner == k).any():
                assert t.hidden == 1


def truth(s, q):
    """The answer by a second, independent reading of the plain wordings, or None."""
    things = [t for t in s.things if not t.word]
    by_name = {t.name: t for t in s.things}
    if m := re.fullmatch(r"Where (?:is|are) the (.+)\?", q.text):
        quoted = re.fullmatch(r'word "(.+)"', m[1])
        x, y = by_name[quoted[1] if quoted else m[1]].center
        row, column = ("top", "", "bottom")[int(y // 112)], ("left", "", "right")[int(x // 112)]
        return f"{row} {column}".strip() or "center"
    if m := re.fullmatch(r"(?:How many (.+) are there\?|Count the (.+)\.)", q.text):
        return str(sum(talk.plural(t.name) == (m[1] or m[2]) for t in things))
    if m := re.fullmatch(r"How much is the (.+)\?", q.text):
        return dict(r for r in s.lines if len(r) == 2)[m[1]]
    if m := re.fullmatch(r"Which is further (left|right), the (.+) or the (.+)\?", q.text):
        x, y = by_name[m[2]], by_name[m[3]]
        return (x if (x.center[0] < y.center[0]) == (m[1] == "left") else y).name
    if m := re.fullmatch(r"What is in row (\d), column (\d)\?", q.text):
        return s.lines[int(m[1]) - 1][int(m[2]) - 1]
    if m := re.fullmatch(r"What is on the (.+) card\?", q.text):
        (found,) = (t for t in things if t.color == m[1])
        return found.name
    return None


def test_answers_are_right(scenes):
    # broken by a question about the wrong thing, place, number or print
    checked = Counter()
    for i, s in enumerate(scenes):
        for q in talk.questions(s, random.Random(i), NAMES, 12):
            assert q.kind in talk.KINDS and q.answer
            right = truth(s, q)
            if right is not None:
                assert q.answer == right, (i, q)
                checked[q.kind] += 1
    assert {"where", "count", "price", "relation", "cell", "what"} <= set(checked), checked


def test_descriptions_are_two_to_four_sentences_and_name_what_is_there(scenes):
    # broken by a layout without words for it, or by a scorer that cannot find a name in its plural
    for s in scenes:
        said = talk.description(s)
        plain = re.sub(r'"[^"]*"|\d+\.\d+', "x", said)
        assert 2 <= len(re.findall(r"[^.]+\.", plain)) <= 4, said
        right, named, there = talk.caption_objects(said, s, NAMES)
        assert right == named == there
        if s.layout in ("things", "count"):
            assert there == len({t.name for t in s.things if t.hidden < 0.5})


def test_plurals_and_articles():
    # broken by a rule that takes another's words
    many = {"fox": "foxes", "cup of coffee": "cups of coffee", "butterfly": "butterflies", "grapes": "grapes"}
    many |= {"bus": "buses", "wolf": "wolves", "flag of United States": "flags of United States", "key": "keys"}
    many |= {"smiling face with sunglasses": "smiling faces with sunglasses", "snowman": "snowmen"}
    assert {n: talk.plural(n) for n in many} == many
    assert [talk.a(n) for n in ("owl", "unicorn", "red apple", "grapes")] == [
        "an owl",
        "a unicorn",
        "a red apple",
        "grapes",
    ]


def test_scoring_forgives_articles_and_case_only():
    # broken if a wrong word passed, or a right one with its article failed
    assert talk.answer_right("A red apple.", "red apple") and talk.answer_right('"STOP"', "stop")
    assert not talk.answer_right("apple", "red apple") and not talk.answer_right("", "fox")


def test_catalogue_reads_unicode_lists():
    # broken by a change of the pattern: nothing would be found
    lines = [
        "# subgroup: food-fruit",
        "1F34E                                                  ; fully-qualified     # 🍎 E0.6 red apple",
        "# subgroup: animal-bug",
        "1F41E                                                  ; fully-qualified     # 🐞 E0.6 lady beetle",
        "# subgroup: zodiac",
        "2648                                                   ; fully-qualified     # ♈ E0.6 Aries",
    ]
    assert assets.catalogue(lines) == [("red apple", "\U0001f34e"), ("ladybug", "\U0001f41e")]
