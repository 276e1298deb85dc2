"""`st3-edge bench` without libraries: the arithmetic of its figures, the order of turns, and what it refuses."""

import json
import math
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from st3_edge import demo
from st3_edge.commands.bench import figures, prepare
from st3_edge.commands.bench.figures import Work
from st3_edge.commands.bench.sides import measure
from st3_edge.commands.bench.worker import Job
from st3_edge.errors import LibraryError, ModelError
from st3_edge.native import machine

ROOT = Path(__file__).parents[2]
COUNTS = [576, 339, 200, 118, 70, 41, 24, 14]  # 32 layers, budget 0.3
PER_LAYER = [n for n in COUNTS for _ in range(4)]


def run(steps: int, *, scale: float = 1.0, kv: int = 640_000) -> dict:
    """What a worker tells of one run; `scale`: how long everything takes."""
    return {
        "encode_ms": 100 * scale,
        "prefill_ms": 1000 * scale,
        "first_token_ms": 1110 * scale,
        "steps_ms": [10.0 * scale] * steps,
        "kv_allocated_bytes": 2 * kv,
        "kv_live_bytes": kv,
        "kv_allocated_end_bytes": 2 * kv,
        "kv_live_end_bytes": kv,
        "peak_rss_bytes": 10**9,
    }


def work(steps: int, per_layer: list[int], live: int, weights: int = 10**6) -> Work:
    return Work(576, 64, per_layer, per_layer, [live] * steps, weights)


def test_speeds_are_told_at_the_lengths_that_an_answer_has():
    # broken if a speed were that of a part of the answer, or a length were told that it does not have
    assert figures.lengths(256) == [16, 64, 128, 256]
    assert figures.lengths(100) == [16, 64, 100]
    assert figures.lengths(5) == [5]
    raw = {**run(20), "steps_ms": [10.0] * 16 + [30.0] * 4}
    found = figures.metrics(raw)
    assert found["decode_16_tps"] == pytest.approx(100)
    assert found["decode_20_tps"] == pytest.approx(20 / 0.28)
    assert found["answer_ms"] == pytest.approx(1110 + 280)


def test_ratios_are_pair_by_pair_and_above_one_where_st3_is_better():
    # broken if a speed were divided the wrong way round, or medians were compared instead of pairs
    pairs = [{"stock": figures.metrics(run(4, scale=a)), "st3": figures.metrics(run(4, scale=b))} for a, b in
             ((1, 0.5), (2, 0.5), (3, 3))]  # fmt: skip
    found = figures.summary(pairs, work(4, PER_LAYER, 640_000))
    for name in ("encode_ms", "prefill_ms", "first_token_ms", "decode_4_tps", "answer_ms"):
        assert found[name]["ratio_pairs"] == pytest.approx([2, 4, 1])
        assert found[name]["ratio"] == pytest.approx(2)
    assert found["prefill_ms"]["stock"] == [2000, 1000, 3000]
    assert found["prefill_ms"]["share"] == pytest.approx(2 / found["prefill_ms"]["ideal"])
    assert found["encode_ms"]["gain_share"] is None  # the schedule promises nothing there
    assert found["prefill_ms"]["gain_share"] == pytest.approx(1 / (found["prefill_ms"]["ideal"] - 1))


def test_ideals_by_hand():
    # broken if text were left out of the token-layers, weights out of a token's bytes, or encoding were sped up
    stock = figures.metrics(run(2))
    found = figures.ideals(stock, work(2, PER_LAYER, 200_000))
    prefill = 640 * 32 / sum(n + 64 for n in PER_LAYER)
    assert prefill == pytest.approx(2.7033, abs=1e-4)
    assert found["prefill_ms"] == found["kv_live_bytes"] == pytest.approx(prefill)
    assert found["first_token_ms"] == pytest.approx(1110 / (110 + 1000 / prefill))
    cell = 1000
    decode = (2 * 10**6 + 641 * cell + 642 * cell) / (2 * 10**6 + 2 * 200_000)
    assert found["decode_2_tps"] == pytest.approx(decode)
    assert found["answer_ms"] == pytest.approx(1130 / (110 + 1000 / prefill + 20 / decode))
    assert found["kv_live_end_bytes"] == pytest.approx(642 * 32 / sum(n + 66 for n in PER_LAYER))
    assert found["peak_rss_bytes"] == pytest.approx(1e9 / (1e9 - (642_000 - 200_000)))
    assert found["encode_ms"] == 1


def test_a_prompt_that_was_read_in_full_promises_no_faster_prefill():
    # broken if what is dropped after the prompt was read counted as if it had never been read
    stock = figures.metrics(run(2))
    found = figures.ideals(stock, replace(work(2, PER_LAYER, 200_000), pruned=False))
    assert found["prefill_ms"] == found["first_token_ms"] == 1
    assert found["kv_live_bytes"] == pytest.approx(2.7033, abs=1e-4)


@given(st.integers(1, 3000), st.integers(1, 500), st.integers(1, 40), st.integers(1, 300), st.integers(1, 10**6))
def test_where_nothing_is_dropped_nothing_is_promised(visual, text, layers, generate, weights):
    # broken if an ideal counted anything that the schedule leaves as it is
    cell = 4096
    full = [visual] * layers
    raw = run(generate, kv=cell * (visual + text))
    live = [cell * (visual + text + 1 + i) for i in range(generate)]
    ideal = figures.ideals(figures.metrics(raw), Work(visual, text, full, full, live, weights))
    assert all(math.isclose(x, 1) for x in ideal.values())


def test_the_table_has_a_line_for_each_figure():
    # broken if a metric had no name for a person, or a unit were wrong by a thousand
    pair = {side: figures.metrics(run(64, kv=640_000)) for side in ("stock", "st3")}
    lines = figures.table(figures.summary([pair], work(64, PER_LAYER, 200_000)), "stock")
    assert len(lines) == 1 + len(pair["stock"])
    assert "1.00 s" in next(line for line in lines if line.startswith("prefill"))
    assert "100.00 t/s" in next(line for line in lines if line.startswith("decode, 64 tokens"))
    assert "0.6 MB" in next(line for line in lines if line.startswith("KV in use, prompt"))


class Recorded:
    """A side that writes down what it is asked."""

    def __init__(self, name, calls):
        self.name, self.calls, self.setup = name, calls, {"ggml": "1", "visual": 576, "text": 13}

    def open(self):
        self.calls.append((self.name, "open"))

    def close(self):
        self.calls.append((self.name, "close"))

    def call(self, name, n=0):
        self.calls.append((self.name, name))
        return {"decode": {"steps_ms": [1.0] * n}, "begin": {"prefill_ms": 5.0}, "end": {"peak_rss_bytes": 1}}[name]


def test_sides_take_turns_within_an_answer():
    # broken if one side ran its whole answer before the other: a machine that slows down would look like a difference
    calls: list = []
    a, b = Recorded("stock", calls), Recorded("st3", calls)
    [pair] = measure([(a, b)], 1, 20, False, lambda stage, share: None)
    assert [c for c in calls if c[1] != "open"] == [(s, c) for c in ("begin", "decode", "decode", "end") for s in
                                                    ("stock", "st3")]  # fmt: skip
    assert len(pair["stock"]["steps_ms"]) == len(pair["st3"]["steps_ms"]) == 20
    assert pair["st3"]["peak_rss_bytes"] == 1


def test_where_memory_holds_one_side_it_is_loaded_alone():
    # broken if both were in memory at once
    calls: list = []
    shares: list = []
    sides = [[Recorded(name, calls)] for name in ("stock", "st3")]
    assert len(list(measure(sides, 2, 5, True, lambda stage, share: shares.append(share)))) == 2
    assert [c for c in calls if c[1] in ("open", "close")] == [
        (s, c) for s in ("stock", "st3") for c in ("open", "close")
    ] * 2
    assert shares == sorted(shares) and shares[0] >= 0 and shares[-1] <= 1


def test_sides_of_different_upstreams_are_not_compared():
    # broken if the bindings' structs were used on another llama.cpp than theirs
    a, b = Recorded("stock", []), Recorded("st3", [])
    b.setup = {**b.setup, "ggml": "2"}
    with pytest.raises(LibraryError, match="ggml"):
        next(measure([(a, b)], 1, 5, False, lambda stage, share: None))


@pytest.fixture
def job() -> Job:
    model, mmproj = map(str, demo.model_paths())
    return Job(True, None, {}, model, mmproj, [], "What?", 0, 0, 16, 4096, None, None, 0, "f16", True)


def test_memory_is_looked_at_before_anything_is_loaded(monkeypatch, job):
    # broken if two copies of the weights were started where one fits, or any where none does
    def free(n: int | None) -> None:
        monkeypatch.setattr(machine, "available_memory", lambda: n)

    free(10**12)
    assert prepare.fit_together(job)
    free(None)
    assert prepare.fit_together(job)
    free(10**9)
    assert not prepare.fit_together(job)
    free(10**8)
    with pytest.raises(ModelError, match="GB of memory are needed"):
        prepare.fit_together(job)
    assert prepare.fit_together(replace(job, n_gpu_layers=-1))


def test_a_token_reads_all_weights_but_the_table(job):
    # broken if the embeddings of all words counted for each one
    size = Path(job.model).stat().st_size
    assert 0.5 * size < prepare.bytes_per_token(job.model) < size


def command(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "PYTHONPATH": str(ROOT), **environment}
    done = [sys.executable, "-m", "st3_edge", "bench", *arguments]
    return subprocess.run(done, capture_output=True, text=True, env=env, timeout=60)


@pytest.fixture
def libraries(tmp_path) -> str:
    """A folder with files of the right names: nothing is loaded before all else is right."""
    for name in ("libst3-llama.so", "libst3-mtmd.so"):
        (tmp_path / name).write_bytes(b"not a library")
    return str(tmp_path)


@pytest.mark.parametrize(
    ("arguments", "says", "code"),
    [
        (["--shape", "gpt"], "there is no 'gpt', choose from", 2),
        (["--type", "Q2_K"], "there is no 'Q2_K', did you mean", 2),
        (["--ctk", "f11"], "there is no 'f11', did you mean", 2),
        (["--pairs", "0"], "from 1 to 1000", 2),
        (["--generate", "many"], "a whole number from 1", 2),
        (["--text", "1"], "from 2", 2),
        (["--threads", "0"], "--threads", 2),
        (["--n-gpu-layers", "-2"], "--n-gpu-layers", 2),
        (["--budget", "2"], "budget must be in (0, 1]", 1),
        (["--model", "a.gguf"], "No such file", 1),
        (["--visual", "100"], "--visual is for random weights", 1),
        (["--text", "100"], "--text is for random weights", 1),
        (["--type", "Q4_0"], "--type is for random weights", 1),
        (["--cache-dir", "/tmp"], "--cache-dir is for random weights", 1),
        (["--question", " "], "the question is empty", 1),
        (["--shape", "tinyllama-1.1b", "--question", ""], "--shape is in place of", 1),
        (["--shape", "tinyllama-1.1b", "--image", "a.png"], "--shape is in place of", 1),
        (["--shape", "tinyllama-1.1b", "--mmproj", "p.gguf"], "--shape is in place of", 1),
        (["--image", "none.png"], "No such file", 1),
        (["--model", "none.gguf", "--mmproj", "none.gguf"], "No such file", 1),
        (["--against", "stock", "--stock", "/nowhere"], "ST3_STOCK=ON", 1),
        (["--shape", "tinyllama-1.1b", "--cache-dir", "/proc/nowhere"], "cannot be written", 1),
        ([], "cannot be loaded", 1),
    ],
)
def test_what_cannot_be_measured_is_told_in_one_line(libraries, arguments, says, code):
    # broken by a traceback, or if a person waited for a model first
    done = command("--against", "off", *arguments, ST3_LIB_DIR=libraries)
    assert done.returncode == code and done.stdout == ""
    assert done.stderr.splitlines()[-1].startswith("st3-edge: error: ") and says in done.stderr
    before = [line for line in done.stderr.splitlines()[:-1] if not line.startswith("(no model chosen")]
    assert all(line.endswith(" ...") for line in before)


@pytest.mark.skipif(sys.platform == "win32", reason="Ctrl-C is another event there")
def test_ctrl_c_ends_a_download(libraries):
    # broken if gigabytes went on coming until it was pressed again
    code = (
        "import sys, time; from st3_edge import cli; from st3_edge.commands import which\n"
        "which.find = lambda *_: print('loading', flush=True) or time.sleep(50)\n"
        "sys.exit(cli.main(['bench', '--against', 'off', '--hf', 'a/b']))"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "ST3_LIB_DIR": libraries}
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, env=environment) as process:
        assert process.stdout is not None and process.stdout.readline() == b"loading\n"
        process.send_signal(signal.SIGINT)
        assert process.wait(30) == 130


def test_without_stock_pruning_off_is_compared_with(tmp_path, monkeypatch):
    # broken if a person who installed the package alone got an error, or was not told what is compared
    monkeypatch.delenv("ST3_STOCK_LIB_DIR", raising=False)
    monkeypatch.setattr(prepare, "__file__", str(tmp_path / "st3_edge" / "commands" / "bench" / "prepare.py"))
    folder, remark = prepare.find_stock(None, None)
    assert folder is None and remark is not None and "ST3_STOCK=ON" in remark
    assert prepare.find_stock("off", None) == (None, None)
    with pytest.raises(LibraryError, match="--against off"):
        prepare.find_stock("stock", None)
    lib = tmp_path / "build" / "stock" / "lib"
    lib.mkdir(parents=True)
    for name in ("libllama.so", "libmtmd.so"):
        (lib / name).write_bytes(b"")
    assert prepare.find_stock(None, None) == (lib, None)


def test_without_the_stock_that_was_named_the_other_comparison_is_offered(libraries):
    # broken if a person who installed the package alone were left without a way
    done = command("--stock", libraries + "/none", ST3_LIB_DIR=libraries)
    assert done.returncode == 1 and "--against off" in done.stderr and done.stderr.count("\n") == 1


def test_without_gguf_the_extra_is_named(libraries, tmp_path):
    # broken by an ImportError: the package does not need gguf for anything else
    (tmp_path / "gguf.py").write_text("raise ImportError('not here')")
    environment = {"ST3_LIB_DIR": libraries, "PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"}
    done = command(
        "--against", "off", "--shape", "tinyllama-1.1b", "--cache-dir", str(tmp_path / "cache"), **environment
    )
    assert done.returncode == 1 and "pip install gguf" in done.stderr and done.stderr.count("\n") == 1


def test_the_shape_of_the_object_is_kept(job):
    # broken if the worker's job could not travel as JSON
    assert Job(**json.loads(json.dumps(job.__dict__))) == job


def test_all_parts_of_a_model_count(tmp_path):
    # broken if bytes were those of the first part, which may hold no weights
    gguf = pytest.importorskip("gguf")
    for number in (1, 2, 3):
        writer = gguf.GGUFWriter(tmp_path / f"m-{number:05}-of-00003.gguf", "llama")
        writer.add_tensor(f"t{number}", np.zeros(32 * number, np.float32))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    assert prepare.bytes_per_token(str(tmp_path / "m-00001-of-00003.gguf")) == 4 * 32 * (1 + 2 + 3)
