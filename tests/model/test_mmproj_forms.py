"""The ways in which model files say where LLaVA's visual tokens leave the vision tower."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from st3_edge import Llava


def test_without_a_feature_layer_all_stored_layers_run(
    llava: Llava, files: tuple[str, str], picture: str, tmp_path: Path
) -> None:
    # broken if upstream's graph left out one more layer than converters already did (patch 0002)
    model, mmproj = files
    key = b"clip.vision.feature_layer"
    data = Path(mmproj).read_bytes()
    assert data.count(key) == 1
    older = tmp_path / "mmproj.gguf"
    older.write_bytes(data.replace(key, key[:-1] + b"_"))
    with Llava(model, older, n_threads=1) as without:
        np.testing.assert_array_equal(without.visual_tokens(picture), llava.visual_tokens(picture))


def test_files_of_the_first_converters_are_llavas(
    llava: Llava, files: tuple[str, str], picture: str, tmp_path: Path
) -> None:
    # broken if a missing clip.projector_type were not taken for "mlp" (patch 0020)
    model, mmproj = files
    key = b"clip.projector_type"
    data = Path(mmproj).read_bytes()
    assert data.count(key) == 1
    older = tmp_path / "mmproj.gguf"
    older.write_bytes(data.replace(key, key[:-1] + b"_"))
    with Llava(model, older, n_threads=1) as without:
        np.testing.assert_array_equal(without.visual_tokens(picture), llava.visual_tokens(picture))
