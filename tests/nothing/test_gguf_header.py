"""The look into a GGUF file before llama.cpp loads it."""

import struct

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from st3_edge import ModelError
from st3_edge.files.gguf import read_header

gguf = pytest.importorskip("gguf")
np = pytest.importorskip("numpy")


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> bytes:
    """A small file that holds every kind of value."""
    path = tmp_path_factory.mktemp("gguf") / "model.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_uint32("llama.context_length", 77)
    writer.add_float32("a.real", 0.5)
    writer.add_bool("a.switch", True)
    writer.add_string("tokenizer.chat_template", "{{ messages }} é")
    writer.add_array("a.words", ["one", "two", ""])
    writer.add_array("a.numbers", [1, -2, 3])
    writer.add_array("a.many", list(range(257)))
    writer.add_array("a.reals", [0.5, 0.25])
    writer.add_tensor("t.f32", np.zeros((3, 5), np.float32))
    writer.add_tensor("t.q8", np.zeros((4, 68), np.uint8), raw_dtype=gguf.GGMLQuantizationType.Q8_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path.read_bytes()


def written(tmp_path, data: bytes):
    path = tmp_path / "model.gguf"
    path.write_bytes(data)
    return path


def test_scalars_and_short_whole_numbers_are_read_and_other_arrays_skipped(tmp_path, whole):
    # broken if a skipped array were measured wrong: every value behind it would be another
    header = read_header(written(tmp_path, whole))
    assert header.architecture == "llama"
    assert header.metadata["llama.context_length"] == 77
    assert header.metadata["a.real"] == 0.5
    assert header.metadata["a.switch"] is True
    assert header.metadata["tokenizer.chat_template"] == "{{ messages }} é"
    assert "a.words" not in header.metadata
    assert header.arrays == {"a.numbers": (1, -2, 3), "a.reals": (0.5, 0.25)}
    assert [header.kinds[key] for key in ("a.real", "a.words", "a.numbers")] == ["f32", "[string]", "[i32]"]
    assert header.types == {"t.f32": 0, "t.q8": 8}


def test_the_bytes_needed_are_those_of_the_last_tensor(tmp_path, whole):
    # broken if a block size of the type table were wrong: a file cut short would pass, or a good one not
    need = read_header(written(tmp_path, whole)).need
    assert 0 <= len(whole) - need < 32
    assert read_header(written(tmp_path, whole[:need])).need == need
    with pytest.raises(ModelError, match="truncated"):
        read_header(written(tmp_path, whole[: need - 1]))


def test_the_type_table_is_that_of_the_format():
    # broken if an entry were mistyped
    from st3_edge.files.gguf import _BLOCKS

    theirs = {int(kind): sizes for kind, sizes in gguf.GGML_QUANT_SIZES.items()}
    assert {kind: theirs[kind] for kind in _BLOCKS} == _BLOCKS


@pytest.mark.parametrize("part", [0, 1, 3, 4, 7, 20, 60, 150, 250])
def test_every_cut_through_the_header_is_refused(tmp_path, whole, part):
    # broken if a short read were taken for a value
    with pytest.raises(ModelError) as caught:
        read_header(written(tmp_path, whole[:part]))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("data", [b"", b"not a model", b"GGML" + bytes(100), b"GGUF" + struct.pack("<I", 99)])
def test_other_files_are_refused(tmp_path, data):
    # broken if the magic or version went unchecked
    with pytest.raises(ModelError, match="damaged or truncated"):
        read_header(written(tmp_path, data))


def test_what_is_no_file_is_refused(tmp_path):
    # broken if an OSError were let through
    with pytest.raises(ModelError, match="No such file"):
        read_header(tmp_path / "none.gguf", "mmproj")
    with pytest.raises(ModelError, match="not a file"):
        read_header(tmp_path)


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_damage_never_ends_in_another_exception(tmp_path_factory, whole, data):
    # broken by a count from the file that is trusted: memory, time or an exception of struct's
    damaged = bytearray(whole)
    for _ in range(data.draw(st.integers(1, 6))):
        damaged[data.draw(st.integers(0, len(damaged) - 1))] = data.draw(st.integers(0, 255))
    path = tmp_path_factory.getbasetemp() / "damaged.gguf"
    path.write_bytes(damaged)
    try:
        read_header(path)
    except ModelError as e:
        assert "\n" not in str(e)
