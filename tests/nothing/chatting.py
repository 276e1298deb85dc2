"""Stand-ins for what `st3-edge chat` talks through and to."""

import contextlib

from st3_edge import StateError
from st3_edge.commands.chat import lines


class Console:
    """Takes down what goes where."""

    def __init__(self) -> None:
        self.out, self.err = "", ""

    def say(self, text="", end="\n") -> None:
        self.out += text + end

    def note(self, text, end="\n") -> None:
        self.err += text + end

    def error(self, text) -> None:
        self.err += f"st3-edge: error: {text}\n"

    def ticking(self):
        return contextlib.nullcontext()

    def stage(self, name) -> None: ...

    shades = " .-+#"


class Model:
    """Says `words`, piece by piece; takes down what it was asked and told."""

    last_report, n_ctx = None, 100

    def __init__(self, words=("one", " two")) -> None:
        self.words, self.asked, self.calls, self.closed = words, [], [], False

    def create_chat_completion(self, messages, **options):
        assert options["stream"]
        self.asked.append(messages)
        return self._chunks()

    def _chunks(self):
        try:
            yield {"choices": [{"delta": {"role": "assistant"}}]}
            for word in self.words() if callable(self.words) else self.words:
                yield {"choices": [{"delta": {"content": word}}]}
        finally:
            self.closed = True

    def reset(self) -> None:
        self.calls.append("reset")

    def save_state(self, path, messages) -> None:
        self.calls.append(("save", str(path)))
        self.kept = messages

    def load_state(self, path, check):
        if "bad" in str(path):
            raise StateError("it is bad")
        check(self.kept)
        self.calls.append(("load", str(path)))
        return self.kept


class Typed:
    """Lines of a terminal."""

    read = lines.Plain.read
