"""Decode a fixed prompt on the libraries of a folder and write the raw logits: run by test_off_is_stock.

python probe.py LIB_DIR MODEL.gguf OUT.bin KV_TYPE stock|st3
"""

from __future__ import annotations

import sys
from pathlib import Path

import native_runtime
import numpy as np
from mrope import RowContext


def main() -> None:
    """Text, image, text as stock multimodal code decodes them, decode steps, then two parallel sequences."""
    lib, gguf, out, kv, mode = sys.argv[1:]
    rt = native_runtime.Runtime(Path(lib), st3=mode == "st3")
    rng = np.random.default_rng(7)
    before, after = [1, 5, 9], [int(t) for t in rng.integers(3, 300, 66)]
    got = []
    with native_runtime.Model(rt, Path(gguf)) as model:
        image = rng.standard_normal((100, model.n_embd_inp)).astype(np.float32)
        kind = RowContext if model.mrope else native_runtime.Context
        with kind(model, n_ctx=512, n_ubatch=128, kv=kv) as ctx:
            ctx.grid = 10, 10
            if mode == "st3":
                code = ctx.prefill([before, native_runtime.Image(image, 10, 10), after])
            else:
                code = ctx.decode(before, 0, outputs="none")
                code = code or ctx.decode(image, 3, outputs="none")
                code = code or ctx.decode(after, 103)
            if code:
                raise SystemExit(f"prefill failed: {code}")
            for step in range(8):
                got.append(ctx.logits())
                if ctx.decode([int(np.argmax(got[-1]))], 169 + step):
                    raise SystemExit("decode failed")
        for unified in (False, True):
            with native_runtime.Context(model, n_ctx=512, n_ubatch=64, kv=kv, n_seq=2, unified=unified) as ctx:
                for seq in (0, 1):
                    if ctx.decode(after[seq:], 0, outputs="all", seq=seq):
                        raise SystemExit("decode failed")
                    got += [ctx.logits(i) for i in range(len(after) - seq)]
    np.concatenate(got).astype(np.float32).tofile(out)


if __name__ == "__main__":
    main()
