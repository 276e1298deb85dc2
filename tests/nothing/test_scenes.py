"""Rendered scenes, their questions and their scorer. Needs numpy and Pillow only."""

import hashlib
import re
import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts" / "embedded_model"))
pytest.importorskip("PIL")
import questions
import scenes
from things import COLORS, GLYPHS, PLACES, SHAPES

INDICES = range(60)
PICTURES = [scenes.scene(i) for i in INDICES]


def test_a_number_always_gives_the_same_picture():
    # broken by any random draw that does not come from the scene's own generator
    again = scenes.scene(7)
    assert np.array_equal(np.asarray(again.image), np.asarray(PICTURES[7].image))
    assert again.things == PICTURES[7].things


@pytest.mark.parametrize(
    ("style", "digest"), [("known", "67b7dca840af37b6"), ("other", "777e1101dfc7fdad"), ("gray", "adc38dcad9ef16bb")]
)
def test_held_out_scenes_stay_those_that_figures_were_measured_on(style, digest):
    # broken by one random draw more or less: every scene, and every figure of the documents, would be another
    told = [
        (s.things, s.ground, s.box, questions.caption(s), questions.held_out_questions(i, style))
        for i in INDICES
        for s in [scenes.scene(i, style=style)]
    ]
    assert hashlib.sha256(repr(told).encode()).hexdigest()[:16] == digest


def test_splits_and_styles_share_no_picture():
    # broken if split or style stopped being part of the seed
    seen = {
        scenes.scene(i, split, style).image.tobytes()
        for i in range(5)
        for split in scenes.SPLITS
        for style in scenes.STYLES
    }
    assert len(seen) == 5 * len(scenes.SPLITS) * len(scenes.STYLES)


@pytest.mark.parametrize("style", scenes.STYLES)
def test_pictures_hold_one_to_six_things_inside_the_frame(style):
    # broken by placement that leaves the frame or by an empty scene
    for i in INDICES:
        s = scenes.scene(i, style=style)
        assert s.image.size == (336, 336)
        assert 1 <= len(s.things) <= 6
        assert all(0 < t.x < 1 and 0 < t.y < 1 for t in s.things)


def test_things_do_not_overlap():
    # broken by a placement check that forgets one of the two radii
    for s in PICTURES:
        w, h = s.box[2] - s.box[0], s.box[3] - s.box[1]
        for k, a in enumerate(s.things):
            for b in s.things[:k]:
                if s.box == (0, 0, 336, 336):  # a stretched picture keeps sizes of its unstretched self
                    far = np.hypot((a.x - b.x) * w, (a.y - b.y) * h)
                    assert far > 0.66 * (a.size + b.size) / 2


def test_a_thing_is_where_the_labels_say():
    # broken by a drawing offset: the middle of a filled thing then shows the ground
    for s in PICTURES:
        labels = scenes.patch_labels(s)
        assert labels[..., 4].sum() == len(s.things)
        pixels = np.asarray(s.image, float)
        for t in s.things:
            if t.shape in ("circle", "square") and not t.glyph and t.color in ("red", "blue"):
                x = int(s.box[0] + t.x * (s.box[2] - s.box[0]))
                y = int(s.box[1] + t.y * (s.box[3] - s.box[1]))
                middle = pixels[y - 2 : y + 3, x - 2 : x + 3].mean((0, 1))
                assert middle.argmax() == {"red": 0, "blue": 2}[t.color]


def truth(s, question):
    """The answer by a second, independent reading of the plain wordings."""
    things = s.things

    def fits(words, t):
        return all(w in (t.color, t.shape, "shape") for w in words.split())

    if m := re.fullmatch(r"What color is the shape at the (.+)\?", question):
        return {t.color for t in things if t.place == m[1]}
    if m := re.fullmatch(r"What color is the shape with the \w+ (.)\?", question):
        return {t.color for t in things if t.glyph == m[1]}
    if m := re.fullmatch(r"What color is the (\w+) with the \w+ (.)\?", question):
        return {t.color for t in things if t.glyph == m[2] and t.shape == m[1]}
    if m := re.fullmatch(r"What color is the (\w+)\?", question):
        return {t.color for t in things if t.shape == m[1]}
    if m := re.fullmatch(r"What shape is at the (.+)\?", question):
        return {t.shape for t in things if t.place == m[1]}
    if m := re.fullmatch(r"What (?:letter|digit) is in the (.+)\?", question):
        return {t.glyph for t in things if fits(m[1], t)}
    if m := re.fullmatch(r"How many (\w+) are there\?", question):
        word = {"crosses": "cross"}.get(m[1], m[1].removesuffix("s"))
        return {str(sum(fits(word, t) for t in things))}
    if m := re.fullmatch(r"Where is the (\w+) with the \w+ (.)\?", question):
        return {t.place for t in things if t.glyph == m[2] and fits(m[1], t)}
    if m := re.fullmatch(r"Where is the (.+)\?", question):
        return {t.place for t in things if fits(m[1], t)}
    m = re.fullmatch(r"Is there an? (.+)\?", question)
    return {"yes" if any(fits(m[1], t) for t in things) else "no"}


@pytest.mark.parametrize("style", scenes.STYLES)
def test_every_question_has_exactly_one_right_answer(style):
    # broken by asking "the star" where there are two, or by a wrong answer
    kinds = set()
    for i in INDICES:
        s = scenes.scene(i, style=style)
        for q in questions.held_out_questions(i, style):
            assert truth(s, q.text) == {q.answer}, (i, q)
            kinds.add(q.kind)
    assert kinds == set(questions.KINDS)


def test_varied_wordings_keep_the_answer_in_the_vocabulary_of_answers():
    # broken by an answer that is a phrase, a capitalised word or a spelled-out number
    allowed = {*SHAPES, *COLORS, *PLACES, *GLYPHS, *"0123456", "yes", "no"}
    for i, s in zip(INDICES, PICTURES, strict=True):
        for q in questions.ask_several(s, np.random.default_rng(i), 12, plain=False):
            assert q.answer in allowed


def test_a_true_caption_scores_full_and_a_wrong_one_loses_one():
    # broken by a scorer that misreads a place ("top" in "top left") or forgives a wrong colour
    for s in PICTURES:
        told = questions.caption(s)
        n = len(s.things)
        assert questions.caption_objects(told, s) == (n, n, n)
        first = s.things[0]
        other = next(c for c in COLORS if all(t.color != c for t in s.things))
        wrong = re.sub(rf"\b{first.color} {first.shape}", f"{other} {first.shape}", told, count=1, flags=re.IGNORECASE)
        assert questions.caption_objects(wrong, s) == (n - 1, n, n)
        assert questions.caption_objects("", s) == (0, 0, n)


def test_repeating_one_object_counts_against_a_caption():
    # broken by counting mentions as right, or by overlooking them
    s = next(s for s in PICTURES if len(s.things) == 2)
    once = questions.caption(s).split(". ")[1] + "."
    assert questions.caption_objects(once * 5, s) == (1, 5, 2)


@pytest.mark.parametrize(
    ("said", "answer", "right"),
    [(" red", "red", True), ("red.", "red", True), ("dark red", "red", False), ("A", "a", False), ("", "no", False)],
)
def test_answers_match_exactly(said, answer, right):
    # broken by substring matching
    assert questions.answer_right(said, answer) is right
