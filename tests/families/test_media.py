"""Vision models of each family by way of mtmd, against Hugging Face's: from the pixels to the logits."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

for package in ("torch", "transformers", "safetensors"):
    pytest.importorskip(package, reason=f"{package} is not installed: no reference to compare with")

import torch  # noqa: E402
from mrope import RowContext  # noqa: E402
from native_runtime import Context, Image, Model  # noqa: E402
from native_vision import Vision  # noqa: E402
from oracle import llama as oracle  # noqa: E402

from families import media  # noqa: E402
from families.conftest import Made  # noqa: E402
from families.files import MEDIA, TEXT  # noqa: E402
from families.test_text import EXACT, KEYS, N_STEPS, same_as_stock, talk, words  # noqa: E402
from families.whole import WHOLE  # noqa: E402

models = pytest.mark.parametrize("name", MEDIA)


@dataclass(frozen=True)
class Pair:
    """A vision model: its recipe, the decoder, Hugging Face's model and the mmproj."""

    media: media.Media
    text: Made
    hf: object
    mmproj: Path

    def features(self, picture: np.ndarray) -> list[np.ndarray]:
        """Hugging Face's embeddings of what mtmd shows of a picture, tile by tile."""
        tiles = [self.media.pixels(tile) for tile in self.media.tiles(picture)]
        with torch.no_grad():
            return [self.media.features(self.hf, tile).numpy() for tile in tiles]


@pytest.fixture(scope="module")
def pair(text_model, converter, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Pair]:
    """Makes a vision model once: pair(name)."""
    folder, made = tmp_path_factory.mktemp("media"), {}

    def make(name: str) -> Pair:
        if name not in made:
            m = MEDIA[name]
            recipe = TEXT[m.text].with_markers(m.markers)
            model = m.make(recipe.make())
            m.write(model, folder / name, folder / f"mmproj-{name}.gguf", converter)
            made[name] = Pair(m, text_model(name, recipe), model, folder / f"mmproj-{name}.gguf")
        return made[name]

    return make


def context(model: Model) -> Context:
    return (RowContext if model.mrope else Context)(model, n_ctx=1024, **EXACT)


def read(pair: Pair, ctx: Context, vision: Vision, chunks: object, p0: int = 0) -> tuple[list[oracle.Piece], int]:
    """A prompt by mtmd's helper; its pieces as the decoder takes them, and where the next row comes."""
    pieces = as_seen(vision.pieces(chunks))
    n = sum(len(x.embd) if isinstance(x, oracle.Image) else len(x) for x in pieces)
    if not isinstance(ctx, RowContext):
        assert vision.evaluate(ctx, chunks, p0) == p0 + n
        return pieces, p0 + n
    assert len(ctx.places) == p0
    end = vision.evaluate(ctx, chunks, ctx.end)
    ctx.add(pieces)
    pair.text.oracle.places = ctx.places
    assert (ctx.end, len(ctx.places)) == (end, p0 + n)
    return pieces, p0 + n


@contextmanager
def loaded(rt, pair: Pair, keys: dict) -> Iterator[tuple[Context, Vision]]:
    with Model(rt, pair.text.path, keys) as model, context(model) as ctx:
        vision = Vision(model, pair.mmproj, threads=1)
        try:
            yield ctx, vision
        finally:
            vision.close()


def prompt(number: int) -> str:
    return f"t{number}<__media__>t7 t8 t9 t{number + 20} t5"


def as_seen(pieces: list) -> list[oracle.Piece]:
    """Pieces as the decoder takes them: tiles with nothing between them are one image."""
    out: list[oracle.Piece] = []
    for piece in pieces:
        if not isinstance(piece, Image):
            out.append(piece)
        elif out and isinstance(out[-1], oracle.Image):
            above = out.pop()
            out.append(oracle.Image(np.concatenate([above.embd, piece.embd]), piece.nx, above.ny + piece.ny))
        else:
            out.append(oracle.Image(piece.embd, piece.nx or len(piece.embd), piece.ny or 1))
    return out


def least_cosine(a: np.ndarray, b: np.ndarray) -> float:
    return float(((a * b).sum(-1) / np.linalg.norm(a, axis=-1) / np.linalg.norm(b, axis=-1)).min())


@models
def test_off_is_hugging_face(rt, pair, tally, name: str) -> None:
    """Breaks if tiles, their order, a tower, a projector or the decoder is another than Hugging Face's."""
    p = pair(name)
    picture = p.media.picture(0)
    with loaded(rt, p, {}) as (ctx, vision), vision.chunks(prompt(1), picture) as chunks:
        raw = vision.pieces(chunks)
        got, want = [x for x in raw if isinstance(x, Image)], p.features(picture)
        assert [len(x.embd) for x in got] == [len(x) for x in want]
        for i, (a, b) in enumerate(zip(got, want, strict=True)):
            assert least_cosine(a.embd, b) >= 0.999, f"tile {i}: {least_cosine(a.embd, b)}"
        theirs = iter(want)
        seen = [oracle.Image(next(theirs), 0, 0) if isinstance(x, Image) else x for x in raw]
        own = p.media.whole
        logits = own(p.hf, seen, p.media.pixels(picture)) if own else p.text.oracle.whole(seen)
        _, end = read(p, ctx, vision, chunks)
        assert end == len(logits)
        cosine = least_cosine(ctx.logits()[None], logits[-1:])
    tally[f"{name} 1 - cosine x 1e-9, from the pixels"] = round(1e9 * (1 - cosine))
    assert cosine >= 0.999


@pytest.mark.parametrize("name", WHOLE)
def test_off_is_stock(pair, tmp_path: Path, name: str) -> None:
    """Breaks if the patches change one bit of a logit where nothing is pruned (the other decoders: test_text)."""
    same_as_stock(pair(name).text.path, tmp_path)


@models
def test_pruned_by_mtmd_is_the_oracle(rt, pair, tally, name: str) -> None:
    """Breaks if what mtmd's helper decodes is not pruned as one prompt, or tiles that follow each other are not one
    image; then the answer, a second picture, and its answer."""
    p = pair(name)
    with loaded(rt, p, KEYS) as (ctx, vision):
        t = talk(ctx, p.text, tally)
        for number in range(2):
            with vision.chunks(prompt(number), p.media.picture(number)) as chunks:
                pieces, _ = read(p, ctx, vision, chunks, t.at)
            report = ctx.report()
            assert (report["mode"], report["reason"]) == ("pruned-prefill", None)
            n_images = 1 if p.media.joined else len(p.media.tiles(p.media.picture(0)))
            assert len(report["images"]) == (number + 1) * n_images
            t.follow("prefill", pieces)
            for token in words(number, N_STEPS):
                t.step(token)
        t.close()


@models
def test_a_saved_state_goes_on_the_same(rt, pair, name: str) -> None:
    """Breaks if anything that a later logit depends on is not in the state."""
    p = pair(name)
    with loaded(rt, p, KEYS) as (ctx, vision):
        with vision.chunks(prompt(3), p.media.picture(3)) as chunks:
            (_, at), got = read(p, ctx, vision, chunks), []
        state = ctx.save(0)
        with context(ctx.model) as other:
            assert other.restore(state, 0) == len(state)
            if isinstance(ctx, RowContext):
                other.places, other.visual, other.end = list(ctx.places), list(ctx.visual), ctx.end
            for c in (ctx, other):
                assert c.decode([5], at) == 0 and c.decode([6], at + 1) == 0
                got.append(c.logits())
    assert oracle.nmse(got[1], got[0]) < p.text.most_error


@pytest.mark.skipif(sys.platform != "linux", reason="LD_PRELOAD is the dynamic linker's of Linux")
def test_nothing_is_read_before_it_is_written(pair, to_preload: Callable[[Path], Path]) -> None:
    """Breaks if an encoder or a decoder computes with memory that nothing wrote, here NaN at first: so did upstream's
    Pixtral."""
    here = Path(__file__).parent
    library = to_preload(here / "nan_memory.c")
    made = {name: pair(name) for name in MEDIA}
    jobs = [[str(p.text.path), str(p.mmproj), *p.media.size, KEYS] for p in made.values()]
    done = subprocess.run(
        [sys.executable, here / "finite.py"],
        input="\n".join(map(json.dumps, jobs)),
        env={**os.environ, "LD_PRELOAD": str(library)},
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert dict(zip(made, map(json.loads, done.stdout.splitlines()), strict=True)) == {
        name: [[], True] for name in made
    }
