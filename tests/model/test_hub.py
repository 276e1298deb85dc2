"""`Llava.from_pretrained`: files of a repository, from the cache; no test asks a network."""

import shutil

import pytest

from st3_edge import ConfigError, Llava, ModelError

pytest.importorskip("huggingface_hub")


@pytest.fixture
def cache(tmp_path, files):
    """A cache that holds a pair of the repository a/b."""
    commit = "0" * 40
    repository = tmp_path / "models--a--b"
    snapshot = repository / "snapshots" / commit
    snapshot.mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    shutil.copy(files[0], snapshot / "m-q8.gguf")
    shutil.copy(files[1], snapshot / "p.gguf")
    return tmp_path


def test_without_network_or_cache_it_says_so(tmp_path):
    # broken by a traceback of huggingface-hub's
    for name in ("m.gguf", "*.gguf"):
        with pytest.raises(ModelError, match="cannot be downloaded") as caught:
            Llava.from_pretrained("a/b", name, "p.gguf", cache_dir=tmp_path, local_files_only=True)
        assert "\n" not in str(caught.value)
    with pytest.raises(ModelError):
        Llava.from_pretrained("not a repository", "m.gguf", "p.gguf", cache_dir=tmp_path, local_files_only=True)


@pytest.mark.parametrize("names", [("m-q8.gguf", "p.gguf"), ("m-*.gguf", "p.g?uf")])
@pytest.mark.parametrize("local_files_only", [True, False])
def test_a_pair_is_taken_from_the_cache(cache, picture, monkeypatch, names, local_files_only):
    # broken if the two files were swapped, looked for elsewhere, or wildcards always asked the network
    import huggingface_hub as hub

    def nobody(*_, **__):
        raise ConnectionError("there is no network")

    monkeypatch.setattr(hub.HfApi, "model_info", nobody)
    monkeypatch.setattr(hub.constants, "HF_HUB_OFFLINE", True)
    options = {"cache_dir": cache, "local_files_only": local_files_only, "n_threads": 1}
    with Llava.from_pretrained("a/b", *names, **options) as llava:
        llava.ask(picture, "What color is the star?", max_tokens=1)
        assert llava.last_report.mode == "pruned-prefill"


def test_a_pattern_that_fits_several_files_is_refused(cache):
    # broken if the first of them were taken
    with pytest.raises(ModelError, match="2 files"):
        Llava.from_pretrained("a/b", "*.gguf", "p.gguf", cache_dir=cache, local_files_only=True)


def test_a_model_is_enough_where_its_mmproj_can_be_found(cache, files, picture):
    # broken if a person had to name two files that lie in one place
    snapshot = next((cache / "models--a--b" / "snapshots").iterdir())
    (snapshot / "p.gguf").rename(snapshot / "mmproj-m.gguf")
    options = {"cache_dir": cache, "local_files_only": True, "n_threads": 1}
    with Llava(files[0], n_threads=1) as beside, Llava.from_pretrained("a/b:q8", **options) as named:
        assert beside.mmproj_path == files[1] and named.mmproj_path == str(snapshot / "mmproj-m.gguf")
        answers = {llava.ask(picture, "How many?", max_tokens=1, temperature=0) for llava in (beside, named)}
        assert len(answers) == 1
    with pytest.raises(ConfigError, match="go together"):
        Llava.from_pretrained("a/b", "m-q8.gguf", **options)
    with pytest.raises(ModelError, match="is not in the cache"):
        Llava.from_pretrained("a/b:Q2_K", **options)
