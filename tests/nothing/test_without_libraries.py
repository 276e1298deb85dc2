"""The package and its command line where the native libraries are not there."""

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from st3_edge import demo
from st3_edge.commands import doctor
from st3_edge.errors import LibraryError
from st3_edge.native import libraries

ROOT = Path(__file__).parents[2]
LLAMA, MTMD = (libraries.path_of(name).name for name in ("llama", "mtmd"))
COMMANDS = ("demo", "ask", "inspect", "chat", "serve", "models", "bench", "tune", "doctor")


@pytest.fixture
def picture(tmp_path) -> str:
    path = tmp_path / "a.png"
    Image.new("RGB", (8, 8)).save(path)
    return str(path)


def python(*arguments: str, lib_dir: Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "ST3_LIB_DIR": str(lib_dir), "PYTHONPATH": str(ROOT)}
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, env=environment, timeout=60)


def command(*arguments: str, lib_dir: Path) -> subprocess.CompletedProcess[str]:
    return python("-m", "st3_edge", *arguments, lib_dir=lib_dir)


def one_line_error(done: subprocess.CompletedProcess[str], code: int, says: str) -> None:
    assert done.returncode == code
    assert done.stdout == ""
    assert done.stderr.startswith("st3-edge: error: ")
    assert done.stderr.count("\n") == 1
    assert says in done.stderr


def test_importing_loads_no_library(tmp_path):
    # broken if the package imported the bindings at its top: a missing library would end in a traceback
    source = (
        "import sys, st3_edge, st3_edge.cli, st3_edge.llava\n"
        "assert not any(name.split('.')[-1] == 'llama_cpp' for name in sys.modules)"
    )
    done = python("-c", source, lib_dir=tmp_path)
    assert done.returncode == 0, done.stderr


def test_missing_libraries_are_told_in_one_line(tmp_path, picture):
    # broken by a traceback, or by the bindings' own libraries being taken instead
    one_line_error(command("ask", picture, "What?", lib_dir=tmp_path), 1, f"{LLAMA} is missing")


def test_libraries_that_do_not_load_are_told_in_one_line(tmp_path, picture):
    # broken by a traceback of ctypes'
    for name in (LLAMA, MTMD):
        (tmp_path / name).write_bytes(b"not a library")
    one_line_error(command("ask", picture, "What?", lib_dir=tmp_path), 1, "cannot be loaded")


def test_doctor_tells_what_is_missing(tmp_path):
    # broken if doctor itself needed what it looks for
    done = command("doctor", lib_dir=tmp_path)
    assert done.returncode == 1
    assert f"{LLAMA} is missing" in done.stdout
    assert done.stderr == ""
    found = json.loads(command("doctor", "--json", lib_dir=tmp_path).stdout)
    assert any(f"{LLAMA} is missing" in problem for problem in found["problems"])


@pytest.mark.parametrize("name", ["SIGILL", "SIGSEGV"])
def test_doctor_survives_a_crash_and_names_it(tmp_path, name):
    # broken if the libraries were loaded into doctor's own process, or if it said "all is well"
    for library in (LLAMA, MTMD):
        (tmp_path / library).write_bytes(b"")
    bindings = tmp_path / "bindings"
    bindings.mkdir()
    (bindings / "llama_cpp.py").write_text(f"import os, signal; os.kill(os.getpid(), signal.{name})")
    environment = {**os.environ, "ST3_LIB_DIR": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-m", "st3_edge", "doctor"], capture_output=True, text=True, env=environment, timeout=60
    )
    assert done.returncode == 1 and done.stderr == ""
    assert f"as they load: {name}: " in done.stdout and "build the package" in done.stdout


@pytest.mark.parametrize(
    ("stage", "code", "says"),
    [(1, -6, "one question to the demo model ends the process: SIGABRT (GGML_ASSERT): build"), (2, 3, "exit code 3")],
)
def test_doctor_says_which_stage_crashed(stage, code, says):
    # broken if a person could not see whether loading or computing fails, or with which words
    assert says in doctor._crash(stage, code, "hello\nGGML_ASSERT\n\n")


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["fly"], "there is no 'fly', choose from demo, ask"),
        (["dmeo"], "did you mean 'demo'?"),
        (["chat", "--revisit", "trun"], "did you mean 'turn'?"),
        (["chat", "--bugdet", "0.5"], "did you mean '--budget'? (st3-edge chat -h"),
        (["ask"], "ask needs at least one picture, and last the question"),
        (["ask", "What?"], "and last the question (st3-edge ask -h shows how)"),
        (["ask", "a.png", "What?", "--budget", "much"], "--budget"),
        (["ask", "a.png", "What?", "--nonsense"], "--nonsense"),
        (["ask", "a.png", "What?", "--trace"], "--trace goes with --json (st3-edge ask -h shows how)"),
        (["chat", "--revisit", "always"], "--revisit"),
        (["demo", "a.png"], "a.png"),
        (["ask", "a.png", "What?", "--n-ctx", "-5"], "--n-ctx"),
        (["ask", "a.png", "What?", "--n-ubatch", "0"], "--n-ubatch: a whole number from 1 to"),
        (["chat", "--threads", "0"], "--threads/-t: a whole number from 1 to"),
        (["tune", "folder", "--n-gpu-layers", "-2"], "--n-gpu-layers/-ngl: a whole number from -1 to"),
        (["tune", "folder", "--tokens", "2000"], "--tokens: a whole number from 1 to 1024"),
        (["tune", "folder", "--prompts", "0"], "--prompts: a whole number from 1 to 10000"),
        (["chat", "--temperature", "-1"], "--temperature: temperature must be a number from 0 to 1e+09"),
        (["ask", "a.png", "What?", "--temperature", "nan"], "--temperature: temperature must be a number from 0"),
        (["ask", "a.png", "What?", "--temperature", "hot"], "--temperature: invalid float value"),
        (["inspect", "a.png", "What?", "--top-p", "inf"], "--top-p: top_p must be a number from 0"),
        (["chat", "--min-p", "-0.1"], "--min-p: min_p must be"),
        (["chat", "--top-k", "0.5"], "--top-k: invalid int value"),
        (["chat", "--top-k", "9" * 400], "--top-k: top_k must be a whole number"),
        (["chat", "--temperature", "1e308"], "--temperature: temperature must be a number from 0 to 1e+09"),
        (["chat", "--repeat-penalty", "1e-50"], "--repeat-penalty: repeat_penalty must be a number from 1e-09"),
        (["chat", "--repeat-penalty", "0"], "--repeat-penalty: repeat_penalty must be a number from 1e-09"),
        (["chat", "--seed", "9" * 400], "--seed: seed must be a whole number"),
        (["chat", "--max-tokens", "9" * 400], "--max-tokens/-n: a whole number"),
    ],
)
def test_wrong_usage_is_one_line_and_exit_code_2(tmp_path, arguments, says):
    # broken if argparse printed its usage before the line
    one_line_error(command(*arguments, lib_dir=tmp_path), 2, says)


def test_without_a_command_the_help_is_shown(tmp_path):
    # broken if a newcomer's first try were an error
    done = command(lib_dir=tmp_path)
    assert done.returncode == 0 and done.stderr == ""
    assert done.stdout == command("--help", lib_dir=tmp_path).stdout


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--budget", "0"], "budget must be in (0, 1]"),
        (["--budget", "1.01"], "budget must be in (0, 1]"),
        (["--budget", "nan"], "budget must be in (0, 1]"),
        (["--budget", "-1"], "budget must be in (0, 1]"),
        (["--budget", "0.5", "--keep", "0.5"], "exclude"),
        (["--preset", "best"], "unknown preset 'best'"),
        (["--start", "0"], "start"),
        (["--score", "best"], "score"),
        (["--model", "a.gguf"], "No such file"),
        (["--hf", "a/b", "--model", "a.gguf"], "exclude"),
        (["--model", "a/b"], "--hf a/b takes it"),
        (["--mmproj", "a.gguf"], "--model"),
        (["--anneal", "cubic"], "--anneal must be one of"),
        (["--anneal-tokens", "0"], "--anneal-tokens must be"),
        (["--anneal-floor", "1.5"], "--anneal-floor must be"),
        (["--anneal", "exponential", "--anneal-floor", "0"], "above 0"),
        (["--preset", "off", "--budget", "0.3"], "nothing for --budget to say"),
        (["--preset", "off", "--min-keep", "0"], "nothing for --min-keep to say"),
        (["--model", "none.gguf", "--mmproj", "none.gguf"], "No such file"),
    ],
)
def test_settings_out_of_range_are_told_before_anything_is_loaded(tmp_path, picture, arguments, says):
    # broken if a setting were looked at only by native code
    one_line_error(command("ask", picture, "What?", *arguments, lib_dir=tmp_path), 1, says)


def test_a_bad_picture_is_told_before_anything_is_loaded(tmp_path):
    # broken if a person waited for a large model to load first
    one_line_error(command("ask", "a.png", "What?", lib_dir=tmp_path), 1, "No such file")
    one_line_error(command("chat", "a.png", lib_dir=tmp_path), 1, "No such file")
    one_line_error(command("chat", "--revisit", "never", "a.png", lib_dir=tmp_path), 1, "No such file")
    one_line_error(command("chat", "--load", "none.st3", lib_dir=tmp_path), 1, "No such file")
    one_line_error(command("chat", "--load", __file__, lib_dir=tmp_path), 1, "does not begin as a saved conversation")


@pytest.mark.parametrize("question", ["", "  ", "\n"])
def test_a_picture_without_words_is_a_question(tmp_path, picture, question):
    # broken if the text were asked for: the model describes what it sees
    one_line_error(command("ask", picture, question, lib_dir=tmp_path), 1, f"{LLAMA} is missing")


def test_options_may_stand_between_the_pictures_and_the_question(tmp_path):
    # broken by argparse, which takes positionals in one run only
    done = command("ask", "a.png", "--preset", "best", "What?", lib_dir=tmp_path)
    one_line_error(done, 1, "unknown preset")


@pytest.mark.parametrize("arguments", ["-h", *(f"{c} -h" for c in COMMANDS), "--version"])
def test_help_and_version_go_to_standard_output(tmp_path, arguments):
    # broken by a '%' in a help text, or help that needs libraries
    done = command(*arguments.split(), lib_dir=tmp_path)
    assert done.returncode == 0
    assert done.stdout and not done.stderr


class NoBackend:
    """ggml where backends are files of their own, and none of them runs on this machine."""

    def __init__(self) -> None:
        self.logs: list[object] = []

    def ggml_backend_dev_count(self) -> int:
        return 0

    def ggml_log_get(self, callback: object, data: object) -> None:
        callback._obj.value = 1234

    def ggml_log_set(self, callback: object, data: object) -> None:
        self.logs.append(callback)

    def ggml_backend_load_all_from_path(self, path: bytes) -> None:
        assert len(self.logs) == 1  # quiet


def test_a_machine_that_no_backend_runs_on(tmp_path, monkeypatch):
    # broken by a model that fails to load for no reason, later; or by a log that stays quiet for another user of ggml
    monkeypatch.setenv("ST3_LIB_DIR", str(tmp_path))
    lib = NoBackend()
    with pytest.raises(LibraryError, match=f"no backend of ggml in {tmp_path} runs on this machine"):
        libraries.load_backends(lib)
    assert lib.logs[-1].value == 1234


@pytest.mark.parametrize("command_name", ["ask", "inspect"])
@pytest.mark.parametrize("inputs", [["P", "P"], ["what is it", "P"], ["P", "P", "P"]])
def test_a_picture_in_the_place_of_the_question_is_wrong_usage(tmp_path, picture, command_name, inputs):
    # broken if the model were asked about the letters of a name
    words = [picture if word == "P" else word for word in inputs]
    done = command(command_name, *words, lib_dir=tmp_path)
    one_line_error(done, 2, "the question is missing: it comes last, behind the pictures")


@pytest.mark.parametrize("words", [["P", "-m", "M", "--", "-v"], ["-m", "M", "--", "P", "-v"], ["P", "--", "--json"]])
def test_words_behind_two_dashes_are_no_options(tmp_path, picture, words):
    # broken if a question could not begin with a dash
    model = str(demo.model_paths()[0])
    words = [{"P": picture, "M": model}.get(word, word) for word in words]
    one_line_error(command("ask", *words, lib_dir=tmp_path), 1, f"{LLAMA} is missing")


@pytest.mark.parametrize(("words", "code", "says"), [(["ask", "-", "q"], 1, "is empty"), (["chat"], 1, "is missing")])
def test_a_standard_input_that_is_closed_is_an_empty_one(tmp_path, words, code, says):
    # broken by a traceback: Python has no sys.stdin then
    environment = {**os.environ, "ST3_LIB_DIR": str(tmp_path), "PYTHONPATH": str(ROOT)}
    line = f"exec {shlex.join([sys.executable, '-m', 'st3_edge', *words])} <&-"
    done = subprocess.run(["sh", "-c", line], capture_output=True, text=True, env=environment, timeout=60)
    one_line_error(done, code, says)


@pytest.mark.parametrize("words", [["serve"], ["ask"], ["fly"]])
def test_the_version_is_told_whatever_stands_behind(tmp_path, words):
    # broken by a traceback, or a command that ran
    assert command("--version", *words, lib_dir=tmp_path).stdout == command("--version", lib_dir=tmp_path).stdout
