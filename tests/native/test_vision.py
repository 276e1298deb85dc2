"""The vision encoder by kernels of ours, against the same in double precision and against stock's."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import native_runtime
import native_vision
import numpy as np
import pytest
from cases import ON_DEVICE, SEED
from oracle import vision

from st3_edge.commands.bench import random_model
from st3_edge.commands.bench.shapes import Shape, Tower

pytestmark = pytest.mark.skipif(ON_DEVICE, reason="the encoder's CPU kernels are what is tested")

TEXT = Shape(4, 96, 3, 3, 64, n_vocab=300)
TOWERS = {
    "heads of 32": (Tower(4, 128, 4, 256, 112, 14), False),
    "an odd number of rows, heads of 20": (Tower(3, 160, 8, 416, 126, 14), True),
    "wide": (Tower(2, 1088, 17, 1120, 98, 14), False),
    "many patches": (Tower(2, 64, 1, 96, 14 * 34, 14), True),
}
KEYS = {"st3.preset": "st3", "st3.budget": 0.5}
KERNELS = {
    "avx512-bf16": {"avx512_bf16", "avx512bw", "avx512dq", "avx512vl"},
    "avx512": {"avx512bw", "avx512dq", "avx512vl"},
    "avx2": {"avx2", "fma", "f16c"},
}


def has(kernels: str) -> bool:
    """Whether this CPU has their instructions, as Linux says."""
    info = Path("/proc/cpuinfo")
    return info.is_file() and KERNELS[kernels] <= set(info.read_text().split())


@pytest.fixture(params=KERNELS)
def kernels(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The kernels that are used, each of those that this CPU can run."""
    if not has(request.param):
        pytest.skip(f"this CPU has no {request.param}")
    monkeypatch.setenv("ST3_VISION_KERNELS", request.param)
    return request.param


def cosines(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Of each row."""
    a, b = a.astype(np.float64), b.astype(np.float64)
    return (a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)


def picture(tower: Tower, seed: int = SEED) -> np.ndarray:
    """Coarse random patches, with noise."""
    rng = np.random.default_rng(seed)
    size = tower.image_size
    coarse = rng.integers(0, 256, (7, 7, 3)).repeat(-(-size // 7), 0).repeat(-(-size // 7), 1)[:size, :size]
    return np.clip(coarse + rng.normal(0, 20, coarse.shape), 0, 255).astype(np.uint8)


@pytest.fixture(scope="module")
def mmproj(tmp_path_factory: pytest.TempPathFactory):
    """Writes an encoder once: mmproj(tower's name, file type) -> path."""
    folder, made = tmp_path_factory.mktemp("mmproj"), {}

    def make(name: str, file_type: str) -> Path:
        if (name, file_type) not in made:
            path = made[name, file_type] = folder / f"{len(made)}.gguf"
            tower, gelu = TOWERS[name]
            random_model.write_vision(path, tower, TEXT.n_embd, SEED, file_type=file_type, gelu=gelu)
        return made[name, file_type]

    return make


def encode(rt, text: Path, mmproj: Path, keys: dict, *pictures: np.ndarray, threads: int = 1) -> list[np.ndarray]:
    with native_runtime.Model(rt, text, keys) as model:
        encoder = native_vision.Vision(model, mmproj, threads)
        try:
            return [encoder.encode(picture).embd for picture in pictures]
        finally:
            encoder.close()


@pytest.mark.parametrize("file_type", ["F32", "F16", "Q8_0"])
@pytest.mark.parametrize("name", TOWERS)
def test_oracle(rt, random_gguf, mmproj, kernels: str, name: str, file_type: str) -> None:
    """Breaks if a visual token points elsewhere than in double precision: a wrong head, row, bias, pad."""
    file, tower = mmproj(name, file_type), TOWERS[name][0]
    expected = vision.encode(file, picture(tower))
    (found,) = encode(rt, random_gguf(TEXT), file, KEYS, picture(tower))
    assert found.shape == expected.shape
    worst = cosines(found, expected).min()
    error = ((found - expected) ** 2).sum() / (expected**2).sum()
    print(f"{kernels} {name} {file_type}: worst cosine {worst:.7f}, NMSE {error:.1e} (seed {SEED})")
    bf16 = kernels == "avx512-bf16"
    assert worst > (0.9999 if bf16 else 0.9999995)
    assert error < (1e-4 if bf16 else 3e-7)


@pytest.mark.skipif(not any(map(has, KERNELS)), reason="no kernels for this CPU")
def test_the_key_decides(rt, random_gguf, mmproj) -> None:
    """Breaks if auto computes as stock, or "file", "off" or no key otherwise."""
    name = "heads of 32"
    file, shown = mmproj(name, "F16"), picture(TOWERS[name][0])
    text = random_gguf(TEXT)
    off, of_file, no_preset, auto = (
        encode(rt, text, file, keys, shown)[0]
        for keys in ({}, KEYS | {"st3.vision_type": "file"}, KEYS | {"st3.preset": "off"}, KEYS)
    )
    assert np.array_equal(off, of_file)
    assert np.array_equal(off, no_preset)
    assert not np.array_equal(off, auto)
    assert cosines(off, auto).min() > 0.9999


def test_a_cpu_without_kernels_is_as_stock(rt, random_gguf, mmproj, monkeypatch) -> None:
    """Breaks if anything of ours stays in the graph where no kernels are."""
    monkeypatch.setenv("ST3_VISION_KERNELS", "none")
    name = "wide"
    file, shown = mmproj(name, "Q8_0"), picture(TOWERS[name][0])
    off, auto = (encode(rt, random_gguf(TEXT), file, keys, shown)[0] for keys in ({}, KEYS))
    assert np.array_equal(off, auto)


@pytest.mark.parametrize("name", ["an odd number of rows, heads of 20", "many patches"])
def test_threads_and_repeats(rt, random_gguf, mmproj, kernels: str, name: str) -> None:
    """Breaks if bits depend on the threads, on how the work is shared among them, or on what was encoded before."""
    tower = TOWERS[name][0]
    first, second = picture(tower), picture(tower, SEED + 1)
    text, file = random_gguf(TEXT), mmproj(name, "Q8_0")
    one = encode(rt, text, file, KEYS, first, second, first)
    assert np.array_equal(one[0], one[2])
    assert not np.array_equal(one[0], one[1])
    for threads in (2, 5):
        for a, b in zip(one, encode(rt, text, file, KEYS, first, second, first, threads=threads), strict=True):
            assert np.array_equal(a, b)


PROBE = """
import sys
from pathlib import Path
import numpy as np
import native_runtime as nr
from native_vision import Vision
lib, text, mmproj, picture, out = sys.argv[1:]
rt = nr.Runtime(Path(lib), st3=False)
with nr.Model(rt, Path(text)) as model:
    Vision(model, Path(mmproj), 1).encode(np.load(picture)).embd.tofile(out)
"""


@pytest.mark.parametrize("file_type", ["F16", "Q8_0"])
def test_off_is_stock(rt, random_gguf, tmp_path: Path, file_type: str) -> None:
    """Breaks if without st3 keys a bit of an embedding differs from stock's libraries'."""
    stock = os.environ.get("ST3_STOCK_LIB_DIR")
    if not stock:
        pytest.skip("ST3_STOCK_LIB_DIR is not set")
    # Without a class token, which stock's graph puts into the wrong row (vendor/patches/0001).
    tower, file, text = TOWERS["heads of 32"][0], tmp_path / "mmproj.gguf", random_gguf(TEXT)
    random_model.write_vision(file, tower, TEXT.n_embd, SEED, file_type=file_type, class_token=False)
    np.save(tmp_path / "picture.npy", picture(tower))
    env = {k: v for k, v in os.environ.items() if k not in ("LLAMA_CPP_LIB_PATH", "MTMD_CPP_LIB", "ST3_LIB_DIR")}
    env["PYTHONPATH"] = str(Path(native_runtime.__file__).parent)
    outputs = []
    for i, lib in enumerate((stock, str(native_runtime.lib_dir()))):
        out = tmp_path / f"{i}.bin"
        args = [sys.executable, "-c", PROBE, lib, str(text), str(file), str(tmp_path / "picture.npy"), str(out)]
        done = subprocess.run(args, env=env, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr[-2000:]
        outputs.append(np.fromfile(out, np.uint32))
    assert len(outputs[0])
    assert np.array_equal(*outputs)
