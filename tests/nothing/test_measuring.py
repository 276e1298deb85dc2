"""scripts/measuring.py: options that are checked, files that are whole, failures in a line. Nothing is measured."""

import argparse
import json
import subprocess
import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).resolve().parents[2] / "scripts"))
import bench_busy
import measuring


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        (measuring.budget, "0"),
        (measuring.budget, "nan"),
        (measuring.budgets, "0.5,,0.2"),
        (measuring.count, "0"),
        (measuring.result_file, "/nowhere/figures.json"),
        (measuring.result_file, "/"),
    ],
)
def test_what_cannot_be_measured_or_written_is_refused_before(kind, text):
    # broken if an hour's figures were lost to a folder that is not there, or medians taken of none
    with pytest.raises(argparse.ArgumentTypeError):
        kind(text)


def test_an_interrupt_leaves_the_figures_that_were_there(tmp_path, monkeypatch):
    # broken if the file were emptied first
    path = tmp_path / "figures.json"
    measuring.write_json(path, {"a": 1})

    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("st3_edge.files.output.os.fsync", interrupted)
    with pytest.raises(KeyboardInterrupt):
        measuring.write_json(path, {"a": 2})
    assert json.loads(path.read_text()) == {"a": 1} and list(tmp_path.iterdir()) == [path]


def test_a_failure_from_outside_is_one_line(capsys, monkeypatch, tmp_path):
    # broken by a traceback, or by exit code 0
    monkeypatch.setenv("ST3_STOCK_LIB_DIR", str(tmp_path))
    with pytest.raises(SystemExit) as e:
        measuring.run(measuring.stock_folder)
    assert str(e.value).startswith(f"error: no stock llama.cpp in {tmp_path}: ") and "\n" not in str(e.value)


def test_figures_in_print():
    # broken by an exponent, or a mean for a median
    assert measuring.spread([1000.4, 0.71234, 12.345]) == "12.3 (0.712 to 1000)"
    assert measuring.spread([2.0, 1.0, 1.5], measuring.ratio) == "1.50 (1.00 to 2.00)"


def test_a_fair_share_is_of_the_first_builds_idle_time():
    # broken if threads beyond the CPUs, idle, were called faster than fair
    ms = {what: [10.0] for what in bench_busy.WHAT}
    rows = [{"busy": busy, "build": "a", "ms": ms} for busy in (0, 4)]
    shares = [line.split("|")[4].strip() for line in bench_busy.table(rows, threads=4, cpus=2)[2:]]
    assert shares == ["1.00", "0.50"]


def test_a_folder_with_other_files_is_not_removed(tmp_path):
    # broken if a slip of the hand took a folder away
    (tmp_path / "mine").touch()
    command = [sys.executable, measuring.ROOT / "scripts" / "old_glibc.py", tmp_path, "x86_64", "2.28"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1 and "holds other files" in done.stderr and (tmp_path / "mine").exists()
