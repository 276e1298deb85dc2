"""Vision models of every family by way of the server, and over several machines: each decoder that is pruned, M-RoPE
with deepstack, images whose tokens see each other, tiles, rows that tokens end."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from serving import ROOT, Server, Start, message, text

for package in ("torch", "transformers", "safetensors"):
    pytest.importorskip(package, reason=f"{package} is not installed: no models to make")

sys.path[:0] = [str(ROOT / folder) for folder in ("tests", "tests/native", "scripts")]

from families.convert import Converter  # noqa: E402
from families.files import MEDIA, write_pair  # noqa: E402
from test_rpc import wait_for  # noqa: E402

from st3_edge import Llava, ST3Config  # noqa: E402

SCHEDULE = {"start": 2, "stride": 2, "budget": 0.6}
OPTIONS = [word for name, value in SCHEDULE.items() for word in (f"--{name}", str(value))]
QUESTIONS = ("What is it?", "Describe the picture.")
Files = tuple[Path, Path]
families = pytest.mark.parametrize("name", MEDIA)


@pytest.fixture(scope="module")
def files(upstream: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str], Files]]:
    """Writes a family's two files once."""
    converter, made = Converter(upstream), {}

    def make(name: str) -> Files:
        if name not in made:
            made[name] = write_pair(name, tmp_path_factory.mktemp(name), converter)
        return made[name]

    yield make
    converter.close()


@pytest.fixture(scope="module")
def far(start_server: Start) -> Iterator[list[Server]]:
    """Two rpc-servers, which lose a server that stops and serve the next one."""
    both = [start_server(program="rpc-server", wait=False) for _ in range(2)]
    for rpc in both:
        wait_for(rpc.port)
    yield both
    for rpc in both:
        rpc.stop()


def options(pair: Files) -> list[str]:
    return ["-m", str(pair[0]), "--mmproj", str(pair[1]), "-np", "1", "-c", "2048", *OPTIONS, "--vision-type", "file"]


def whole(answer: str) -> str:
    """Without characters of which a part alone is there: the server has another number of signs for them."""
    return answer.replace("\ufffd", "").strip()


def told(server: Server, scenes: list[Any]) -> list[tuple[str, Any]]:
    """Answers, and what each layer held then."""
    out = []
    for scene, question in zip(scenes, QUESTIONS, strict=False):
        answer = server.chat(message(question, scene.picture), max_tokens=16)
        assert answer["st3"]["mode"] == "pruned-prefill", answer["st3"]["reason"]
        out.append((whole(text(answer)), answer["st3"]["held"]))
    return out


@families
def test_the_server_answers_as_llava_does(start_server: Start, files, scenes, name: str) -> None:
    """Breaks if their prompts, positions, image markers or pruning differ."""
    pair = files(name)
    server = start_server(*options(pair))
    got, want = told(server, scenes), []
    server.stop()
    with Llava(*pair, ST3Config(**SCHEDULE, vision_type="file"), n_ctx=2048, n_threads=1) as llava:
        for scene, question in zip(scenes, QUESTIONS, strict=False):
            answer = llava.ask(scene.picture, question, max_tokens=16, temperature=0)
            report = llava.last_report
            assert report is not None and report.mode == "pruned-prefill", report
            want.append((whole(answer), report.visual_tokens.held))
            llava.reset()
    assert got == want


@families
def test_two_machines_keep_what_one_does(start_server: Start, files, far: list[Server], scenes, name: str) -> None:
    """Breaks if a mask, a position or a row that deepstack adds is not where the layers are."""
    places = ",".join(f"127.0.0.1:{rpc.port}" for rpc in far)
    local = start_server(*options(files(name)), "-ngl", "0", env={"ST3_STOCK_OPS": "1"})
    want = told(local, scenes)
    local.stop()
    spread = start_server(*options(files(name)), "-ngl", "99", "--rpc", places)
    assert told(spread, scenes) == want
    spread.stop()
    assert all(rpc.process.poll() is None for rpc in far)
