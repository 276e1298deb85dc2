"""What of a `st3-edge serve` command line is ours, and what llama-server's."""

from __future__ import annotations

import argparse
import difflib
import os
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from ...errors import ConfigError
from ...native import libraries
from .. import options, settings

DESCRIPTION = "Serves a vision model with ST3 on: llama-server of this package, with its web page and its APIs."
EPILOG = (
    "Every other option goes to llama-server as it is (-c, -np, -ngl, --api-key, ...; `{} --help` lists them). "
    "Example: st3-edge serve -m llava.gguf --budget 0.3 -c 8192"
)

_CLOSE = 0.8  # of difflib's ratio

# What says which models llama-server serves: there is none for us to choose then.
_ROUTER = ("--models-dir", "--models-preset", "--model-url", "-mu", "--docker-repo", "-dr")
_ROUTER_VARIABLES = ("LLAMA_ARG_MODELS_DIR", "LLAMA_ARG_MODELS_PRESET")  # where no model is named
# Those that name other files than the pair that we choose: llama-server would download over that pair, or not use them.
_MODEL, _HALF = "-m or --hf names the model", "--mmproj names the file"
_ELSEWHERE = {
    "-mmu": _HALF,
    "--mmproj-url": _HALF,
    "-hff": "--hf OWNER/REPO:QUANT chooses the file",
    "--hf-file": "--hf OWNER/REPO:QUANT chooses the file",
    "-hfr": "--hf names the repository",
    "LLAMA_ARG_MMPROJ_URL": _HALF,
    "LLAMA_ARG_MODEL_URL": _MODEL,
    "LLAMA_ARG_DOCKER_REPO": _MODEL,
    "LLAMA_ARG_HF_REPO": _MODEL,
    "LLAMA_ARG_HF_FILE": _MODEL,
}


@dataclass(frozen=True)
class Arguments:
    """ours: the options of `parser`; theirs: llama-server's, in order; words: all as they were typed."""

    ours: argparse.Namespace
    theirs: list[str]
    words: list[str]

    def has(self, *names: str) -> bool:
        """Whether llama-server gets one of these options, or variables of its environment."""
        return any(word.partition("=")[0] in names for word in self.theirs) or any(map(os.environ.get, names))

    @property
    def routes(self) -> bool:
        """Whether llama-server's own options or environment say which models there are."""
        return self.has(*_ROUTER) or (not (self.ours.model or self.ours.hf) and self.has(*_ROUTER_VARIABLES))

    def check_files(self) -> None:
        """Raises ConfigError where llama-server would take other files than the pair that we choose."""
        for name, instead in _ELSEWHERE.items():
            if not self.routes and self.has(name):
                raise ConfigError(f"{name} names other files than those that are served: {instead}")

    def check_names(self, their_help: Callable[[], str]) -> None:
        """Raises ConfigError for an option that is close to one of ours, and not in llama-server's help."""
        ours = [name for action in parser(argparse.ArgumentParser)._actions for name in action.option_strings]
        for word in self.theirs:
            name = word.partition("=")[0]
            close = name.startswith("--") and difflib.get_close_matches(name, ours, 1, _CLOSE)
            if close and (known := their_help()) and not re.search(rf"(?<![\w-]){re.escape(name)}(?![\w-])", known):
                raise ConfigError(f"there is no option {name}, did you mean {close[0]}?")


def place(program: str) -> Path:
    """Where one of llama.cpp's programs is looked for."""
    # Windows finds a program's libraries in its own folder alone
    folder = libraries.folder()
    return folder / f"{program}.exe" if sys.platform == "win32" else folder.parent / "bin" / program


def _layers(text: str) -> int | str:
    """What llama-server takes for -ngl."""
    try:
        return text if text in ("auto", "all") else int(text)
    except ValueError as e:
        raise argparse.ArgumentTypeError(f"a whole number, auto or all, not {text!r}") from e


def parser(kind: type[argparse.ArgumentParser]) -> argparse.ArgumentParser:
    """The parser of our options."""
    made = kind(
        prog="st3-edge serve",
        usage="st3-edge serve [-m M.gguf | --hf OWNER/REPO[:QUANT]] [options]",
        description=DESCRIPTION,
        epilog=EPILOG.format(place("llama-server")),
        allow_abbrev=False,
    )
    model = options.add_files(made)
    options.add_lora(model)
    model.add_argument("--n-ctx", type=int, metavar="N", help="positions of all slots' contexts (llama-server's -c)")
    model.add_argument("--threads", type=int, metavar="N", help="CPU threads (llama-server's -t)")
    model.add_argument("--n-gpu-layers", type=_layers, metavar="N", help="layers on the GPU (llama-server's -ngl)")
    where = made.add_argument_group("address")
    host = os.environ.get("LLAMA_ARG_HOST") or "127.0.0.1"
    port = os.environ.get("LLAMA_ARG_PORT") or 8080
    where.add_argument("--host", default=host, metavar="H", help="address to listen on (default %(default)s)")
    where.add_argument("--port", type=int, default=port, metavar="N", help="port; 0: a free one (default %(default)s)")
    options.add_schedule(made, without=("keep",))  # which is llama-server's too
    return made


def parse(kind: type[argparse.ArgumentParser], words: Sequence[str]) -> Arguments:
    """Splits a command line. Leaves by itself for --help, and for bad values of our own options."""
    known = parser(kind)
    ours, theirs = list[str](), list[str]()
    names = {name: action for action in known._actions for name in action.option_strings}
    rest = iter(words)
    for word in rest:
        action = names.get(word.partition("=")[0])
        if action is None:
            theirs.append(word)
            continue
        ours.append(word)
        if "=" not in word and action.nargs != 0:
            ours += [value for value in (next(rest, None),) if value is not None]
    if re.search(r"(?<!\S)--keep[ =]\S*\.", " ".join(theirs)):
        known.error("--keep is llama-server's own, a whole number of tokens; --budget says how much ST3 keeps")
    found = known.parse_args(ours)
    return Arguments(known.parse_args(ours) if settings.use(known) else found, theirs, list(words))
