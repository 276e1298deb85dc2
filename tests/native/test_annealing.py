"""Visual tokens that leave while the answer grows, step by step against the oracle."""

from __future__ import annotations

import copy

import cases
import numpy as np
import pytest
from annealing import MOST_ERROR, Conversation, native
from cases import SEED
from native_runtime import Context, Model
from oracle import llama as oracle
from oracle import schedule

from st3_edge.native import libraries

N_CASES = 84
SHAPE = cases.SHAPES["gqa-32"]
KEYS: dict[str, str | int | float] = {
    "st3.preset": "st3",
    "st3.keep": 0.5,
    "st3.start": 2,
    "st3.stride": 2,
    "st3.score": "text-max",
    "st3.anneal": "linear",
    "st3.anneal_tokens": 16,
    "st3.anneal_floor": 0.2,
}
N_PROMPT = 2 + 81 + 70


def resolve(keys: dict[str, str | int | float], shape=SHAPE) -> schedule.Schedule:
    return schedule.resolve(shape.n_layer, **{k.removeprefix("st3."): v for k, v in keys.items()})


def picture(number: int = 0, nx: int = 9, ny: int = 9) -> oracle.Image:
    rng = np.random.default_rng([SEED, 21, number])
    return oracle.Image(rng.standard_normal((nx * ny, SHAPE.n_embd)).astype(np.float32), nx, ny)


def words(number: int, n: int) -> list[int]:
    return [int(t) for t in np.random.default_rng([SEED, 22, number]).integers(3, SHAPE.n_vocab, n)]


def prompt(number: int = 0) -> list:
    return [[1, 5], picture(number), words(number, 70)]


@pytest.fixture(scope="module")
def path(random_gguf):
    return random_gguf(SHAPE)


@pytest.fixture(scope="module")
def model(rt, path):
    with Model(rt, path, KEYS) as m:
        yield m


@pytest.fixture
def ctx(model):
    with Context(model, n_ctx=512) as c:
        yield c


def held(ctx: Context, seq: int = 0) -> list[list[int]]:
    """Positions in every layer."""
    return [ctx.held(layer, seq).tolist() for layer in range(ctx.model.n_layer)]


def predicted(images: list[tuple[int, int]], number: int, keys: dict, n_pos: int, steps: int) -> list[list[int]]:
    """Positions in every layer where the order is random: images (p0, n), `number` the first one's, steps since."""
    s = resolve(keys)
    out = []
    for layer in range(s.n_layer):
        stage, gone = sum(c < layer for c in s.cuts), set()
        for i, (p0, n) in enumerate(images):
            order = np.argsort(-schedule.random_order(s.seed, number + i, n))
            n0 = [n, *s.counts(n)][stage]
            now = min([n0, *[s.target_before(n, n0, t) or n0 for t in range(1, steps + 1)]])
            gone |= {p0 + int(j) for j in order[now:]}
        out.append([p for p in range(n_pos) if p not in gone])
    return out


# --- against the oracle ---


@pytest.mark.parametrize("number", range(N_CASES))
def test_tokens_of_every_layer_after_every_step(rt, random_gguf, tally, number: int) -> None:
    """Breaks if a score, a record, a count, an order, a position, a cell or a step's time is wrong."""
    case = cases.make_annealed(number, SEED)
    rng = np.random.default_rng([SEED, 20, number])
    path = random_gguf(cases.SHAPES[case.model])
    with Model(rt, path, case.keys) as model, Context(model, n_ctx=512, kv=case.kv) as ctx:
        talk = Conversation(ctx, path, case.schedule, case.kv, tally)
        talk.prefill(case.pieces)
        for _ in range(int(rng.integers(20, 31))):
            talk.step(int(rng.integers(3, cases.SHAPES[case.model].n_vocab)))
            talk.count("steps")
        talk.close()


def test_near_ties_are_rare(tally) -> None:
    """Breaks if ties excuse more than one choice in fifty, which the gaps between scores do not."""
    if tally.get("annealing conversations", 0) < N_CASES:
        pytest.skip("needs the whole of test_tokens_of_every_layer_after_every_step")
    doubts = sum(
        n for word, n in tally.items() if word.startswith("annealing") and ("ties" in word or "rounding" in word)
    )
    assert doubts <= tally["annealing choices"] / 50


@pytest.mark.parametrize("kv", ["F16", "Q8_0"])
@pytest.mark.parametrize("interval", [1, 3])
@pytest.mark.parametrize("score", ["text-max", "last-mean", "text-mean+last-max"])
def test_conversation(rt, path, tally, kv: str, interval: int, score: str) -> None:
    """Breaks if a question advances t or records nothing, or images of several turns share a quota, a t or a score."""
    keys = {**KEYS, "st3.anneal_interval": interval, "st3.score": score, "st3.coverage": 0.25}
    with Model(rt, path, keys) as model, Context(model, n_ctx=1024, kv=kv) as ctx:
        talk = Conversation(ctx, path, resolve(keys), kv, tally, "conversation")
        talk.prefill(prompt())
        for token in words(1, 5):
            talk.step(token)
        talk.text(words(2, 9))
        for token in words(3, 4):
            talk.step(token)
        talk.prefill([words(4, 3), picture(1, 7, 5), [6], picture(2, 4, 4), words(5, 12)])
        for token in words(6, 6):
            talk.step(token)
        talk.text(words(7, 80))
        for token in words(8, 12):
            talk.step(token)
        assert [im.t for im in talk.result.images] == [27, 18, 18]
        talk.close()


def test_annealing_forgets_what_matters_less(rt, path) -> None:
    """Breaks if parity holds only because nothing is dropped: another score must hold other tokens."""
    got = []
    for score in ("text-max", "random"):
        keys = {**KEYS, "st3.anneal_score": score}
        with Model(rt, path, keys) as model, Context(model, n_ctx=256) as ctx:
            assert ctx.prefill(native(prompt())) == 0
            before = held(ctx)
            for i, token in enumerate(words(1, 20)):
                assert ctx.decode([token], N_PROMPT + i) == 0
            got.append(held(ctx))
        assert before[0] != got[-1][0]
    assert all(a != b for a, b in zip(*got, strict=True))


# --- counts and cells ---


@pytest.mark.parametrize("keep", [0.5, 1.0])
def test_freed_cells_take_the_next_tokens(rt, path, keep: float) -> None:
    """Breaks if a generated token grows a layer although cells were freed in it, or the freed ones are not used."""
    keys = {**KEYS, "st3.keep": keep, "st3.anneal_tokens": 8, "st3.min_keep": 0}
    s = resolve(keys)
    with Model(rt, path, keys) as model, Context(model, n_ctx=512) as ctx:
        assert ctx.prefill(native(prompt())) == 0
        report = ctx.report()
        first = [len(p) for p in held(ctx)]
        counts = [81, *s.counts(81)]
        at, allocated = N_PROMPT, report["kv_bytes"]["allocated"]
        freed = [n - s.target(81, n, 8) for n in counts]
        for t in range(1, max(freed) + 4):
            assert ctx.decode([5], at) == 0
            at += 1
            for layer, positions in enumerate(held(ctx)):
                n0 = counts[sum(c < layer for c in s.cuts)]
                assert len(positions) == first[layer] + t - (n0 - s.target(81, n0, t))
                assert len(positions) <= first[layer] or t > freed[sum(c < layer for c in s.cuts)]
            report = ctx.report()
            assert report["kv_bytes"]["live"] == sum(len(p) for p in held(ctx)) * 2 * 2 * SHAPE.head * SHAPE.n_head_kv
            if t <= min(freed):
                assert report["kv_bytes"]["allocated"] <= allocated, "grew although cells are free"
        assert report["held"] == [s.target(81, counts[sum(c < il for c in s.cuts)], t) for il in range(SHAPE.n_layer)]
        assert report["anneal"] == {
            "curve": "linear",
            "tokens": 8,
            "floor": 0.2,
            "interval": 1,
            "score": "text-max",
        }
        assert report["per_layer"] == s.per_layer([81])


@pytest.mark.parametrize("keys", [{"st3.anneal": "none"}, {"st3.anneal_floor": 1.0}, {"st3.preset": "pvtp"}])
def test_without_annealing_all_stay(rt, path, keys: dict) -> None:
    """Breaks if tokens leave although no curve, no floor or another preset says so."""
    keys = {"st3.preset": "st3", "st3.keep": 0.5, "st3.start": 2, "st3.stride": 2, **keys}
    with Model(rt, path, keys) as model, Context(model, n_ctx=512) as ctx:
        assert ctx.prefill(native(prompt())) == 0
        before = held(ctx)
        for i in range(70):
            assert ctx.decode([5], N_PROMPT + i) == 0
        assert held(ctx) == [p + list(range(N_PROMPT, N_PROMPT + 70)) for p in before]
        assert ctx.report()["held"] == resolve(keys).per_layer([81])


def test_alone_annealing_starts_from_the_full_model(rt, path) -> None:
    """Breaks if annealing alone drops anything in prefill, or leaves tokens above its target afterwards."""
    keys = {**KEYS, "st3.keep": 1.0, "st3.start": 1, "st3.stride": 1}
    got = []
    for k in (keys, {"st3.preset": "off"}):
        with Model(rt, path, k) as model, Context(model, n_ctx=256) as ctx:
            assert ctx.prefill(native(prompt())) == 0
            got.append(ctx.logits())
            if k is keys:  # stock memory knows of no images
                assert ctx.report()["per_layer"] == [81] * SHAPE.n_layer
                assert held(ctx) == [list(range(N_PROMPT))] * SHAPE.n_layer
                for i in range(16):
                    assert ctx.decode([5], N_PROMPT + i) == 0
                assert ctx.report()["held"] == [16] * SHAPE.n_layer
                assert len({tuple(p) for p in held(ctx)}) == SHAPE.n_layer, "every layer has a choice of its own"
    assert oracle.nmse(got[0], got[1]) < 1e-6


def test_one_stage_for_all_layers(rt, path) -> None:
    """Breaks if a schedule without cuts cannot anneal, or is taken for off."""
    keys = {"st3.preset": "st3", "st3.keep": 1.0, "st3.start": 8, "st3.anneal_tokens": 4, "st3.anneal_floor": 0.0}
    with Model(rt, path, keys) as model, Context(model, n_ctx=256) as ctx:
        assert model.check() is None
        assert ctx.prefill(native(prompt())) == 0
        for i in range(4):
            assert ctx.decode([5], N_PROMPT + i) == 0
        assert ctx.report()["held"] == [1] * SHAPE.n_layer
        assert len({tuple(p) for p in held(ctx)}) == 1


def test_interval(rt, path) -> None:
    """Breaks if cells are freed at other steps than every fourth, or the next four tokens do not fit in what left."""
    keys = {**KEYS, "st3.anneal_interval": 4}
    s = resolve(keys)
    with Model(rt, path, keys) as model, Context(model, n_ctx=256) as ctx:
        assert ctx.prefill(native(prompt())) == 0
        for t in range(1, 22):
            assert ctx.decode([5], N_PROMPT + t - 1) == 0
            assert ctx.report()["held"][0] == s.target(81, 81, (t - 1) // 4 * 4 + 4)


@pytest.mark.parametrize("how", ["preset", "anneal_score"])
def test_random_order_is_the_twisters(rt, path, how: str) -> None:
    """Breaks if the shuffle, its seed or the images' numbers are other than the header says."""
    keys = {**KEYS, "st3.seed": 12345, "st3.preset": "random"}
    if how == "anneal_score":
        keys |= {"st3.preset": "st3", "st3.keep": 1.0, "st3.anneal_score": "random"}
    with Model(rt, path, keys) as model, Context(model, n_ctx=512) as ctx:
        assert ctx.prefill(native([[1], picture(), [7], picture(1, 6, 5), [8, 9]])) == 0
        at, images = 1 + 81 + 1 + 30 + 2, [(1, 81), (83, 30)]
        assert held(ctx) == predicted(images, 0, keys, at, 0)
        for t in range(1, 20):
            assert ctx.decode([5], at) == 0
            at += 1
            assert held(ctx) == predicted(images, 0, keys, at, t)


# --- failures and parallel sequences ---


def test_aborted_steps_change_nothing_in_the_end(model, ctx) -> None:
    """Breaks if a decode that was aborted advances t, records, frees twice, or leaves its cell."""
    tokens = words(3, 12)
    with Context(model, n_ctx=512) as calm:
        assert calm.prefill(native(prompt())) == 0
        want = []
        for i, token in enumerate(tokens):
            assert calm.decode([token], N_PROMPT + i) == 0
            want.append((held(calm), calm.logits()))
    assert ctx.prefill(native(prompt())) == 0
    aborted = 0
    for i, token in enumerate(tokens):
        for after in (0, 3, 30):
            calls = iter(range(10**9))
            ctx.abort_when(lambda calls=calls, after=after: next(calls) >= after)
            if ctx.decode([token], N_PROMPT + i) == 0:
                break
            aborted += 1
            assert ctx.positions() == (0, N_PROMPT + i - 1)
        else:
            ctx.abort_when(None)
            assert ctx.decode([token], N_PROMPT + i) == 0
        ctx.abort_when(None)
        assert held(ctx) == want[i][0]
        assert oracle.nmse(ctx.logits(), want[i][1]) < 1e-6  # cells lie elsewhere
    assert aborted >= len(tokens) or cases.ON_DEVICE  # which may not ask


def test_refused_steps_change_nothing(model, ctx) -> None:
    """Breaks if a token at a wrong position, or one that finds no room, advances t."""
    assert ctx.prefill(native(prompt())) == 0
    before = held(ctx)
    assert ctx.decode([5], N_PROMPT + 3) != 0
    assert ctx.decode([10**6], N_PROMPT) != 0
    assert held(ctx) == before
    s = resolve(KEYS)
    assert ctx.decode([5], N_PROMPT) == 0
    assert ctx.report()["held"][0] == s.target(81, 81, 1)


def test_full_context_still_anneals(rt, path) -> None:
    """Breaks if a cache that is full refuses a token although cells can be freed for it."""
    keys = {**KEYS, "st3.keep": 1.0, "st3.anneal_tokens": 20, "st3.anneal_floor": 0.0}
    with Model(rt, path, keys) as model, Context(model, n_ctx=256) as ctx:
        pieces = [[1, 5], picture(), words(0, 173)]
        assert ctx.prefill(native(pieces)) == 0
        done = 0
        while ctx.decode([5], 256 + done) == 0:
            done += 1
            assert done < 100
        assert done == 80, "all but one of the visual tokens make room"
        assert [len(p) for p in held(ctx)] == [256] * SHAPE.n_layer


@pytest.mark.parametrize("kv", ["F16", "Q8_0"])
@pytest.mark.parametrize("unified", [False, True])
@pytest.mark.parametrize("together", [False, True])
def test_sequences_are_annealed_alone(rt, path, tally, unified: bool, together: bool, kv: str) -> None:
    """Breaks if a sequence's scores, t, cells or targets are mixed up with another's, in one batch or in turns."""
    with Model(rt, path, KEYS) as model, Context(model, n_ctx=1024, n_seq=2, unified=unified, kv=kv) as ctx:
        talks = [Conversation(ctx, path, resolve(KEYS), kv, tally, "two sequences", seq) for seq in (0, 1)]
        talks[0].prefill(prompt(0))
        for token in words(9, 3):
            talks[0].step(token)
        talks[1].prefill([[1, 5], picture(1, 6, 7), words(1, 70)])
        for a, b in zip(words(10, 12), words(11, 12), strict=True):
            if not together:
                talks[1].step(b)
                talks[0].step(a)
                continue
            assert ctx.decode_rows([(a, talks[0].at, [0]), (b, talks[1].at, [1])]) == 0
            for i, (talk, token) in enumerate(zip(talks, (a, b), strict=True)):
                talk.follow("step", token, check_logits=False)
                assert oracle.nmse(ctx.logits(i), talk.result.logits) <= MOST_ERROR[kv]
        assert [talk.result.images[0].t for talk in talks] == [15, 12]
        for talk in talks:
            talk.close()
        before = held(ctx, 1)
        assert ctx.seq_rm(0)
        assert held(ctx, 1) == before and held(ctx, 0) == [[]] * SHAPE.n_layer


def twin(talk: Conversation, ctx: Context, seq: int) -> Conversation:
    """The same conversation in another sequence or context, to go on with."""
    other = Conversation(ctx, talk.path, talk.schedule, talk.kv, talk.tally, talk.name, seq, list(talk.turns))
    other.result = copy.deepcopy(talk.result)
    return other


@pytest.mark.parametrize("kv", ["F16", "Q8_0"])
@pytest.mark.parametrize("unified", [False, True])
@pytest.mark.parametrize("how", ["copy", "save the sequence", "save all"])
def test_copies_and_saved_states_are_annealed_on(rt, path, tally, how: str, unified: bool, kv: str) -> None:
    """Breaks if scores, t or counts are lost on the way, or a copy's tokens leave the original with it."""
    shape = {"n_ctx": 1024, "n_seq": 2, "unified": unified, "kv": kv}
    with Model(rt, path, KEYS) as model, Context(model, **shape) as ctx, Context(model, **shape) as other:
        talk = Conversation(ctx, path, resolve(KEYS), kv, tally, "copies")
        talk.prefill(prompt())
        for token in words(12, 5):
            talk.step(token)
        if how == "copy":
            ctx.seq_cp(0, 1)
            second = twin(talk, ctx, 1)
        elif how == "save all":
            assert other.restore(ctx.save()) > 0
            second = twin(talk, other, 0)
        else:
            assert other.restore(ctx.save(0), 1) > 0
            second = twin(talk, other, 1)
        for a, b in zip(words(13, 11), words(14, 11), strict=True):
            talk.step(a)
            second.step(b)
        assert talk.result.images[0].t == second.result.images[0].t == 16
        assert held(ctx) != held(second.ctx, second.seq), "other tokens were generated"
        for t in (talk, second):
            t.close()


def test_tokens_that_a_copy_gives_back(rt, path) -> None:
    """Breaks, under the sanitizers, if what came back by a copy is looked for among what was compared without it."""
    keys = {**KEYS, "st3.keep": 1.0, "st3.anneal_tokens": 40}
    with Model(rt, path, keys) as model, Context(model, n_ctx=512, n_seq=2, unified=True) as ctx:
        assert ctx.prefill(native(prompt())) == 0
        ctx.seq_cp(0, 1)
        at = N_PROMPT
        for i in range(30):
            if i == 8:  # its tokens are compared anew, without those that left
                assert ctx.restore(ctx.save(1), 1) > 0
            if i == 16:
                before = [len(p) for p in held(ctx, 1)]
                ctx.seq_cp(0, 1)
                assert all(len(p) > n for p, n in zip(held(ctx, 1), before, strict=True))
            assert ctx.decode([5 + i], at + i, seq=1) == 0
            assert np.isfinite(ctx.logits()).all()
        assert held(ctx) == [list(range(N_PROMPT))] * SHAPE.n_layer


def test_positions_of_nowhere(rt, ctx) -> None:
    """Breaks if a layer or sequence that is not there is read."""
    assert ctx.prefill(native(prompt())) == 0
    for seq, layer in ((-1, 0), (1, 0), (0, -1), (0, SHAPE.n_layer)):
        assert rt.lib.st3_positions(ctx.ptr, seq, layer, None, 0) == -1
        assert rt.last_error()
    assert rt.lib.st3_positions(None, 0, 0, None, 0) == -1
    assert rt.lib.st3_positions(ctx.ptr, 0, 0, None, 5) == -1
    assert rt.lib.st3_positions(ctx.ptr, 0, 0, None, 0) == N_PROMPT
    assert rt.lib.st3_abi_version() == libraries.ABI_VERSION
    assert not rt.lib.st3_device_has_kernel(None, 1, 128)
    assert rt.last_error() == "st3: no device"
