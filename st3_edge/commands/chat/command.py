"""What `st3-edge chat` does."""

from __future__ import annotations

import argparse
import sys
import threading
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

from ...config import ST3Config
from ...errors import ConfigError, ContextError, ImageError, OutputError, St3Error, one_line
from ...files.pair import projector_of
from ...llava import Llava
from ...prompts import images
from ...prompts.messages import parts_of
from ...report import layers
from ...runtime import state
from .. import loading, options, which
from ..console import Console, run
from ..inspect.seen import see
from ..parser import suggestion
from . import lines, paths, saved, terminal

_HELP = """\
Ask, and drop or paste a picture's path where you like: several pictures are looked at together.
/image FILE...  show pictures with the next question
/paste          show the picture of the clipboard with the next question
/retry          another answer to the last question
/budget B       keep this share of the visual tokens, above 0 to 1 (1: all)
/system TEXT    instructions before the conversation (- removes them)
/kept           which parts of the pictures the last answer still saw
/report         what ST3 did for the last answer
/save FILE      keep the conversation
/load FILE      go on with one that was kept
/clear          begin anew
/quit           leave (exit and Ctrl-D do too; Ctrl-C stops an answer)
Alt-Enter begins another line; so does all between \"\"\" and \"\"\"."""
_COMMANDS = [line.split()[0] for line in _HELP.splitlines() if line.startswith("/")]
_ALIASES = {"/exit": "/quit", "/bye": "/quit", "/reset": "/clear", "/?": "/help", "/regenerate": "/retry"}
_WITH_FILES = ("/image", "/save", "/load")
_LEAVE = ("exit", "quit", "/quit")
_RETRY_TEMPERATURE = 0.8


def main(console: Console, arguments: argparse.Namespace) -> int:
    """Loads the model and talks; returns the exit code."""
    config = options.config(arguments)
    if arguments.load:  # check before the slow model load
        state.check_saved(paths.one(arguments.load))
    pictures = [images.data_url(picture) for picture in arguments.images]
    threading.Thread(target=lines.warm_up, daemon=True).start()
    found = run(console, lambda: which.find(console, arguments))

    def load(config: ST3Config) -> Llava:
        with console.ticking():
            return loading.load(console, arguments, config, found)

    chat = Chat(console, run(console, lambda: load(config)), [], options.answer(arguments), config, load)
    try:
        if arguments.load:
            chat.restore(paths.one(arguments.load))
        chat.system = arguments.system or chat.system
        chat.pictures += pictures
        found.say(console)
        if note := options.idle(arguments):
            console.note(note)
        console.note(f"{found.name}: ask, or drop a picture here. /help shows what else there is.")
        if pictures:
            console.note(f"({len(pictures)} to look at, shown with the next question)")
        return chat.loop()
    finally:
        chat.close()


class Chat:
    """The messages so far, and what a line does. `pictures`: data URLs, shown with the next question; `options`: of
    every answer, as `options.answer` gives them; `config` and `load`: the schedule, and what loads the model with
    another one."""

    def __init__(
        self,
        console: Console,
        llava: Llava,
        pictures: list[str],
        options: dict[str, Any],
        config: ST3Config | None = None,
        load: Callable[[ST3Config], Llava] | None = None,
    ) -> None:
        self._console, self._llava = console, llava
        self.pictures, self._options = pictures, options
        self._chosen = self._config = config or ST3Config()  # as the chat began, and in use
        self._load = load
        self._messages: list[dict[str, Any]] = []
        self._asked_about: list[Any] = []  # the pictures that the last answer is about
        self.system = ""
        self._is_terminal = sys.stdin.isatty() and sys.stdout.isatty()
        self._script = False  # lines come from no terminal
        self._failed = False

    def close(self) -> None:
        """Frees the model."""
        self._llava.close()

    def loop(self) -> int:
        """Reads lines and does them until the input ends; returns the exit code. Raises KeyboardInterrupt where lines
        come from no terminal: nobody is there to go on."""
        source = lines.source([*_COMMANDS, "/help"], _WITH_FILES)
        self._script = isinstance(source, lines.Plain)
        interrupted = False
        while True:
            try:
                if interrupted:  # here, where one more is seen as well
                    interrupted = False
                    self._console.note("(Ctrl-D or /quit leaves)")
                line = lines.read(source)
                if line.lower() in _LEAVE or self._command(line) == "/quit":
                    break
                if line:
                    self.do(line)
            except EOFError:
                break
            except KeyboardInterrupt:
                if self._script:
                    raise
                interrupted = True
        return int(self._script and self._failed)

    def do(self, line: str) -> None:
        """Does a line, and says what goes wrong; an output that cannot be written is raised."""
        try:
            self._do(line)
        except OutputError:  # nobody would read the next answer either
            raise
        except St3Error as e:
            self._failed = True
            self._console.error(one_line(e))

    def _does(self) -> dict[str, Callable[[str], None]]:
        """The commands, less the one that leaves."""
        return {
            "/image": self._image,
            "/paste": self._paste,
            "/retry": self._retry,
            "/budget": self._budget,
            "/system": self._set_system,
            "/kept": self._kept,
            "/report": self._report,
            "/save": self._save,
            "/load": lambda rest: self.restore(paths.one(rest)),
            "/clear": self._clear,
            "/help": self._help,
        }

    def _command(self, word: str) -> str:
        """The command that a word means: the beginning of one is enough."""
        word = _ALIASES.get(word, word)
        begun = [name for name in (*self._does(), "/quit") if len(word) > 1 and name.startswith(word)]
        return begun[0] if len(begun) == 1 else word

    def _do(self, line: str) -> None:
        word, _, rest = line.partition(" ")
        command, rest = self._command(word), rest.strip()
        does = self._does()
        if command in does:
            if command in _WITH_FILES and not rest:
                raise ConfigError(f"{command} needs a file")
            does[command](rest)
            return
        found, question = paths.split(line)
        if not found and line.startswith("/"):
            first = line.split()[0]
            if Path(first).is_dir():
                raise ImageError(f"{first!r} is a folder, not a picture")
            raise ConfigError(f"there is no command {first!r}{suggestion(first, does)} (/help lists them)")
        shown = [images.data_url(path) for path in found]  # all of them, or none
        if question:
            for picture in shown:
                self._draw(picture)
            self._ask(question, shown)
        elif shown:
            self._attach(shown)

    def _help(self, _: str) -> None:
        self._console.note(_HELP)

    def _image(self, rest: str) -> None:
        self._attach([images.data_url(path) for path in paths.unquoted(rest)])

    def _paste(self, _: str) -> None:
        self._attach(_of_clipboard())

    def _attach(self, pictures: list[str]) -> None:
        self.pictures += pictures
        for picture in pictures:
            self._draw(picture)
        self._console.note("(shown with the next question)")

    def _draw(self, picture: str) -> None:
        if self._is_terminal and (drawn := terminal.picture(terminal.thumbnail(picture))):
            self._console.say(drawn, end="")

    def _retry(self, _: str) -> None:
        if not self._messages:
            raise ConfigError("there is no question to answer again")
        *before, question, _answer = self._messages
        others, self._messages = self._messages, before
        changed = {}
        if not self._options.get("temperature"):  # or the same words would come again
            changed = {"temperature": _RETRY_TEMPERATURE}
            self._console.note(f"(temperature {_RETRY_TEMPERATURE}, as without chance the same words would come again)")
        try:
            if not self._answer_to(question, {**self._options, **changed}):
                self._messages = others
        except BaseException:
            self._messages = others
            raise

    def _budget(self, rest: str) -> None:
        if not rest:
            self._console.note(f"(the budget is {self._budget_now()})")
            return
        try:
            budget = float(rest.rstrip("%")) / (100 if rest.endswith("%") else 1)
        except ValueError as e:
            raise ConfigError(f"/budget takes a number above 0 to 1, as 0.3, not {rest!r}") from e
        if self._load is None:
            raise ConfigError("the model cannot be loaded again")
        preset = None if self._chosen.preset == "off" else self._chosen.preset
        config = replace(self._chosen, budget=budget, keep=None, preset=preset)
        if budget == 1:
            config = ST3Config(preset="off")
        self._llava.close()  # memory may not hold two
        try:
            self._llava = self._load(config)
        except BaseException as e:
            self._llava = self._load(self._config)
            if isinstance(e, KeyboardInterrupt) and not self._script:
                self._console.note("(stopped: the budget stays as it was)")
                return
            raise
        self._config = config
        self._console.note(f"(budget {budget:g}: the next question reads the conversation again)")

    def _budget_now(self) -> str:
        if self._config.budget is not None or self._config.preset == "off":
            return "1" if self._config.preset == "off" else f"{self._config.budget:g}"
        report = self._llava.last_report
        if report and report.mode == "pruned-prefill":
            return f"{report.schedule.budget:.2g}, by the last answer"
        return "that of the model file or preset: /budget tells its number after an answer"

    def _set_system(self, rest: str) -> None:
        if rest:
            self.system = "" if rest == "-" else rest
        self._console.note(f"(system: {self.system})" if self.system else "(no system message)")

    def _kept(self, _: str) -> None:
        report = self._llava.last_report
        trace = report.trace if report else None
        if not report or not trace or not trace.images:
            self._console.note("(no answer about a picture yet)")
            return
        llava, pictures = self._llava, [images.load(picture) for picture in self._asked_about]
        kind = projector_of(llava.mmproj_path)
        seen = see("", self._asked_about, pictures, llava.tiles, report, llava.model_path, kind)
        held, shares = seen.held(seen.n_steps - 1), seen.shares(seen.n_steps - 1)
        for number, picture in enumerate(seen.pictures, 1):
            for view in picture.views:
                for line in terminal.shaded(shares[view.tokens], self._console.shades, self._console.width()):
                    self._console.note(line)
            of_picture = held[:, picture.first : picture.first + picture.n].sum(axis=1)
            still = ", ".join(f"{n} in {layers(stage)}" for stage, n in zip(seen.stages, of_picture, strict=True))
            self._console.note(f"picture {number}: of {picture.n} visual tokens, still seen at the end: {still}")
        if seen.unknown:
            self._console.note(f"(patches are not shown: {seen.unknown})")
        else:
            self._console.note("(the brighter a patch, the more of the model's layers still saw it)")

    def _report(self, _: str) -> None:
        report = self._llava.last_report
        self._console.note(report.summary() if report else "(no answer yet)")

    def _save(self, rest: str) -> None:
        path = Path(paths.one(rest))
        state.check_replaceable(path)
        self._llava.save_state(path, [*self._system(), *self._messages])
        self._console.note(f"(kept in {path})")

    def restore(self, path: str) -> None:
        """Goes on with the conversation of a file. Raises StateError, and goes on with this one then."""
        found: list[saved.Conversation] = []
        self._llava.load_state(path, lambda messages: found.append(saved.conversation(messages)))
        ((self.system, self._messages, question),) = found
        self.pictures = [part["image"] for part in question if part["type"] == "image"]
        n = len(self._messages) // 2
        self._console.note(f"({n} question{'s' * (n != 1)} so far)")
        if question:
            text = "".join(part["text"] for part in question if part["type"] == "text")
            self._console.note(f"(its last question has no answer, ask it again: {text})")

    def _clear(self, _: str) -> None:
        self._llava.reset()
        self._messages = []
        self.pictures.clear()
        self._console.note("(begun anew)")

    def _ask(self, text: str, shown: list[str]) -> None:
        """Asks about the pictures that wait, and those that are `shown` with this question. Where nothing is answered,
        the conversation stays as it was, and only the former go on waiting."""
        before = [*self._messages], [*self.pictures]
        pictures, notes, answered = [*self.pictures, *shown], list[str](), False
        own = len(pictures)
        try:
            while True:
                question = {"role": "user", "content": [*map(_part, pictures), {"type": "text", "text": text}]}
                self.pictures = []
                try:
                    answered = self._answer_to(question, self._options, notes)
                    return
                except ContextError:
                    self.pictures = pictures
                    if not (note := self._forget(own)):
                        raise
                    pictures = self.pictures
                    notes.append(note)
        finally:
            if not answered:
                self._messages, self.pictures = before
                if shown:
                    self._console.note("(not answered: name its pictures again with the next question)")

    def _answer_to(self, question: dict[str, Any], how: dict[str, Any], notes: Iterable[str] = ()) -> bool:
        """Streams an answer, behind `notes`, and adds both to the conversation; False where nothing was said."""
        said: list[str] = []
        stopped = False
        wrap = terminal.Wrap(lambda text: self._console.say(text, end="")) if self._is_terminal else None
        try:
            with self._console.ticking():
                for piece in self._pieces(question, how):
                    if piece and not any(said):
                        for note in notes:
                            self._console.note(note)
                    said.append(piece)
                    if wrap:
                        wrap.push(piece)
                    else:
                        self._console.say(piece, end="")
        except KeyboardInterrupt:  # what was said before it counts
            stopped = True
        if wrap:
            wrap.finish()
        self._console.say()
        if any(said):
            self._messages += [question, {"role": "assistant", "content": "".join(said)}]
        if stopped and self._script:
            raise KeyboardInterrupt
        report = self._llava.last_report
        if report and not stopped and (note := options.cut(report, how, self._llava.n_ctx)):
            self._console.note(note)
            if any(said) and options.is_full(report, how):
                self._console.note(self._forget(0))  # or the next answer would be as short
        return any(said)

    def _pieces(self, question: dict[str, Any], how: dict[str, Any]) -> Any:
        messages = [*self._system(), *self._messages, question]
        pictures = [part["image"] for message in messages for part in _pictures_of(message)]
        before = self._llava.last_report
        for chunk in self._llava.create_chat_completion(messages, stream=True, trace=True, **how):
            if self._llava.last_report is not before:  # the prompt was read
                self._asked_about = pictures
            yield chunk["choices"][0]["delta"].get("content", "")

    def _system(self) -> list[dict[str, Any]]:
        return [{"role": "system", "content": self.system}] if self.system else []

    def _forget(self, own: int) -> str:
        """Makes room in the context: the older half of the questions goes, less their pictures; where there is none,
        the oldest picture that is not one of the `own` last. Returns what to tell; "" where nothing can go."""
        n = len(self._messages) // 2
        if n:
            gone = -(-n // 2)
            pictures = [part for message in self._messages[: 2 * gone] for part in _pictures_of(message)]
            del self._messages[: 2 * gone]
            if self._messages:
                first = self._messages[0]
                self._messages[0] = {**first, "content": [*pictures, *parts_of(first)]}
            else:
                self.pictures = [*(part["image"] for part in pictures), *self.pictures]
            what = "the oldest question is" if gone == 1 else f"the {gone} oldest questions are"
            more = "forgotten, and their pictures kept" if pictures else "forgotten"
        elif len(self.pictures) > own:
            self.pictures = self.pictures[1:]
            what, more = "the oldest picture is", "forgotten"
        else:
            return ""
        return f"(the context of {self._llava.n_ctx} tokens is full: {what} {more}; /clear begins anew)"


def _part(source: str) -> dict[str, Any]:
    return {"type": "image", "image": source}


def _pictures_of(message: dict[str, Any]) -> list[Any]:
    return [part for part in parts_of(message) if part["type"] == "image"]


def _of_clipboard() -> list[str]:
    """The pictures of the clipboard as `data:` URLs. Raises ImageError where there are none."""
    import base64
    import io

    from PIL import Image, ImageGrab

    try:
        found = ImageGrab.grabclipboard()
    except Exception as e:  # no clipboard here, no program that reads it, or a picture that it cannot read
        raise ImageError(f"the clipboard cannot be read: {one_line(e)}") from e
    if isinstance(found, Image.Image):
        out = io.BytesIO()
        found.save(out, "PNG")
        return ["data:image/png;base64," + base64.b64encode(out.getvalue()).decode()]
    if found:
        return [images.data_url(path) for path in found]
    raise ImageError("the clipboard holds no picture")
