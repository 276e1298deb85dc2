"""The embedded model's two files with changed headers: each pair is refused in one line, or answers."""

from __future__ import annotations

import random
import struct
import tempfile
import time
from collections import Counter
from pathlib import Path

from st3_edge import Llava, St3Error, demo
from st3_edge.files.gguf import Header, aligned, read_header
from st3_edge.files.gguf_copy import _text
from st3_edge.native import libraries

from . import isolated

_NUMBERS = (
    0,
    1,
    2,
    3,
    5,
    7,
    13,
    14,
    16,
    27,
    28,
    64,
    191,
    336,
    337,
    1000,
    4096,
    65535,
    2**24,
    2**31 - 1,
    2**31,
    2**32 - 1,
)
_GRIDS = (
    [336, 672, 672, 336], [336, 672, 672], [300, 300], [336, 0], [-336, 336], [2**30, 2**30], [336 * 40, 336], [], [1],
)  # fmt: skip
_LAYERS = ([], [0], [5], [6], [-1], [-2], [2, 4], [5] * 40, [2**30], [3, 3, 1])
_ADDED = (
    "clip.vision.feature_layer", "clip.vision.image_grid_pinpoints", "clip.vision.mm_patch_merge_type",
    "clip.vision.attention.head_count_kv", "clip.vision.attention.key_length", "clip.minicpmv_version",
    "clip.has_audio_encoder", "clip.use_silu", "clip.vision.projector_type", "general.alignment", "st3.preset",
    "st3.budget", "st3.keep", "st3.start", "st3.stride", "st3.anneal", "st3.min_keep", "llama.expert_count",
    "llama.attention.key_length", "llama.rope.scaling.type", "llama.attention.sliding_window", "split.count",
    "tokenizer.chat_template", "tokenizer.ggml.pre", "tokenizer.ggml.add_space_prefix", "llama.vocab_size",
)  # fmt: skip


def _array(values: list[int], kind: int = 5) -> bytes:
    return struct.pack("<IIQ", 9, kind, len(values)) + b"".join(
        struct.pack("<i", max(-(2**31), min(v, 2**31 - 1))) for v in values
    )


def _any_value(rng: random.Random, key: str) -> bytes:
    if key.endswith("pinpoints"):
        return _array(rng.choice(_GRIDS))
    if key.endswith("feature_layer"):
        return _array(rng.choice(_LAYERS))
    kind = rng.randrange(9)
    if kind < 4:
        return struct.pack("<II", rng.choice((4, 4, 4, 5)), rng.choice(_NUMBERS))
    if kind == 4:
        return struct.pack("<If", 6, rng.choice((0.0, -1.0, 1e-5, 1.0, 1e30, float("nan"), float("inf"), 10000.0)))
    if kind == 5:
        return struct.pack("<I?", 7, rng.random() < 0.5)
    if kind == 6:
        return struct.pack("<I", 8) + _text(
            rng.choice(("", "mlp", "mlp_norm", "ldp", "llama", "clip", "st3", "off", "x" * 300, "\0", "{{ x"))
        )
    if kind == 7:
        return struct.pack("<IQ", 10, rng.choice(_NUMBERS))
    return _array(rng.choice((*_GRIDS, *_LAYERS)), rng.choice((5, 4, 6)))


def _changed(rng: random.Random, path: Path, header: Header, target: Path) -> list[str]:
    """Writes a file with some of its header changed; returns what was."""
    data = path.read_bytes()
    values = {key: data[begin:end] for key, (begin, end) in header.values.items()}
    intact = data[slice(*header.infos)]
    infos = bytearray(intact)
    n_tensors = len(header.tensors)
    said = []
    keys = [k for k in values if k.startswith(("clip.", "llama.", "general.", "tokenizer.ggml.", "st3."))]
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        what = rng.randrange(8)
        if what < 4:
            key = rng.choice(keys)
            if len(values.get(key, b"")) < 200 or rng.random() < 0.05:
                values[key] = _text(key) + (new := _any_value(rng, key))
                said.append(f"{key} = {new[:40].hex()}")
        elif what == 4:
            key = rng.choice(keys)
            values.pop(key, None)
            said.append(f"no {key}")
        elif what == 5:
            key = rng.choice(_ADDED)
            values[key] = _text(key) + (new := _any_value(rng, key))
            said.append(f"{key} = {new[:40].hex()}")
        elif what == 6:
            at = rng.randrange(len(infos))
            infos[at] = rng.choice((0, 1, 255, infos[at] ^ 1, rng.randrange(256)))
            said.append(f"infos[{at}] = {infos[at]}")
        else:
            name = rng.choice(list(header.tensors)).encode()
            at = intact.index(struct.pack("<Q", len(name)) + name) + 8 + len(name)
            (n_dims,) = struct.unpack_from("<I", intact, at)
            which = rng.randrange(n_dims + 2)
            if which < n_dims:
                struct.pack_into("<Q", infos, at + 4 + 8 * which, rng.choice((0, 1, 32, 191, 192, 193, 2**31, 2**63)))
            elif which == n_dims:
                struct.pack_into("<I", infos, at + 4 + 8 * n_dims, rng.choice((0, 1, 2, 8, 12, 24, 26, 30, 39, 4, 99)))
            else:
                infos[at - 1] ^= 1  # another name
            said.append(f"{name.decode()}: {which} of {n_dims}")
    head = struct.pack("<4sIQQ", b"GGUF", 3, n_tensors, len(values)) + b"".join(values.values()) + bytes(infos)
    out = head + bytes(aligned(len(head), 32) - len(head)) + data[header.data :]
    if rng.random() < 0.05:
        out = out[: rng.randrange(len(out))]
        said.append(f"cut to {len(out)}")
    target.write_bytes(out)
    return said


def _answer(pair: tuple[str, str, list[str]]) -> str:
    model, mmproj, _ = pair
    try:
        with Llava(model, mmproj, n_threads=1, n_ctx=2048) as llava:
            for scene in demo.scenes()[:2]:
                llava.ask(scene.picture, "What color is the star?", max_tokens=2)
    except St3Error as e:
        assert "\n" not in str(e)
        assert len(str(e)) < 600, str(e)
        return "refused"
    return "answered"


def run(rng: random.Random, seconds: float, most: int | None = None) -> Counter[str]:
    """Tries pairs of files for so long, or `most` of them; returns how many of what."""
    libraries.load()
    tried: Counter[str] = Counter()
    end = time.perf_counter() + seconds
    files = [(path, read_header(path)) for path in demo.model_paths()]
    with tempfile.TemporaryDirectory() as folder:
        while isolated.until(end) and (most is None or tried["inputs"] < most):
            batch = []
            for i in range(8):
                pair = [str(path) for path, _ in files]
                which = rng.choice((0, 1, 1))
                target = Path(folder) / f"{i}.gguf"
                said = _changed(rng, *files[which], target)
                pair[which] = str(target)
                batch.append((*pair, said))
            tried["inputs"] += len(batch)
            tried.update(isolated.each(_answer, batch, 120))
    return tried
