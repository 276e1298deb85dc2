"""Pruned prefill and annealing on the counting device, or the CPU, as JSON: run by test_device.

python device_probe.py LIB_DIR MODEL.gguf KEYS KV_TYPE STEPS [DEVICE.so REFUSED LAYERS]

DEVICE.so is made by emulator/build.py; REFUSED are the ops that it is to have no kernel for, LAYERS how many are put
there. With KEYS {} the prompt is decoded as stock multimodal code decodes it.
"""

from __future__ import annotations

import ctypes as C
import json
import os
import sys
from pathlib import Path

import native_runtime
import numpy as np

from st3_edge.native import backends

COUNTED = ("waits", "graphs", "bytes_in", "bytes_out", "kernels", "captures", "replays")


class Counts(C.Structure):
    """struct device_counts."""

    _fields_ = [(name, C.c_int64) for name in COUNTED]


def main() -> None:
    """A prompt with two images, then generated tokens; after each decode what the device counted and layers hold."""
    lib, gguf, keys, kv, steps, *device = sys.argv[1:]
    rt = native_runtime.Runtime(Path(lib))
    take = Counts
    if device:
        counting = C.CDLL(device[0])
        counting.device_register(device[1].encode())
        take, take.restype = counting.device_take, Counts
        os.environ["ST3_GPU_LAYERS"] = device[2]
    rng = np.random.default_rng(12)  # with this one no choice is a near-tie
    out: dict = {"steps": [], "logits": [], "devices": {d["name"]: d["kernel_for"] for d in backends.devices(rt.lib)}}
    with native_runtime.Model(rt, Path(gguf), json.loads(keys)) as model:
        embd = [rng.standard_normal((n, model.n_embd)).astype(np.float32) for n in (100, 81)]
        images = [native_runtime.Image(embd[0], 10, 10), native_runtime.Image(embd[1], 9, 9)]
        prompt = [[1, 5, 9], images[0], [7], images[1], [int(t) for t in rng.integers(3, 300, 20)]]
        with native_runtime.Context(model, n_ctx=512, n_ubatch=512, kv=kv) as ctx:

            def note() -> dict:
                counts = take()
                row = {name: getattr(counts, name) for name in COUNTED}
                row["held"] = [len(ctx.held(il)) for il in range(model.n_layer)]
                return row

            note()
            assert ctx.prefill(prompt) == 0
            out["logits"].append(ctx.logits().tolist())
            out["prefill"] = note()
            report = ctx.report()
            out["mode"] = report["mode"]
            out["kept"] = [k.tolist() for k in ctx.kept(len(report["cuts"]))] if report["cuts"] else []
            for i in range(int(steps)):
                assert ctx.decode([5 + i % 7], 205 + i) == 0
                out["logits"].append(ctx.logits().tolist())
                out["steps"].append(note())
            state = ctx.save(0)
            note()
            for what, bring in (("size", lambda: ctx.state_size(0)), ("save", lambda: len(ctx.save(0)))):
                out[what] = {"bytes": bring(), **note()}
            assert ctx.restore(state, 0) == len(state) and ctx.save(0) == state
            out["positions"] = [ctx.held(il).tolist() for il in range(model.n_layer)]
        # nothing is read until the end, while the cache grows and is copied
        with native_runtime.Context(model, n_ctx=1024, n_ubatch=512, kv=kv, n_seq=2) as ctx:
            for i in range(0, 450, 30):
                assert ctx.decode([int(t) for t in rng.integers(3, 300, 30)], i) == 0
            ctx.seq_cp(0, 1)
            assert ctx.decode([3, 4, 5], 450, seq=1) == 0
            out["unread"] = ctx.logits().tolist()
    print(json.dumps(out))


if __name__ == "__main__":
    main()
