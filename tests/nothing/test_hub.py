"""Files of a repository: which one is meant, what is asked of a network, and that all parts come."""

import functools
from types import SimpleNamespace

import pytest

from st3_edge import Llava, ModelError
from st3_edge.files import hub

huggingface_hub = pytest.importorskip("huggingface_hub")

SPLIT = [f"m-q8-{i:05}-of-00003.gguf" for i in (1, 2, 3)]


@pytest.fixture
def repository(tmp_path, monkeypatch):
    """repository(there, cached): a repository a/b that holds files, some of which are in the cache; returns what is
    asked of the network. Without `there` there is no network."""

    def make(there, cached=()):
        commit = "0" * 40
        folder = tmp_path / "models--a--b"
        snapshot = folder / "snapshots" / commit
        snapshot.mkdir(parents=True)
        (folder / "refs").mkdir()
        (folder / "refs" / "main").write_text(commit)
        for name in cached:
            (snapshot / name).parent.mkdir(exist_ok=True)
            (snapshot / name).write_text("x")
        asked = []

        def model_info(_, repo_id, **options):
            asked.append("list")
            assert 0 < options["timeout"] <= 10
            if there is None:
                raise ConnectionError("there is no network")
            return SimpleNamespace(siblings=[SimpleNamespace(rfilename=name) for name in there])

        def download(repo_id, name, **_):
            asked.append(name)
            if there is None or name not in there:
                raise ConnectionError("there is no network")
            return f"/new/{name}"

        monkeypatch.setattr(huggingface_hub.HfApi, "model_info", model_info)
        monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
        return asked

    return make


def get(tmp_path, name, local_files_only=False):
    return hub.file("a/b", name, revision=None, cache_dir=tmp_path, local_files_only=local_files_only)


def test_what_the_cache_holds_is_asked_of_nobody(repository, tmp_path):
    # broken if each start waited for a network, or failed without one
    asked = repository(None, ["m.gguf", "sub/p.gguf"])
    assert get(tmp_path, "m.gguf").endswith("/m.gguf")
    assert get(tmp_path, "m.*").endswith("/m.gguf")
    assert get(tmp_path, "*/p.gguf").endswith("/sub/p.gguf")
    assert asked == []


@pytest.mark.parametrize("cached", [0, 1, 3])
@pytest.mark.parametrize("name", [SPLIT[0], SPLIT[2], "m-q8*.gguf", "*q8*"])
def test_all_parts_of_a_split_model_come(repository, tmp_path, cached, name):
    # broken if the loader missed a part that nobody downloaded
    asked = repository(SPLIT, SPLIT[:cached])
    assert get(tmp_path, name).endswith(f"/{SPLIT[0]}")
    assert [part for part in asked if part != "list"] == SPLIT[cached:]


@pytest.mark.parametrize(
    ("pattern", "meant"),
    [
        ("mmproj*.gguf", "llava-v1.5-7b-mmproj-F16.gguf"),
        ("MMPROJ*.gguf", "llava-v1.5-7b-mmproj-F16.gguf"),
        ("*q4_k_m*", "llava-v1.5-7b-Q4_K_M.gguf"),
        ("*Q8_0.gguf", "sub/llava-v1.5-7b-q8_0.gguf"),
    ],
)
def test_patterns_fit_as_people_name_files(repository, tmp_path, pattern, meant):
    # broken if letter for letter were all that counts
    names = ["README.md", "llava-v1.5-7b-mmproj-F16.gguf", "llava-v1.5-7b-Q4_K_M.gguf", "sub/llava-v1.5-7b-q8_0.gguf"]
    repository(names)
    assert get(tmp_path, pattern) == f"/new/{meant}"


def test_what_is_there_is_said(repository, tmp_path):
    # broken if a person had to look it up
    repository([f"m-Q{i}.gguf" for i in range(2, 9)] + ["README.md"])
    for pattern, n in (("m-*.gguf", 7), ("x-*.gguf", 0)):
        with pytest.raises(ModelError, match=rf"{n} files of a/b fit .* there are: m-Q2.gguf, .*m-Q8.gguf") as caught:
            get(tmp_path, pattern)
        assert "README" not in str(caught.value)


def test_without_a_network_nothing_is_tried_again(repository, tmp_path):
    # broken by most of a minute of retries
    asked = repository(None)
    with pytest.raises(ModelError, match="there is no network"):
        get(tmp_path, "*.gguf")
    assert asked == ["list"]


def test_a_pair_in_the_cache_is_asked_of_nobody(repository, monkeypatch, tmp_path):
    # broken if a server that ran yesterday did not start on a train
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    asked = repository(None, ["m-Q4_K_M.gguf", "mmproj-m-f16.gguf"])
    model, mmproj, name = hub.pair("a/b")
    assert name == "a/b:Q4_K_M"
    assert model.endswith("/m-Q4_K_M.gguf")
    assert mmproj.endswith("/mmproj-m-f16.gguf")
    assert asked == []


def test_a_download_that_breaks_off_says_what_is_kept(repository, monkeypatch, tmp_path):
    # broken if it promised to go on within a file: huggingface_hub begins that anew
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    repository(["m-Q4_K_M.gguf", "mmproj-m-f16.gguf"])
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda *_, **__: 1 / 0)
    with pytest.raises(ModelError, match=r"cannot be downloaded: .*; files that are complete are kept$"):
        hub.pair("a/b")


def test_a_mistyped_option_is_seen_before_the_download(repository):
    # broken if it were after gigabytes
    asked = repository(["m.gguf", "p.gguf"])
    with pytest.raises(TypeError, match="n_contex"):
        Llava.from_pretrained("a/b", "m.gguf", "p.gguf", n_contex=5)
    assert asked == []


@pytest.mark.parametrize(
    "address", ["https://huggingface.co/a/b", "hf.co/a/b/", "https://huggingface.co/a/b/tree/main"]
)
@pytest.mark.parametrize("quant", ["", ":q8_0"])
def test_the_address_of_a_repository_is_its_name(repository, monkeypatch, tmp_path, address, quant):
    # broken if what is copied from a browser were no name
    monkeypatch.setattr(hub, "_check_room", lambda *_: None)
    repository(["m-q8_0.gguf", "mmproj.gguf"])
    assert hub.pair(address + quant, cache_dir=tmp_path).name == "a/b:q8_0"


@pytest.mark.parametrize(
    "name", ["", "a", "a/b/c", "https://example.org/a/b", "a/b:", "a/b c", "hf.co/a/b/blob/main/m.gguf", "../a/b"]
)
def test_what_names_no_repository_is_asked_of_nobody(repository, tmp_path, name):
    # broken if the network's words came for a slip
    asked = repository(["m.gguf", "mmproj.gguf"])
    with pytest.raises(ModelError, match="a repository is named as OWNER/REPO or OWNER/REPO:QUANT"):
        hub.pair(name, cache_dir=tmp_path)
    assert asked == []


def test_a_cache_that_is_no_folder_is_told_in_one_line(monkeypatch, tmp_path):
    # broken by a traceback
    path = tmp_path / "file"
    path.write_text("x")
    monkeypatch.setattr(hub.hub, "scan_cache_dir", functools.partial(hub.hub.scan_cache_dir, path))
    with pytest.raises(ModelError, match="the cache of Hugging Face cannot be read"):
        hub.snapshots()
    monkeypatch.setattr(hub.shutil, "disk_usage", lambda _: (tmp_path / "none").stat())
    with pytest.raises(ModelError, match=r"the cache folder .* cannot be read: No such file"):
        hub._check_room("a/b", {}, {"cache_dir": str(path)})
