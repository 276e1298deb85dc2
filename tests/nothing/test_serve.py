"""`st3-edge serve`: which words are ours, what llama-server is started with, and the files of a repository."""

import argparse

import pytest

from st3_edge import demo
from st3_edge.commands import options as shared_options
from st3_edge.commands.console import Console
from st3_edge.commands.serve import command, options
from st3_edge.config import ST3Config
from st3_edge.errors import ConfigError, ModelError
from st3_edge.files import hub
from st3_edge.files.pair import check_pair
from st3_edge.prompts.templates import VICUNA


def parse(*words):
    return options.parse(argparse.ArgumentParser, words)


def test_llama_servers_options_pass_in_order():
    # broken if one of them were taken for an abbreviation of ours, or lost its value
    theirs = ["-c", "4096", "--keep", "-1", "-hft", "token", "--mod", "-np", "4", "--api-key=a b", "-mu", "x"]
    found = parse("--budget", "0.5", *theirs[:5], "--port=0", *theirs[5:], "-m", "a", "-mm", "b")
    assert found.theirs == theirs
    assert (found.ours.budget, found.ours.port, found.ours.model, found.ours.mmproj) == (0.5, 0, "a", "b")
    assert found.routes


def test_an_option_without_its_value_is_a_usage_error(capsys):
    # broken if the next option, or nothing, were taken for it
    for words in (["--model"], ["--port", "x"], ["--budget", "much"]):
        with pytest.raises(SystemExit) as caught:
            parse(*words)
        assert caught.value.code == 2
    capsys.readouterr()


def test_what_serving_needs_is_set_unless_it_is_said():
    # broken if a prompt did not fit a batch, any web page could read answers, or a person's choice were overruled
    model, mmproj = map(str, demo.model_paths())
    header = check_pair(model, mmproj)
    for words, absent in (([], ()), (["-b", "64", "--cors-origins", "*"], ("--batch-size", "localhost"))):
        arguments = parse("--budget", "0.4", *words)
        made = command.flags(arguments, shared_options.config(arguments.ours), header, model, mmproj)
        assert made[:2] == ["--host", "127.0.0.1"]
        assert made[made.index("--override-kv") + 1] == "st3.preset=str:st3,st3.budget=float:0.4"
        assert made[made.index("--model") + 1] == model
        assert ("--batch-size" in made, "localhost" in made) == ((False, False) if absent else (True, True))
        assert "--chat-template" not in made  # the model's own
    header.metadata.pop("tokenizer.chat_template")
    assert VICUNA in command.flags(parse(), ST3Config(), header, model, mmproj)
    assert VICUNA not in command.flags(parse("--chat-template", "x"), ST3Config(), header, model, mmproj)


def test_llama_servers_own_variables_are_as_good_as_its_options(monkeypatch):
    # broken if what a container sets were replaced by a default that nobody asked for
    model, mmproj = map(str, demo.model_paths())
    header = check_pair(model, mmproj)
    header.metadata.pop("tokenizer.chat_template")
    for name, value in {
        "HOST": "0.0.0.0",
        "PORT": "81",
        "BATCH": "9",
        "CORS_ORIGINS": "*",
        "CHAT_TEMPLATE": "x",
    }.items():
        monkeypatch.setenv(f"LLAMA_ARG_{name}", value)
    arguments = parse()
    assert (arguments.ours.host, arguments.ours.port, arguments.routes) == ("0.0.0.0", 81, False)
    made = command.flags(arguments, ST3Config(), header, model, mmproj)
    assert made[:2] == ["--host", "0.0.0.0"]
    assert not {"--batch-size", "--cors-origins", "--chat-template"} & {*made}
    monkeypatch.setenv("LLAMA_ARG_MODELS_DIR", "/x")
    assert parse().routes and not parse("-m", "a").routes  # which is typed
    monkeypatch.setenv("LLAMA_ARG_MODELS_DIR", "")
    assert not parse().routes


def test_the_config_files_settings_reach_the_server(tmp_path, monkeypatch):
    # broken if one of them were dropped in silence
    monkeypatch.setenv("ST3_CONFIG", str(tmp_path / "config.toml"))
    (tmp_path / "config.toml").write_text('n-ctx = 700\nthreads = 1\nn-gpu-layers = 0\nlora = ["a", "b=0.5"]\n')
    made = command.flags(parse("-c", "5"), ST3Config(), None, None, None)
    expected = ["--ctx-size", "700", "--threads", "1", "--n-gpu-layers", "0", "--lora", "a", "--lora-scaled", "b:0.5"]
    assert made[4 : 4 + len(expected)] == expected


@pytest.mark.parametrize("words", [["--keep", "0.3"], ["--keep=.5"]])
def test_the_share_that_other_commands_call_keep_is_refused(words, capsys):
    # broken if llama-server took it for a number of tokens
    with pytest.raises(SystemExit):
        parse(*words)
    assert "--budget" in capsys.readouterr().err


def test_overrides_are_written_as_llama_cpp_reads_them():
    # broken if a value came with another type
    values = {"st3.preset": "pvtp", "st3.start": 4, "st3.coverage": 0.25, "a": True}
    assert command.override(values) == "st3.preset=str:pvtp,st3.start=int:4,st3.coverage=float:0.25,a=bool:true"


FILES = ["README.md", "llava-Q8_0.gguf", "llava-Q4_K_M.gguf", "mmproj-bf16.gguf", "mmproj-f16.gguf", "mmproj-f32.gguf"]


@pytest.fixture
def repository(monkeypatch):
    """A repository's files; what is downloaded is listed."""
    loaded = []

    def serve(names):
        monkeypatch.setattr(hub, "_cached", lambda *_: [])
        monkeypatch.setattr(hub, "_listed", lambda *_: dict.fromkeys(names))
        monkeypatch.setattr(hub, "_get", lambda repo, name, *_: loaded.append(name) or f"/cache/{repo}/{name}")
        return loaded

    return serve


@pytest.mark.parametrize(
    ("name", "model"),
    [("a/b", "llava-Q4_K_M.gguf"), ("a/b:q8_0", "llava-Q8_0.gguf"), ("a/b:Q4_K_M", "llava-Q4_K_M.gguf")],
)
def test_a_pair_of_a_repository(repository, name, model):
    # broken if the halves were swapped, or another quantization came
    repository(FILES)
    found = hub.pair(name)
    assert found[:2] == (f"/cache/a/b/{model}", "/cache/a/b/mmproj-f16.gguf")
    assert found.name == f"a/b:{model[6:-5]}"


def test_every_part_of_a_split_model_is_loaded(repository):
    # broken if llama.cpp missed the second file
    parts = [f"m-{i:05}-of-00003.gguf" for i in (1, 2, 3)]
    loaded = repository([*parts, "mmproj.gguf"])
    assert hub.pair("a/b")[0].endswith(parts[0])
    assert loaded == [*parts, "mmproj.gguf"]


@pytest.mark.parametrize(
    ("names", "name", "part"),
    [
        (FILES, "a/b:Q2_K", "Q2_K"),
        (FILES[:3], "a/b", "both halves"),
        (FILES[3:], "a/b", "both halves"),
        ([], "a/b", "nothing"),
    ],
)
def test_a_repository_that_lacks_a_half(repository, names, name, part):
    # broken by a traceback, or a server that starts without its pictures
    repository(names)
    with pytest.raises(ModelError, match=part):
        hub.pair(name)


@pytest.mark.parametrize(
    ("words", "variable", "instead"),
    [
        (["-mmu", "http://x/y.gguf"], "", "--mmproj names the file"),
        (["--mmproj-url=http://x/y.gguf"], "", "--mmproj names the file"),
        (["--hf-file", "y.gguf"], "", "--hf OWNER/REPO:QUANT"),
        (["-hfr", "a/b"], "", "--hf names"),
        ([], "LLAMA_ARG_MMPROJ_URL", "--mmproj names the file"),
        ([], "LLAMA_ARG_MODEL_URL", "-m or --hf names"),
    ],
)
def test_no_other_file_takes_the_place_of_one_that_is_served(words, variable, instead, monkeypatch):
    # broken if llama-server downloaded over the mmproj beside the model, or a file were chosen and not used
    if variable:
        monkeypatch.setenv(variable, "http://x/y.gguf")
    with pytest.raises(ConfigError, match=instead):
        parse(*words).check_files()
    parse("-mu", "http://x/m.gguf", *words).check_files()  # llama-server chooses both then


@pytest.mark.parametrize(
    ("word", "says"),
    [
        ("--buget", "did you mean --budget"),
        ("--n-gpu-layer=1", "did you mean --n-gpu-layers"),
        ("--threads-batch", ""),
        ("--model-draft", ""),
        ("--slots", ""),
    ],
)
def test_a_slip_in_one_of_our_options_is_told(word, says):
    # broken if llama-server told it after a download, or one of its own options were taken for a slip
    help_of_theirs = "-tb, --threads-batch N\n-md, --model-draft FNAME\n"
    arguments = parse(word, "1")
    if not says:
        return arguments.check_names(lambda: help_of_theirs)
    with pytest.raises(ConfigError, match=says):
        arguments.check_names(lambda: help_of_theirs)
    return arguments.check_names(str)  # llama-server said nothing


@pytest.mark.parametrize("words", [["--port", "70000"], ["--host", "a..b"], ["--buget", "1"]])
def test_a_slip_is_told_before_a_download(words, monkeypatch, tmp_path):
    # broken if it came to light gigabytes later, or by a traceback of UnicodeError
    monkeypatch.setattr(command, "find", lambda name: tmp_path / name)
    monkeypatch.setattr(command, "_help", lambda _: "llama-server's")
    monkeypatch.setattr(hub, "pair", lambda *_, **__: pytest.fail("it was downloaded"))
    with pytest.raises(ConfigError):
        command.main(Console(), parse("--hf", "a/b", *words))


@pytest.mark.parametrize(("text", "layers"), [("all", "all"), ("auto", "auto"), ("3", 3), ("-1", -1)])
def test_layers_on_the_gpu_are_what_llama_server_takes(text, layers):
    # broken if -ngl took a word that --n-gpu-layers does not
    arguments = parse("--n-gpu-layers", text)
    made = command.flags(arguments, ST3Config(), None, None, None)
    assert arguments.ours.n_gpu_layers == layers and made[made.index("--n-gpu-layers") + 1] == text


def test_the_hints_are_of_the_command_that_was_typed(monkeypatch):
    # broken if a client's line lost an option, had another port, or showed the key
    monkeypatch.delenv("LLAMA_API_KEY", raising=False)
    typed = parse("-m", "a b.gguf", "--budget", "0.3", "--port", "80", "-c", "8192", "--api-key", "secret")
    said = command.hints(typed, ["--model", "a b.gguf"], 80)
    again = "st3-edge serve -m 'a b.gguf' --budget 0.3 -c 8192 --api-key YOUR_KEY --port ${PORT}\n"
    assert again in said and "secret" not in said and said.count("api_key='YOUR_KEY'") == 1
    said = command.hints(parse("--port=80"), ["--hf", "a/b"], 80)
    assert "st3-edge serve --hf a/b --port ${PORT}" in said and "api_key='none'" in said
