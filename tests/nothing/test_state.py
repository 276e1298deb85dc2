"""State files: what is written comes back, and nothing else is ever taken for one."""

import hashlib
import json
import os
import random
import struct

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from st3_edge import ModelError, StateError
from st3_edge.native.st3 import Visual
from st3_edge.runtime import state
from st3_edge.runtime.conversation import Image, Record, Span, n_positions

MODEL = {"model": "a", "schedule": "b"}
SHAPE = {"n_vocab": 100, "n_embd": 3}
RED, BLUE = Image("red", 0, 4), Image("blue", 1, 2, 1)
SEED = 7


def visual(image: Image, seed: int = 0) -> Visual:
    embd = np.random.default_rng(seed).standard_normal((image.n, 3)).astype(np.float32)
    return Visual(embd, 2, image.n // 2)


def saved(units=(1, RED, 7, BLUE, 9), **changes) -> state.Saved:
    spans = [Span(i, i + 1) for i, unit in enumerate(units) if isinstance(unit, Image)]
    fields = {
        "belongs_to": MODEL,
        "record": Record(tuple(units), tuple(spans), n_positions(units)),
        "native": bytes(range(256)),
        "embeddings": {RED: visual(RED), BLUE: visual(BLUE, 1)},
        "messages": [{"role": "user", "content": "猫"}],
    }
    return state.Saved(**{**fields, **changes})


def same(a: state.Saved, b: state.Saved) -> bool:
    embeddings = a.embeddings.keys() == b.embeddings.keys() and all(
        np.array_equal(a.embeddings[k].embd, v.embd) and (a.embeddings[k].nx, a.embeddings[k].ny) == (v.nx, v.ny)
        for k, v in b.embeddings.items()
    )
    return embeddings and (a.record, a.native, a.messages) == (b.record, b.native, b.messages)


def read(path) -> state.Saved:
    return state.read(path, MODEL, **SHAPE)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "kept.st3"


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(), lambda x: st.lists(x, max_size=3), max_leaves=5
)


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(st.integers(0, 99) | st.sampled_from([RED, BLUE]), max_size=9),
    st.binary(max_size=99),
    st.sets(st.sampled_from([RED, BLUE])),
    JSON,
)
def test_what_is_written_is_read(path, units, native, known, messages):
    # broken if any part were lost, cut or shifted against its size
    whole = saved(units, native=native, embeddings={image: visual(image) for image in known}, messages=messages)
    state.write(path, whole)
    assert same(read(path), whole)


def test_a_file_cut_anywhere_is_refused(path):
    # broken if a length were trusted before the checksum
    state.write(path, saved())
    data = path.read_bytes()
    for n in range(len(data)):
        path.write_bytes(data[:n])
        with pytest.raises(StateError):
            read(path)
    path.write_bytes(data + b"\0")
    with pytest.raises(StateError):
        read(path)


def test_a_changed_bit_is_refused(path):
    # broken if some bytes were outside the checksum; one bit of every byte is flipped, which one by a fixed seed
    state.write(path, saved())
    rng = random.Random(SEED)
    with path.open("r+b", buffering=0) as file:
        for at, byte in enumerate(path.read_bytes()):
            for value in (byte ^ 1 << rng.randrange(8), byte):
                file.seek(at)
                file.write(bytes([value]))
                if value != byte:
                    with pytest.raises(StateError):
                        read(path)
    assert same(read(path), saved())


def forged(header: bytes, rest: bytes = b"", version: int = state.VERSION, length: int | None = None) -> bytes:
    """A file with a right checksum, whatever is in it."""
    body = struct.pack("<16sII", state.MAGIC, version, len(header) if length is None else length) + header + rest
    return body + hashlib.sha256(body).digest()


def test_headers_that_somebody_made_are_refused(path):
    # broken if a file with a right checksum were believed: sizes, ranges and types are checked as well
    state.write(path, saved())
    data = path.read_bytes()
    (length,) = struct.unpack_from("<I", data, 20)
    header, rest = json.loads(data[24 : 24 + length]), data[24 + length : -32]
    path.write_bytes(forged(json.dumps(header).encode(), rest))
    assert same(read(path), saved())  # the forger's tool works

    image = header["embeddings"][0]
    changes = [
        ("units", [100]),
        ("units", [-1]),
        ("units", [True]),
        ("units", [1.0]),
        ("units", [["red", 0, 0]]),
        ("units", [["red", -1, 4]]),
        ("units", [["red", 0, 2**31]]),
        ("units", [[3, 0, 4]]),
        ("units", [["red", 0]]),
        ("units", [["red", 0, 4, 0]]),
        ("units", [["red", 0, 4, 4, 4]]),
        ("units", "12"),
        ("units", None),
        ("spans", [[0, 3]]),
        ("spans", [[1, 6]]),
        ("spans", [[1, 1]]),
        ("spans", [[-4, 3]]),
        ("spans", [[1]]),
        ("state", 255),
        ("state", 257),
        ("state", 2**63),
        ("state", -1),
        ("state", "256"),
        ("embeddings", []),
        ("embeddings", header["embeddings"] + [image]),
        ("embeddings", [[*image[:5], 2, 3]]),
        ("embeddings", [[*image[:5], 4, 2]]),
        ("embeddings", [[*image[:3], 3, 3, 4, 3], header["embeddings"][1]]),
        ("embeddings", [[*image[:3], -2, -2, 4, 3], header["embeddings"][1]]),
        ("embeddings", [[*image[:3], 2, 2, 2**62, 3]]),
        ("embeddings", [["red", 0, 3, *image[3:]], header["embeddings"][1]]),
        ("belongs_to", []),
        ("belongs_to", None),
    ]
    for key, value in changes:
        changed = {**header, key: value} if key != "units" else {**header, "units": value, "spans": []}
        path.write_bytes(forged(json.dumps(changed).encode(), rest))
        with pytest.raises(StateError):
            read(path)
    for key in header:
        path.write_bytes(forged(json.dumps({k: v for k, v in header.items() if k != key}).encode(), rest))
        with pytest.raises(StateError):
            read(path)
    for made in (b"", b"[]", b"3", b"{", b"\xff", b"[" * 100_000):
        path.write_bytes(forged(made, rest))
        with pytest.raises(StateError):
            read(path)
    path.write_bytes(forged(b"{}", length=2**32 - 1))
    with pytest.raises(StateError):
        read(path)


def test_random_changes_under_a_right_checksum_end_in_no_other_exception(path):
    # broken by a type or range that is looked at nowhere. Fixed seed
    state.write(path, saved())
    data = path.read_bytes()
    rng = random.Random(SEED)
    for _ in range(1000):
        made = bytearray(data[:-32])
        for _ in range(rng.randint(1, 4)):
            made[rng.randrange(len(made))] = rng.randrange(256)
        path.write_bytes(made + hashlib.sha256(made).digest())
        try:
            got = read(path)
        except StateError as e:
            assert "\n" not in str(e)
        else:
            assert got.record.n_positions == n_positions(got.record.units)


def test_another_version_or_model_is_named(path):
    # broken if a file of another layout were parsed, or a person were not told what does not fit
    path.write_bytes(forged(b"{}", version=state.VERSION + 1))
    with pytest.raises(StateError, match=f"version {state.VERSION + 1}"):
        read(path)
    for theirs in ({**MODEL, "schedule": "other"}, {"model": "a"}, {**MODEL, "more": "x"}):
        state.write(path, saved(belongs_to=theirs))
        with pytest.raises(StateError, match=r"another (schedule|more)"):
            read(path)


def test_what_is_no_state_file_is_refused_in_one_line(tmp_path):
    # broken by an OSError that is let through, or by waiting for a pipe's writer
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "text").write_text("hello")
    (tmp_path / "empty").write_bytes(b"")
    for name in ("pipe", "text", "empty", "none", "", "a\0b"):
        with pytest.raises(StateError) as caught:
            read(f"{tmp_path}/{name}")
        assert "\n" not in str(caught.value)


def test_messages_that_json_cannot_hold_are_refused_before_anything_is_written(path):
    # broken if a half-written file were left, or the exception were json's
    endless: list = []
    endless.append(endless)
    for messages in (b"bytes", {1, 2}, endless):
        with pytest.raises(StateError, match="messages"):
            state.write(path, saved(messages=messages))
    assert not path.exists()


@pytest.mark.parametrize("stage", ["replace", "fsync"])
def test_a_write_that_is_cut_off_leaves_the_old_file(path, monkeypatch, stage):
    # broken if the file were written in place, or a part of the new one stayed in the folder
    state.write(path, saved())

    def killed(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, stage, killed)
    with pytest.raises(KeyboardInterrupt):
        state.write(path, saved(native=b"new"))
    monkeypatch.undo()
    assert same(read(path), saved())
    assert list(path.parent.iterdir()) == [path]


def test_the_file_is_on_the_disk_before_it_has_its_name(path, monkeypatch):
    # broken if the rename came first: after a power cut the name could hold nothing
    calls = []
    for name in ("fsync", "replace"):
        real = getattr(os, name)
        monkeypatch.setattr(os, name, lambda *a, name=name, real=real: (calls.append(name), real(*a))[1])
    state.write(path, saved())
    assert calls == ["fsync", "replace", "fsync"]


def test_a_folder_that_is_not_there_is_told(tmp_path):
    # broken by an OSError that is let through
    for target in (tmp_path / "none" / "x", tmp_path, f"{tmp_path}/a\0b"):
        with pytest.raises(StateError, match="cannot be written"):
            state.write(target, saved())
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_is_replaced_keeps_its_mode(path):
    # broken if a private conversation became readable for everyone the second time it is saved
    state.write(path, saved())
    path.chmod(0o600)
    state.write(path, saved(native=b"new"))
    assert path.stat().st_mode & 0o777 == 0o600


def test_a_model_that_cannot_be_read_is_told(tmp_path):
    # broken by an OSError that is let through
    with pytest.raises(ModelError, match="cannot be read"):
        state.fingerprint(str(tmp_path / "none"))


def test_a_fingerprint_tells_files_apart(tmp_path):
    # broken if size or content were left out; a small file is read whole
    paths = [tmp_path / str(i) for i in range(4)]
    for path, data in zip(paths, (b"", b"\0", b"\0\0", b"\0\1"), strict=True):
        path.write_bytes(data)
    assert len({state.fingerprint(str(path)) for path in paths}) == 4
    large = np.random.default_rng(SEED).integers(0, 256, 64 * 2**16, np.uint8)
    digests = set()
    for at in (0, 5, len(large) // 2, len(large) - 1):
        changed = large.copy()
        changed[at] ^= 1
        paths[0].write_bytes(changed.tobytes())
        digests.add(state.fingerprint(str(paths[0])))
    assert len(digests) == 4


def test_a_file_is_looked_at_before_a_model_is_loaded(path, tmp_path):
    # broken if a person waited for a model to hear of a slip in a name
    state.write(path, saved())
    state.check_saved(path)
    path.write_bytes(b"something else")
    os.mkfifo(tmp_path / "pipe")
    for name, says in (
        ("none", "No such file"),
        ("pipe", "is not a file"),
        (path.name, "does not begin"),
        ("\0", "read"),
    ):
        with pytest.raises(StateError, match=says):
            state.check_saved(tmp_path / name)
