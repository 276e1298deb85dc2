"""Annealing of the embedded model, step by step against the oracle: trained attention, real pictures and captions."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

gguf = pytest.importorskip("gguf")
ROOT = Path(__file__).resolve().parents[2]
for folder in (ROOT / "tests", ROOT / "tests" / "native", ROOT / "scripts"):
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))

import native_runtime  # noqa: E402
import native_vision  # noqa: E402
from annealing import MOST_ERROR_BYTES, MOST_ERROR_LONG, NEAR_TIE, Conversation  # noqa: E402
from oracle import llama as oracle  # noqa: E402
from oracle import schedule  # noqa: E402
from oracle.exact import write_exact  # noqa: E402

N_LAYER, N_STEPS = 16, 12
TALLY: dict[str, int] = {}
WHERE = {
    "alone": {"st3.keep": 1.0},
    "pruned": {"st3.budget": 0.3, "st3.start": 2, "st3.stride": 3, "st3.min_share": 0.0},
}
# With distances, rounding that swaps two like tokens moves a rank from nothing to its score, so margins say nothing.
BY_SCORE = {"st3.rank": "score"}
CASES = [  # where, images, curve, KV, other keys
    ("alone", 1, "linear", "F16", {}),
    *(("pruned", n, curve, kv, {}) for n in (1, 3) for curve in schedule.CURVES[1:] for kv in ("F16", "Q8_0")),
    ("pruned", 3, "linear", "Q8_0", {"st3.anneal_interval": 3, "st3.coverage": 0.25}),
]


@pytest.fixture(scope="module")
def rt() -> Iterator[native_runtime.Runtime]:
    folder = native_runtime.lib_dir()
    assert folder is not None
    made = native_runtime.Runtime(folder)
    yield made
    made.close()


@pytest.fixture(scope="module")
def exact(files: tuple[str, str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The embedded text model with its weights as F32."""
    path = tmp_path_factory.mktemp("exact") / "model.gguf"
    write_exact(Path(files[0]), path)
    return path


@pytest.fixture(scope="module")
def pictures(rt: native_runtime.Runtime, files: tuple[str, str], scenes: list) -> list[oracle.Image]:
    """Embeddings of the first three shipped pictures."""
    with native_runtime.Model(rt, Path(files[0])) as model:
        vision = native_vision.Vision(model, Path(files[1]), threads=1)
        try:
            seen = [vision.encode(np.asarray(Image.open(s.picture).convert("RGB"))) for s in scenes[:3]]
        finally:
            vision.close()
    return [oracle.Image(im.embd, im.nx, im.ny) for im in seen]


def converse(
    ctx: native_runtime.Context,
    path: Path,
    keys: dict,
    kv: str,
    pictures: list[oracle.Image],
    tally: dict[str, int],
    most_error: dict[str, float],
) -> Conversation:
    """A caption's first tokens."""
    s = schedule.resolve(N_LAYER, **{k.removeprefix("st3."): v for k, v in keys.items()})
    talk = Conversation(ctx, path, s, kv, tally, "embedded", most_error=most_error)
    pieces: list = [[1, *ctx.model.tokenize("USER: ")]]
    for im in pictures:
        pieces += [im, ctx.model.tokenize("\n")]
    talk.prefill([*pieces[:-1], ctx.model.tokenize("\nDescribe the image. ASSISTANT:")])
    for _ in range(N_STEPS):
        talk.step(int(np.argmax(ctx.logits())))
    return talk


@pytest.mark.parametrize(("where", "n_images", "curve", "kv", "more"), CASES)
def test_tokens_of_every_layer_after_every_step(
    rt, exact: Path, pictures: list, where: str, n_images: int, curve: str, kv: str, more: dict
) -> None:
    # broken if attention that is peaked as a trained model's is were recorded, added up or ranked otherwise
    keys = {"st3.preset": "st3", "st3.anneal": curve, **WHERE[where], **more}
    keys |= {"st3.anneal_tokens": N_STEPS, "st3.anneal_floor": 0.21, **BY_SCORE}
    with (
        native_runtime.Model(rt, exact, keys) as model,
        native_runtime.Context(model, n_ctx=2048, n_ubatch=2048, kv=kv) as ctx,
    ):
        talk = converse(ctx, exact, keys, kv, pictures[:n_images], TALLY, MOST_ERROR_LONG)
        held = ctx.report()["held"]
        assert held == [len(talk.result.held(talk.result.stage(i))) for i in range(N_LAYER)]
        assert max(held) < 0.25 * 576 * n_images, "the floor was reached"
        talk.close()


def test_near_ties_are_rare(capsys) -> None:
    # broken if ties excused choices. Rounding does more here: 1750 cells are summed in F16 where the cache is F16
    if TALLY.get("embedded conversations", 0) < len(CASES):
        pytest.skip("needs the whole of test_tokens_of_every_layer_after_every_step")
    with capsys.disabled():
        print(f" [{', '.join(f'{n} {word}' for word, n in TALLY.items())}]", end="")
    assert TALLY["embedded near-ties"] <= TALLY["embedded choices"] / 50
    assert TALLY["embedded choices decided by rounding"] <= TALLY["embedded choices"] / 10


def test_the_shipped_weights_choose_much_the_same(rt, files: tuple[str, str], pictures: list) -> None:
    # broken if products of quantized weights, whose inputs are rounded to a byte, went another way than exact ones;
    # the bounds are of this score, by which other tokens stay than by the default's
    keys = {"st3.preset": "st3", "st3.anneal_tokens": N_STEPS, "st3.anneal_floor": 0.21, **BY_SCORE}
    keys["st3.score"] = "text-max"
    path, tally = Path(files[0]), {}
    with (
        native_runtime.Model(rt, path, keys) as model,
        native_runtime.Context(model, n_ctx=1024, n_ubatch=1024) as ctx,
    ):
        talk = converse(ctx, path, keys, "F16", pictures[:1], tally, MOST_ERROR_BYTES)
    doubts = [margin for margin, _ in talk.doubts.values() if margin >= NEAR_TIE]
    assert len(doubts) < 0.75 * tally["embedded choices"]  # seen: 21 of 44, by tokens at the border
    assert max(doubts, default=0.0) < 0.12  # of the score of a token at the border; seen: 0.03
