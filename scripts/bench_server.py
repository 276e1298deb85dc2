"""Time llama-server and llama-mtmd-cli beside stock: prompts, and what is answered.

python scripts/bench_server.py [--shape llava-1.5-7b] [--budget 0.2] [--rounds 3] [--cases cli one four] [--json OUT]

Four sides, a process each: `stock` (llama.cpp of $ST3_STOCK_LIB_DIR, else in build/stock/lib), `off`, `evict` (a
batch that does not hold the prompt, so that cells go after the compute), `st3`. In each round every side starts,
answers, and ends. Without --shape it is the embedded model and its pictures; with one, random weights and a picture of
576 tokens.

cli   llama-mtmd-cli, one picture: "total time" of its own log, from the loaded text model to the last of a few tokens
one   llama-server -np 1, one picture after another: `timings.prompt_ms`, the vision encoder in it
four  llama-server -np 4, pictures and texts mixed, all at once: milliseconds until the last is answered

Compare stock's time by st3's with the first token's of `st3-edge bench`; in `cli` and `four` some tokens of answers are
in it, too. Answers are greedy; "same" counts those that are stock's in the same round, which pruning may change and
`off` must not. Without stock among --sides the first of them is in its place. Cases that are not run stay in OUT
as they were.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "server")]

import measuring  # noqa: E402
from serving import Server, free_port, message, text  # noqa: E402

from st3_edge import demo  # noqa: E402
from st3_edge.commands.bench.cache import random_vision  # noqa: E402
from st3_edge.commands.bench.shapes import SHAPES  # noqa: E402
from st3_edge.commands.serve import command  # noqa: E402
from st3_edge.native.machine import provenance  # noqa: E402

SIDES = ("stock", "off", "evict", "st3")
CASES = ("cli", "one", "four")
QUESTION = "Describe the image."
N_VISUAL = 576  # of a picture, either way
N_TEXT = 64  # of a prompt for random weights, as in `st3-edge bench`
PLAIN = "{% for message in messages %}{{ message['content'] }}{% endfor %}"


class Bench:
    """The files, and how a side is started on them."""

    def __init__(self, args: argparse.Namespace, folder: Path) -> None:
        self.args, self.folder = args, folder
        self.scenes = demo.scenes()
        self.pictures = [scene.picture for scene in self.scenes]
        if args.shape:
            mmproj = random_vision(SHAPES[args.shape].n_embd, args.cache)
            self.files = measuring.random_model(args), mmproj
            self.n_predict, self.template = 4, ["--jinja", "--chat-template", PLAIN]
            # a token each, behind the BOS token, the new line, and the three bytes of SentencePiece's space
            self.words = "x" * (N_TEXT - 5)
        else:
            self.files = demo.model_paths()
            self.n_predict, self.template = 24, []  # its own
            self.words = QUESTION

    def program(self, side: str, name: str) -> str:
        """The path of a program of a side."""
        if side == "stock":
            return str(measuring.stock_folder().parent / "bin" / name)
        return str(command.find(name))

    def options(self, side: str) -> list[str]:
        """What both programs take."""
        model, mmproj = map(str, self.files)
        options = ["-m", model, "--mmproj", mmproj, "-t", str(self.args.threads), "-c", "8192", *self.template]
        batch = N_VISUAL if side == "evict" else 2048
        options += ["-b", str(batch), "-ub", str(min(batch, 512))]
        if side in ("evict", "st3"):
            options += ["--override-kv", f"st3.preset=str:st3,st3.budget=float:{self.args.budget}"]
        return options

    @contextlib.contextmanager
    def server(self, side: str, slots: int) -> Iterator[Server]:
        """A running server that has answered once: buffers grow at the first picture."""
        port = free_port()
        words = [self.program(side, "llama-server"), *self.options(side), "-np", str(slots), "--port", str(port)]
        server = Server([*words, "--host", "127.0.0.1", "--no-webui"], port, self.folder / f"log-{side}")
        try:
            self.ask(server.wait(), self.about(side, self.pictures[-1]))
            yield server
        except AssertionError as e:  # it did not start
            raise SystemExit(f"{side}: {e}") from None
        finally:
            server.stop()

    def cli(self, side: str) -> tuple[float, list[str]]:
        """(milliseconds, answers)"""
        words = [self.program(side, "llama-mtmd-cli"), *self.options(side), "--image", str(self.pictures[0])]
        words += ["-p", self.words, "--temp", "0", "-n", str(self.n_predict), "-lv", "4"]
        done = subprocess.run(words, capture_output=True, text=True)
        found = re.search(r"total time = +([\d.]+) ms", done.stderr + done.stdout)
        if done.returncode or not found:
            raise SystemExit(f"{side}: llama-mtmd-cli failed:\n{done.stderr[-2000:]}")
        return float(found[1]), [done.stdout.strip()]

    def about(self, side: str, picture: Path) -> dict[str, Any]:
        """A question about a picture. Stock's has the new line that ours puts behind a LLaVA's picture."""
        return message("\n" * (side == "stock") + self.words, picture)

    def ask(self, server: Server, asked: dict[str, Any]) -> dict[str, Any]:
        """A chat completion that may take minutes."""
        body = {"messages": [asked], "temperature": 0, "max_tokens": self.n_predict, "cache_prompt": False}
        status, answer = server.request("POST", "/v1/chat/completions", body, timeout=900)
        if status != 200:
            raise SystemExit(f"llama-server: {answer}")
        return dict(answer)

    def one(self, side: str) -> tuple[float, list[str]]:
        """(milliseconds a prompt, answers)"""
        pictures = self.pictures[:1] if self.args.shape else self.pictures
        with self.server(side, 1) as server:
            got = [self.ask(server, self.about(side, picture)) for picture in pictures]
        if self.args.shape and (n := got[0]["timings"]["prompt_n"]) != N_VISUAL + N_TEXT:
            raise SystemExit(f"{side}: a prompt of {n} tokens in place of {N_VISUAL + N_TEXT}")
        return statistics.median(answer["timings"]["prompt_ms"] for answer in got), [text(answer) for answer in got]

    def four(self, side: str) -> tuple[float, list[str]]:
        """(milliseconds until all were answered, answers)"""
        n = 2 if self.args.shape else 8
        asked = []
        for i in range(n):
            asked += [self.about(side, self.pictures[i % len(self.pictures)]), message(f"{self.words} {i}")]
        with self.server(side, 4) as server, ThreadPoolExecutor(4) as pool:
            begin = time.perf_counter()
            got = list(pool.map(lambda part: self.ask(server, part), asked))
            ms = 1e3 * (time.perf_counter() - begin)
        return ms, [text(answer) for answer in got]


def main() -> None:
    """Rounds of all sides and cases; prints a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    measuring.add_shape(parser)
    parser.add_argument("--budget", type=measuring.budget, default=0.2)
    parser.add_argument("--threads", type=measuring.count, default=2)
    parser.add_argument("--rounds", type=measuring.count, default=3)
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=list(SIDES))
    parser.add_argument("--json", type=measuring.result_file)
    args = parser.parse_args()
    try:
        kept = json.loads(args.json.read_text()) if args.json and args.json.is_file() else {}
    except ValueError:
        parser.error(f"{args.json} has no figures that could stay")
    found: dict[str, dict[str, dict[str, Any]]] = {
        case: {side: {"ms": [], "answers": []} for side in args.sides} for case in args.cases
    }
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(args, Path(folder))
        for _ in range(args.rounds):
            for case in args.cases:
                for side in args.sides:
                    ms, answers = getattr(bench, case)(side)
                    found[case][side]["ms"].append(ms)
                    found[case][side]["answers"].append(answers)
                    print(f"{case} {side}: {ms:.0f} ms", file=sys.stderr)
    first = "stock" if "stock" in args.sides else args.sides[0]
    print(f"| | side | ms | {first} / side (rounds) | same answers |")
    print("|---|---|---|---|---|")
    for case, sides in found.items():
        base = sides[first]
        for side, got in sides.items():
            ratios = [a / b for a, b in zip(base["ms"], got["ms"], strict=True)]
            rounds = zip(base["answers"], got["answers"], strict=True)
            same = [a == b for one, other in rounds for a, b in zip(one, other, strict=True)]
            ms, times = measuring.spread(got["ms"]), measuring.spread(ratios, measuring.ratio)
            print(f"| {case} | {side} | {ms} | {times} | {sum(same)} of {len(same)} |")
    if args.json:
        new = {case: {**provenance(), "sides": sides} for case, sides in found.items()}
        measuring.write_json(args.json, kept | new)


if __name__ == "__main__":
    measuring.run(main)
