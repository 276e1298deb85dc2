"""Images that wait in llama_decode for their question: given as stock front ends do, pruned as by st3_prefill."""

from __future__ import annotations

import ctypes as C

import cases
import numpy as np
import pytest
from cases import SEED
from native_runtime import Context, Image, Model, NativeError
from oracle import llama as oracle

SHAPE = cases.SHAPES["gqa-32"]
KEYS = {"st3.preset": "st3", "st3.keep": 0.5, "st3.start": 1, "st3.stride": 2, "st3.anneal_tokens": 12}
N_LAYER = SHAPE.n_layer
Pieces = list  # of token lists and images, as Context.prefill takes them


def words(number: int, n: int) -> list[int]:
    return [int(t) for t in np.random.default_rng([SEED, 50, number]).integers(3, SHAPE.n_vocab, n)]


def picture(number: int = 0, nx: int = 8, ny: int = 8) -> Image:
    rng = np.random.default_rng([SEED, 51, number])
    return Image(rng.standard_normal((nx * ny, SHAPE.n_embd)).astype(np.float32), nx, ny)


def length(pieces: Pieces) -> int:
    return sum(len(p.embd) if isinstance(p, Image) else len(p) for p in pieces)


def give(ctx: Context, pieces: Pieces, at: int = 0, seq: int = 0, ask: bool = True) -> int:
    """Pieces by llama_decode, as mtmd's helper does; only the last token asks for an output. Returns the first code."""
    for i, piece in enumerate(pieces):
        if isinstance(piece, Image):
            code = ctx.picture(piece, at, seq)
        else:
            code = ctx.decode(piece, at, "last" if ask and i == len(pieces) - 1 else "none", seq)
        if code:
            return code
        at += length([piece])
    return 0


def follow(ctx: Context, at: int, n: int = 8, seq: int = 0) -> list[np.ndarray]:
    """Logits after a prompt that ended at `at` and after each of n fixed tokens."""
    out = [ctx.logits()]
    for i in range(n):
        assert ctx.decode([7 + i], at + i, seq=seq) == 0
        out.append(ctx.logits())
    return out


def same(a: list[np.ndarray], b: list[np.ndarray]) -> bool:
    return all(np.array_equal(x, y) for x, y in zip(a, b, strict=True))


def held(ctx: Context, seq: int = 0) -> list[list[int]]:
    return [ctx.held(layer, seq).tolist() for layer in range(N_LAYER)]


PROMPTS = {
    "one": [[1, 5], picture(), words(0, 20)],
    "none before": [picture(1, 5, 7), words(1, 3)],
    "two": [words(2, 9), picture(2), words(3, 4), picture(3, 6, 6), words(4, 70)],
    "in a row": [[1], picture(4, 4, 4), picture(5, 4, 4), picture(6, 1, 16), [9]],
}


@pytest.fixture(scope="module")
def model(rt, random_gguf):
    with Model(rt, random_gguf(SHAPE), KEYS) as m:
        yield m


@pytest.fixture(scope="module")
def fresh(model):
    """Logits of a prompt and 8 tokens, and what was kept, in a context of its own."""

    def run(pieces: Pieces, **how) -> tuple[list[np.ndarray], list[np.ndarray]]:
        with Context(model, n_ctx=512, **how) as ctx:
            assert ctx.prefill(pieces) == 0
            return follow(ctx, length(pieces)), ctx.kept(4)

    return run


@pytest.mark.parametrize("name", PROMPTS)
@pytest.mark.parametrize("kv", ["F16", "Q8_0"])
@pytest.mark.parametrize("how", [{}, {"n_ubatch": 16}, {"n_seq": 3}, {"n_seq": 3, "unified": True}], ids=str)
def test_waiting_is_prefill(model, fresh, name: str, kv: str, how: dict) -> None:
    """Breaks if what llama_decode gets piece by piece is not the one pruned prompt that st3_prefill makes, bit for bit,
    whatever n_ubatch is."""
    pieces = PROMPTS[name]
    n_ctx = 512 if how.get("unified") else 512 * how.get("n_seq", 1)
    want, kept = fresh(pieces, kv=kv)
    with Context(model, n_ctx=n_ctx, kv=kv, **how) as ctx:
        seq = how.get("n_seq", 1) - 1
        assert give(ctx, pieces, seq=seq) == 0
        report = ctx.report()
        assert (report["mode"], report["reason"], report["waiting"]) == ("pruned-prefill", None, 0)
        assert report["given"] == sum(len(p.embd) for p in pieces if isinstance(p, Image))
        assert [len(c) for c in report["counts"]] == [sum(isinstance(p, Image) for p in pieces)] * 4
        assert all(np.array_equal(a, b) for a, b in zip(ctx.kept(4, seq), kept, strict=True))
        assert same(follow(ctx, length(pieces), seq=seq), want)


def test_positions_count_while_an_image_waits(model) -> None:
    """Breaks if what waits is computed, or cannot be told from what was decoded."""
    with Context(model, n_ctx=256) as ctx:
        assert give(ctx, [[1, 5], picture(), words(0, 3)], ask=False) == 0
        assert ctx.positions() == (0, 68) and ctx.report()["waiting"] == 69
        assert held(ctx) == [[]] * N_LAYER
        if not cases.SANITIZED:  # upstream aborts where assert() is on
            with pytest.raises(NativeError):
                ctx.logits()
        assert ctx.decode([5], 3) == -1, "positions that are there"
        assert ctx.decode([5], 70) == -1, "a gap"
        assert ctx.decode([10**6], 69) == -1, "no token"
        assert ctx.report()["waiting"] == 69
        assert ctx.decode([5], 69) == 0
        assert [len(h) - 6 for h in held(ctx)] == ctx.report()["per_layer"] == [64, 32, 32, 16, 16, 8, 8, 4]


def test_embeddings_that_nobody_announced_are_no_image(model, fresh) -> None:
    """Breaks if audio is pruned, or if an image's announcement is good for more than its tokens."""
    with Context(model, n_ctx=256) as ctx:
        assert ctx.decode(picture().embd, 0, "none") == 0
        ctx.announce(36, 6, 6)
        ctx.announce(0)
        assert ctx.decode(picture(1, 6, 6).embd, 64, "none") == 0
        assert ctx.report()["waiting"] == 0
        assert ctx.decode(words(0, 9), 100) == 0
        assert held(ctx) == [list(range(109))] * N_LAYER
        assert ctx.report()["given"] == 0 and ctx.report()["reason"] == "the prompt has no image"
        assert give(ctx, PROMPTS["one"], at=109) == 0
        assert ctx.decode(picture().embd[:9], 109 + 86, "none") == 0
        assert ctx.decode([5], 109 + 95) == 0
        assert ctx.report()["given"] == 64


@pytest.mark.parametrize("sizes", [(64,), (50, 14), (1, 63), (16, 16, 16, 16)])
def test_an_image_may_come_in_parts(model, fresh, sizes: tuple[int, ...]) -> None:
    """Breaks if each batch of one image is taken for an image."""
    pieces = PROMPTS["one"]
    want, kept = fresh(pieces)
    with Context(model, n_ctx=256) as ctx:
        assert ctx.decode(pieces[0], 0, "none") == 0
        ctx.announce(64, 8, 8)
        at = 0
        for n in sizes:
            assert ctx.decode(pieces[1].embd[at : at + n], 2 + at, "none") == 0
            at += n
        assert ctx.decode(pieces[2], 66) == 0
        assert all(np.array_equal(a, b) for a, b in zip(ctx.kept(4), kept, strict=True))
        assert same(follow(ctx, 86), want)


def test_more_images_than_a_graph_first_had_room_for(model) -> None:
    """Breaks if a prompt of many images is refused, not pruned, or outgrows the graph."""
    pieces = [p for i in range(40) for p in (picture(i, 3, 3), [5 + i])] + [words(0, 5)]
    with Context(model, n_ctx=1024, n_ubatch=64) as ctx:
        assert give(ctx, pieces) == 0
        report = ctx.report()
        assert report["mode"] == "pruned-prefill" and report["given"] == 360
        assert len(report["counts"][0]) == 40 and np.isfinite(ctx.logits()).all()


def test_slots_in_one_batch(model, fresh) -> None:
    """Breaks if questions of several slots, generated tokens and text in one batch are not what they are one by one."""
    prompts = [PROMPTS["one"], PROMPTS["none before"], PROMPTS["two"]]
    alone = [fresh(p) for p in prompts]
    with Context(model, n_ctx=512) as ctx:
        assert ctx.decode([3, 4, 5], 0) == 0
        assert ctx.decode([6], 3) == 0
        plain = ctx.logits()
    for unified in (False, True):
        with Context(model, n_ctx=512 * (1 if unified else 5), n_seq=5, unified=unified) as ctx:
            assert ctx.decode([3, 4, 5], 0, seq=3) == 0
            for seq, pieces in enumerate(prompts):
                assert give(ctx, pieces[:-1], seq=seq, ask=False) == 0
            rows: list = [(6, 3, [3])]
            outputs = [0]
            for seq, pieces in enumerate(prompts):
                at = length(pieces[:-1])
                rows += [(t, at + i, [seq]) for i, t in enumerate(pieces[-1])]
                outputs.append(len(rows) - 1)
                rows.append((9 + seq, seq, [4]))  # text of another slot, between them
            assert ctx.decode_rows(rows, outputs) == 0
            assert oracle.nmse(ctx.logits(0), plain) < 1e-6  # it shares its batch with slot 4, as in stock
            assert np.array_equal(ctx.logits(-4), ctx.logits(0))
            for seq, (want, kept) in enumerate(alone):
                got = ctx.logits(outputs[1 + seq])
                assert oracle.nmse(got, want[0]) < 1e-6 if unified else np.array_equal(got, want[0])
                assert all(np.array_equal(a, b) for a, b in zip(ctx.kept(4, seq), kept, strict=True))
                assert ctx.report(seq)["mode"] == "pruned-prefill"
            assert ctx.positions(4) == (0, 2)
            for i in range(8):  # and go on together
                batch = [(7 + i, length(pieces) + i, [seq]) for seq, pieces in enumerate(prompts)]
                assert ctx.decode_rows(batch) == 0
                for seq, (want, _) in enumerate(alone):
                    assert oracle.nmse(ctx.logits(seq), want[1 + i]) < 1e-5


def test_a_question_in_parts(model, fresh) -> None:
    """Breaks if text without an output after an image is computed before the question is complete."""
    pieces = PROMPTS["two"]
    with Context(model, n_ctx=512, n_seq=2) as ctx:
        assert ctx.decode([5], 0, seq=1) == 0
        assert give(ctx, pieces[:-1], ask=False) == 0
        at, question = length(pieces[:-1]), pieces[-1]
        assert ctx.decode_rows([(6, 1, [1])] + [(t, at + i, [0]) for i, t in enumerate(question[:30])], [0]) == 0
        assert ctx.report(0)["waiting"] == at + 30
        assert ctx.decode(question[30:], at + 30) == 0
        assert same(follow(ctx, length(pieces)), fresh(pieces)[0])


def test_a_question_longer_than_the_batch(model) -> None:
    """Breaks if a prompt that cannot be one batch is refused, or is not cut down afterwards."""
    with Context(model, n_ctx=512, n_batch=100) as ctx:
        assert give(ctx, [[1, 5], picture()], ask=False) == 0
        assert ctx.decode(words(0, 50), 66) == 0
        report = ctx.report()
        assert report["mode"] == "evict-only" and "114" in report["reason"] and "100" in report["reason"]
        assert [len(h) - 52 for h in held(ctx)] == report["per_layer"] == [64, 32, 32, 16, 16, 8, 8, 4]
        assert ctx.positions() == (0, 115)
        with pytest.raises(NativeError):
            ctx.kept(4)


def test_a_cancelled_request(model, fresh) -> None:
    """Breaks if a request that goes away while its image waits leaves a row behind."""
    want = fresh(PROMPTS["one"])[0]
    with Context(model, n_ctx=512) as ctx:
        for cut in (0, 1, 2, 30, 66, 68):
            assert give(ctx, [[1, 5], picture(), words(0, 3)], ask=False) == 0
            assert ctx.seq_rm(0, cut, -1)
            assert ctx.positions() == ((0, cut - 1) if cut else (-1, -1))
            assert ctx.seq_rm(0, -1, -1) and ctx.positions() == (-1, -1)
            assert ctx.report()["embedding_bytes"] == 0
            assert give(ctx, PROMPTS["one"]) == 0
            assert same(follow(ctx, 86), want)
            assert ctx.seq_rm(0)


def test_part_of_an_image_that_is_taken_back(model, fresh) -> None:
    """Breaks if the rest of a picture keeps its grid, or does not wait."""
    pieces = [[1, 5], Image(picture().embd[:28], 28, 1), words(0, 20)]
    with Context(model, n_ctx=512) as ctx:
        assert give(ctx, [[1, 5], picture()], ask=False) == 0
        assert ctx.seq_rm(0, 30, -1)
        assert ctx.decode(words(0, 20), 30) == 0
        assert same(follow(ctx, 50), fresh(pieces)[0])


def test_the_middle_of_what_waits(model) -> None:
    """Breaks if positions can be left with a gap that nothing closes: what waits is computed first then."""
    with Context(model, n_ctx=512) as ctx:
        assert give(ctx, [[1, 5], picture()], ask=False) == 0
        assert ctx.seq_rm(0, 10, 20)
        assert ctx.report()["waiting"] == 0
        assert ctx.decode(words(0, 9), 66) == 0
        assert len(ctx.held(0)) == 75 - 10
        assert ctx.report()["mode"] == "evict-only"
        assert ctx.report()["per_layer"] == [54, 32, 32, 16, 16, 8, 8, 4]


def test_too_little_room(model, fresh) -> None:
    """Breaks if an image waits that no cells will be found for, or if the refused one changes anything."""
    with Context(model, n_ctx=256, n_seq=2, unified=True) as ctx:
        assert give(ctx, [[1, 5], picture()], ask=False) == 0
        assert ctx.decode(words(0, 120), 0, "none", seq=1) == 0
        assert ctx.picture(picture(1, 10, 10), 120, seq=1) == 1
        assert ctx.decode(words(1, 200), 120, seq=1) == 1
        assert ctx.report(0)["waiting"] == 66
        assert ctx.seq_rm(1)
        assert ctx.decode(words(0, 20), 66) == 0
        assert same(follow(ctx, 86), fresh([[1, 5], picture(), words(0, 20)])[0])


@cases.can_abort
@pytest.mark.parametrize("after", [0, 5, 60])
def test_failing_then_trying_again(model, fresh, after: int) -> None:
    """Breaks if a question that was aborted cannot be asked again with the same bits, or takes others along."""
    prompts = [PROMPTS["one"], PROMPTS["two"]]
    with Context(model, n_ctx=512 * 3, n_seq=3) as ctx:
        assert ctx.decode([3, 4, 5], 0, seq=2) == 0
        for seq, pieces in enumerate(prompts):
            assert give(ctx, pieces[:-1], seq=seq, ask=False) == 0
        rows, outputs = [], []
        for seq, pieces in enumerate(prompts):
            rows += [(t, length(pieces[:-1]) + i, [seq]) for i, t in enumerate(pieces[-1])]
            outputs.append(len(rows) - 1)
        rows.append((6, 3, [2]))
        outputs.append(len(rows) - 1)
        waiting = [ctx.report(s)["waiting"] for s in (0, 1)]
        for n in (after, 2 * after + 200, 3 * after + 400):  # in the first prompt, in the second, beside them
            calls = iter(range(10**9))
            ctx.abort_when(lambda calls=calls, n=n: next(calls) >= n)
            code = ctx.decode_rows(rows, outputs)
            ctx.abort_when(None)
            if code == 0:
                break
            assert code == 2
            assert [ctx.report(s)["waiting"] for s in (0, 1)] == waiting
            assert [ctx.positions(s)[1] for s in (0, 1)] == [w - 1 for w in waiting]
            assert ctx.positions(2) == (0, 2)
        else:
            assert ctx.decode_rows(rows, outputs) == 0
        for seq, pieces in enumerate(prompts):
            assert np.array_equal(ctx.logits(outputs[seq]), fresh(pieces)[0][0])


@pytest.mark.parametrize("whole", [False, True])
def test_states_of_what_waits(model, fresh, whole: bool) -> None:
    """Breaks if a state that is saved between image and question forgets the image, or what may be read again."""
    pieces = PROMPTS["two"]
    want = fresh(pieces)[0]
    with Context(model, n_ctx=512) as ctx, Context(model, n_ctx=512) as other:
        assert give(ctx, pieces[:-1], ask=False) == 0
        raw = ctx.save(None if whole else 0)
        assert other.restore(raw, None if whole else 0) == len(raw)
        assert other.positions() == ctx.positions()
        for c in (ctx, other):
            assert c.decode(pieces[-1], length(pieces[:-1])) == 0
            assert same(follow(c, length(pieces)), want)
        raw = ctx.save(None if whole else 0)
        assert ctx.restore(raw, None if whole else 0) == len(raw)
        assert ctx.seq_rm(0, length(pieces) - 1, -1)
        assert ctx.decode(pieces[-1][-1:], length(pieces) - 1) == 0
        assert same(follow(ctx, length(pieces)), want)


@pytest.mark.parametrize("unified", [False, True])
def test_copies_of_what_waits(model, fresh, unified: bool) -> None:
    """Breaks if a copied sequence shares its waiting image, or lacks it."""
    pieces = PROMPTS["one"]
    want, other = fresh(pieces)[0], fresh([*pieces[:-1], words(7, 30)])[0]
    with Context(model, n_ctx=512 * (1 if unified else 3), n_seq=3, unified=unified) as ctx:
        assert give(ctx, pieces[:-1], ask=False) == 0
        ctx.seq_cp(0, 1)
        ctx.seq_cp(0, 2)
        assert ctx.decode(pieces[-1], 66, seq=1) == 0
        assert same(follow(ctx, 86, seq=1), want)
        assert ctx.decode(words(7, 30), 66, seq=0) == 0
        assert oracle.nmse(ctx.logits(), other[0]) < 1e-6
        ctx.seq_keep(2)
        assert ctx.report(2)["waiting"] == 66
        assert ctx.decode(pieces[-1], 66, seq=2) == 0
        assert oracle.nmse(ctx.logits(), want[0]) < 1e-6


def test_the_same_again_is_the_same(model, fresh) -> None:
    """Breaks if "regenerate" answers from what annealing left, or another question from what the first one pruned."""
    pieces = PROMPTS["one"]
    want = fresh(pieces)[0]
    question = words(8, 25)
    other = fresh([*pieces[:-1], question])[0]
    with Context(model, n_ctx=512) as ctx:
        assert give(ctx, pieces) == 0
        first = follow(ctx, 86)
        assert same(first, want)
        for back in (1, 5, 20):  # of the question, as a server's cache leaves it
            assert ctx.seq_rm(0, 86 - back, -1)
            assert ctx.report()["waiting"] == 86 - back
            assert ctx.decode(pieces[-1][20 - back :], 86 - back) == 0
            assert same(follow(ctx, 86), want)
        assert ctx.seq_rm(0, 66, -1)
        assert ctx.decode(question, 66) == 0
        assert same(follow(ctx, 91), other)
        # the answer alone, and a second turn: nothing is read again
        assert ctx.seq_rm(0, 94, -1)
        assert ctx.report()["waiting"] == 0
        assert give(ctx, [[5, 6], picture(9, 4, 4), [8, 9]], at=94) == 0
        assert ctx.report()["given"] == 80
        assert ctx.seq_rm(0, 113, -1)
        assert ctx.report()["waiting"] == 19, "the second prompt alone"
        assert ctx.seq_rm(0, 70, -1)
        assert ctx.report()["waiting"] == 70, "then the first one"
        assert ctx.decode(question[4:], 70) == 0 and ctx.report()["mode"] == "pruned-prefill"


def test_what_was_cut_down_afterwards_is_not_read_again(model) -> None:
    """Breaks if an evict-only image waits again, or a question that is answered from what the first one left of it is
    reported to be answered from all of it."""
    question = words(0, 50)
    with Context(model, n_ctx=512, n_batch=100) as ctx:
        assert give(ctx, [[1, 5], picture()], ask=False) == 0
        assert ctx.decode(question, 66) == 0
        report, left = ctx.report(), held(ctx)
        for end in (question[40:], words(8, 10)):
            assert ctx.seq_rm(0, 106, -1)
            assert ctx.report()["waiting"] == 0
            assert ctx.decode(end, 106) == 0
            again = ctx.report()
            assert (again["mode"], again["reason"]) == ("evict-only", report["reason"])
            assert held(ctx) == left


def test_st3_prefill_keeps_no_embeddings(model) -> None:
    """Breaks if the caller's pictures are held twice."""
    with Context(model, n_ctx=512) as ctx:
        assert ctx.prefill(PROMPTS["one"]) == 0
        assert ctx.report()["embedding_bytes"] == 0
        ctx.clear()
        assert give(ctx, PROMPTS["one"]) == 0
        assert ctx.report()["embedding_bytes"] == 64 * SHAPE.n_embd * 4


def test_adapters_change_nothing_that_came_before(model, rt) -> None:
    """Breaks if what waits is computed with an adapter that was set after it came."""
    cvec = rt.lib.llama_set_adapter_cvec
    cvec.argtypes = [C.c_void_p, C.c_void_p, C.c_size_t, C.c_int32, C.c_int32, C.c_int32]
    data = np.random.default_rng(SEED).standard_normal((N_LAYER - 1, SHAPE.n_embd)).astype(np.float32)
    got = []
    for late in (False, True):
        with Context(model, n_ctx=256) as ctx:
            assert ctx.decode([1, 5, 6], 0, "none" if late else "last") == 0
            if late:
                assert ctx.report()["waiting"] == 3
            assert cvec(ctx.ptr, data.ctypes.data, data.size, SHAPE.n_embd, 1, N_LAYER) == 0
            assert ctx.report()["waiting"] == 0
            assert ctx.decode([7], 3) == 0
            got.append(ctx.logits())
    assert np.array_equal(*got)


def test_a_pruned_cache_is_not_shifted(model) -> None:
    """Breaks if a context shift is half done, or refused without a word."""
    with Context(model, n_ctx=256) as ctx:
        assert not ctx.can_shift()
        assert give(ctx, PROMPTS["one"]) == 0
        before = held(ctx)
        for change in (lambda: ctx.seq_add(0, 10, -1, -5), lambda: ctx.seq_div(0, 10, -1, 2)):
            ctx.rt.log.clear()
            change()
            assert any("positions" in line for line in ctx.rt.log)
            assert held(ctx) == before and ctx.positions() == (0, 85)


def test_llama_cpp_times_its_work(model, rt) -> None:
    """Breaks if what llama-cli and others print of a prompt and an answer leaves out rows, or has no time at all."""
    with Context(model, n_ctx=512) as ctx:
        assert give(ctx, PROMPTS["one"]) == 0
        follow(ctx, length(PROMPTS["one"]))
        told = rt.llama.llama_perf_context(ctx.ptr)
        assert (told.n_p_eval, told.n_eval) == (length(PROMPTS["one"]), 8)
        assert told.t_p_eval_ms > 0 and told.t_eval_ms > 0


@pytest.mark.parametrize("pooling", [1, 2, 3], ids=["mean", "cls", "last"])
def test_pooled_embeddings(model, pooling: int) -> None:
    """Breaks if a context that pools embeddings cannot be made, or differs from one without ST3."""
    with Context(model, n_ctx=256, pooling=pooling) as ctx:
        assert ctx.decode(words(0, 30), 0, "all") == 0
        got = ctx.embeddings()
        assert np.isfinite(got).all() and np.abs(got).max() > 0
        assert give(ctx, [picture()], at=30, ask=False) == 0
        assert ctx.report()["waiting"] == 0


def test_a_prompt_before_a_gap_is_read_again(model) -> None:
    """Breaks if taking positions out right behind a prompt forgets it: another question was asked of what was left."""
    with Context(model, n_ctx=512) as ctx:
        assert give(ctx, [[1, 5], picture(14), words(62, 6)]) == 0
        for i in range(6):
            assert ctx.decode([20 + i], 72 + i) == 0
        assert ctx.seq_rm(0, 72, 75)
        assert ctx.seq_rm(0, 68)
        assert ctx.report()["waiting"] == 68
