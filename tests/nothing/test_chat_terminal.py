"""What a chat makes of what people drop and type, and what it draws."""

import base64
import io

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from st3_edge import ImageError
from st3_edge.commands.chat import lines, paths, terminal


@pytest.fixture
def picture(tmp_path):
    folder = tmp_path / "my holiday (1)"
    folder.mkdir()
    path = folder / "a'b photo.PNG"
    Image.new("RGB", (40, 20), "red").save(path)
    return str(path)


def escaped(path: str) -> str:
    return "".join(f"\\{c}" if c in " ()'" else c for c in path)


WRITTEN = {
    "as it is": lambda path: path,
    "backslashes": escaped,
    "double quotes": lambda path: f'"{path}"',
    "single quotes": lambda path: "'" + path.replace("'", "'\\''") + "'",
    "quotes of both kinds": lambda path: "'" + path.replace("'", "'\"'\"'") + "'",
    "quotes behind the folder": lambda path: f'{escaped(path[:5])}"{path[5:]}"',
    "a URL": lambda path: "file://" + path.replace(" ", "%20"),
    "with a space behind": lambda path: escaped(path) + " ",
}


@pytest.mark.parametrize("way", WRITTEN)
def test_a_dropped_picture_is_a_picture(picture, way):
    # broken if a terminal's way of writing a name made it a question about a path
    found, rest = paths.split(WRITTEN[way](picture))
    assert rest == "" and len(found) == 1
    assert found[0] == picture or found[0].startswith("file://")


def test_pictures_and_words_in_any_order(picture, tmp_path, monkeypatch):
    # broken if words were lost, or only the first picture were seen
    Image.new("RGB", (4, 4)).save(tmp_path / "b.jpg")
    monkeypatch.chdir(tmp_path)
    line = f"What differs in {escaped(picture)} and b.jpg, 'please'?"
    assert paths.split(line) == ([picture, "b.jpg"], "What differs in and, 'please'?")
    assert paths.split(f"{escaped(picture)} b.jpg  compare them") == ([picture, "b.jpg"], "compare them")


@pytest.mark.parametrize(
    ("line", "found", "rest"),
    [
        ("what is in {0}?", ["{0}"], "what is in?"),
        ("compare photo.png, {0}: which", ["photo.png", "{0}"], "compare, which"),
        ("it is (photo.png).", ["photo.png"], "it is."),
        ("“photo.png”, what is it?", ["photo.png"], "what is it?"),
        ("what is in file://{0}?", ["file://{0}"], "what is in?"),
        ("'Mum'\\''s photo.png' it's what?", ["Mum's photo.png"], "it's what?"),
        ("it's 'Mum'\"'\"'s photo.png', isn't it?", ["Mum's photo.png"], "it's, isn't it?"),
    ],
)
def test_a_picture_among_the_marks_of_a_sentence(tmp_path, monkeypatch, line, found, rest):
    # broken if a mark, or the way that a shell writes an apostrophe, became a part of the name
    for name in ("photo.png", "Mum's photo.png"):
        Image.new("RGB", (4, 4)).save(tmp_path / name)
    monkeypatch.chdir(tmp_path)
    path = str(tmp_path / "photo.png")
    assert paths.split(line.format(path)) == ([name.format(path) for name in found], rest)


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("my file", "my file"),
        ("'my file'", "my file"),
        ('"my file"', "my file"),
        ("my\\ file", "my file"),
        ("it's", "it's"),
        ("'Mum'\\''s'", "Mum's"),
    ],
)
def test_a_file_behind_a_command(text, name):
    # broken if /save wrote a file whose name has quotes
    assert paths.one(text) == name


def test_lines_stay_where_a_picture_is_among_them(tmp_path, monkeypatch):
    # broken if a table or a poem became one line because a picture was named with it
    Image.new("RGB", (4, 4)).save(tmp_path / "photo.png")
    monkeypatch.chdir(tmp_path)
    for text in ("photo.png\nis it:\n  a  b\n\n  c", "is it:\n  a  b\nphoto.png\n\n  c"):
        found, rest = paths.split(text)
        assert found == ["photo.png"] and rest == "is it:\n  a  b\n\n  c"


@pytest.mark.parametrize(
    "line", ["what is a.jpg?", "is b.png right", "It's 5 o'clock", 'he said "hi"', "a \\ b", "  x "]
)
def test_words_stay_words(line):
    # broken if an apostrophe opened a quotation, or a file that is not there were looked for
    assert paths.split(line) == ([], line.strip())


@pytest.mark.parametrize(
    "line",
    [
        "/none/at all.png",
        "~/none.jpg what is it?",
        "./none.webp",
        "what is in /none.png?",
        "C:\\none.png",
        "is 1/2.png right",
        "a.png",
        "a.png b.jpg",
    ],
)
def test_a_path_that_is_not_there_is_said(line):
    # broken if the model were asked about the letters of a path
    with pytest.raises(ImageError, match="there is no picture"):
        paths.split(line.replace("at all", "at_all"))


def wrapped(pieces, width: int) -> str:
    out = []
    wrap = terminal.Wrap(out.append, lambda: width)
    for piece in pieces:
        wrap.push(piece)
    wrap.finish()
    return "".join(out)


def test_words_are_not_broken_at_the_edge():
    # broken if a terminal cut them, or a piece's end were taken for a word's
    assert wrapped(["The sta", "r is bl", "ue, the ring too"], 12) == "The star is\nblue, the\nring too"
    assert wrapped(["日本語の文"], 5) == "日本\n語の\n文"


@given(st.text("ab \n語", max_size=80), st.integers(4, 20), st.integers(1, 7))
def test_wrapping_changes_spaces_alone(text, width, step):
    # broken if a character were lost, or a line passed the edge
    got = wrapped([text[i : i + step] for i in range(0, len(text), step)], width)
    assert "".join(got.split()) == "".join(text.split())
    assert all(terminal.cells(line.rstrip(" ")) < width for line in got.split("\n"))


def test_the_brightness_of_patches():
    # broken if rows and columns were swapped, a long row were broken, or what is in no whole square were lost
    def drawn(shares, width=80):
        return terminal.shaded(np.array(shares, float), " .:#", width)

    assert drawn([[1, 0, 0], [0.3, 0.7, 1]]) == ["##    ", "..::##"]
    assert drawn([[1, 1, 0, 0, 1]] * 3, 6) == ["##  ##", "##  ##"]
    assert drawn([[0, 0, 0, 0, 0], [1, 1, 1, 1, 1]], 6) == ["::::::"]


def test_several_lines_between_fences(monkeypatch):
    # broken if each line were asked alone
    monkeypatch.setattr("sys.stdin", io.StringIO('"""one\n\n two"""\nthree\n"""\nfour\n"""\n'))
    source = lines.source([], [])
    assert [lines.read(source) for _ in range(3)] == ["one\n\n two", "three", "four"]
    with pytest.raises(EOFError):
        lines.read(source)


@pytest.mark.parametrize(
    ("environment", "begins"),
    [
        ({"TERM": "xterm-kitty"}, "\x1b_Ga=T,f=100,"),
        ({"TERM": "xterm-256color", "TERM_PROGRAM": "iTerm.app"}, "\x1b]1337;File=inline=1;"),
        ({"TERM": "xterm-256color"}, None),
        ({"TERM": "xterm-kitty", "TMUX": "/x"}, None),
    ],
)
def test_pictures_are_drawn_where_a_terminal_can(monkeypatch, picture, environment, begins):
    # broken if a terminal were sent what it prints as letters
    for name in ("TERM", "TERM_PROGRAM", "TMUX", "KITTY_WINDOW_ID"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    drawn = terminal.picture(terminal.thumbnail(picture))
    assert (drawn is None) == (begins is None)
    if drawn and begins:
        assert drawn.startswith(begins)
        body = [part.partition(";")[2].partition("\x1b")[0] for part in drawn.split("\x1b_G")[1:]]
        data = "".join(body) or drawn.partition(":")[2].rstrip("\a\n")
        shown = Image.open(io.BytesIO(base64.b64decode(data)))
        assert shown.format == "PNG" and shown.size == (40, 20)
        assert shown.convert("RGB").getcolors() == [(800, (255, 0, 0))]


def test_a_large_picture_is_made_small(tmp_path):
    # broken if megabytes went to the terminal
    Image.new("RGB", (3000, 2000)).save(tmp_path / "a.png")
    assert max(Image.open(io.BytesIO(terminal.thumbnail(str(tmp_path / "a.png")))).size) <= 480
