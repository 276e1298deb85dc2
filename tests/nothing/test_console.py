"""What the command line shows of a wait, and how its lines look in a terminal."""

import io
import os
import threading
import time

import pytest

from st3_edge import ModelError, cli, demo
from st3_edge.commands import which
from st3_edge.commands.console import Console, amount
from st3_edge.commands.serve import command as serve
from st3_edge.files import hub
from st3_edge.native import libraries


class Screen(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def console(monkeypatch) -> Console:
    for name, value in (("TERM", "xterm"), ("COLUMNS", "60"), ("LINES", "20")):
        monkeypatch.setenv(name, value)
    made = Console()
    made.err = Screen()
    return made


def waited(console: Console, seconds: float, screen: Screen | None = None) -> str:
    """What is on the line after that many seconds of the stage that was begun."""
    name, since = console._stage
    console._stage = name, since - seconds
    console.err = screen or Screen()
    console.tick()
    return console.err.getvalue().replace("\r\x1b[K", "")


def test_a_wait_shows_what_is_done_and_what_remains(console):
    # broken if the time before a download went on counted for its speed, or a line passed the edge
    console.stage("downloading a/b", 0.5, "1.0 GB of 2.0 GB")
    assert "s left" not in waited(console, 2)
    console.stage("downloading a/b", 0.75, "1.5 GB of 2.0 GB, 9.9 MB/s")
    said = waited(console, 8)
    assert said.startswith("downloading a/b ") and "1.5 GB of 2.0 GB" in said and len(said) < 60
    console.stage("b", 0.0)
    console.stage("b", 0.2)
    assert waited(console, 10).endswith("... 10 s, 40 s left")
    console.stage(None)
    console.tick()


def test_a_short_wait_shows_nothing(console):
    # broken if each command flickered
    console.stage("x")
    console.tick()
    assert console.err.getvalue() == ""


def test_lines_end_between_words(console):
    # broken if a terminal cut a word, or an option at its dash
    console.note("a word " * 10 + "--an-option-with-dashes")
    lines = console.err.getvalue().replace("\x1b[2m", "").replace("\x1b[0m", "").splitlines()
    assert len(lines) == 2 and lines[1].endswith("--an-option-with-dashes")


@pytest.mark.parametrize(("name", "value"), [("NO_COLOR", "1"), ("TERM", "dumb")])
def test_plain_where_that_is_asked_for(console, monkeypatch, name, value):
    # broken if somebody who cannot use colors got them
    console.error("no")
    assert "\x1b[1;31m" in console.err.getvalue()
    monkeypatch.setenv(name, value)
    console.err = Screen()
    console.error("no")
    assert console.err.getvalue() == "st3-edge: error: no\n"


def test_a_download_shows_size_and_rate(console, monkeypatch):
    # broken if a person did not know whether to wait; what was there before is not the network's speed
    shown = []

    def pair(name, progress):
        for done in (1_000_000_000, 1_500_000_000, 2_000_000_000):
            progress(done, 4_000_000_000)
            shown.append(console._detail)
            time.sleep(0.05)
        return hub.Pair("m", "p", name)

    monkeypatch.setattr(hub, "pair", pair)
    assert which.download(console, "a/b") == ("m", "p", "a/b")
    assert [text.partition(",")[0] for text in shown] == [f"{n} GB of 4.0 GB" for n in ("1.0", "1.5", "2.0")]
    assert shown[0].endswith(" 0.0 MB/s") and not shown[2].endswith(" 0.0 MB/s")


def test_amounts():
    # broken if a small model were 0.0 GB
    assert [amount(n) for n in (24_400_000, 999_000_000, 4_700_000_000)] == ["24 MB", "999 MB", "4.7 GB"]


@pytest.mark.parametrize("command", [["ask", "P", "?"], ["chat"], ["inspect", "P", "?"], ["serve"], ["tune", "FOLDER"]])
def test_every_command_shows_how_far_a_download_is(command, monkeypatch, tmp_path):
    # broken if gigabytes came in silence
    shown = threading.Event()

    def pair(name, progress):
        progress(1, 4)
        assert shown.wait(10), "nothing was shown"
        raise ModelError("enough")

    monkeypatch.setattr(hub, "pair", pair)
    monkeypatch.setattr(Console, "tick", lambda console: shown.set() if console._stage else None)
    monkeypatch.setattr(serve, "find", lambda name: tmp_path / name)
    monkeypatch.setattr(serve, "_port", lambda *_: 1)
    place = {"P": str(demo.scenes()[0].picture), "FOLDER": str(demo.FOLDER)}
    monkeypatch.chdir(tmp_path)
    assert cli.main([*(place.get(word, word) for word in command), "--hf", "a/b"]) == 1
    assert shown.is_set()


@pytest.mark.parametrize("columns", ["1", "0", "5"])
def test_a_narrow_terminal_is_no_error(console, monkeypatch, columns):
    # broken by a ValueError: no line can be 0 wide
    monkeypatch.setenv("COLUMNS", columns)
    console.note("some words that are longer than that")
    assert "words" in console.err.getvalue()


def test_the_width_is_that_of_the_terminal_that_is_written_to(monkeypatch):
    # broken if standard output, a file, were asked: each line of a wait would stay on a narrow terminal
    monkeypatch.delenv("COLUMNS", raising=False)
    monkeypatch.setattr("os.get_terminal_size", lambda fd: os.terminal_size((30 if fd == 42 else 80, 20)))
    made = Console()
    made.err = Screen()
    made.err.fileno = lambda: 42
    made.stage("a wait whose words are longer than thirty columns")
    assert len(waited(made, 2, made.err)) == 29


def test_a_map_is_drawn_in_letters_that_there_are(console):
    # broken if "?" were drawn for each patch under a locale that is not UTF-8
    made = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    console.err = made
    assert len(console.shades.encode(made.encoding)) == 5


@pytest.mark.parametrize(
    ("command", "says"),
    [
        (["ask", "none.png", "?"], "none.png"),
        (["chat", "none.png"], "none.png"),
        (["inspect", "none.png", "?"], "none.png"),
        (["tune", "none"], "folder 'none'"),
        (["tune", "FOLDER", "--questions", "none.txt"], "none.txt"),
        (["tune", "FOLDER", "--output", "none/new.gguf"], "there is no folder 'none'"),
        (["bench", "--against", "off", "--image", "none.png"], "none.png"),
    ],
)
def test_a_mistake_is_told_before_a_download(command, says, monkeypatch, tmp_path, capfd):
    # broken if it came to light gigabytes later
    monkeypatch.setattr(hub, "pair", lambda *_, **__: pytest.fail("it was downloaded"))
    monkeypatch.setattr(libraries, "check_present", lambda: None)
    monkeypatch.chdir(tmp_path)
    assert cli.main([*(word.replace("FOLDER", str(demo.FOLDER)) for word in command), "--hf", "a/b"]) == 1
    assert says in capfd.readouterr().err
