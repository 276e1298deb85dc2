"""python finite.py: reads JSON lines [text model, mmproj, picture's height, width, metadata], and answers each with the
numbers of visual tokens that are not finite, and whether the logits after a pruned prompt are."""

from __future__ import annotations

import json
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path += [str(ROOT), str(ROOT / "scripts")]

import numpy as np  # noqa: E402
from native_runtime import Context, Image, Model, Runtime, lib_dir  # noqa: E402
from native_vision import Vision  # noqa: E402


def main() -> None:
    """Serve jobs until the input ends."""
    folder = lib_dir()
    assert folder is not None
    rt = Runtime(folder)
    for line in sys.stdin:
        text, mmproj, height, width, keys = json.loads(line)
        with Model(rt, Path(text), keys) as model, Context(model, n_ctx=1024) as ctx:
            vision = Vision(model, Path(mmproj), threads=1)
            with vision.chunks("a<__media__>b", np.full((height, width, 3), 99, np.uint8)) as chunks:
                seen = np.concatenate([p.embd for p in vision.pieces(chunks) if isinstance(p, Image)])
                vision.evaluate(ctx, chunks)
                rows = np.flatnonzero(~np.isfinite(seen).all(1)).tolist()
                print(json.dumps([rows, bool(np.isfinite(ctx.logits()).all())]))
            vision.close()
    rt.close()


if __name__ == "__main__":
    main()
