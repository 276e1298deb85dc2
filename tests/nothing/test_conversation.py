"""What of a conversation can be reused, the record of it, and the pictures kept: pure Python."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from st3_edge.config import REVISIT
from st3_edge.native.st3 import Visual
from st3_edge.runtime.conversation import (
    Conversation,
    Embeddings,
    Image,
    Span,
    common_prefix,
    n_positions,
    pieces_of,
    reusable,
)

RED, BLUE = Image("red", 0, 4), Image("blue", 0, 4)
WIDE = Image("wide", 0, 6, 3)  # M-RoPE: six tokens at three positions
# Few of each, so that prompts often begin alike.
IMAGES = [RED, BLUE, Image("red", 1, 4), Image("red", 0, 2), WIDE]
UNITS = st.lists(st.integers(0, 1) | st.sampled_from(IMAGES), max_size=8)


@st.composite
def histories(draw):
    """A conversation held, of prompts that each dropped tokens of their images, and a prompt that may go on from it."""
    held, spans = [], []
    for _ in range(draw(st.integers(0, 3))):
        prompt = draw(UNITS)
        images = [i for i, unit in enumerate(prompt) if isinstance(unit, Image)]
        if images:
            spans.append(Span(len(held) + images[0], len(held) + len(prompt)))
        held += prompt + draw(st.lists(st.integers(0, 1), max_size=2))
    wanted = held[: draw(st.integers(0, len(held)))] + draw(UNITS) + [draw(st.integers(0, 1))]
    return held, spans, wanted


@given(UNITS, UNITS)
def test_the_common_prefix_is_common_and_longest(a, b):
    # broken by an off-by-one, or a comparison of images by anything but all of their content
    n = common_prefix(a, b)
    assert a[:n] == b[:n]
    assert n == min(len(a), len(b)) or a[n] != b[n]


@given(histories(), st.sampled_from(REVISIT))
def test_what_is_reused_is_held_and_leaves_the_last_token(history, revisit):
    # broken if a token were taken from another conversation, or no logits were computed
    held, spans, wanted = history
    n = reusable(held, wanted, spans, revisit=revisit)
    assert 0 <= n < len(wanted)
    assert held[:n] == wanted[:n]


@given(histories(), st.sampled_from(REVISIT))
def test_no_image_is_reused_whose_question_is_not(history, revisit):
    # broken if a picture pruned by one question were shown to another, or a span of which a part is used were forgotten
    held, spans, wanted = history
    n = reusable(held, wanted, spans, revisit=revisit)
    assert all(span.first >= n or span.end <= n for span in spans)


@given(histories())
def test_a_new_turn_revisits_every_pruned_image(history):
    # broken if revisit="turn" left one of several images as an earlier question pruned it
    held, spans, wanted = history
    n = reusable(held, wanted, spans, revisit="turn")
    assert all(span.first >= n for span in spans)


@given(histories(), st.sampled_from(REVISIT))
def test_nothing_is_given_up_without_a_reason(history, revisit):
    # broken if the whole conversation were computed again at every call: only spans are reasons
    held, spans, wanted = history
    n = reusable(held, wanted, spans, revisit=revisit)
    whole = min(common_prefix(held, wanted), len(wanted) - 1)
    assert n == whole or n in {span.first for span in spans}
    assert reusable(held, wanted, [], revisit=revisit) == whole


@pytest.mark.parametrize(
    ("wanted", "revisit", "expected"),
    [
        ([1, RED, 2, 9, 3], "never", 4),  # the second question goes on from the first answer
        ([1, RED, 2, 9, 3], "turn", 1),  # ... and is asked of the whole picture
        ([1, RED, 2], "turn", 1),  # asked again: the picture is pruned again
        ([1, RED, 2], "never", 1),
        ([1, RED, 2, 9], "never", 3),  # the last token alone gives the logits
        ([1, RED, 5], "never", 1),  # another first question: it prunes for itself
        ([1, BLUE, 2], "never", 1),  # another picture
        ([7, RED, 2], "never", 0),
        ([1], "never", 0),
    ],
)
def test_turns_of_a_conversation(wanted, revisit, expected):
    # broken by a rule that fits the properties and not the purpose
    held = [1, RED, 2, 9]  # a prompt of three, pruned, and one token of the answer
    assert reusable(held, wanted, [Span(1, 3)], revisit=revisit) == expected


class Memory:
    """What a sequence holds, position by position; `partial`: whether it can forget a part of it."""

    def __init__(self, partial: bool) -> None:
        self.partial, self.cells = partial, []

    def remove(self, p0: int) -> bool:
        if not self.partial and 0 < p0 < len(self.cells):
            return False
        del self.cells[p0:]
        return True

    def add(self, units) -> None:
        for unit in units:
            self.cells += [unit] * (unit.n_positions if isinstance(unit, Image) else 1)


OPERATIONS = st.lists(
    st.tuples(st.just("add"), UNITS, st.sampled_from(["", "before", "after", "asked"]))
    | st.tuples(st.just("cut"), st.integers(0, 20), st.just(""))
    | st.tuples(st.just("replace"), UNITS, st.sampled_from(["", "before", "after", "refused"])),
    max_size=12,
)


@given(st.booleans(), OPERATIONS)
def test_the_record_is_what_the_memory_holds_whatever_fails(partial, operations):
    # broken if an interrupt before, in or after a native call left either of the two ahead of the other
    memory = Memory(partial)
    conversation = Conversation(memory.remove)
    before = []

    def add(units, fails) -> bool:
        if fails == "before":
            raise KeyboardInterrupt
        memory.add(units)
        if fails == "after":
            raise KeyboardInterrupt
        return fails != "refused"

    def pruned(fails) -> bool:
        if fails == "asked":
            raise KeyboardInterrupt
        return True

    for name, what, fails in operations:
        before = list(conversation.units)
        try:
            if name == "cut":
                assert conversation.cut(what) in (min(what, len(before)), 0)
            elif name == "add":
                with conversation.adding(what, lambda fails=fails: pruned(fails)):
                    add(what, fails)
                assert list(conversation.units) == before + what
            else:
                new = Conversation(Memory(True).remove)
                with new.adding(what):
                    pass
                done = conversation.replace(new.record, lambda what=what, fails=fails: add(what, fails))
                assert list(conversation.units) == (what if done else [])
        except KeyboardInterrupt:
            assert list(conversation.units) in (before, [])
        expected = Memory(True)
        expected.add(conversation.units)
        assert memory.cells == expected.cells
        assert conversation.n_positions == len(memory.cells) == n_positions(conversation.units)
        assert all(isinstance(conversation.units[span.first], Image) for span in conversation.record.spans)
        assert all(span.end <= len(conversation.units) for span in conversation.record.spans)


def visual(n_bytes: int) -> Visual:
    return Visual(np.zeros((n_bytes // 4, 1), np.float32), 0, 0)


@given(
    st.sampled_from([0, 8, 12]),
    st.lists(st.tuples(st.booleans(), st.sampled_from("abc"), st.integers(1, 2)), min_size=20, max_size=40),
)
def test_pictures_are_kept_within_their_bound_the_latest_used_first(bound, operations):
    # broken if the bound were counted wrong, or the picture just looked at were the one that is forgotten
    kept = Embeddings(bound)
    model: list[tuple[Image, int]] = []  # the least recently used first
    for puts, key, size in operations:
        image = Image(key, 0, 1)
        held = dict(model).get(image)
        if puts:
            kept.put(image, visual(4 * size))
            model = [entry for entry in model if entry[0] != image] + [(image, 4 * size)]
            while sum(n for _, n in model) > bound:
                model.pop(0)
        else:
            found = kept.get(image)
            assert (found is None) == (held is None)
            if found is not None:
                assert found.embd.nbytes == held
                model = [entry for entry in model if entry[0] != image] + [(image, held)]


@given(UNITS)
def test_a_visual_token_is_at_the_position_that_its_image_gives_it(units):
    # broken if text were counted among visual tokens, or an image took one position
    conversation = Conversation(lambda p0: True)
    with conversation.adding(units):
        pass
    expected = [unit for unit in units for _ in range(unit.n if isinstance(unit, Image) else 1)]
    assert conversation.n_visual == sum(isinstance(unit, Image) for unit in expected)
    assert conversation.n_tokens == len(expected)
    assert conversation.n_positions == len(expected) - 3 * units.count(WIDE)


def test_tiles_of_a_picture_with_nothing_between_are_one_image() -> None:
    """Breaks if tiles are given to the runtime one by one, or other pictures, or text between, are joined."""
    a = [Image("a", part, 4) for part in range(3)]
    b = Image("b", 0, 4)
    visual = {unit: Visual(np.full((4, 2), i, np.float32), 2, 2) for i, unit in enumerate((*a, b))}
    units = [1, *a, b, 7, a[0], 8, a[1]]
    pieces = pieces_of(units, [visual[unit] for unit in units if isinstance(unit, Image)])
    images = [piece for piece in pieces if isinstance(piece, Visual)]
    assert [(len(v.embd), v.nx, v.ny) for v in images] == [(12, 2, 6), (4, 2, 2), (4, 2, 2), (4, 2, 2)]
    assert images[0].embd[:, 0].tolist() == [0] * 4 + [1] * 4 + [2] * 4
    wide = [Visual(np.zeros((4, 2), np.float32), 2, 2), Visual(np.zeros((6, 2), np.float32), 3, 2)]
    assert [(p.nx, p.ny) for p in pieces_of(a[:2], wide) if isinstance(p, Visual)] == [(0, 0)]
    placed = [Visual(np.zeros((4, 2), np.float32), 2, 2, np.full((4, 4), i, np.int32), 2) for i in range(2)]
    (whole,) = pieces_of(a[:2], placed)
    assert isinstance(whole, Visual) and whole.n_pos == 4
    assert whole.pos is not None and whole.pos[:, 0].tolist() == [0] * 4 + [1] * 4
    ahead = [Visual(np.zeros((4, 2), np.float32), 2, 2, non_causal=True)] * 2
    assert len(pieces_of(a[:2], ahead)) == 2, "images whose tokens see each other stay two"
