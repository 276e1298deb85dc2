"""The ways in which model files say where LLaVA's visual tokens leave the vision tower."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from st3_edge import Llava


@pytest.mark.parametrize("key", [b"clip.vision.feature_layer", b"clip.projector_type"])
def test_files_of_older_converters_give_the_same_tokens(
    llava: Llava, files: tuple[str, str], picture: str, tmp_path: Path, key: bytes
) -> None:
    # broken if upstream's graph left out one more layer than converters already did (patch 0002), or if a missing
    # clip.projector_type were not taken for "mlp" (patch 0020)
    model, mmproj = files
    data = Path(mmproj).read_bytes()
    assert data.count(key) == 1
    older = tmp_path / "mmproj.gguf"
    older.write_bytes(data.replace(key, key[:-1] + b"_"))
    with Llava(model, older, n_threads=1) as without:
        np.testing.assert_array_equal(without.visual_tokens(picture), llava.visual_tokens(picture))
