"""`st3-edge tune` on the embedded model: the search, what it writes, and what the new file does."""

import json
import shutil
import signal
import subprocess
import time

import pytest

from st3_edge import ST3Config, St3Error
from st3_edge.commands.tune.evaluate import Work
from st3_edge.commands.tune.subject import Prompt, Subject

gguf = pytest.importorskip("gguf")

QUESTION = "How many shapes are there?"


@pytest.fixture(scope="module")
def folder(scenes, tmp_path_factory) -> str:
    """Two pictures."""
    path = tmp_path_factory.mktemp("pictures")
    for scene in scenes[:2]:
        shutil.copy(scene.picture, path)
    return str(path)


@pytest.fixture(scope="module")
def work(tmp_path_factory) -> str:
    """What one test measured, the next need not."""
    return str(tmp_path_factory.mktemp("work"))


@pytest.fixture(scope="module")
def questions(tmp_path_factory, scenes) -> str:
    path = tmp_path_factory.mktemp("questions") / "questions.txt"
    path.write_text(f"{QUESTION}\n{scenes[0].picture.name}\tDescribe the image.\n")
    return str(path)


@pytest.fixture
def tune(command, folder, work, questions):
    """`st3-edge tune` over start 2 and 4 prompts at most, of which there are three."""

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        options = ("--questions", questions, "--work", work, "--tokens", "8", "--prompts", "4", "--threads", "1")
        return command("tune", folder, *options, "--start", "2", "--stride", "2", *arguments)

    return run


def test_the_schedule_found_is_written_and_used(tune, ask, files, folder, tmp_path):
    # broken if the limit were passed, the file carried another schedule, or the package's default hid it
    new = tmp_path / "new.gguf"
    done = tune("--json", "--preset", "pvtp", "--coverage", "0.25", "--output", str(new))
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    best = found["best"]
    assert found["prompts"] == 3 and found["output"] == str(new)
    assert 0 < best["kl"] <= found["max_kl"] == 0.03 and 0 < best["cost"] < 1
    assert best in found["frontier"] and best["kl_interval"][0] <= best["kl"] <= best["kl_interval"][1]
    assert [row["cost"] for row in found["frontier"]] == sorted(row["cost"] for row in found["frontier"])
    assert best["worst"]["kl"] >= best["kl"] and 0.5 < best["same_top"] <= 1

    keys = {"st3.preset": "pvtp", "st3.coverage": 0.25, "st3.start": 2, "st3.stride": 2, "st3.budget": best["budget"]}
    assert found["overrides"] == keys
    assert {k: f.contents() for k, f in gguf.GGUFReader(new).fields.items() if k.startswith("st3.")} == keys

    picture = f"{folder}/scene-1.png"
    options = [f"--{k.removeprefix('st3.')}={v}" for k, v in keys.items()]
    pair = ("--mmproj", files[1], "--json", "--trace")
    own = json.loads(ask(picture, QUESTION, "--model", str(new), *pair).stdout)
    given = json.loads(ask(picture, QUESTION, "--model", files[0], *pair, *options).stdout)
    plain = json.loads(ask(picture, QUESTION, "--model", files[0], *pair).stdout)
    for key in ("answer", "schedule", "kept", "first_logits_top"):
        assert own[key] == given[key]
    assert own["schedule"]["preset"] == "pvtp" != plain["schedule"]["preset"]
    assert own["visual_tokens"]["held"] == own["visual_tokens"]["per_layer"], "no annealing: the file's preset has none"
    over = json.loads(ask(picture, QUESTION, "--model", str(new), *pair, "--preset", "off").stdout)
    assert over["mode"] == "off"


def test_what_is_known_is_not_measured_again(tune):
    # broken if a restart began anew; nothing is loaded, so it takes no time to speak of
    first = tune("--json", "--preset", "pvtp", "--coverage", "0.25")
    begin = time.monotonic()
    again = tune("--json", "--preset", "pvtp", "--coverage", "0.25")
    assert again.stdout == first.stdout and first.returncode == 0
    assert time.monotonic() - begin < 60
    assert "looking at the pictures" not in again.stderr and "loading" not in again.stderr


def test_a_larger_limit_is_never_dearer(tune):
    # broken if the limit did not reach the search
    loose, strict = (
        json.loads(tune("--json", "--preset", "pvtp", "--coverage", "0.25", "--max-kl", kl).stdout)["best"]
        for kl in ("0.5", "0.03")
    )
    assert loose["cost"] < strict["cost"] and strict["kl"] <= 0.03 < loose["kl"] <= 0.5


def test_the_page_says_how_to_use_it(tune):
    # broken if the options or overrides shown were not those of the schedule
    done = tune("--preset", "pvtp", "--coverage", "0.25")
    assert done.returncode == 0
    assert "\n* 0." in done.stdout
    best = json.loads(tune("--json", "--preset", "pvtp", "--coverage", "0.25").stdout)["best"]
    (line,) = (line for line in done.stdout.splitlines() if line.startswith("st3-edge ask IMAGE QUESTION "))
    words = line.split()[4:]
    budget = str(best["budget"])
    options = {"--preset": "pvtp", "--coverage": "0.25", "--start": "2", "--stride": "2", "--budget": budget}
    assert dict(zip(words[::2], words[1::2], strict=True)) == options


def test_where_nothing_is_near_enough_it_says_so_and_writes_nothing(tune, tmp_path):
    # broken if the nearest one were taken, or the frontier not shown
    new = tmp_path / "new.gguf"
    done = tune("--preset", "pvtp", "--coverage", "0.25", "--max-kl", "1e-9", "--output", str(new))
    assert done.returncode == 1 and not new.exists()
    assert done.stderr.splitlines()[-1] == "st3-edge: error: no schedule stays within a KL of 1e-09 (--max-kl)"
    assert "budget" in done.stdout and "*" not in done.stdout


def test_ctrl_c_tells_what_is_known_and_the_next_run_goes_on(start, folder, tmp_path):
    # broken if it ended in a traceback, wrote the model, or measured again what was measured
    arguments = ["tune", folder, "--prompts", "2", "--tokens", "4", "--threads", "1", "--work", str(tmp_path / "work")]
    arguments += ["--output", str(tmp_path / "new.gguf"), "--json"]
    process = start(*arguments)
    assert process.stderr is not None
    for line in process.stderr:
        if "KL" in line:
            break
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 130, err
    found = json.loads(out)
    assert found["interrupted"] and found["evaluated"] >= 1 and found["output"] is None
    assert "the same command goes on from here" in err and "Traceback" not in err
    assert not (tmp_path / "new.gguf").exists()
    lines = next((tmp_path / "work").glob("*/results.jsonl")).read_text().splitlines()
    assert len(lines) >= 2 and all(json.loads(line)["kl"] >= 0 for line in lines)


def test_a_prompt_that_leaves_no_room_is_told(tune):
    # broken if an answer were cut short by the context, and so another one compared
    done = tune("--preset", "pvtp", "--n-ctx", "590")
    assert done.returncode == 1 and "set n_ctx to" in done.stderr.splitlines()[-1]


def test_n_ctx_0_is_what_the_model_was_trained_on(files, scenes, tmp_path):
    # broken if a context of no tokens were made: the other commands take 0, too
    prompt = Prompt(scenes[0].picture, "digest", QUESTION)
    subject = Subject(*files, [prompt], Work(tmp_path), n_tokens=2, n_ctx=0, n_threads=1)
    subject.answer()
    with subject.opened(ST3Config(preset="pvtp").overrides()) as measure:
        assert measure(0).flops < measure(0).flops_full


def test_a_prompt_that_cannot_be_pruned_is_told(files, scenes, tmp_path):
    # broken if schedules were compared that change nothing: here the prompt does not fit one batch
    prompt = Prompt(scenes[0].picture, "digest", QUESTION)
    subject = Subject(*files, [prompt], Work(tmp_path), n_tokens=2, n_ctx=1024, n_ubatch=128, n_threads=1)
    subject.answer()
    with (
        subject.opened(ST3Config(preset="pvtp").overrides()) as measure,
        pytest.raises(St3Error, match="do not fit one batch"),
    ):
        measure(0)
