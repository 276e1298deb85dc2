"""Each allocation of a call that fails, one after the other, as JSON: run by test_no_memory.

python no_memory.py LIB_DIR MODEL.gguf LIBRARY, with LIBRARY, made of no_memory.cpp, in LD_PRELOAD as well.
"""

from __future__ import annotations

import ctypes as C
import functools
import json
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
from native_runtime import Context, Model, Runtime

KEYS = {"st3.preset": "st3", "st3.keep": 0.5, "st3.start": 1, "st3.stride": 2}
WAYS = {
    "an image": [[1, 5], "image", list(range(20, 40))],
    "tiles, and text between": ["tile", "tile", [7, 8], [9], "image", [11]],
    "more than a batch": [list(range(20, 90)), "image", list(range(30, 90))],
}


def main() -> None:
    """Prints, for each of WAYS, how many allocations failed in each call, and whether all came to the same bits."""
    lib, gguf, library = sys.argv[1:]
    rt = Runtime(Path(lib))
    failing = C.CDLL(library)
    fail_after, decode = failing.fail_after, failing.decode_caught
    fail_after.argtypes, fail_after.restype = [C.c_long], C.c_long
    decode.argtypes = [C.c_void_p, C.c_void_p, rt.llama.llama_batch]
    of_llama = C.cast(rt.llama._lib.llama_decode, C.c_void_p)
    rt.llama.llama_decode = lambda ctx, batch: decode(of_llama, ctx, batch)
    rng = np.random.default_rng(3)
    out = {}
    with Model(rt, Path(gguf), KEYS) as model:
        rows = [rng.standard_normal((64, model.n_embd)).astype(np.float32) for _ in range(8)]
        ways = {name: functools.partial(told, model, pieces, rows) for name, pieces in WAYS.items()}
        ways["one asks, one waits, one has no picture"] = functools.partial(beside, model, rows)
        for name, way in ways.items():
            calm, _ = way(lambda call, _: (call(), 0))
            got, failed = way(lambda call, state: with_failures(call, state, fail_after))
            out[name] = {"failed": failed, "same": bool(np.array_equal(got, calm))}
    print(json.dumps(out))


def beside(model: Model, rows: list[np.ndarray], how: Callable) -> tuple[np.ndarray, list[int]]:
    """The logits of three sequences behind one batch of them all, and how often that failed before."""
    with Context(model, n_ctx=512 * 3, n_ubatch=144, n_seq=3) as ctx:
        for seq in (0, 1):
            ctx.announce(64, 8, 8)
            assert ctx.decode(rows[seq], 0, "none", seq) == 0
        assert ctx.decode([1, 5], 0, "last", 2) == 0
        batch = [(7 + i, 64 + i, [0]) for i in range(9)] + [(30 + i, 64 + i, [1]) for i in range(5)] + [(9, 2, [2])]

        def state() -> list:
            return [(ctx.positions(seq)[1], ctx.report(seq)["waiting"]) for seq in (0, 1, 2)]

        code, failed = how(lambda: ctx.decode_rows(batch, [8, 14]), state)
        assert code == 0 and [at for at, _ in state()] == [72, 68, 2], (code, state())
        found = [ctx.logits(8), ctx.logits(14)]
        assert ctx.decode([11], 69, "last", 1) == 0
        return np.stack([*found, ctx.logits()]), [failed]


def told(model: Model, pieces: list, rows: list[np.ndarray], how: Callable) -> tuple[np.ndarray, list[int]]:
    """The logits behind pieces that are given one by one, and how often each failed before."""
    with Context(model, n_ctx=512, n_ubatch=144) as ctx:
        at, failed = 0, []
        for i, piece in enumerate(pieces):
            if isinstance(piece, str):
                ctx.announce(64, 8, 8, "p" if piece == "tile" else "")
                piece = rows[i]
            outputs = "last" if i == len(pieces) - 1 else "none"

            def call(piece=piece, at=at, outputs=outputs) -> int:
                return ctx.decode(piece, at, outputs)

            code, times = how(call, lambda: (ctx.positions()[1], ctx.report(0)["waiting"]))
            assert code == 0, (i, code)
            failed.append(times)
            at += len(piece)
            assert ctx.positions()[1] == at - 1
        return ctx.logits(), failed


def with_failures(call: Callable[[], int], state: Callable, fail_after: Callable[[int], int]) -> tuple[int, int]:
    """Lets the first allocation of a call fail, then of the same call again the second, and so on until none does."""
    before = state()
    for n in range(10**6):
        fail_after(n)
        code = call()
        if fail_after(-1) >= 0:
            return code, n
        assert code == -2 or code == 0, code
        if code == 0:  # what failed was caught on the way
            return code, n
        assert state() == before, (n, state(), before)
    raise AssertionError("it never came to its end")


if __name__ == "__main__":
    main()
