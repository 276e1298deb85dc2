"""The cache behind a pruned prompt, by llama.cpp's own memory and state functions."""

from __future__ import annotations

import ctypes as C
import json
import os
import struct
import subprocess
import sys
from pathlib import Path

import cases
import numpy as np
import pytest
import saved
from annealing import Conversation
from cases import SANITIZED, SEED
from native_runtime import Context, Image, Model, lib_dir
from oracle import llama as oracle
from oracle.schedule import resolve

from st3_edge.commands.bench.shapes import Shape

SHAPE = cases.SHAPES["gqa-32"]
KEYS = {"st3.preset": "pvtp", "st3.keep": 0.5, "st3.start": 1, "st3.stride": 2}
N_PROMPT = 2 + 81 + 70


@pytest.fixture(scope="module")
def model(rt, random_gguf):
    with Model(rt, random_gguf(SHAPE), KEYS) as m:
        yield m


@pytest.fixture
def ctx(model):
    with Context(model, n_ctx=256) as c:
        yield c


def prompt(number: int = 0) -> list:
    rng = np.random.default_rng([SEED, 9, number])
    words = [int(t) for t in rng.integers(3, SHAPE.n_vocab, 70)]
    return [[1, 5], Image(rng.standard_normal((81, SHAPE.n_embd)).astype(np.float32), 9, 9), words]


def generate(ctx: Context, at: int, n: int) -> list[np.ndarray]:
    """Logits before and after each of n greedy steps from position `at` on."""
    out = [ctx.logits()]
    for i in range(n):
        assert ctx.decode([int(np.argmax(out[-1]))], at + i) == 0
        out.append(ctx.logits())
    return out


def test_rewind(ctx) -> None:
    """Breaks if generated positions cannot be taken back from every stage, or prompt cells go with them."""
    assert ctx.prefill(prompt()) == 0
    first = generate(ctx, N_PROMPT, 6)
    assert ctx.seq_rm(0, N_PROMPT + 2)
    assert ctx.positions() == (0, N_PROMPT + 1)
    assert ctx.decode([int(np.argmax(first[2]))], N_PROMPT + 2) == 0
    assert oracle.nmse(ctx.logits(), first[3]) < 1e-9


@pytest.mark.parametrize("second", ["text", "image"])
def test_prompt_that_goes_on(ctx, random_gguf, tally, second: str) -> None:
    # broken if a prompt part at a later position overwrites cells, does not see them, or is not pruned
    schedule = resolve(SHAPE.n_layer, **{key.removeprefix("st3."): value for key, value in KEYS.items()})
    talk = Conversation(ctx, random_gguf(SHAPE), schedule, "F16", tally, "goes on")
    words, image, question = prompt()
    talk.prefill([words, oracle.Image(image.embd, image.nx, image.ny), question])
    embd = np.random.default_rng([SEED, 10]).standard_normal((16, SHAPE.n_embd)).astype(np.float32)
    more = [[7, 8, 9]] if second == "text" else [oracle.Image(embd, 4, 4), [7]]
    talk.prefill(more)
    assert ctx.positions() == (0, N_PROMPT + (3 if second == "text" else 17) - 1)
    assert ctx.report()["mode"] == "pruned-prefill"
    talk.step(8)
    talk.close()


def test_text_first_then_image(model, ctx) -> None:
    # broken if cells that are already there are not seen, or scored wrongly, by a prompt that is pruned
    pieces = prompt()
    with Context(model, n_ctx=256) as one:
        assert one.prefill(pieces) == 0
        want, kept = one.logits(), one.kept(4)
    assert ctx.prefill(pieces[:1]) == 0
    assert ctx.prefill(pieces[1:], p0=2) == 0
    assert ctx.report()["mode"] == "pruned-prefill"
    assert all(np.array_equal(a, b) for a, b in zip(ctx.kept(4), kept, strict=True))
    assert oracle.nmse(ctx.logits(), want) < 1e-6


def test_many_prompts(ctx) -> None:
    """Breaks if cells of a cleared prompt are never used again."""
    want = None
    for round_ in range(12):
        ctx.clear()
        assert ctx.prefill(prompt(round_ % 3)) == 0
        last = generate(ctx, N_PROMPT, 3)[-1]
        if round_ % 3 == 0:
            want = last if want is None else want
            assert np.array_equal(last, want)


def test_state(model, ctx) -> None:
    """Breaks if a saved state is read back as another state."""
    assert ctx.prefill(prompt()) == 0
    for seq in (0, None):
        raw = ctx.save(seq)
        token = int(np.argmax(ctx.logits()))
        at = ctx.positions()[1] + 1
        assert ctx.decode([token], at) == 0
        with Context(model, n_ctx=256) as other:
            assert other.restore(raw, seq) == len(raw)
            assert other.positions() == (0, at - 1)
            assert other.decode([token], at) == 0
            assert oracle.nmse(other.logits(), ctx.logits()) < 1e-9


@pytest.mark.parametrize("seq", [0, None], ids=["sequence", "whole"])
def test_a_state_goes_through_a_file(model, ctx, tmp_path, seq: int | None) -> None:
    """Breaks if what is streamed to a file is not what goes to memory, or a full disk ends more than the saving."""
    assert ctx.prefill(prompt()) == 0
    want, file = ctx.save(seq), tmp_path / "state"
    assert ctx.save_file(file, seq)
    assert file.read_bytes().endswith(want[8:] if seq == 0 else want)  # a sequence in memory has a head of its own
    if Path("/dev/full").exists():
        assert not ctx.save_file(Path("/dev/full"), seq)
        assert ctx.save(seq) == want
    with Context(model, n_ctx=256) as other:
        assert other.load_file(file, seq)
        assert other.save(seq) == want


def test_states_of_other_kinds_are_refused(rt, model, random_gguf, ctx) -> None:
    """Breaks if a state is put where it does not belong: another model, cache type, schedule, or part of a context."""
    assert ctx.prefill(prompt()) == 0
    one, whole = ctx.save(0), ctx.save()
    before = ctx.positions()
    assert ctx.restore(whole, 0) == 0 and ctx.restore(one) == 0
    assert ctx.positions() == before
    with Context(model, n_ctx=256, kv="Q8_0") as other:
        assert other.restore(one, 0) == 0 and other.positions() == (-1, -1)
    small = [[1, 5], Image(prompt()[1].embd[:30], 6, 5), prompt()[2]]
    for shape, keys in (
        (SHAPE, {**KEYS, "st3.stride": 3}),
        (SHAPE, {"st3.preset": "off"}),
        (cases.SHAPES["mha-64"], KEYS),
    ):
        with Model(rt, random_gguf(shape), keys) as m, Context(m, n_ctx=256) as other:
            assert other.prefill(small) == 0
            want = other.logits(), other.positions()
            assert other.restore(one, 0) == 0 and other.restore(whole) == 0
            assert other.positions() == want[1]
            if keys is KEYS:
                assert ctx.restore(other.save(0), 0) == 0
    assert ctx.positions() == before


def next_logits(ctx: Context) -> np.ndarray:
    """The logits after one more token, which is taken back."""
    at = ctx.positions()[1] + 1
    assert ctx.decode([5], at) == 0
    out = ctx.logits()
    assert ctx.seq_rm(0, at, -1)
    return out


@pytest.mark.no_device
@pytest.mark.parametrize("seq", [0, None], ids=["sequence", "whole"])
def test_bad_states(rt, random_gguf, seq: int | None) -> None:
    """Breaks if a truncated or damaged state is taken, crashes, or touches the running conversation before it fails."""
    shape = Shape(3, 32, 1, 1, 32, n_vocab=272)
    image = Image(np.random.default_rng([SEED, 10]).standard_normal((9, 32)).astype(np.float32), 3, 3)
    keys = {"st3.preset": "st3", "st3.keep": 0.5, "st3.start": 1, "st3.stride": 1, "st3.anneal_tokens": 4}
    rng = np.random.default_rng([SEED, 11])
    with Model(rt, random_gguf(shape), keys) as model, Context(model, n_ctx=64) as ctx, Context(model, n_ctx=64) as c:
        assert c.prefill([[1, 5], image, [6, 7, 8]]) == 0
        raw = c.save(seq)
        assert ctx.prefill([[1, 9, 5], image, [6, 9, 7, 8]]) == 0
        for i in range(5):  # settled: from here on, a token that is taken back changes nothing
            assert ctx.decode([7], 16 + i) == 0
        held, want = [ctx.held(layer).tolist() for layer in range(3)], next_logits(ctx)

        def check() -> None:
            assert [ctx.held(layer).tolist() for layer in range(3)] == held
            assert np.array_equal(next_logits(ctx), want)

        def bad_states():
            for n in [*range(256), *rng.integers(256, len(raw), 1000)]:
                yield raw[: int(n)]
            for at in rng.integers(0, len(raw), 10000 // 2):
                # which sequence was saved is read by llama.cpp itself, and ignored
                at = int(at) + 4 if seq == 0 and 4 <= at < 8 else int(at)
                yield raw[:at] + bytes([raw[at] ^ 1 << int(rng.integers(8))]) + raw[at + 1 :]

        for n, bad in enumerate(bad_states()):
            assert ctx.restore(bad, seq) == 0, f"bad state {n}"
            if n % 100 == 0:
                check()
        check()
        assert ctx.restore(raw, seq) == len(raw)
        assert np.array_equal(next_logits(ctx), next_logits(c))


@pytest.mark.no_device
def test_false_counts_with_a_true_checksum(rt, random_gguf) -> None:
    """Breaks if only the checksum guards a state: counts, positions and owners in it must be checked as well."""
    shape = Shape(3, 32, 1, 1, 32, n_vocab=272)
    image = Image(np.random.default_rng([SEED, 10]).standard_normal((9, 32)).astype(np.float32), 3, 3)
    keys = {"st3.preset": "st3", "st3.keep": 0.5, "st3.start": 1, "st3.stride": 1}
    rng = np.random.default_rng([SEED, 12])
    with Model(rt, random_gguf(shape), keys) as model, Context(model, n_ctx=64) as ctx:
        assert ctx.prefill([[1, 5], image, [6, 7, 8]]) == 0
        (head, body), want, taken = saved.take_apart(ctx.save(0)), ctx.logits(), 0
        for _ in range(3000):
            bad = bytearray(body)
            word = 4 * int(rng.integers(0, 160))  # all before the first keys
            bad[word : word + 4] = int(rng.choice([0, 1, 2**31 - 1, 2**31, 2**32 - 1, 7, 300])).to_bytes(4, "little")
            taken += ctx.restore(saved.put_together(head, bytes(bad)), 0) > 0
            ctx.decode([5], ctx.positions()[1] + 1)
        assert 0 < taken < 2500  # a value of a key is nobody's to judge
        ctx.clear()
        assert ctx.prefill([[1, 5], image, [6, 7, 8]]) == 0
        assert np.array_equal(ctx.logits(), want)


def with_other_image(raw: bytes, n_layer: int, n_cuts: int, flags: int | None, n0: list[int] | None) -> bytes:
    """A state of one image with other flags and counts, and a checksum that is right (st3-snapshot.cpp)."""
    head, body = saved.take_apart(raw)
    at = 4 * (4 + n_cuts + 2 * n_layer) + 8 + 4
    n_images, _, n = struct.unpack_from("<IiI", body, at)
    assert n_images == 1
    at += 24
    had = struct.unpack_from("<I", body, at)[0]
    counts = at + 20 + 12 * n
    (n_counts,) = struct.unpack_from("<I", body, counts)
    if n0 is None:
        n0 = list(struct.unpack_from(f"<{n_counts}I", body, counts + 4))
    new = struct.pack("<I", had if flags is None else flags) + body[at + 4 : counts]
    new += struct.pack(f"<I{len(n0)}I", len(n0), *n0) + body[counts + 4 + 4 * n_counts :]
    return saved.put_together(head, body[:at] + new)


def test_images_that_lie_with_a_true_checksum(rt, random_gguf) -> None:
    """Breaks if an image that waits for its cuts may have scores, which do not grow with it, or if one that is said to
    have held less than it does has more scores recorded than there is room for (ASan sees either)."""
    keys = {"st3.preset": "st3", "st3.keep": 0.5, "st3.start": 1, "st3.stride": 1}
    rng = np.random.default_rng([SEED, 13])
    image = Image(rng.standard_normal((400, 32)).astype(np.float32), 20, 20)
    with Model(rt, random_gguf(Shape(3, 32, 1, 1, 32, n_vocab=272)), keys) as model, Context(model, n_ctx=4096) as ctx:
        assert ctx.prefill([[1, 5], image, [7, 8, 9]]) == 0
        assert [ctx.decode([5], 405 + i) for i in range(3)] == [0] * 3
        raw = ctx.save(0)
        assert with_other_image(raw, 3, 2, None, None) == raw

        assert ctx.restore(with_other_image(raw, 3, 2, 0, []), 0) == 0  # waits, and has scores
        assert ctx.restore(with_other_image(raw, 3, 2, None, [1, 1, 1]), 0) > 0
        assert ctx.decode([7, 8, 9], 408) == 0
        assert len(ctx.save(0)) > len(raw)


@pytest.mark.skipif(SANITIZED, reason="upstream asserts that nothing is copied twice, where assert() is on")
def test_copying_twice_is_copying_once(model) -> None:
    """Breaks if a sequence that is copied again counts its images again."""
    with Context(model, n_ctx=256, n_seq=2, unified=True) as ctx:
        assert ctx.prefill(prompt()) == 0
        ctx.seq_cp(0, 1)
        once = ctx.save(1)
        ctx.seq_cp(0, 1)
        assert ctx.save(1) == once


def test_full_context(model) -> None:
    """Breaks if decoding past the context crashes instead of saying that there is no room."""
    with Context(model, n_ctx=256) as ctx:
        assert ctx.prefill(prompt()) == 0
        assert [ctx.decode([5], i) for i in range(N_PROMPT, 256)] == [0] * (256 - N_PROMPT)
        assert [ctx.decode([5], 256) for _ in range(3)] == [1, 1, 1]
        assert ctx.positions() == (0, 255)


@pytest.mark.parametrize("unified", [False, True])
def test_two_sequences(model, unified: bool) -> None:
    """Breaks if a prompt of one sequence scores, drops or sees cells of another."""
    alone = []
    for number in (0, 1):
        with Context(model, n_ctx=256) as ctx:
            assert ctx.prefill(prompt(number)) == 0
            alone.append([ctx.kept(4), *generate(ctx, N_PROMPT, 2)])
    with Context(model, n_ctx=512, n_seq=2, unified=unified) as ctx:
        for seq in (0, 1):
            assert ctx.prefill(prompt(seq), seq=seq) == 0
            assert ctx.report()["mode"] == "pruned-prefill"
            assert all(np.array_equal(a, b) for a, b in zip(ctx.kept(4), alone[seq][0], strict=True))
            assert oracle.nmse(ctx.logits(), alone[seq][1]) < 1e-6
        for step in (0, 1):
            for seq in (1, 0):
                assert ctx.decode([int(np.argmax(alone[seq][1 + step]))], N_PROMPT + step, seq=seq) == 0
                assert oracle.nmse(ctx.logits(), alone[seq][2 + step]) < 1e-5


# --- memory is paid as used ---


def measure(path: Path, keys: dict, n_ctx: int) -> dict:
    """What a process of its own (memory_probe.py) holds while it works in a context of that length."""
    env = {k: v for k, v in os.environ.items() if k not in ("LLAMA_CPP_LIB_PATH", "MTMD_CPP_LIB")}
    here = Path(__file__).resolve().parent
    env["PYTHONPATH"] = str(here.parents[1] / "scripts")
    args = [sys.executable, str(here / "memory_probe.py"), str(lib_dir()), str(path), json.dumps(keys), str(n_ctx)]
    done = subprocess.run(args, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout)


@pytest.mark.no_device
@pytest.mark.skipif(SANITIZED, reason="ASan has its own use of memory")
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="resident memory is read from /proc")
def test_a_long_context_costs_what_it_holds(rt, random_gguf) -> None:
    """Breaks if cells are allocated before they are needed, or the report tells less than the process has, as where
    what growing caches leave behind stays in the heap."""
    shape = Shape(8, 512, 8, 8, 256, n_vocab=272)
    keys = {
        "st3.preset": "st3",
        "st3.budget": 0.3,
        "st3.start": 1,
        "st3.stride": 1,
        "st3.anneal_tokens": 100,
        "st3.anneal_floor": 0.3,
        "st3.min_share": 0.0,
    }
    got = measure(random_gguf(shape), keys, 32768)
    cell = 2 * 2 * shape.n_embd  # K and V of a layer, two bytes
    mib = 2**20
    assert got["fresh"]["allocated"] <= 32 * cell * shape.n_layer
    assert got["fresh"]["resident"] < 16 * mib, "512 MiB are the whole context"
    for state in ("prefill", "answer", "talk"):
        now = got[state]
        assert now["live"] <= now["allocated"] <= 1.25 * now["live"] + 64 * cell * shape.n_layer
        assert now["resident"] <= now["allocated"] + 64 * mib  # the rest is what computing takes
    assert got["prefill"]["live"] < 0.4 * got["prefill"]["full"]
    grown = got["answer"]["live"] - got["prefill"]["live"]
    assert grown < 0.2 * 128 * cell * shape.n_layer, "annealing frees nearly what the answer takes"
    assert got["cleared"]["live"] == 0


def test_no_leak(rt, model) -> None:
    """Breaks if a context, a growth, a state or a failed call keeps memory."""
    in_use = heap()
    if in_use is None:
        pytest.skip("neither glibc's mallinfo2 nor a sanitizer tells what is allocated")

    def work() -> None:
        with Context(model, n_ctx=2048, n_seq=2) as ctx:
            assert ctx.prefill(prompt()) == 0
            assert ctx.prefill(prompt(), p0=5000) == -100
            generate(ctx, N_PROMPT, 3)
            raw = ctx.save(0)
            assert ctx.restore(raw, 1) and not ctx.restore(raw[:-1], 0)
            assert ctx.decode([7] * 400, N_PROMPT + 3) == 0
            ctx.seq_rm(0, 20, 500)
            assert ctx.picture(prompt()[1], ctx.positions()[1] + 1) == 0
            ctx.seq_cp(0, 1)
            assert ctx.decode([7], ctx.positions(1)[1] + 1, seq=1) == 0

    for _ in range(3):
        work()
    before = in_use()
    for _ in range(8):
        work()
    assert in_use() - before < 100_000  # one cache alone is 600 kB


def heap():
    """A function that tells how many bytes are allocated in this process."""
    libc = C.CDLL(None)
    if hasattr(libc, "__sanitizer_get_current_allocated_bytes"):
        libc.__sanitizer_get_current_allocated_bytes.restype = C.c_size_t
        return libc.__sanitizer_get_current_allocated_bytes
    if not hasattr(libc, "mallinfo2"):
        return None

    class Info(C.Structure):
        _fields_ = [(n, C.c_size_t) for n in ("a", "o", "sb", "hb", "mapped", "us", "fs", "used", "f", "k")]

    libc.mallinfo2.restype = Info
    return lambda: (lambda i: i.used + i.mapped)(libc.mallinfo2())


@pytest.mark.parametrize("unified", [False, True])
def test_a_request_that_cannot_fit_changes_nothing(rt, model, unified: bool) -> None:
    """Breaks if work begins before room is checked, the numbers are not told, or the conversation is touched."""
    with Context(model, n_ctx=512, n_seq=2, unified=unified) as ctx, Context(model, n_ctx=512, n_seq=2) as calm:
        for c in (ctx, calm):
            assert c.prefill(prompt()) == 0
        room = 512 if unified else 256
        for pieces in (
            [[7] * (room - N_PROMPT + 1)],
            [*prompt(1), [7] * (room - 2 * N_PROMPT + 1)] if unified else prompt(1),
        ):
            n = sum(len(p.embd) if isinstance(p, Image) else len(p) for p in pieces)
            assert ctx.prefill(pieces, p0=N_PROMPT) == -100
            message = rt.last_error()
            assert all(str(x) in message for x in (n, N_PROMPT, room)) and "\n" not in message.strip(), message
            assert ctx.prefill([[1]], p0=N_PROMPT + 1) == -100, "a gap"
            assert ctx.prefill([[1]], p0=0) == -100, "positions that are there"
        for c in (ctx, calm):
            assert c.decode([5], N_PROMPT) == 0
        assert oracle.nmse(ctx.logits(), calm.logits()) < (1e-9 if unified else 1e-30)


@pytest.mark.parametrize("kv", ["F16", "Q8_0"])
def test_graphs_do_not_outlive_their_cells(rt, random_gguf, monkeypatch, kv: str) -> None:
    """Breaks if a graph that was made before a cache grew, shrank or was annealed is used again afterwards."""
    keys = {**KEYS, "st3.preset": "st3", "st3.anneal_tokens": 60, "st3.anneal_interval": 2}
    got = []
    for disable in ("", "1"):
        monkeypatch.setenv("LLAMA_GRAPH_REUSE_DISABLE", disable) if disable else None
        with Model(rt, random_gguf(SHAPE), keys) as m, Context(m, n_ctx=1024, kv=kv) as ctx:
            assert ctx.prefill(prompt()) == 0
            rows, at = [ctx.logits()], N_PROMPT
            for i in range(150):
                assert ctx.decode([3 + i % 300], at) == 0
                rows.append(ctx.logits())
                at += 1
                if i == 100:  # far fewer cells
                    ctx.seq_rm(0, N_PROMPT, N_PROMPT + 90)
                    ctx.seq_rm(0, 10, 60)
            got.append(np.array(rows))
    assert np.array_equal(*got)
