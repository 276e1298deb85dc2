"""Which model a command means, and what the config file adds to its words."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from st3_edge import ConfigError, ModelError, demo
from st3_edge.commands import loading, options, settings, which
from st3_edge.commands.bench import options as bench_options
from st3_edge.commands.parser import Parser
from st3_edge.commands.serve import options as serve_options
from st3_edge.commands.tune import options as tune_options

ROOT = Path(__file__).parents[2]


class Quiet:
    def note(self, text, end="\n") -> None: ...

    def stage(self, *_) -> None: ...


def parse(*words):
    parser = Parser()
    options.add_shared(parser)
    if settings.use(parser):
        return parser.parse_args(words)
    return parser.parse_args(words)


@pytest.fixture
def config(tmp_path, monkeypatch):
    """config(text): the config file."""
    path = tmp_path / "config.toml"
    path.write_text("")
    monkeypatch.setenv("ST3_CONFIG", str(path))

    def write(text: str):
        path.write_text(text, encoding="utf-8")

    return write


@pytest.fixture
def asked(monkeypatch):
    """What is taken from Hugging Face."""
    names = []
    monkeypatch.setattr(which, "download", lambda _, name: names.append(name) or ("/c/m", "/c/p", name))
    return names


def found(*words):
    return which.find(Quiet(), parse(*words))


def test_words_come_before_the_environment_and_that_before_the_file(config, asked, monkeypatch):
    # broken if what is said once were not overruled by what is said now
    model, mmproj = map(str, demo.model_paths())
    assert found()[:2] == (model, mmproj) and found().words == []
    config('hf = "o/file:Q8_0"')
    assert found().words == ["--hf", "o/file:Q8_0"]
    monkeypatch.setenv("ST3_MODEL", "o/environment")
    assert found().words == ["--hf", "o/environment"]
    monkeypatch.setenv("ST3_MODEL", model)
    assert found()[:2] == (model, mmproj)
    monkeypatch.setenv("ST3_MMPROJ", "x.gguf")
    assert found()[:2] == (model, "x.gguf")
    assert found("--hf", "o/words")[:2] == ("/c/m", "/c/p")
    assert found("-m", model)[:2] == (model, mmproj)
    assert found("-m", "a.gguf", "-mm", "b.gguf")[:2] == ("a.gguf", "b.gguf")
    assert asked == ["o/file:Q8_0", "o/environment", "o/words"]


def test_a_home_in_the_file_is_the_persons(config, monkeypatch, tmp_path):
    # broken if ~ were a folder's name, as no shell expands it there
    monkeypatch.setenv("HOME", str(tmp_path))
    config('model = "~/m.gguf"\nmmproj = "~/p.gguf"')
    assert found()[:2] == (f"{tmp_path}/m.gguf", f"{tmp_path}/p.gguf")


@pytest.mark.parametrize("text", ['hf = "a/b"\nmodel = "m.gguf"', ""])
def test_two_names_for_one_model_are_refused(config, asked, text):
    # broken if one of them were taken silently
    config(text)
    with pytest.raises(ModelError, match="both"):
        found(*([] if text else ["--hf", "a/b", "-m", "m.gguf"]))


@pytest.mark.parametrize("name", ["~nosuchperson/m.gguf", "~/m.gguf"])
def test_a_home_that_nobody_has_is_a_folders_name(config, name, monkeypatch, tmp_path):
    # broken by a traceback
    monkeypatch.setenv("HOME", str(tmp_path))
    config(f'model = "{name}"\nmmproj = "p.gguf"')
    assert found().model == os.path.expanduser(name)  # noqa: PTH111


def test_half_a_model_is_refused_wherever_it_is_named(config, monkeypatch):
    # broken if the demo model answered in place of a half that was chosen
    config('mmproj = "x.gguf"')
    with pytest.raises(ModelError, match="mmproj is half of a model"):
        found()
    monkeypatch.setenv("ST3_MMPROJ", "y.gguf")
    with pytest.raises(ModelError, match="ST3_MMPROJ is half of a model"):
        found()


@pytest.mark.parametrize(("text", "adapters"), [('"a.gguf"', ["a.gguf"]), ('["a.gguf", "b=0.5"]', ["a.gguf", "b=0.5"])])
def test_adapters_of_the_file_are_those_that_it_names(config, text, adapters):
    # broken if a name were taken letter by letter, or one on the command line were added to them
    config(f"lora = {text}")
    assert loading.adapters(parse()) == {name.partition("=")[0]: 0.5 if "=" in name else 1 for name in adapters}
    assert loading.adapters(parse("--lora", "c")) == {"c": 1}
    config("lora = [1]")
    with pytest.raises(ConfigError, match="lora cannot be"):
        parse()


def test_pruning_of_the_file_gives_way_to_what_is_said(config):
    # broken if a preset that was asked for got another's budget, or --keep were refused for the file's sake
    config("budget = 0.3\nmerge = false\nn-ctx = 8192\ntemperature = 0.5\n")
    arguments = parse()
    assert (arguments.n_ctx, arguments.temperature) == (8192, 0.5)
    made = options.config(arguments)
    assert (made.budget, made.merge, made.preset) == (0.3, False, None)
    assert options.config(parse("--keep", "0.5")).budget is None
    assert options.config(parse("--budget", "0.4")).budget == 0.4
    for preset in ("off", "fastv"):
        made = options.config(parse("--preset", preset))
        assert (made.budget, made.merge, made.preset) == (None, None, preset)
    assert parse("--n-ctx", "100").n_ctx == 100
    config('preset = "off"')
    assert options.config(parse()).preset == "off"
    made = options.config(parse("--budget", "0.4"))
    assert (made.budget, made.preset) == (0.4, None)  # what is typed puts it aside
    config("keep = 0.5\nmin-share = 0.1")
    tune = Parser()
    tune_options.add_arguments(tune)
    settings.use(tune)
    made = options.config(tune.parse_args(["folder"]))
    assert (made.keep, made.min_share) == (None, 0.1)  # it looks for a budget
    serve = serve_options.parse(Parser, ["--score", "last-mean"])
    assert options.config(serve.ours).keep == 0.5


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("budgte = 0.3", "did you mean 'budget'"),
        ('budget = "much"', "budget cannot be 'much'"),
        ("budget = [1]", "budget cannot be"),
        ("merge = 1", "merge cannot be 1"),
        ("budget", "is not TOML"),
        ("trace = true", "no option 'trace'"),
    ],
)
def test_a_mistake_in_the_file_is_one_line(config, text, says):
    # broken by a traceback, or a setting that is silently ignored
    config(text)
    with pytest.raises(ConfigError, match=says):
        parse()


def test_every_command_reads_the_file(config, tmp_path):
    # broken if one of them used another model than the others
    config(f'model = "{tmp_path}/none.gguf"')
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "ST3_LIB_DIR": str(tmp_path)}
    picture = str(demo.scenes()[0].picture)
    for words in (["ask", picture, "?"], ["chat"], ["inspect", picture, "?"], ["tune", str(demo.FOLDER)], ["bench"]):
        (tmp_path / "libst3-llama.so").write_bytes(b"")
        (tmp_path / "libst3-mtmd.so").write_bytes(b"")
        done = subprocess.run(
            [sys.executable, "-m", "st3_edge", *words], capture_output=True, text=True, env=environment, timeout=60
        )
        assert done.returncode == 1 and "none.gguf' cannot be read: No such file" in done.stderr, (words, done.stderr)


def test_models_lists_what_was_downloaded(tmp_path):
    # broken if a pair in the cache were missing, or its schedule were not that of its file
    snapshot = tmp_path / "models--a--b" / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (tmp_path / "models--a--b" / "refs").mkdir()
    (tmp_path / "models--a--b" / "refs" / "main").write_text("0" * 40)
    blobs = tmp_path / "models--a--b" / "blobs"
    blobs.mkdir()
    for i, (name, source) in enumerate(zip(("m-Q8_0.gguf", "mmproj-m.gguf"), demo.model_paths(), strict=True)):
        (blobs / str(i)).write_bytes(source.read_bytes())
        (snapshot / name).symlink_to(blobs / str(i))
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_CACHE": str(tmp_path)}

    def models(*words):
        command = [sys.executable, "-m", "st3_edge", "models", *words]
        done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=60)
        assert done.returncode == 0, done.stderr
        return done.stdout

    (one,) = json.loads(models("--json"))
    size = sum(path.stat().st_size for path in demo.model_paths())
    assert (one["name"], one["size"], one["problem"], one["architecture"]) == ("a/b:Q8_0", size, None, "llama")
    assert "a/b:Q8_0" in models() and "default schedule" in models()
    environment["HF_HUB_CACHE"] = str(tmp_path / "none")
    assert models() == ""


def test_a_config_file_that_is_named_and_not_there_is_an_error(monkeypatch, tmp_path):
    # broken if its settings were left out in silence
    monkeypatch.setenv("ST3_CONFIG", str(tmp_path / "none.toml"))
    with pytest.raises(ConfigError, match=r"none\.toml' is not there: ST3_CONFIG names it"):
        parse()


def test_the_other_name_of_hf_is_the_same_key(config, asked):
    # broken if it counted as typed, and excluded --model
    config('hf-repo = "o/file"')
    assert found().words == ["--hf", "o/file"]
    model, _ = map(str, demo.model_paths())
    assert found("-m", model).model == model


def test_adapters_of_the_file_may_be_in_the_persons_home(config, monkeypatch, tmp_path):
    # broken if ~ were a folder's name
    monkeypatch.setenv("HOME", str(tmp_path))
    config('lora = "~/a.gguf=0.5"')
    assert loading.adapters(parse()) == {f"{tmp_path}/a.gguf": 0.5}


def test_a_key_means_the_same_to_every_command(config):
    # broken if `cache = true`, which keeps encoded pictures, were a folder to bench
    config("cache = true\n")
    shared, bench = Parser(), Parser()
    options.add_shared(shared)
    bench_options.add_arguments(bench)
    assert settings.use(bench) and not hasattr(bench.parse_args([]), "cache")
    ours, theirs = settings._actions(shared), settings._actions(bench)
    assert {key for key in ours.keys() & theirs.keys() if type(ours[key]) is not type(theirs[key])} == set()


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--top-p", "0.9", "--seed", "1"], "whatever --top-p, --seed says"),
        (["--top-k", "5"], "--top-k"),
        (["--min-p", "0.1", "--temperature", "0.5"], ""),
        (["--repeat-penalty", "1.1"], ""),
    ],
)
def test_sampling_that_changes_nothing_is_told(words, told):
    # broken if a person took the likeliest words for chosen ones
    said = options.idle(parse(*words))
    assert told in said and bool(said) == bool(told)


@pytest.mark.parametrize("word", ["--model", "--hf", "--mmproj"])
def test_a_model_of_no_name_is_refused(config, word):
    # broken if the demo model answered in its place, as where a shell's variable is empty
    with pytest.raises(ModelError, match=f"{word} names nothing"):
        found(word, "")


def test_a_folder_in_the_place_of_a_model_is_called_so(config, tmp_path):
    # broken if it were called a model without an mmproj
    with pytest.raises(ModelError, match="is a folder: name"):
        found("-m", str(tmp_path))


def test_adapters_are_looked_at_before_a_download(config, asked, tmp_path):
    # broken if a slip came to light gigabytes later
    with pytest.raises(ModelError, match=r"adapter .* No such file"):
        found("--hf", "a/b", "--lora", str(tmp_path / "none.gguf"))
    assert asked == []
