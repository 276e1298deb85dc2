"""A GGUF file with other metadata: what changes, what does not, and what is refused."""

import shutil
import struct
from pathlib import Path

import numpy as np
import pytest

from st3_edge import ModelError, OutputError
from st3_edge.files import gguf_copy
from st3_edge.files.gguf import read_header

gguf = pytest.importorskip("gguf")

KINDS = gguf.GGUFValueType
CHANGES = {"st3.preset": "pvtp", "st3.start": 3, "st3.budget": 0.34}


def write(path, alignment=32, **values):
    """A file with every kind of value, and tensors whose bytes are all different."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_custom_alignment(alignment)
    for kind in KINDS:
        if kind not in (KINDS.ARRAY, KINDS.STRING):
            writer.add_key_value(f"one.{kind.name}", 1, kind)
            writer.add_array(f"many.{kind.name}", [1, 0, 1] if kind != KINDS.FLOAT32 else [0.5, -1.0])
    writer.add_string("text", "é\n" * 100)
    writer.add_array("words", ["one", "", "three"])
    for key, value in values.items():
        {str: writer.add_string, int: writer.add_uint32, float: writer.add_float32}[type(value)](f"st3.{key}", value)
    rng = np.random.default_rng(1)
    writer.add_tensor("a", rng.standard_normal((3, 5)).astype(np.float32))
    writer.add_tensor("b", rng.integers(0, 255, (4, 68)).astype(np.uint8), raw_dtype=gguf.GGMLQuantizationType.Q8_0)
    writer.add_tensor("c", rng.standard_normal(7).astype(np.float16))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture
def source(tmp_path) -> Path:
    return write(tmp_path / "model.gguf", preset="st3", keep=0.5)


@pytest.fixture
def target(tmp_path) -> Path:
    return tmp_path / "new.gguf"


def fields(reader) -> dict:
    return {k: (f.types, f.contents()) for k, f in reader.fields.items() if not k.startswith("GGUF.")}


@pytest.mark.parametrize("alignment", [8, 32, 256])
def test_only_what_is_asked_for_changes(tmp_path, target, alignment):
    # broken if a value of some kind were read and written again otherwise, or tensors moved against their offsets
    source = write(tmp_path / "model.gguf", alignment, preset="st3", seed=5)
    gguf_copy.copy(source, target, CHANGES, force=False)
    old, new = gguf.GGUFReader(source), gguf.GGUFReader(target)
    before, after = fields(old), fields(new)
    del before["st3.preset"]
    assert {k: v for k, v in after.items() if k not in CHANGES} == before
    assert after["st3.preset"] == ([KINDS.STRING], "pvtp")
    assert after["st3.start"] == ([KINDS.UINT32], 3)
    assert after["st3.budget"] == ([KINDS.FLOAT64], 0.34)
    for a, b in zip(old.tensors, new.tensors, strict=True):
        assert (a.name, a.tensor_type, list(a.shape)) == (b.name, b.tensor_type, list(b.shape))
        assert a.data.tobytes() == b.data.tobytes() and b.data_offset % alignment == 0
    assert read_header(target).schedule == {**CHANGES, "st3.seed": 5}


def test_a_change_back_gives_the_same_values(tmp_path, source, target):
    # broken if something grew or was left over with every copy
    again = tmp_path / "again.gguf"
    gguf_copy.copy(source, target, CHANGES, force=False)
    gguf_copy.copy(target, again, {"st3.preset": "a much longer name"}, force=False)
    gguf_copy.copy(again, target, CHANGES, force=True)
    assert fields(gguf.GGUFReader(target)) == {
        **fields(gguf.GGUFReader(source)),
        **{k: v for k, v in fields(gguf.GGUFReader(target)).items() if k in CHANGES},
    }
    assert len(read_header(target).values) == len(read_header(source).values) + 2


def test_what_must_stay_is_never_written_over(source, target, tmp_path):
    # broken if the model itself, by whatever name, or another file were replaced unasked
    before = source.read_bytes()
    link = tmp_path / "link.gguf"
    link.symlink_to(source)
    (tmp_path / "hard.gguf").hardlink_to(source)
    for name in (source, str(source), link, tmp_path / "hard.gguf"):
        with pytest.raises(OutputError, match="one of the files to read"):
            gguf_copy.copy(source, name, CHANGES, force=True)
    target.touch()
    with pytest.raises(OutputError, match="--force"):
        gguf_copy.copy(source, target, CHANGES, force=False)
    with pytest.raises(OutputError, match="not a file"):
        gguf_copy.copy(source, tmp_path, CHANGES, force=True)
    with pytest.raises(OutputError, match="no folder"):
        gguf_copy.copy(source, tmp_path / "none" / "x.gguf", CHANGES, force=False)
    assert source.read_bytes() == before and target.stat().st_size == 0


def test_a_disk_that_is_too_full_is_told_before_the_work(source, target, monkeypatch):
    # broken if it were found out by writing gigabytes
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(2**40, 2**40, 1000))
    with pytest.raises(OutputError, match="are free"):
        gguf_copy.check(source, target, force=False)


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_a_copy_that_is_cut_off_leaves_what_was_there(source, target, tmp_path, error):
    # broken if it were written in place, or a part stayed in the folder
    target.touch()

    def cut(share):
        raise error

    with pytest.raises((OutputError, KeyboardInterrupt)):
        gguf_copy.copy(source, target, CHANGES, force=True, tell=cut)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model.gguf", "new.gguf"] and target.stat().st_size == 0


def test_one_of_several_files_is_refused(tmp_path, target):
    # broken if a part were copied as the whole
    writer = gguf.GGUFWriter(tmp_path / "part.gguf", "llama")
    writer.add_uint16("split.count", 3)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    with pytest.raises(ModelError, match="one of 3 files"):
        gguf_copy.copy(tmp_path / "part.gguf", target, CHANGES, force=False)


def test_a_key_that_is_there_twice_is_refused(source, target):
    # broken if one of the two were dropped on the way: llama.cpp takes no such file either
    data = source.read_bytes().replace(b"one.UINT8", b"one.INT32")
    assert data.count(b"one.INT32") == 2
    source.write_bytes(data)
    with pytest.raises(ModelError, match="twice"):
        gguf_copy.check(source, target, force=False)


def test_an_older_version_stays_one(source, target):
    # broken if version 2 were written as 3, or refused
    data = bytearray(source.read_bytes())
    struct.pack_into("<I", data, 4, 2)
    source.write_bytes(data)
    gguf_copy.copy(source, target, CHANGES, force=False)
    assert struct.unpack_from("<I", target.read_bytes(), 4) == (2,)
    assert read_header(target).schedule["st3.start"] == 3
