"""vendor/upstream.py: a wrong archive, a patch that does not fit or a foreign folder is never taken for a good one."""

from __future__ import annotations

import hashlib
import importlib.util
import io
import json
import sys
import tarfile
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "vendor" / "upstream.py"
SOURCE = b"one\ntwo\nthree\nfour\nfive\nsix\n"
PATCH = "why\n\n--- a/src/a.c\n+++ b/src/a.c\n@@ -2,3 +2,4 @@ f()\n two\n-three\n+THREE\n+3\n four\n"


@pytest.fixture
def upstream(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The script, on an archive of two files and an empty patch queue, both in tmp_path."""
    spec = importlib.util.spec_from_file_location("upstream", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    root = module.archive_name().removesuffix(".tar.gz")
    with tarfile.open(tmp_path / "up.tar.gz", "w:gz") as tar:
        for name in ("vendor/llama.cpp/src/a.c", "vendor/llama.cpp/src/b.c", "vendor/llama.cpp/docs/c.md", "d.py"):
            info = tarfile.TarInfo(f"{root}/{name}")
            info.size = len(SOURCE)
            tar.addfile(info, io.BytesIO(SOURCE))
    (tmp_path / "patches").mkdir()
    (tmp_path / "upstream.json").write_text("{}")
    monkeypatch.setattr(module, "HERE", tmp_path)
    monkeypatch.setitem(module.PIN, "sha256", hashlib.sha256((tmp_path / "up.tar.gz").read_bytes()).hexdigest())
    return module


def run(module: ModuleType, *arguments: str) -> Path:
    dest = module.HERE / "dest"
    sdist = str(module.HERE / "up.tar.gz")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["upstream.py", "--dest", str(dest), "--sdist", sdist, *arguments])
        module.main()
    return dest


def test_patches_apply_in_order_and_untouched_files_keep_their_time(upstream: ModuleType) -> None:
    # broken if a second run rewrote files (all of llama.cpp would compile again) or patched a patched file
    dest = run(upstream)
    assert sorted(p.name for p in dest.rglob("*.*") if p.is_file()) == [upstream.STAMP, "a.c", "b.c"]
    before = (dest / "src/b.c").stat().st_mtime_ns
    (upstream.HERE / "patches/0001-x.patch").write_text(PATCH)
    second = "--- a/src/a.c\n+++ b/src/a.c\n@@ -3,2 +3,1 @@\n THREE\n-3\n"
    (upstream.HERE / "patches/0002-y.patch").write_text(second)
    for _ in range(2):
        run(upstream)
        assert (dest / "src/a.c").read_bytes() == b"one\ntwo\nTHREE\nfour\nfive\nsix\n"
    assert (dest / "src/b.c").stat().st_mtime_ns == before
    run(upstream, "--stock")
    assert (dest / "src/a.c").read_bytes() == SOURCE


def test_fixes_come_first_and_stock_has_them(upstream: ModuleType) -> None:
    # broken if a comparison with stock measured a crash or a stall that ours does not have
    (upstream.HERE / "fixes").mkdir()
    (upstream.HERE / "fixes/0001-z.patch").write_text(PATCH)
    (upstream.HERE / "patches/0001-a.patch").write_text("--- a/src/a.c\n+++ b/src/a.c\n@@ -3,2 +3,1 @@\n THREE\n-3\n")
    assert (run(upstream) / "src/a.c").read_bytes() == b"one\ntwo\nTHREE\nfour\nfive\nsix\n"
    assert (run(upstream, "--stock") / "src/a.c").read_bytes() == b"one\ntwo\nTHREE\n3\nfour\nfive\nsix\n"


def test_a_hunk_may_move_to_the_one_place_where_it_fits(upstream: ModuleType) -> None:
    # broken if line numbers of an earlier patch's file were taken literally
    (upstream.HERE / "patches/0001-x.patch").write_text(PATCH.replace("-2,3 +2,4", "-4,3 +4,4"))
    assert b"THREE\n3\nfour" in (run(upstream) / "src/a.c").read_bytes()


@pytest.mark.parametrize(
    ("patch", "says"),
    [
        (PATCH.replace("-three", "-drei"), "0001-x.patch does not apply to src/a.c:2"),
        (PATCH.replace("src/a.c", "src/z.c"), "upstream has no file src/z.c"),
        (PATCH.replace("--- a/src/a.c", "--- /dev/null"), "new files belong in native/"),
        (PATCH.replace(" four\n", ""), "malformed"),
        ("why\n", "changes nothing"),
    ],
)
def test_a_patch_that_does_not_fit_stops_with_its_name(upstream: ModuleType, patch: str, says: str) -> None:
    # broken if a hunk were applied with fuzz, skipped, or applied in part
    (upstream.HERE / "patches/0001-x.patch").write_text(patch)
    with pytest.raises(SystemExit) as stop:
        run(upstream)
    assert says in str(stop.value) and "\n" not in str(stop.value)
    assert not (upstream.HERE / "dest").exists()


def test_another_archive_is_refused(upstream: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    # broken if the digest were not compared
    monkeypatch.setitem(upstream.PIN, "sha256", "0" * 64)
    with pytest.raises(SystemExit, match="SHA-256"):
        run(upstream)


def test_a_folder_with_other_files_is_left_alone(upstream: ModuleType) -> None:
    # broken if a wrong --dest lost somebody's files
    (upstream.HERE / "dest").mkdir()
    (upstream.HERE / "dest/mine.txt").write_text("mine")
    with pytest.raises(SystemExit, match="empty folder"):
        run(upstream)
    assert (upstream.HERE / "dest/mine.txt").read_text() == "mine"


def test_the_llama_cpp_python_of_the_tests_is_of_the_pin() -> None:
    # broken if it were run on libraries whose structures are others
    pin = json.loads((ROOT / "vendor" / "upstream.json").read_text())
    assert f'"{pin["package"]}=={pin["version"]}"' in (ROOT / "pyproject.toml").read_text()
    assert f"llama-cpp-python {pin['version']}" in (ROOT / "docs" / "serve.md").read_text()
