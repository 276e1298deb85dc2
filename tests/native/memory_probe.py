"""Work in a long context and tell what the process holds at each stage, as JSON: run by test_memory.

python memory_probe.py LIB_DIR MODEL.gguf KEYS N_CTX
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import native_runtime
import numpy as np


def resident() -> int:
    """Bytes of this process in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE")


def main() -> None:
    """A fresh context; an image of 576 tokens with 64 of text; 128 generated tokens; five more questions
    and answers; nothing again."""
    lib, gguf, keys, n_ctx = sys.argv[1:]
    rt = native_runtime.Runtime(Path(lib))
    rng, out = np.random.default_rng(8), {}
    with native_runtime.Model(rt, Path(gguf), json.loads(keys)) as model:
        embd = rng.standard_normal((576, model.n_embd)).astype(np.float32)
        with native_runtime.Context(model, n_ctx=64, n_ubatch=64) as warm:  # threads and first pages are not ours
            assert warm.decode([1, 2, 3], 0) == 0
        before = resident()
        with native_runtime.Context(model, n_ctx=int(n_ctx), n_ubatch=704) as ctx:

            def note(name: str) -> None:
                out[name] = {**ctx.report()["kv_bytes"], "resident": resident() - before}

            note("fresh")
            assert ctx.prefill([[1], native_runtime.Image(embd, 24, 24), [7] * 63]) == 0
            note("prefill")
            for i in range(128):
                assert ctx.decode([5], 640 + i) == 0
            note("answer")
            at = 768
            for _ in range(5):
                assert ctx.prefill([[7] * 500], p0=at) == 0
                assert [ctx.decode([5], at + 500 + i) for i in range(48)] == [0] * 48
                at += 548
            note("talk")
            ctx.clear()
            note("cleared")
    print(json.dumps(out))


if __name__ == "__main__":
    main()
