"""Headers of the embedded model with values changed: what upstream would abort the process for is refused first."""

import struct
from pathlib import Path

import pytest

from st3_edge import ModelError
from st3_edge._gguf import read_header
from st3_edge._pair import check_pair


def changed(path: str, key: str, value: int, target: Path) -> str:
    """A copy of a GGUF file with another value of a u32 key."""
    end = read_header(path).values[key][1]
    data = bytearray(Path(path).read_bytes())
    struct.pack_into("<I", data, end - 4, value)
    target.write_bytes(data)
    return str(target)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("image_size", 0),
        ("image_size", 7),
        ("image_size", 28 * 14),
        ("patch_size", 0),
        ("patch_size", 1),
        ("patch_size", 13),
        ("patch_size", 1000),
        ("embedding_length", 0),
        ("embedding_length", 191),
        ("attention.head_count", 0),
        ("attention.head_count", 5),
        ("attention.head_count", 1000),
    ],
)
def test_a_vision_half_whose_values_cannot_be_is_refused(files, tmp_path, key, value):
    # broken if it were loaded: upstream asserts, and the process aborts
    mmproj = changed(files[1], f"clip.vision.{key}", value, tmp_path / "mmproj.gguf")
    with pytest.raises(ModelError, match="is damaged") as caught:
        check_pair(files[0], mmproj)
    assert "\n" not in str(caught.value)


def test_a_text_model_without_layers_is_refused(files, tmp_path):
    # broken if it were loaded: upstream asserts, and the process aborts
    with pytest.raises(ModelError, match="block_count is 0"):
        check_pair(changed(files[0], "llama.block_count", 0, tmp_path / "model.gguf"), files[1])


def test_a_vision_half_of_another_width_is_refused(files, foreign_mmproj):
    # broken if both were loaded to find that out
    with pytest.raises(ModelError, match="another model: its visual tokens are 32 wide, those of the text model 192"):
        check_pair(files[0], foreign_mmproj)


def test_the_embedded_pair_fits(files):
    # broken if a check refused what works
    assert check_pair(*files).architecture == "llama"
