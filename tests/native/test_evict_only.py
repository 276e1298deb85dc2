"""Images that come by ordinary batches: computed in full, cut down by the question, annealed from then on."""

from __future__ import annotations

import cases
import numpy as np
import pytest
from annealing import Conversation, native
from cases import SEED
from native_runtime import Context, Model
from oracle import llama as oracle
from oracle import schedule

SHAPE = cases.SHAPES["mha-32"]
KEYS: dict[str, str | int | float] = {
    "st3.preset": "st3",
    "st3.keep": 0.5,
    "st3.start": 1,
    "st3.stride": 2,
    "st3.anneal_tokens": 12,
}


def picture(number: int = 0, nx: int = 8, ny: int = 8) -> oracle.Image:
    rng = np.random.default_rng([SEED, 31, number])
    return oracle.Image(rng.standard_normal((nx * ny, SHAPE.n_embd)).astype(np.float32), nx, ny)


def words(number: int, n: int) -> list[int]:
    return [int(t) for t in np.random.default_rng([SEED, 32, number]).integers(3, SHAPE.n_vocab, n)]


def resolve(keys: dict[str, str | int | float]) -> schedule.Schedule:
    return schedule.resolve(SHAPE.n_layer, **{k.removeprefix("st3."): v for k, v in keys.items()})


@pytest.fixture(scope="module")
def path(random_gguf):
    return random_gguf(SHAPE)


@pytest.mark.parametrize("kv", ["F16", "Q8_0"])
@pytest.mark.parametrize("coverage", [0.0, 0.5])
@pytest.mark.parametrize("score", ["text-max", "last-mean-sum", "text-mean-sum+last-max"])
def test_ordinary_batches(rt, path, tally, score: str, coverage: float, kv: str) -> None:
    """Breaks if the question's rows are not what scores, a cut reads another layer, or tokens do not leave after it."""
    keys = {**KEYS, "st3.score": score, "st3.coverage": coverage}
    with Model(rt, path, keys) as model, Context(model, n_ctx=512, kv=kv) as ctx:
        talk = Conversation(ctx, path, resolve(keys), kv, tally, "evict-only")
        talk.text([1, 5])
        talk.picture(picture())
        talk.text(words(0, 20))
        assert [len(talk.result.held(s)) for s in range(4)] == [64, 32, 16, 8]
        for token in words(1, 6):
            talk.step(token)
        talk.text(words(2, 7))
        talk.picture(picture(1, 6, 6))
        talk.text(words(3, 70))
        assert [im.n0 for im in talk.result.images] == [[64, 32, 16, 8], [36, 18, 9, 5]]
        for token in words(4, 10):
            talk.step(token)
        assert [im.t for im in talk.result.images] == [16, 10]
        talk.close()


def test_several_images_wait_for_one_question(rt, path, tally) -> None:
    """Breaks if text without an output is taken for the question, or images share a quota."""
    with Model(rt, path, KEYS) as model, Context(model, n_ctx=512) as ctx:
        talk = Conversation(ctx, path, resolve(KEYS), "F16", tally, "evict-only")
        talk.text([1])
        talk.picture(picture())
        assert ctx.decode([9, 8, 7], talk.at, outputs="none") == 0
        talk.before("silent", [9, 8, 7])
        talk.picture(picture(1, 5, 7))
        talk.text(words(0, 12))
        assert [im.n0 for im in talk.result.images] == [[64, 32, 16, 8], [35, 18, 9, 5]]
        for token in words(1, 5):
            talk.step(token)
        talk.close()


@pytest.mark.parametrize("sizes", [(64,), (32, 32), (50, 14), (1, 63), (16, 16, 16, 16)])
def test_an_image_may_come_in_parts(rt, path, tally, sizes: tuple[int, ...]) -> None:
    """Breaks if each batch of one image is taken for an image, with a quota of its own."""
    embd = picture().embd
    with Model(rt, path, KEYS) as model, Context(model, n_ctx=512) as ctx:
        talk = Conversation(ctx, path, resolve(KEYS), "F16", tally, "evict-only")
        talk.text([1, 5])
        at = 0
        for n in sizes:
            talk.picture(oracle.Image(embd[at : at + n], 0, 0), announce=0 if at else 64)
            at += n
        talk.text(words(0, 9))
        assert [im.n0 for im in talk.result.images] == [[64, 32, 16, 8]]
        for token in words(1, 4):
            talk.step(token)
        talk.close()


def test_without_annealing_or_cuts(rt, path) -> None:
    """Breaks if eviction depends on annealing, or happens where everything is kept."""
    for keys, want in (
        ({**KEYS, "st3.anneal": "none"}, [64, 32, 32, 16, 16, 8]),
        ({**KEYS, "st3.keep": 1.0}, [64] * 6),
        ({"st3.preset": "off"}, None),
    ):
        with Model(rt, path, keys) as model, Context(model, n_ctx=256) as ctx:
            assert ctx.decode([1, 5], 0) == 0
            ctx.announce(64, 8, 8)
            assert ctx.decode(picture().embd, 2) == 0
            assert ctx.decode([7, 8, 9], 66) == 0
            if want:
                assert [len(ctx.held(layer)) - 5 for layer in range(6)] == want
            assert ctx.positions() == (0, 68)


@pytest.mark.parametrize("kv", ["F16", "Q8_0"])
def test_prefill_that_does_not_fit_one_batch(rt, path, tally, kv: str) -> None:
    """Breaks if image and question beyond n_batch are left unpruned, cut by another rule, or without a reason."""
    with Model(rt, path, KEYS) as model, Context(model, n_ctx=512, n_ubatch=50, n_batch=72, kv=kv) as ctx:
        talk = Conversation(ctx, path, resolve(KEYS), kv, tally, "evict-only")
        before, image, question = words(0, 11), picture(), words(1, 40)
        assert ctx.prefill(native([before, image, question])) == 0, rt.last_error()
        # after the fact: what stock batches would have been
        talk.before("silent", before)
        talk.before("picture", image)
        talk.follow("text", question)
        report = ctx.report()
        assert report["mode"] == "evict-only"
        assert "72" in report["reason"] and "104" in report["reason"], report["reason"]
        assert report["per_layer"] == [64, 32, 32, 16, 16, 8]
        assert report["counts"] == [[32], [16], [8]]
        for token in words(2, 12):
            talk.step(token)
        assert ctx.report()["mode"] == "evict-only"
        assert ctx.report()["held"] == [len(talk.result.held(talk.result.stage(i))) for i in range(6)]
        talk.close()


@pytest.mark.parametrize("kv", ["F16", "Q8_0"])
def test_history_goes_first(rt, path, tally, kv: str) -> None:
    """Breaks if a history that exceeds the batch costs the image its pruned prefill, or is not seen by it."""
    with Model(rt, path, KEYS) as model, Context(model, n_ctx=512, n_ubatch=32, n_batch=96, kv=kv) as ctx:
        talk = Conversation(ctx, path, resolve(KEYS), kv, tally, "history first")
        history, rest = words(0, 90), [picture(), words(1, 25)]
        assert ctx.prefill(native([history, *rest])) == 0, rt.last_error()
        talk.before("silent", history)
        talk.follow("prefill", rest)
        report = ctx.report()
        assert (report["mode"], report["reason"]) == ("pruned-prefill", None)
        assert report["given"] == 64
        for token in words(2, 12):
            talk.step(token)
        talk.close()


@pytest.mark.parametrize("score", ["text-mean", "last-max+text-max-sum"])
@pytest.mark.parametrize(("n_batch", "n_ubatch"), [(150, 40), (60, 16), (40, 32), (32, 32)])
def test_long_question_in_parts(rt, path, tally, n_batch: int, n_ubatch: int, score: str) -> None:
    """Breaks if a question of several batches is never recognized, or one of several ubatches cuts before the last of
    them has run, or by other rows than the last one's."""
    keys = {**KEYS, "st3.score": score}
    with Model(rt, path, keys) as model, Context(model, n_ctx=512, n_ubatch=n_ubatch, n_batch=n_batch) as ctx:
        talk = Conversation(ctx, path, resolve(keys), "F16", tally, "question in parts")
        image, question = picture(), words(0, 100)
        assert ctx.prefill(native([[1, 5], image, question])) == 0
        report = ctx.report()
        assert report["mode"] == "evict-only" and report["reason"]
        assert report["per_layer"] == [64, 32, 32, 16, 16, 8]
        talk.before("silent", [1, 5])
        talk.before("picture", image)
        parts = [question[i : i + n_batch] for i in range(0, 100, n_batch)]
        for part in parts[:-1]:
            talk.before("silent", part)
        talk.follow("text", parts[-1], scoring=(len(parts[-1]) - 1) % n_ubatch + 1)
        for token in words(1, 4):
            talk.step(token)
        assert ctx.report()["held"][0] == resolve(KEYS).target(64, 64, 4)
        talk.close()


def test_mode_covers_earlier_turns(rt, path) -> None:
    """Breaks if the report forgets images of earlier turns, or calls a conversation pruned that was not."""
    with Model(rt, path, KEYS) as model, Context(model, n_ctx=512, n_batch=96, n_ubatch=32) as ctx:
        assert ctx.prefill(native([[1], picture(), words(0, 9)])) == 0
        assert ctx.report()["mode"] == "pruned-prefill"
        assert ctx.prefill(native([words(1, 4), picture(1, 6, 6), words(2, 9)]), p0=74) == 0
        report = ctx.report()
        assert (report["mode"], report["given"], report["counts"]) == (
            "pruned-prefill",
            100,
            [[32, 18], [16, 9], [8, 5]],
        )
        assert ctx.prefill(native([picture(2, 9, 9), words(3, 20)]), p0=123) == 0
        report = ctx.report()
        assert report["mode"] == "evict-only" and report["reason"]
        assert report["given"] == 181
        assert report["per_layer"] == resolve(KEYS).per_layer([64, 36, 81])
        assert ctx.positions() == (0, 223)
