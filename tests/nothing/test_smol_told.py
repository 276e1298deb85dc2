"""What the projector of SmolLM2 that sees is asked to tell of each patch. Needs torch."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="torch is not installed")
pytest.importorskip("tokenizers", reason="tokenizers is not installed")
pytest.importorskip("gguf", reason="gguf is not installed")
sys.path.insert(0, str(Path(__file__).parents[2] / "scripts" / "smol_llava"))
pictures = pytest.importorskip("pictures")
vision = pytest.importorskip("vision")

SPELLED = {"fox": [0, 1], "stop": [2], "red": [3], "top": [4], "left": [5], "center": [6]}
MORE = ("bottom", "right", *(c for c in vision.COLORS if c != "red"), "more")


@pytest.fixture(scope="module")
def sample() -> vision.Sample:
    """A fox on a red card in two patches, the word STOP in one."""
    fox = pictures.Thing("fox", False, "red", (0, 0, 40, 40))
    stop = pictures.Thing("STOP", True, None, (150, 150, 200, 200))
    thing = np.zeros((24, 24), np.int16)
    thing[1, :2], thing[12, 12] = 1, 2
    found = pictures.Labels(thing, np.zeros((24, 24, vision.SLOTS), np.uint8), np.zeros((24, 24, 3), np.float16))
    scene = SimpleNamespace(image=np.zeros((336, 336, 3), np.uint8), things=[fox, stop])
    assets = SimpleNamespace(names=["fox"], index={"fox": 1})
    return vision.sample(scene, found, assets, vision.Words(list(range(7)), SPELLED))


def test_a_patch_tells_name_place_and_ink(sample) -> None:
    # broken by columns that overlap, or by the place of the patch instead of its thing's
    none = [-1] * vision.TOKENS
    assert sample.tokens[24].tolist() == [0, 1, *none[2:], 4, 5, 3] == sample.tokens[25].tolist()
    assert sample.tokens[12 * 24 + 12].tolist() == [2, *none[1:], 6, -1, -1]
    assert (sample.tokens[0] == -1).all()


def test_outputs_that_tell_all_are_all_right(sample) -> None:
    # broken by a share or a rank of what is not asked: nothing could reach the whole
    torch.manual_seed(8)
    words = vision.Words(list(range(20)), {**SPELLED, **{w: [k] for k, w in enumerate(MORE, 7)}})
    table = vision.Table(words, torch.randn(20, 64))
    assert table.allowed.sum(1).tolist() == [20, 5, len(vision.COLORS)]
    net = SimpleNamespace(table=table, head=SimpleNamespace(parts={"thing": 3}))
    asked = torch.from_numpy(sample.tokens)
    mixed = torch.stack([table.weight[row[row >= 0]].mean(0) if (row >= 0).any() else table.middle for row in asked])
    net.projector = lambda x: mixed[x[:, 0].long()]
    features = torch.arange(576.0)[None, :, None]
    _, right = vision.token_losses(net, features, [sample], 99)
    assert {k: v.item() for k, v in right.items()} == {f"{k}_token": 1.0 for k in ("name", "place", "ink", "word")}
    net.projector = lambda x: 2 * table.middle - table.weight[[3] * len(x)]  # anything but red
    _, right = vision.token_losses(net, features, [sample], 99)
    assert right["ink_token"] == 0
