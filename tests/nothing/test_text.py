"""TextStream: characters whole, stop strings never shown."""

import itertools

from hypothesis import given
from hypothesis import strategies as st

from st3_edge.runtime.text_stream import TextStream

# Few letters, so that stop strings overlap the text and each other.
LETTERS = st.text(alphabet="abé猫", max_size=24)
STOPS = st.lists(st.text(alphabet="abé猫", min_size=1, max_size=4), max_size=3)


def pushed(data: bytes, cuts: list[int], stop: list[str]) -> tuple[list[str], bool]:
    stream = TextStream(stop)
    edges = [0, *sorted(min(c, len(data)) for c in cuts), len(data)]
    shown = []
    for a, b in itertools.pairwise(edges):
        shown.append(stream.push(data[a:b]))
        if stream.stopped:
            break
    else:
        shown.append(stream.finish())
    return shown, stream.stopped


@given(LETTERS, STOPS, st.lists(st.integers(0, 80), max_size=8))
def test_the_text_does_not_depend_on_how_its_bytes_are_cut(text, stop, cuts):
    # broken by a decoder that forgets half a character, or a stop that is looked for within one token only
    whole = pushed(text.encode(), [], stop)
    parts = pushed(text.encode(), cuts, stop)
    assert ("".join(whole[0]), whole[1]) == ("".join(parts[0]), parts[1])


@given(LETTERS, STOPS, st.lists(st.integers(0, 80), max_size=8))
def test_no_stop_string_and_nothing_behind_it_is_shown(text, stop, cuts):
    # broken if the beginning of a stop string left before its end came
    shown, stopped = pushed(text.encode(), cuts, stop)
    joined = "".join(shown)
    assert text.startswith(joined)
    assert not any(s in joined for s in stop)
    assert stopped == any(s in text for s in stop)
    if not stopped:
        assert joined == text


@given(LETTERS, st.lists(st.integers(0, 80), max_size=8))
def test_every_piece_is_whole_characters(text, cuts):
    # broken if a multibyte character were decoded in halves
    shown, _ = pushed(text.encode(), cuts, [])
    assert "�" not in "".join(shown)


def test_text_that_cannot_become_a_stop_is_not_held_back():
    # broken if streaming waited for the longest stop string's length always
    stream = TextStream(["STOP"])
    assert stream.push(b"hello ") == "hello "
    assert stream.push(b"S") == ""
    assert stream.push(b"un") == "Sun"


@given(st.binary(max_size=30))
def test_bytes_that_are_no_text_do_not_fail(data):
    # broken by strict decoding: a model can generate any bytes
    stream = TextStream()
    assert isinstance(stream.push(data) + stream.finish(), str)
