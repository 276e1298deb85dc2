"""`st3-edge bench` on the embedded model. Times are not looked at: other programs may run."""

import json
import os
import signal
import subprocess
from pathlib import Path

import pytest

from st3_edge.native import libraries

QUICK = ("bench", "--threads", "1", "--pairs", "2", "--generate", "20", "--json")


def measured(done: subprocess.CompletedProcess[str]) -> dict:
    """The object that --json printed, and nothing else on standard output."""
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("\n") == 1
    return json.loads(done.stdout)


def test_both_sides_do_the_same_work(command):
    # broken if a side read another prompt, generated less, or bytes were counted another way
    got = measured(command(*QUICK, "--against", "off"))
    assert list(got) == ["machine", "setup", "pairs", "first", "summary"]
    assert all(len(runs) == 1 and runs[0]["first_token_ms"] > 0 for runs in got["first"].values())
    setup = got["setup"]
    assert (setup["visual"], setup["layers"], setup["threads"], setup["kv_type"]) == (576, 16, [1, 1], "f16")
    assert setup["schedule"]["mode"] == "pruned-prefill" and setup["per_layer"][0] == 576 > setup["per_layer"][-1]
    assert [d["backend"] for d in setup["devices"]][-1] == "CPU"
    assert setup["command"].startswith("st3-edge bench --threads 1") and setup["commit"] and setup["together"]
    assert len(got["pairs"]) == 2
    for pair in got["pairs"]:
        assert list(pair["stock"]) == list(pair["st3"])
        assert all(len(run["steps_ms"]) == 20 and all(x > 0 for x in run["steps_ms"]) for run in pair.values())
    assert {*got["pairs"][0]["st3"], "steps_ms"} == {*got["summary"], "steps_ms"}
    for name, row in got["summary"].items():
        assert row["stock"][1] <= row["stock"][0] <= row["stock"][2] and len(row["ratio_pairs"]) == 2, name


def test_bytes_of_the_kv_cache_are_those_that_the_schedule_allows(command):
    # broken if either side's bytes, or the ideal, were wrong: the three come from different places
    got = measured(command(*QUICK, "--against", "off", "--ctk", "q8_0", "--budget", "0.4", "--anneal-tokens", "30"))
    for name in ("kv_live_bytes", "kv_live_end_bytes"):
        assert got["summary"][name]["share"] == pytest.approx(1, abs=0.002)
    kept = sum(got["setup"]["per_layer"]) / 16 / 576
    assert kept == pytest.approx(0.4, abs=0.01) and sum(got["setup"]["held"]) < sum(got["setup"]["per_layer"])


def test_pruning_off_is_measured_as_no_gain(command):
    # broken if an ideal were promised, or memory counted, that is not there
    got = measured(command(*QUICK, "--against", "off", "--preset", "off", "--reload", "--no-repack"))
    assert got["setup"]["schedule"]["mode"] == "off"
    assert all(row["ideal"] == pytest.approx(1) for row in got["summary"].values())
    for name in ("kv_allocated_bytes", "kv_live_bytes", "kv_live_end_bytes"):
        assert got["summary"][name]["ratio"] == 1


def test_a_small_ubatch_is_pruned_all_the_same(command):
    # broken if a pruned prompt had to fit one ubatch
    got = measured(command(*QUICK, "--against", "off", "--n-ubatch", "128"))
    assert got["setup"]["n_ubatch"] == 128
    assert got["setup"]["schedule"]["mode"] == "pruned-prefill"
    assert got["summary"]["prefill_ms"]["ideal"] > 1.5
    assert got["summary"]["kv_live_bytes"]["ideal"] > 1.5


def test_stock_is_another_library(command):
    # broken if both sides ran on one: a slower build of ours would go unseen
    stock = os.environ.get("ST3_STOCK_LIB_DIR")
    if not stock or not libraries.stock_path(Path(stock), "mtmd").is_file():
        pytest.skip("ST3_STOCK_LIB_DIR has no libmtmd")
    got = measured(command(*QUICK))
    assert got["setup"]["libraries"]["stock"] == got["setup"]["libraries"]["st3"]  # the same upstream and compiler
    assert got["summary"]["kv_live_bytes"]["share"] == pytest.approx(1, abs=0.002)


def test_our_own_libraries_are_not_stock(command):
    # broken if a person compared ST3 with itself by mistake
    done = command(*QUICK, "--stock", str(libraries.folder()))
    assert done.returncode == 1 and "is not stock llama.cpp" in done.stderr and done.stdout == ""


def test_what_the_model_refuses_is_told_by_the_side_that_it_is_of(command):
    # broken if a worker's error were lost, or its traceback shown
    for arguments, says in ((["--start", "99"], "st3.start"), (["--n-ctx", "300"], "n_ctx is 300")):
        done = command(*QUICK, "--against", "off", *arguments)
        assert done.returncode == 1 and done.stdout == "" and says in done.stderr.splitlines()[-1]
        assert "Traceback" not in done.stderr


def test_a_picture_and_question_of_ones_own(command, scenes):
    # broken if they were not what is asked
    pictures = [str(scene.picture) for scene in scenes[:2]]
    done = command(
        *QUICK[:-1], "--against", "off", "--image", pictures[0], "--image", pictures[1], "--question", "What?"
    )
    assert done.returncode == 0, done.stderr
    assert "1152 visual" in done.stdout and "whole answer" in done.stdout


def test_ctrl_c_prints_what_was_measured(start):
    # broken by a traceback, lost pairs, or workers that go on
    arguments = ("bench", "--threads", "1", "--pairs", "1000", "--generate", "1500", "--against", "off", "--json")
    process = start(*arguments)
    assert process.stderr is not None
    assert any(line.startswith("pair 2") for line in process.stderr)
    threads = Path(f"/proc/{process.pid}/task").iterdir()
    workers = [pid for thread in threads for pid in (thread / "children").read_text().split()]
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130 and "Traceback" not in err
    got = json.loads(out)
    assert len(got["pairs"]) >= 1 and got["summary"]["prefill_ms"]["ratio"] > 0
    assert len(workers) == 2 and not any(Path(f"/proc/{pid}").exists() for pid in workers)
