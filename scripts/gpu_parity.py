"""The visual tokens that the embedded model keeps on a GPU and on the CPU, picture by picture.

python scripts/gpu_parity.py [--images N] [--budget 0.3] [--quantized] [--emulate cuda|metal] [--cpu NAME] [--json OUT]

With --emulate there is no GPU: the decoder runs on a device that computes by the CPU backend, and scores by a GPU
backend's kernels on emulated lanes (tests/emulator). With --cpu it is another CPU in place of a GPU, by qemu-user (7.2
or newer; Nehalem has no AVX, Haswell has AVX2), for libraries with ggml's variants, as scripts/wheel.sh builds them.

Both start from the same embeddings, made on the CPU. The decoder is the package's with its weights as F32; with
--quantized they stay Q8_0, and then products round activations, which each backend does in its own way, if at all.

Where the two keep other tokens at a cut, the oracle of the tests says how far apart their scores are in double
precision; a relative margin below 1e-3 is a near-tie. Cuts after such a one start from other tokens and are not
compared. Exits with 1 where, with F32 weights, a difference is no near-tie.
"""

from __future__ import annotations

import argparse
import ctypes
import dataclasses
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
for folder in (ROOT, ROOT / "tests", ROOT / "scripts", ROOT / "scripts" / "embedded_model"):
    sys.path.insert(0, str(folder))

import measuring  # noqa: E402
import native_runtime  # noqa: E402
import numpy as np  # noqa: E402
import questions  # noqa: E402
import scenes  # noqa: E402
from emulator import build  # noqa: E402
from native_runtime import Context, Image, Model, Runtime  # noqa: E402
from native_vision import Vision  # noqa: E402
from oracle.exact import write_exact  # noqa: E402

from st3_edge import demo  # noqa: E402
from st3_edge.native import backends  # noqa: E402
from st3_edge.native.machine import provenance  # noqa: E402

NEAR_TIE = 1e-3
HIDE = ("CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "GGML_VK_VISIBLE_DEVICES")
# NumPy's OpenBLAS chooses kernels by the CPU, too, and is wrong about emulated ones
OPENBLAS = {"OPENBLAS_NUM_THREADS": "1", "OPENBLAS_CORETYPE": "PRESCOTT"}
# ggml has cuBLAS multiply F32 as TF32, which rounds to 11 bits
WHERE = {"cpu": dict.fromkeys(HIDE, ""), "gpu": {"ST3_GPU_LAYERS": "999", "NVIDIA_TF32_OVERRIDE": "0"}}


def keys(budget: float) -> dict[str, native_runtime.Value]:
    return {"st3.preset": "st3", "st3.budget": budget, "st3.anneal": "none"}


def pieces(model: Model, number: int, embd: np.ndarray) -> list:
    """The prompt of a picture: its first question."""
    question = questions.held_out_questions(number)[0].text
    before = [*model.bos(), *model.tokenize("USER: ")]
    return [before, Image(embd, 24, 24), model.tokenize(f"\n{question} ASSISTANT:")]


def work(args: argparse.Namespace, where: str) -> None:
    """Run by a process of its own for each device: kept tokens of all pictures. The CPU's makes the embeddings."""
    folder = native_runtime.built()
    rt, (_, mmproj) = Runtime(folder), demo.model_paths()
    if args.device:
        ctypes.CDLL(str(args.device)).device_register(b"")
    if where == "gpu" and not args.cpu and not rt.llama.llama_supports_gpu_offload():
        raise SystemExit(f"no GPU for the libraries in {folder}")
    with Model(rt, args.work / "model.gguf", keys(args.budget)) as model:
        file = args.work / "embeddings.npy"
        if where == "cpu":
            vision = Vision(model, mmproj)
            np.save(file, [vision.encode(np.asarray(scenes.scene(i).image)).embd for i in range(args.images)])
            vision.close()
        out = []
        with Context(model, n_ctx=1024, threads=args.threads) as ctx:
            for i, embd in enumerate(np.load(file)):
                ctx.clear()
                if ctx.prefill(pieces(model, i, embd)):
                    raise SystemExit(f"prefill failed: {rt.last_error()}")
                n_cuts = len(ctx.report()["cuts"])
                out.append({"kept": [k.tolist() for k in ctx.kept(n_cuts)], "token": int(np.argmax(ctx.logits()))})
    devices = [d for d in backends.devices(rt.lib) if d["backend"] != "CPU"]
    if args.cpu:
        variants = {Path(word).stem for word in Path("/proc/self/maps").read_text().split() if "ggml-cpu" in word}
        devices = [{"description": f"{' '.join(variants)} on {args.cpu if where == 'gpu' else 'this CPU'}"}]
        print(devices[0]["description"])
    (args.work / f"{where}.json").write_text(json.dumps({"devices": devices, "pictures": out}))


def emulated_device(backend: str, out: Path) -> Path:
    """The library that registers one."""
    return build.device(build.upstream_tree(), out, native_runtime.built(), backend)


def margins(args: argparse.Namespace, both: list[tuple[dict, dict]]) -> list[dict]:
    """Of each picture whose kept tokens differ: at which cut first, and how clear that is."""
    from oracle import llama as oracle
    from oracle import schedule

    rt, path = Runtime(native_runtime.built()), args.work / "model.gguf"
    decoder, embeddings, out = oracle.Decoder(path), np.load(args.work / "embeddings.npy"), []
    with Model(rt, path, keys(args.budget)) as model:
        named = {k.removeprefix("st3."): v for k, v in keys(args.budget).items()}
        plan = schedule.resolve(model.n_layer, **named)
        for i, (cpu, gpu) in enumerate(both):
            cut = next((c for c, (a, b) in enumerate(zip(cpu["kept"], gpu["kept"], strict=True)) if a != b), None)
            if cut is None:
                continue
            before, image, after = pieces(model, i, embeddings[i])
            first = len(before)
            held = [np.arange(first, first + len(image.embd)), *(first + np.array(k, int) for k in cpu["kept"])]
            prompt = [before, oracle.Image(image.embd, image.nx, image.ny), after]
            seen = decoder.prefill(prompt, plan, "F16", follow=held).cuts[cut]
            mine, theirs = np.array(cpu["kept"][cut]), np.array(gpu["kept"][cut])
            margin = max(dataclasses.replace(seen, kept=a).margin(b) for a, b in ((mine, theirs), (theirs, mine)))
            other = len(np.setdiff1d(mine, theirs))
            out.append({"picture": i, "cut": cut, "tokens": other, "of": len(mine), "margin": float(margin)})
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=measuring.count, default=200)
    parser.add_argument("--budget", type=measuring.budget, default=0.3)
    parser.add_argument("--quantized", action="store_true")
    beside = parser.add_mutually_exclusive_group()
    beside.add_argument("--emulate", choices=build.BACKENDS)
    beside.add_argument("--cpu", metavar="NAME")
    parser.add_argument("--threads", type=measuring.count, default=2)
    parser.add_argument("--json", type=measuring.result_file)
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--device", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--where", choices=WHERE, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.where:
        work(args, args.where)
        return
    qemu = f"qemu-{platform.machine()}"
    if args.cpu and not shutil.which(qemu):
        raise SystemExit(f"--cpu needs {qemu}")
    with tempfile.TemporaryDirectory() as folder:
        args.work = Path(folder)
        (shutil.copy if args.quantized else write_exact)(demo.model_paths()[0], args.work / "model.gguf")
        for where, env in WHERE.items():
            command = [sys.executable, __file__, "--images", str(args.images), "--budget", str(args.budget)]
            command += ["--threads", str(args.threads)]
            if args.emulate and where == "gpu":
                command += ["--device", str(emulated_device(args.emulate, args.work))]
            if args.cpu:
                command, env = [*command, "--cpu", args.cpu], {}
            if args.cpu and where == "gpu":
                command, env = [qemu, "-cpu", args.cpu, *command], OPENBLAS
            subprocess.run([*command, "--work", folder, "--where", where], env=os.environ | env, check=True)
        cpu, gpu = (json.loads((args.work / f"{where}.json").read_text()) for where in WHERE)
        both = list(zip(cpu["pictures"], gpu["pictures"], strict=True))
        differing = margins(args, both)
    ties = sum(d["margin"] < NEAR_TIE for d in differing)
    result = {
        "device": f"{args.emulate} kernels, emulated" if args.emulate else gpu["devices"][0]["description"],
        "devices": gpu["devices"],
        "weights": "Q8_0" if args.quantized else "F32",
        "pictures": len(both),
        "equal": len(both) - len(differing),
        "near_ties": ties,
        "other": len(differing) - ties,
        "same_first_token": sum(a["token"] == b["token"] for a, b in both),
        "differing": differing,
        **provenance(),
    }
    print(
        "{device}, {weights} weights: {pictures} pictures, {equal} equal, {near_ties} with near-ties, "
        "{other} with other differences, {same_first_token} with the same first token".format(**result)
    )
    for d in differing:
        print("picture {picture}: {tokens} of {of} tokens differ at cut {cut}, margin {margin:.1e}".format(**d))
    if args.json:
        measuring.write_json(args.json, result)
    if not args.quantized and result["other"]:
        raise SystemExit("other tokens are kept than rounding can explain")


if __name__ == "__main__":
    measuring.run(main)
