"""Encoded pictures on the disk."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from st3_edge.native.st3 import Visual
from st3_edge.runtime.conversation import Embeddings, Image
from st3_edge.runtime.encodings import Encodings

WIDTH = 8


def visual(n: int, seed: int) -> Visual:
    side = int(n**0.5)
    return Visual(np.random.default_rng(seed).standard_normal((n, WIDTH), np.float32), side, n // side)


def image(i: int, n: int = 4) -> Image:
    return Image(f"{i:064x}", 0, n)


def test_what_was_put_is_there_for_another_process(tmp_path: Path) -> None:
    """Breaks if a bit or the grid is lost, or if anything else of the key is left out."""
    folder, put = tmp_path / "a" / "b", visual(6, 1)
    Encodings(folder, "x", WIDTH, 2**20).put(image(1, 6), put)
    found = Encodings(folder, "x", WIDTH, 2**20).get(image(1, 6))
    assert found is not None
    assert found.embd.tobytes() == put.embd.tobytes()
    assert (found.nx, found.ny) == (put.nx, put.ny) == (2, 3)
    for other in (image(2, 6), image(1, 4), Image(image(1).digest, 1, 6)):
        assert Encodings(folder, "x", WIDTH, 2**20).get(other) is None
    assert Encodings(folder, "y", WIDTH, 2**20).get(image(1, 6)) is None
    assert Encodings(folder, "x", WIDTH + 1, 2**20).get(image(1, 6)) is None


@pytest.mark.parametrize("exists", [False, True])
def test_only_its_owner_can_read_it(tmp_path: Path, exists: bool) -> None:
    """Breaks if another user could see what a picture shows, or if a folder of the user's were closed to others."""
    folder = tmp_path / "pictures"
    before = os.umask(0)
    try:
        if exists:
            folder.mkdir(mode=0o755)
        Encodings(folder, "x", WIDTH, 2**20).put(image(1), visual(4, 1))
    finally:
        os.umask(before)
    (file,) = folder.iterdir()
    assert stat.S_IMODE(folder.stat().st_mode) == (0o755 if exists else 0o700)
    assert stat.S_IMODE(file.stat().st_mode) == 0o600


def test_what_an_ended_process_left_half_written_goes(tmp_path: Path) -> None:
    """Breaks if it stayed for ever beside the folder's limit, or a file that is being written went."""
    old, new, other = tmp_path / f".{'0' * 16}.part", tmp_path / f".{'1' * 16}.part", tmp_path / ".film.part"
    for path in (old, new, other):
        path.touch()
    for path in (old, other):
        os.utime(path, (0, 0))
    Encodings(tmp_path, "x", WIDTH, 2**20).put(image(1), visual(4, 1))
    assert not old.exists() and new.exists() and other.exists()


def test_no_file_of_the_users_is_removed(tmp_path: Path) -> None:
    """Breaks if what lies in the folder already is taken for an encoded picture."""
    theirs = [tmp_path / name for name in ("data.npz", f"{'0' * 64}.npz", "x.st3.npz")]
    for path in theirs:
        path.write_bytes(b"mine" * 1000)
        os.utime(path, (1, 1))
    few = Encodings(tmp_path, "x", WIDTH, 700)
    for i in range(3):
        few.put(image(i), visual(4, i))
    assert all(path.is_file() for path in theirs)
    assert len(list(tmp_path.iterdir())) == len(theirs) + 1


def test_it_is_bounded(tmp_path: Path) -> None:
    """Breaks if the folder grows without end, or if what was used last goes first."""
    first = Encodings(tmp_path, "x", WIDTH, 2**20)
    first.put(image(0), visual(4, 0))
    size = next(tmp_path.iterdir()).stat().st_size
    few = Encodings(tmp_path, "x", WIDTH, 3 * size)
    for i in range(1, 3):
        few.put(image(i), visual(4, i))
    for i, path in enumerate(few._path(image(i)) for i in range(3)):
        os.utime(path, (i + 1, i + 1))
    assert few.get(image(0)) is not None  # used now
    few.put(image(3), visual(4, 3))
    assert [few.get(image(i)) is not None for i in range(4)] == [True, False, True, True]
    Encodings(tmp_path, "x", WIDTH, 100).put(image(4), visual(4, 4))  # larger than all that may be there
    assert len(list(tmp_path.iterdir())) == 3


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(at=st.integers(0, 10_000), bits=st.integers(1, 255), cut=st.integers(0, 10_000) | st.none())
def test_a_damaged_file_is_encoded_anew(tmp_path: Path, at: int, bits: int, cut: int | None) -> None:
    """Breaks if a damaged file raises, or gives other visual tokens."""
    store, put = Encodings(tmp_path, "x", WIDTH, 2**20), visual(4, 1)
    store.put(image(1), put)
    path = store._path(image(1))
    raw = bytearray(path.read_bytes())
    raw[at % len(raw)] ^= bits
    path.write_bytes(raw[: None if cut is None else cut % len(raw)])
    found = store.get(image(1))
    assert found is None or (found.embd.tobytes() == put.embd.tobytes() and (found.nx, found.ny) == (put.nx, put.ny))


@pytest.mark.parametrize("place", ["a file", "/proc/nowhere"])
def test_a_folder_that_cannot_be_is_no_error(tmp_path: Path, place: str) -> None:
    """Breaks if a question fails because nothing can be kept."""
    folder = Path(place) if place.startswith("/") else tmp_path / place
    if folder.parent == tmp_path:
        folder.write_text("something")
    store = Encodings(folder, "x", WIDTH, 2**20)
    store.put(image(1), visual(4, 1))
    assert store.get(image(1)) is None


def test_embeddings_ask_the_store_once(tmp_path: Path) -> None:
    """Breaks if what the disk holds is not found, or read again for every question."""
    store = Encodings(tmp_path, "x", WIDTH, 2**20)
    Embeddings(2**20, store).put(image(1), visual(4, 1))
    fresh = Embeddings(2**20, store)
    found = fresh.get(image(1))
    assert found is not None
    store._path(image(1)).unlink()
    assert fresh.get(image(1)) is found
    assert fresh.get(image(2)) is None
