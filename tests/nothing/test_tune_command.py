"""What `st3-edge tune` refuses, before it loads anything."""

import numpy as np
import pytest
from PIL import Image

from st3_edge import ST3Config, cli, demo
from st3_edge.commands import options
from st3_edge.commands.parser import Parser
from st3_edge.commands.tune import command

gguf = pytest.importorskip("gguf")


@pytest.fixture
def folder(tmp_path):
    path = tmp_path / "pictures"
    path.mkdir()
    Image.new("RGB", (8, 8)).save(path / "a.png")
    return path


@pytest.fixture
def refused(tmp_path, folder, monkeypatch, capfd):
    """Runs the command where there are no libraries: what it says of the arguments it says without them."""
    monkeypatch.setenv("ST3_LIB_DIR", str(tmp_path / "none"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))

    def run(*arguments: str, where=folder) -> str:
        assert cli.main(["tune", str(where), *arguments]) == 1
        out, err = capfd.readouterr()
        assert out == "" and err.startswith("st3-edge: error: ") and err.count("\n") == 1
        assert not (tmp_path / "cache").exists()
        return err

    return run


def model(path, **values):
    writer = gguf.GGUFWriter(path, "llama")
    add = {int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
    for key, value in values.items():
        add[type(value)](key.replace("__", "."), value)
    writer.add_tensor("t", np.zeros(4, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return ("--model", str(path), "--mmproj", str(demo.model_paths()[1]))


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--max-kl", "0"], "--max-kl must be above 0"),
        (["--max-kl", "nan"], "--max-kl must be above 0"),
        (["--max-kl", "inf"], "--max-kl must be above 0"),
        (["--preset", "off"], "nothing to tune"),
        (["--preset", "best"], "unknown preset"),
        (["--start", "16"], "start must be below 16"),
        (["--start", "0"], "start"),
        (["--stride", "0"], "stride"),
        (["--model", "a.gguf"], "No such file"),
        (["--model", "none.gguf", "--mmproj", "none.gguf"], "No such file"),
        (["--questions", "none.txt"], "No such file"),
        (["--output", "/none/new.gguf"], "no folder"),
    ],
)
def test_arguments_are_checked_first(refused, arguments, says):
    # broken if a person were told after hours, or by a traceback
    assert says in refused(*arguments)


def test_missing_libraries_are_told_in_one_line(refused):
    # broken by a traceback: measurements are kept apart by the library that made them
    assert "is missing" in refused()


def test_folders_without_pictures_are_refused(refused, folder, tmp_path):
    # broken if there were nothing to measure on, and it were found out late
    assert "holds no picture" in refused(where=tmp_path)
    assert "cannot be read" in refused(where=tmp_path / "none")
    (folder / "b.jpg").write_text("no picture")
    assert "b.jpg" in refused()


def test_questions_are_checked_first(refused, tmp_path):
    # broken if a slip in the file were found out after the model was loaded
    path = tmp_path / "questions.txt"
    path.write_text("What?\nb.png\tWhat?\n")
    assert "line 2: there is no picture 'b.png'" in refused("--questions", str(path))


def test_the_output_is_checked_first(refused, folder, tmp_path):
    # broken if the model were overwritten, or another file unasked
    path = str(tmp_path / "model.gguf")
    pair = model(path, llama__block_count=4)
    assert "one of the files to read" in refused(*pair, "--output", path, "--force")
    assert "exists (--force replaces it)" in refused(*pair, "--output", str(folder / "a.png"))


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({}, "no layers to cut between"),
        ({"llama__block_count": 1}, "no layers to cut between"),
        ({"llama__block_count": 4, "st3__keep": 0.5}, "carries st3.keep"),
        ({"llama__block_count": 4, "st3__preset": "off"}, "nothing to tune"),
    ],
)
def test_models_that_cannot_be_tuned_are_refused(refused, tmp_path, values, says):
    # broken if a schedule without a place for a cut, or one against the file's own keys, were tried
    assert says in refused(*model(tmp_path / "model.gguf", **values))


@pytest.mark.parametrize("merge", [True, False])
def test_the_options_that_it_prints_are_the_schedule(merge):
    # broken if ask refused one of them (--merge False), or read another value
    parser = Parser()
    options.add_shared(parser)
    names = [
        a.dest for a in parser._actions if a.dest in ST3Config.__dataclass_fields__ and a.dest not in ("keep", "merge")
    ]
    texts = {
        "preset": "st3",
        "score": "text-max-sum+last-mean",
        "rank": "score",
        "anneal": "cosine",
        "vision_type": "file",
    }
    values = {
        name: texts.get(name, 7 if name in ("start", "stride", "min_keep", "anneal_tokens") else 0.35) for name in names
    }
    overrides = ST3Config(**values, merge=merge).overrides()
    words = [word for item in overrides.items() for word in command._option(*item)]
    assert options.config(parser.parse_args(words)).overrides() == overrides
