"""`st3-edge chat` in a pseudo-terminal, as a person sits before it."""

import fcntl
import os
import pty
import re
import select
import shutil
import signal
import struct
import subprocess
import sys
import termios
import time
from pathlib import Path

import pytest

pyte = pytest.importorskip("pyte")

LONGEST = 60.0
COLUMNS, LINES = 80, 300
PROMPT = r"\n>$"


class Screen(pyte.Screen):
    """Answers what a program asks of its terminal."""

    def __init__(self, master: int) -> None:
        super().__init__(COLUMNS, LINES)
        self._master = master

    def write_process_input(self, data: str) -> None:
        os.write(self._master, data.encode())


class Terminal:
    """A chat in a terminal of 80 columns, high enough for all of it. text: what is on it."""

    def __init__(self, environment: dict[str, str], *arguments: str) -> None:
        self._master, slave = pty.openpty()
        fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", LINES, COLUMNS, 0, 0))
        command = [sys.executable, "-m", "st3_edge", "chat", "--threads", "1", *arguments]
        self.process = subprocess.Popen(
            command,
            stdin=slave,
            stdout=slave,
            stderr=slave,
            env={**environment, "TERM": "xterm"},
            start_new_session=True,
        )
        os.close(slave)
        self._screen = Screen(self._master)
        self._stream = pyte.ByteStream(self._screen)

    @property
    def text(self) -> str:
        return "\n".join(line.rstrip() for line in self._screen.display).rstrip()

    def _read(self) -> bool:
        """Whether the program may still write."""
        if not select.select([self._master], [], [], 0.1)[0]:
            return True
        try:
            data = os.read(self._master, 65536)
        except OSError:  # the other end is closed
            return False
        self._stream.feed(data)
        return bool(data)

    def expect(self, pattern: str, after: int = 0) -> int:
        """Waits for what matches in the text behind `after`; returns where it ends."""
        end = time.monotonic() + LONGEST
        while not (found := re.compile(pattern).search(self.text, after)):
            assert time.monotonic() < end, f"{pattern!r} never came:\n{self.text}"
            assert self._read() or re.compile(pattern).search(self.text, after), f"it ended:\n{self.text}"
        return found.end()

    def type(self, text: str) -> int:
        """Types; returns where the text ends before that."""
        at = len(self.text)
        os.write(self._master, text.encode())
        return at

    def leave(self) -> int:
        while self._read() and self.process.poll() is None:
            pass
        return self.process.wait(LONGEST)


@pytest.fixture
def chat(environment, tmp_path):
    """Starts a chat whose history is in a folder of the test's."""
    running = []

    def start(*arguments: str) -> Terminal:
        made = Terminal({**environment, "XDG_STATE_HOME": str(tmp_path / "state")}, *arguments)
        running.append(made)
        made.expect("/help shows")
        made.expect(PROMPT)
        return made

    yield start
    for terminal in running:
        terminal.process.kill()
        terminal.process.wait()


def test_a_dropped_picture_a_question_and_a_clean_way_out(chat, picture, tmp_path):
    # broken if a path were asked as text, a word were cut at the edge, or the shell's prompt came on our last line
    dropped = tmp_path / "my picture.png"
    shutil.copy(picture, dropped)
    terminal = chat()
    at = terminal.type(f"\x1b[200~{str(dropped).replace(' ', chr(92) + ' ')}\x1b[201~ Describe the image.\r")
    at = terminal.expect(r"the\s+digit 9 is at the bottom\s+left\.", at)
    answer = re.search(r"The image shows[^>]*bottom\s+left\.", terminal.text)[0]
    assert len(answer.split("\n")) > 2 and all(len(line) < 80 for line in answer.split("\n"))
    assert " ".join(answer.split()).startswith("The image shows 5 shapes on a light ground. A black ring")
    terminal.expect(PROMPT, at)
    at = terminal.type("/kept\r")
    terminal.expect("picture 1: of 576 visual tokens", at)
    terminal.expect(PROMPT, at)
    terminal.type("\x04")
    assert terminal.leave() == 0
    assert terminal._screen.cursor.x == 0


def test_history_completion_and_several_lines(chat, picture, tmp_path):
    # broken if Tab did nothing, another day's questions were forgotten, or lines were asked alone
    terminal = chat(picture)
    at = terminal.type("What color\x1b\ris the ring?\r")
    terminal.expect(r"\n[a-z]+\n", at)
    terminal.expect(PROMPT, at)
    at = terminal.type("/rep\t")
    terminal.expect("> /report", at - 1)
    terminal.type("\r")
    terminal.expect(r"\[ST3 kept \d+%", at)
    terminal.expect(PROMPT, at)
    terminal.type("exit\r")
    assert terminal.leave() == 0
    (history,) = (tmp_path / "state").rglob("chat-history")
    assert history.stat().st_mode & 0o077 == 0
    assert "+What color\n+is the ring?\n" in history.read_text()
    again = chat(picture)
    at = again.type("\x1b[A\x1b[A\x1b[A")  # exit, /report, the question
    again.expect("is the ring", at)


def test_ctrl_c_stops_an_answer_and_then_says_how_to_leave(chat, picture):
    # broken if the program ended, or the answer went on
    terminal = chat(picture, "--max-tokens", "0", "--temperature", "3", "--seed", "1")
    at = terminal.type("Describe the image.\r")
    terminal.expect(r"\n\S+ \S+ ", at)
    at = terminal.type("\x03")
    at = terminal.expect(PROMPT, at)
    at = terminal.type("\x03")
    terminal.expect(r"Ctrl-D or /quit leaves", at)
    terminal.expect(PROMPT, at)
    terminal.type("/quit\r")
    assert terminal.leave() == 0


def test_two_interrupts_in_a_long_prefill_leave_the_chat(chat, scenes):
    # broken if the second one ended the process, and with it the conversation
    pictures = [str(scene.picture) for scene in scenes]
    terminal = chat(pictures[0], "--n-ctx", "8192", "--n-ubatch", "8192", "--temperature", "0", "--max-tokens", "4")
    at = terminal.type("What color is the star?\r")
    answer = r"\n(the star is \w+|\w+)\n"
    first = terminal.expect(answer, at) and re.compile(answer).search(terminal.text, at)
    at = terminal.expect(PROMPT, at)
    for name in [*pictures, *pictures]:
        at = terminal.type(f"/image {name}\r")
        at = terminal.expect(PROMPT, at)
    at = terminal.type("Describe the image.\r")
    time.sleep(0.3)
    for _ in range(2):
        terminal.process.send_signal(signal.SIGINT)
        time.sleep(0.02)
    at = terminal.expect(PROMPT, at)
    for line in ("/reset", f"/image {pictures[0]}"):
        at = terminal.type(f"{line}\r")
        at = terminal.expect(PROMPT, at)
    at = terminal.type("What color is the star?\r")
    terminal.expect(re.escape(first[0]), at)
    terminal.expect(PROMPT, at)
    assert "Traceback" not in terminal.text
    terminal.type("/quit\r")
    assert terminal.leave() == 0


def test_another_budget_is_another_report(chat, picture):
    # broken if the model were not loaded with it, or the conversation were lost
    terminal = chat(picture)
    at = terminal.type("How many shapes are there?\r")
    at = terminal.expect(r"\n5(?=\n)", at)
    terminal.expect(PROMPT, at)
    at = terminal.type("/budget 50%\r")
    terminal.expect(r"budget 0\.5: ", at)
    terminal.expect(PROMPT, at)
    at = terminal.type("Is there a red diamond?\r")
    terminal.expect(PROMPT, terminal.expect(r"\n\S+(?=\n)", at))
    at = terminal.type("/report\r")
    terminal.expect(r"ST3 kept (49|50|51)% of 576", at)


def test_no_color_where_nobody_wants_it(environment, picture):
    # broken if NO_COLOR, or a terminal that knows none, were sent colors
    for more, colored in (({}, True), ({"NO_COLOR": "1"}, False), ({"TERM": "dumb"}, False)):
        master, slave = pty.openpty()
        command = [sys.executable, "-m", "st3_edge", "ask", picture, "?", "--budget", "7"]
        done = subprocess.Popen(command, stdout=slave, stderr=slave, env={**environment, "TERM": "xterm", **more})
        done.wait(60)
        os.close(slave)
        said = os.read(master, 65536)
        os.close(master)
        assert b"error:" in said and (b"\x1b[" in said) == colored


def test_a_script_is_no_terminal(environment, picture):
    # broken if colors, prompts or broken lines came into what another program reads
    command = [sys.executable, "-m", "st3_edge", "chat", "--threads", "1", picture]
    done = subprocess.run(
        command, input=b"Describe the image.\n", capture_output=True, env=environment, timeout=LONGEST
    )
    assert done.stdout.count(b"\n") == 1 and b"\x1b" not in done.stdout + done.stderr
    assert Path(picture).is_file()
