"""`st3-edge` as a person runs it, on the embedded model."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path

import pytest
from PIL import Image

from st3_edge.native import libraries

QUESTION = "What color is the star?"
KEYS = [
    "answer",
    "finish_reason",
    "n_generated",
    "mode",
    "reason",
    "schedule",
    "visual_tokens",
    "kv_bytes",
    "flops",
    "ms",
    "reused",
    "kv_bytes_end",
]


def answered(done) -> dict:
    """The object that --json printed, and nothing else on standard output."""
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("\n") == 1
    return json.loads(done.stdout)


def refused(done, says: str) -> None:
    assert done.returncode == 1, (done.returncode, done.stderr)
    assert done.stdout == ""
    assert done.stderr.splitlines()[-1].startswith("st3-edge: error: ")
    assert says in done.stderr
    # Only which model it is and what tells of a long wait may stand before the one line.
    before = [line for line in done.stderr.splitlines()[:-1] if not line.startswith("(no model chosen")]
    assert all(line.endswith(" ...") for line in before)


def test_json_is_one_object_of_the_documented_shape(ask, picture):
    # broken if a key were renamed, or a log line or the streamed answer came on standard output
    got = answered(ask(picture, QUESTION, "--json", "--no-cache"))
    assert list(got) == KEYS
    assert got["mode"] == "pruned-prefill" and got["reason"] is None
    assert got["n_generated"] <= 6
    assert got["visual_tokens"]["given"] == 576
    layers = got["visual_tokens"]["per_layer"]
    assert layers == sorted(layers, reverse=True) and layers[-1] < layers[0] == 576
    assert got["schedule"]["budget"] == pytest.approx(sum(layers) / len(layers) / 576, abs=1e-4)
    kv = got["kv_bytes"]
    assert kv["live"] < kv["full"] and kv["live"] <= kv["allocated"]
    assert got["flops"]["prefill"] < got["flops"]["prefill_full"]
    assert all(value > 0 for value in got["ms"].values())


def test_the_answer_streams_to_standard_output_and_all_else_goes_to_standard_error(ask, picture):
    # broken if the summary were mixed into the answer, or the answer differed from --json's
    done = ask(picture, QUESTION)
    assert done.returncode == 0
    assert done.stdout == answered(ask(picture, QUESTION, "--json"))["answer"] + "\n"
    assert re.search(r"ST3 kept \d+% of 576 visual tokens; first token after .*KV cache", done.stderr)
    assert "the small demo model answers" in done.stderr


def test_a_trace_tells_what_was_read_and_kept(ask, picture, scenes):
    # broken if images were counted wrong, or kept indices were not those of the counts
    got = answered(ask(picture, str(scenes[1].picture), QUESTION, "--json", "--trace"))
    assert got["prompt_tokens"].count(-1) == 2
    top = got["first_logits_top"]
    assert len(top) == 10 and [logit for _, logit in top] == sorted((logit for _, logit in top), reverse=True)
    counts = got["schedule"]["counts"]
    assert [len(kept) for kept in got["kept"]] == [sum(images) for images in counts]
    for kept, images in zip(got["kept"], counts, strict=True):
        assert kept == sorted(set(kept))
        assert [sum(i < 576 for i in kept), sum(i >= 576 for i in kept)] == images
    for before, after in pairwise(got["kept"]):
        assert set(after) <= set(before)


def test_the_schedule_is_the_one_asked_for(ask, picture):
    # broken if an option did not reach its key
    got = answered(
        ask(picture, QUESTION, "--json", "--keep", "0.5", "--start", "3", "--stride", "5", "--min-keep", "99")
    )
    assert got["schedule"]["cuts"] == [2, 7, 12]
    assert got["schedule"]["counts"] == [[288], [144], [99]]
    assert answered(ask(picture, QUESTION, "--json", "--budget", "0.3"))["schedule"]["budget"] == pytest.approx(
        0.3, abs=0.01
    )


def test_score_and_coverage_change_what_is_kept(ask, picture):
    # broken if either did not reach its key
    def kept(*options):
        return answered(ask(picture, QUESTION, "--json", "--trace", *options))["kept"][0]

    default = kept("--score", "last-mean", "--coverage", "0")
    assert kept("--score", "text-max-sum", "--coverage", "0") != default
    assert kept("--score", "last-mean", "--coverage", "0.5") != default


def test_merging_and_rank_are_those_asked_for(ask, picture):
    # broken if either did not reach its key, or the trace's weights were not those of its owners
    def traced(*options):
        return answered(ask(picture, QUESTION, "--json", "--trace", *options))

    alone, merged = traced("--no-merge", "--rank", "distance"), traced("--merge", "--rank", "score")
    assert (alone["schedule"]["merge"], alone["schedule"]["rank"]) == (False, "distance")
    assert (merged["schedule"]["merge"], merged["schedule"]["rank"]) == (True, "score")
    assert alone["owners"] == alone["weights"] == [] and alone["kept"][0] != merged["kept"][0]
    for kept, owners, weights in zip(*(merged[k] for k in ("kept", "owners", "weights")), strict=True):
        assert len(owners) == 576 and sorted(set(owners)) == kept and all(owners[k] == k for k in kept)
        assert weights == [owners.count(k) for k in kept] and sum(weights) == 576


def test_annealing_is_the_one_asked_for(ask, picture):
    # broken if an option did not reach its key
    options = ("--json", "--anneal", "linear", "--anneal-tokens", "4", "--anneal-floor", "0.5", "--min-share", "0")
    got = answered(ask(picture, "Describe the image.", *options))["visual_tokens"]
    assert got["held"] == [max(1, int(0.5 * n + 0.5)) for n in got["per_layer"]]
    got = answered(ask(picture, "Describe the image.", "--json", "--anneal", "none"))["visual_tokens"]
    assert got["held"] == got["per_layer"]


def test_off_drops_nothing(ask, picture):
    # broken if off were a schedule that keeps all, with its costs, or kept fewer
    got = answered(ask(picture, QUESTION, "--json", "--preset", "off"))
    assert got["mode"] == "off"
    assert set(got["visual_tokens"]["per_layer"]) == {576}
    assert got["schedule"]["cuts"] == [] and got["schedule"]["budget"] == 1
    assert got["kv_bytes"]["live"] == got["kv_bytes"]["full"]


@pytest.mark.parametrize("preset", ["pvtp", "paper", "fastv", "pyramiddrop", "vtw", "random", "downsample"])
def test_every_preset_answers(ask, picture, preset):
    # broken if a name that the command line takes were unknown to the library
    got = answered(ask(picture, QUESTION, "--json", "--preset", preset))
    assert got["schedule"]["preset"] == preset
    assert got["mode"] == "pruned-prefill" and got["schedule"]["budget"] < 1


def test_doctor_finds_everything(command):
    # broken if a library, the ABI or the embedded model were not where the package looks
    done = command("doctor", "--json")
    assert done.returncode == 0, done.stdout
    found = json.loads(done.stdout)
    assert found["problems"] == [] and found["abi"] == libraries.ABI_VERSION
    assert all("f16" in d["kernel_for"] for d in found["devices"] if d["backend"] == "CPU") and found["devices"]
    assert found["demo_model"].keys() == {"model", "mmproj", "pictures"}
    assert "all is well" in command("doctor").stdout


def test_the_demo_shows_answers_layers_and_times(command):
    # broken if the first thing that a newcomer runs failed
    done = command("demo")
    assert done.returncode == 0, done.stderr
    assert re.search(r"\n  layer 0 +576  .*\n  layers 1–15 +269  ", done.stdout)
    assert "KV cache in use" in done.stdout
    assert re.search(r"\n  prefill .*(x as fast \(\d+\.\d\d to |not compared: pairs)", done.stdout)


@pytest.mark.parametrize("part", [0, 3, 100, 5_000, 2_000_000])
@pytest.mark.parametrize("half", [0, 1])
def test_truncated_model_files_are_refused(ask, picture, files, tmp_path, half, part):
    # broken if a cut file were loaded: upstream's vision reader takes what is missing for zeros
    cut = tmp_path / "cut.gguf"
    cut.write_bytes(Path(files[half]).read_bytes()[:part])
    pair = list(files)
    pair[half] = str(cut)
    done = ask(picture, QUESTION, "--model", pair[0], "--mmproj", pair[1])
    refused(done, "truncated")


def test_files_of_the_wrong_kind_are_refused(ask, picture, files, foreign_mmproj, tmp_path):
    # broken if a half were loaded in the other's place, or embeddings of the wrong width reached the decoder
    model, mmproj = files
    refused(ask(picture, QUESTION, "--mmproj", mmproj), "--model names the other")
    refused(ask(picture, QUESTION, "--model", model, "--mmproj", model), "is a text model")
    refused(ask(picture, QUESTION, "--model", mmproj, "--mmproj", mmproj), "is a vision half")
    refused(ask(picture, QUESTION, "--model", str(tmp_path / "none"), "--mmproj", mmproj), "No such file")
    refused(ask(picture, QUESTION, "--model", model, "--mmproj", picture), "does not begin as a GGUF file")
    refused(
        ask(picture, QUESTION, "--model", model, "--mmproj", foreign_mmproj),
        "its visual tokens are 32 wide",
    )


@pytest.mark.parametrize("tensor", ["v.patch_embd.weight", "mm.0.weight", "mm.2.bias"])
def test_a_vision_half_that_lacks_a_tensor_is_refused(ask, picture, files, tmp_path, tensor):
    # broken if it were loaded: upstream's graph would use a null pointer
    damaged = tmp_path / "mmproj.gguf"
    damaged.write_bytes(Path(files[1]).read_bytes().replace(tensor.encode(), tensor.upper().encode()))
    refused(ask(picture, QUESTION, "--model", files[0], "--mmproj", str(damaged)), f"lacks the tensor {tensor}")


@pytest.mark.parametrize(("width", "height"), [(1, 1), (30_000, 30_000), (10_000, 3)])
def test_pictures_out_of_bounds_are_refused(ask, tmp_path, width, height):
    # broken if a bomb were decoded, or a sliver resized to nothing
    path = tmp_path / "picture.png"
    Image.new("1", (width, height)).save(path)
    refused(ask(str(path), QUESTION), "pixels")


def test_files_that_are_no_pictures_are_refused(ask, picture, tmp_path):
    # broken by an exception of Pillow's that is let through
    text = tmp_path / "notes.txt"
    text.write_text("no picture")
    refused(ask(str(text), QUESTION), "is no PNG")
    refused(ask(str(tmp_path), QUESTION), "is not a file")
    refused(ask("none.png", QUESTION), "No such file")
    refused(ask("https://example.org/a.png", QUESTION), "not fetched")
    refused(ask(picture, "data:,", QUESTION), "is empty")


def test_a_prompt_longer_than_the_context_is_refused_with_the_numbers(ask, picture):
    # broken if it were cut, or the cache overran
    refused(ask(picture, QUESTION, "--n-ctx", "300"), "n_ctx is 300")
    refused(ask(picture, "word " * 5000, "--n-ctx", "1024"), "n_ctx is 1024")


@pytest.mark.parametrize("options", [("--start", "16"), ("--preset", "st3", "--start", "4000000000")])
def test_a_schedule_that_does_not_fit_the_model_is_refused(ask, picture, options):
    # broken if the library's reason were lost on the way
    refused(ask(picture, QUESTION, *options), "start")


def chat(environment, lines: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "st3_edge", "chat", "--threads", "1", "--max-tokens", "6", *arguments]
    return subprocess.run(command, input=lines, capture_output=True, text=True, env=environment, timeout=300)


def test_a_chat_goes_on_from_question_to_question_and_from_day_to_day(environment, picture, tmp_path):
    # broken if a question saw no picture, or a conversation that was kept could not be gone on with
    kept = tmp_path / "kept.st3"
    first = chat(environment, f"{QUESTION}\nHow many shapes are there?\n/report\n/save {kept}\n", picture)
    assert first.returncode == 0, first.stderr
    assert len(first.stdout.splitlines()) == 2 and all(first.stdout.splitlines())
    assert "% of 576 visual tokens" in first.stderr and "error" not in first.stderr

    second = chat(environment, f"/load {kept}\nIs there a blue ring?\n/report\n", "--revisit", "never")
    assert second.returncode == 0 and len(second.stdout.splitlines()) == 1
    assert "2 questions so far" in second.stderr and "error" not in second.stderr
    told = re.search(r"; (\d+) positions of the prompt reused; first token after \d+ ms \(pictures 0,", second.stderr)
    assert told and int(told[1]) > 576, second.stderr


def test_a_chat_goes_on_with_what_a_program_saved(environment, load, picture, tmp_path):
    # broken if a question without an answer at the end, as in docs/conversations.md, ended in an error
    kept, nothing = tmp_path / "talk.st3", tmp_path / "nothing.st3"
    with load(n_ctx=4096) as llava:
        content = [{"type": "image_url", "image_url": {"url": picture}}, {"type": "text", "text": QUESTION}]
        messages = [{"role": "system", "content": "Be short."}, {"role": "user", "content": content}]
        answer = llava.create_chat_completion(messages, max_tokens=6)["choices"][0]["message"]
        llava.save_state(nothing)
        llava.save_state(kept, [*messages, answer, {"role": "user", "content": "And what is behind it?"}])
    done = chat(environment, "/system\n/retry\nIs there a ring?\n/report\n", picture, "--load", str(kept))
    assert done.returncode == 0 and len(done.stdout.splitlines()) == 2, done.stderr
    assert "(system: Be short.)" in done.stderr and "ask it again: And what is behind it?" in done.stderr
    assert "% of 1152 visual tokens" in done.stderr and "error" not in done.stderr
    other = chat(environment, "", "--load", str(kept), "--system", "Be long.")
    assert other.returncode == 0 and "1 question so far" in other.stderr
    refused(chat(environment, QUESTION, "--load", str(nothing)), "holds no messages")


def test_what_goes_wrong_in_a_chat_is_told_and_the_chat_goes_on(environment, picture, tmp_path):
    # broken by a traceback, or if one bad line ended the program
    lines = f"/image {tmp_path}/none.png\n/load {picture}\n{'word ' * 5000}\n/save {tmp_path}\n{QUESTION}\n"
    done = chat(environment, lines, picture)
    assert done.returncode == 1 and done.stdout.strip()
    errors = [line for line in done.stderr.splitlines() if line.startswith("st3-edge: error: ")]
    assert len(errors) == 4, done.stderr
    expected = ("cannot be read", "does not begin", "n_ctx is", "is no saved conversation")
    for said, error in zip(expected, errors, strict=True):
        assert said in error


def kept(environment, model: str, mmproj: str, *pictures: str) -> list[list[str]]:
    """What `/kept` says after a question about pictures and `/clear`: for each picture the lines of its map, and what
    it held."""
    said = "What color is the star?\n/clear\n/kept\n"
    options = ("-m", model, "--mmproj", mmproj, "--n-ctx", "8192")
    done = chat({**environment, "PYTHONIOENCODING": "utf-8"}, said, *options, *pictures)
    assert done.returncode == 0, done.stderr
    lines = done.stderr.partition("(begun anew)\n")[2].splitlines()
    assert lines[-1].startswith("(the brighter")
    ends = [i for i, line in enumerate(lines) if line.startswith("picture ")]
    return [lines[a + 1 : b + 1] for a, b in zip([-1, *ends], ends, strict=False)]


def test_a_chat_shows_what_was_kept(environment, files, tiled, picture: str, tmp_path: Path) -> None:
    # broken if a map were of another picture, of the conversation now, or tiles were pictures of their own
    wide = tmp_path / "wide.png"
    Image.open(picture).resize((1100, 330)).save(wide)
    maps = kept(environment, *files, picture, str(wide))
    assert [len(lines) for lines in maps] == [25, 25]
    for *lines, told in maps:
        n, first, held = (int(n) for n in re.findall(r"(\d+)(?: visual| in)", told))
        assert (n, first) == (576, 576) and 200 < held < 300
        assert "".join(lines).count("█") == 2 * held
    (of_tiles,) = kept(environment, files[0], tiled, str(wide))
    assert "of 2304 visual tokens" in of_tiles[-1]  # the whole, and three tiles
    assert len(of_tiles) == 24 + 12 + 1  # of the tiles in a row, four patches are a square of the map


def test_output_that_cannot_be_written_is_told_in_one_line(environment, picture):
    # broken by a traceback of OSError: a full disk is no bug of ours
    for arguments in (("ask", picture, QUESTION, "--max-tokens", "3"), ("chat", picture), ("doctor",), ("--version",)):
        command = [sys.executable, "-m", "st3_edge", *arguments]
        with Path("/dev/full").open("w") as full:
            done = subprocess.run(
                command, input="a?\n", stdout=full, stderr=subprocess.PIPE, text=True, env=environment, timeout=300
            )
        assert done.returncode == 1 and "Traceback" not in done.stderr
        assert done.stderr.splitlines()[-1].startswith("st3-edge: error: standard output cannot be written: No space")


def test_standard_error_that_cannot_be_written_is_no_error(environment, picture):
    # broken if an answer were lost because its summary could not be told
    command = [sys.executable, "-m", "st3_edge", "ask", picture, QUESTION, "--max-tokens", "3"]
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=full, text=True, env=environment, timeout=300)
    assert done.returncode == 0 and done.stdout.strip()


def test_an_answer_that_was_cut_is_said_to_be(ask, picture):
    # broken if a person took a part of an answer for all of it
    assert "(cut at --max-tokens 6)" in ask(picture, "Describe the image.").stderr
    full = ask(picture, "Describe the image.", "--max-tokens", "0", "--n-ctx", "600")
    assert "(the context of 600 tokens is full: raise --n-ctx)" in full.stderr
    whole = ask(picture, "How many shapes are there?", "--max-tokens", "100")
    assert "(cut" not in whole.stderr and "is full" not in whole.stderr


def test_a_seed_makes_an_answer_repeatable(ask, picture):
    # broken if it did not reach the sampler, or became the seed of the preset "random"
    def sampled(seed):
        done = ask(picture, QUESTION, "--temperature", "20", "--seed", str(seed))
        assert done.returncode == 0, done.stderr
        return done.stdout

    assert sampled(1) == sampled(1) != sampled(2)


def test_a_prompt_longer_than_n_ubatch_is_read_unpruned(ask, picture):
    # broken if the option did not reach the context
    short = answered(ask(picture, QUESTION, "--json", "--n-ubatch", "128"))
    assert short["mode"] == "evict-only" and short["reason"]
    long = ask(*[picture] * 8, QUESTION, "--json", "--n-ctx", "8192", "--n-ubatch", "8192")
    assert answered(long)["mode"] == "pruned-prefill"


def test_files_whose_names_are_no_text_are_used(ask, picture, files, tmp_path):
    # broken by a traceback of UnicodeEncodeError: a name is bytes
    folder = tmp_path / os.fsdecode(b"d\xff")
    folder.mkdir()
    for path in files:
        shutil.copy(path, folder)
    model, mmproj = (folder / Path(path).name for path in files)
    assert answered(ask(picture, QUESTION, "--json", "--model", str(model), "--mmproj", str(mmproj)))["n_generated"]


def test_ctrl_c_leaves_at_once_with_130(start, picture):
    # broken by a traceback, or if native code had to end first
    process = start("ask", picture, "Describe the image.", "--max-tokens", "3000")
    assert process.stdout is not None
    process.stdout.read(1)
    started = time.monotonic()
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    if process.returncode != 0:  # 0: the model had said all that it had to say
        assert process.returncode == 130
        assert time.monotonic() - started < 30
        assert err.splitlines()[-1] == "st3-edge: interrupted"
    assert "Traceback" not in err


def test_a_reader_that_leaves_early_is_no_error_to_tell(start, picture):
    # broken by a traceback of BrokenPipeError, as in `st3-edge ask ... | head`
    process = start("ask", picture, "Describe the image.", "--threads", "1")
    assert process.stdout is not None and process.stderr is not None
    process.stdout.close()
    err = process.stderr.read()
    process.wait(timeout=300)
    assert "Traceback" not in err and "Exception" not in err
