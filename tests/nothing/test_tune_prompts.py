"""Pictures and questions of `st3-edge tune`."""

from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from st3_edge import ImageError, PromptError
from st3_edge.commands.tune import prompts

NAMES = ["a.png", "b.jpg", "my cat.png"]
WORDS = st.text(st.characters(exclude_categories=("Cc", "Cs")), min_size=1).map(str.strip).filter(bool)
LINES = st.tuples(st.sampled_from([None, *NAMES]), WORDS)


@given(st.lists(LINES, min_size=1), st.sampled_from(["\n", "\r\n", "\n\n", " \n"]), st.booleans())
def test_what_is_written_is_read(lines, end, last):
    # broken if a line, a name with a space, or the text behind a tab were lost
    text = end.join(q if name is None else f"{name}\t{q}" for name, q in lines) + end * last
    assert prompts.parse_questions(text, NAMES) == lines


@given(st.text() | st.text("a.png\t\n \r?"))
def test_any_text_is_questions_or_one_line_of_error(text):
    # broken by an exception of another kind, or a question that is blank or about a picture that is not there
    try:
        read = prompts.parse_questions(text, NAMES)
    except PromptError as e:
        assert "\n" not in str(e)
    else:
        assert read and all(q.strip() and (name is None or name in NAMES) for name, q in read)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "no question"),
        ("\n \n", "no question"),
        ("What?\nc.png\tWhat?", "line 2: there is no picture 'c.png'"),
        ("../a.png\tWhat?", "no picture"),
        ("\tWhat?", "no picture ''"),
        ("a.png\t ", "line 1: nothing is asked about 'a.png'"),
    ],
)
def test_bad_questions_are_told_by_line(text, says):
    # broken if a slip in a file were read as something else
    with pytest.raises(PromptError, match=says):
        prompts.parse_questions(text, NAMES)


@pytest.mark.parametrize(
    ("data", "says"), [(b"\xff\xfe", "UTF-8"), (b"x" * (2**20 + 1), "longer"), (None, "No such file")]
)
def test_files_that_hold_no_questions_are_told(tmp_path, data, says):
    # broken by a UnicodeDecodeError, or by reading what has no end
    path = tmp_path / "questions.txt"
    if data is not None:
        path.write_bytes(data)
    with pytest.raises(PromptError, match=says):
        prompts.read_questions(str(path), NAMES)


def test_a_byte_order_mark_is_no_part_of_the_first_question(tmp_path):
    # broken by plain utf-8, which editors of some systems do not write
    path = tmp_path / "questions.txt"
    path.write_bytes("\ufeffWhat?".encode())
    assert prompts.read_questions(str(path), NAMES) == [(None, "What?")]


def test_pictures_are_found_by_their_endings_in_order(tmp_path):
    # broken if other files, or folders, were taken for pictures
    for name in ("b.PNG", "a.jpg", "notes.txt", "c.webp", "d.avif", "e.HEIC"):
        (tmp_path / name).touch()
    (tmp_path / "folder.png").mkdir()
    assert [p.name for p in prompts.pictures_in(str(tmp_path))] == [*("a.jpg", "b.PNG", "c.webp", "d.avif", "e.HEIC")]
    for folder, says in ((tmp_path / "folder.png", "no picture"), (tmp_path / "none", "cannot be read")):
        with pytest.raises(ImageError, match=says):
            prompts.pictures_in(str(folder))


@given(st.integers(1, 30), st.integers(0, 5), st.integers(0, 40), st.integers(1, 100))
def test_pairs_are_spread_over_the_pictures(n_pictures, n_general, n_own, n):
    # broken if one picture got a second question before another had its first, or pairs were drawn anew each time
    pictures = [Path(f"{i:02}.png") for i in range(n_pictures)]
    questions = [(None, f"general {i}") for i in range(n_general)]
    questions += [(f"{i % n_pictures:02}.png", f"own {i}") for i in range(n_own)]
    if not questions:
        return
    pairs = prompts.choose(pictures, questions, n)
    assert pairs == prompts.choose(pictures, questions, n)
    possible = {(p, q) for p in pictures for name, q in questions if name in (None, p.name)}
    assert len(pairs) == len(set(pairs)) == min(n, len(possible)) and set(pairs) <= possible
    assert [p for p, _ in pairs] == sorted(p for p, _ in pairs), "a picture's questions stand together"
    asked, most = Counter(p for p, _ in pairs), Counter(p for p, _ in possible)
    for p in most:
        if len(pairs) >= len(most):
            assert asked[p] >= min(most[p], max(asked.values()) - 1)
    if n_pictures == n_general == n and not n_own:
        assert len({q for _, q in pairs}) == n, "the general ones take turns"
