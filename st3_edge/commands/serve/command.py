"""What `st3-edge serve` does: checks the files, and becomes llama-server."""

from __future__ import annotations

import os
import shlex
import signal
import socket
import stat
import subprocess
import sys
from pathlib import Path
from typing import NoReturn

from ...config import Override, ST3Config
from ...errors import ConfigError, LibraryError, one_line
from ...files import gguf
from ...files.pair import check_adapter, check_pair
from ...native import libraries
from ...prompts.templates import VICUNA
from .. import loading, options, which
from ..console import Console, run
from .options import Arguments, place

# A prompt is pruned between the layers where it fits one logical batch: this holds a picture of LLaVA-1.6.
_BATCH = 4096
# What says how llama-server writes a conversation.
_TEMPLATE = (
    "--chat-template",
    "--chat-template-file",
    "--no-jinja",
    "LLAMA_ARG_NO_JINJA",
    "LLAMA_ARG_JINJA",
    "LLAMA_ARG_CHAT_TEMPLATE",
    "LLAMA_ARG_CHAT_TEMPLATE_FILE",
)


def main(console: Console, arguments: Arguments) -> NoReturn:
    """Replaces this process by llama-server: signals and the exit code are its own. Raises St3Error before that."""
    program = find("llama-server")
    ours = arguments.ours
    config = options.config(ours)
    arguments.check_files()
    arguments.check_names(lambda: _help(program))
    port = _port(ours.host, ours.port)
    found = header = None
    if not arguments.routes:
        found = run(console, lambda: which.find(console, ours))  # shows how far a download is
        header = check_pair(found.model, found.mmproj)
    elif ours.model or ours.hf:
        raise ConfigError("name one model, or several for llama-server to route to, not both")
    files = (found.model, found.mmproj) if found else (None, None)
    command = [str(program), *flags(arguments, config, header, *files), "--port", str(port), *arguments.theirs]
    if found:
        found.say(console)
    if not ours.host.endswith(".sock"):
        console.note(hints(arguments, found.words if found else [], port))
    become(command)


def become(command: list[str]) -> NoReturn:
    """Puts a program in the place of this process. Windows cannot: there this one waits for it, leaves Ctrl-C, which
    reaches both, to it, and ends with its exit code."""
    if sys.platform != "win32":
        os.execv(command[0], command)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    sys.exit(subprocess.run(command, check=False).returncode)


def find(program: str) -> Path:
    """The path of one of llama.cpp's programs. Raises LibraryError where this installation has none."""
    path = place(program)
    if not path.is_file() or not path.stat().st_mode & stat.S_IXUSR:
        raise LibraryError(f"{path} is missing: build the package without ST3_TOOLS=OFF")
    libraries.check_present()
    return path


def flags(
    arguments: Arguments, config: ST3Config, header: gguf.Header | None, model: str | None, mmproj: str | None
) -> list[str]:
    """llama-server's options, less the port: the model, its schedule, and what serving needs where nothing was said of
    it. header: of the text model; None: llama-server is a router."""
    given = [
        "--host",
        arguments.ours.host,
        "--override-kv",
        override(config.overrides(header.schedule if header else None)),
    ]
    if model and mmproj:
        given += ["--model", model, "--mmproj", mmproj]
    ours = arguments.ours
    for name, value in (("ctx-size", ours.n_ctx), ("threads", ours.threads), ("n-gpu-layers", ours.n_gpu_layers)):
        if value is not None:
            given += [f"--{name}", str(value)]
    for path, strength in loading.adapters(ours).items():
        if header:
            check_adapter(path, header)
        given += ["--lora", path] if strength == 1 else ["--lora-scaled", f"{path}:{strength:g}"]
    if not arguments.has("-b", "--batch-size", "LLAMA_ARG_BATCH"):
        given += ["--batch-size", str(_BATCH)]
    if not arguments.has("--cors-origins", "LLAMA_ARG_CORS_ORIGINS"):
        given += ["--cors-origins", "localhost"]
    template = header is not None and "tokenizer.chat_template" in header.metadata
    if header and not template and not arguments.has(*_TEMPLATE):
        given += ["--chat-template", VICUNA]
    return given


def override(values: dict[str, Override]) -> str:
    """Metadata as --override-kv takes it."""

    def typed(value: Override) -> str:
        if isinstance(value, bool):
            return f"bool:{str(value).lower()}"
        return f"{ {int: 'int', float: 'float', str: 'str'}[type(value)] }:{value}"

    return ",".join(f"{key}={typed(value)}" for key, value in values.items())


def hints(arguments: Arguments, words: list[str], port: int) -> str:
    """Where the server will be, and how clients find it. words: the options that choose its model."""
    ours = arguments.ours
    host = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(ours.host, f"[{ours.host}]" if ":" in ours.host else ours.host)
    url = f"http://{host}:{port}"
    secret = arguments.has("--api-key", "--api-key-file", "LLAMA_API_KEY", "LLAMA_ARG_API_KEY_FILE")
    again = ["st3-edge", "serve", *([] if ours.model or ours.hf else words), *_again(arguments.words)]
    return (
        f"{url}/      the web page, once the model is loaded\n"
        f"{url}/st3   which patches of a picture ST3 keeps\n"
        f"  openai      OpenAI(base_url='{url}/v1', api_key='{'YOUR_KEY' if secret else 'none'}')\n"
        f"  Open WebUI  OPENAI_API_BASE_URL={url}/v1{' OPENAI_API_KEY=YOUR_KEY' if secret else ''}\n"
        f"  llama-swap  cmd: {shlex.join(again)} --port ${{PORT}}\n"
    )


def _again(words: list[str]) -> list[str]:
    """The words of a command line, less the port and the key."""
    said, rest = list[str](), iter(words)
    for word in rest:
        name, equals, _ = word.partition("=")
        if name not in ("--port", "--api-key"):
            said.append(word)
            continue
        if not equals:
            next(rest, None)
        said += [name, "YOUR_KEY"] if name == "--api-key" else []
    return said


def _help(program: Path) -> str:
    """llama-server's; "" where it does not say it."""
    try:
        return subprocess.run([program, "--help"], capture_output=True, text=True, errors="replace", timeout=30).stdout
    except (OSError, subprocess.SubprocessError):
        return ""


def _port(host: str, port: int) -> int:
    """`port`, or a free one for 0. Raises ConfigError where it cannot be listened on."""
    if host.endswith(".sock"):
        return port
    if not 0 <= port <= 65535:
        raise ConfigError(f"--port must be from 0 to 65535, not {port}")
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
            return int(probe.getsockname()[1])
    except (OSError, UnicodeError) as e:  # the latter of a name that is no host's
        why = one_line(getattr(e, "strerror", None) or e)
        raise ConfigError(f"nobody can listen on {host} port {port}: {why} (--port chooses another)") from e
