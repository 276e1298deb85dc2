"""Everything that wants an NVIDIA card, in one go: the op against its reference, the op's time beside the memory's, the
embedded model's kept tokens beside the CPU's, prefill and decode at the 7B shape beside pruning off, what scoring costs
there, and compute-sanitizer.

python scripts/gpu_check.py [STEP ...] [--libraries DIR] [--results DIR] [--shape llava-1.5-7b]

Without --libraries they are built here for this card alone: some 190 compilations of up to half a minute. Ones that
were built elsewhere (build/gpu/lib there, stripped) must suit this processor: build them with -DGGML_NATIVE=OFF. Needs
no network, and the packages that PACKAGES names; for a build $ST3_SDIST, upstream's archive. The 7B shape's random
weights take 4 GB of disk. Writes summary.json, anew after each step, and log.txt. Exits with 1 if a step failed.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "scripts")]
import measuring  # noqa: E402

from st3_edge.commands.bench.shapes import SHAPES  # noqa: E402
from st3_edge.native.machine import provenance, usable_cpus  # noqa: E402

PACKAGES = ("numpy", "pytest", "hypothesis", "PIL", "gguf", "jinja2", "platformdirs")  # what the steps import
KERNEL_FOR = {"f16", "q8_0"}
SANITIZERS = ("memcheck", "racecheck", "initcheck", "synccheck")


@dataclass(frozen=True)
class Step:
    """A command of a name. `limit`: seconds; `out`: whether it takes --json FILE (else, of `prints`, prints JSON)."""

    name: str
    command: list[str]
    limit: int
    out: bool = False
    prints: bool = False


def steps(shape: str) -> list[Step]:
    """All of them, the figures first: a sanitizer that hangs costs none."""
    python, scripts = sys.executable, ROOT / "scripts"
    tests = [python, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(ROOT / "tests" / "gpu")]
    threads = ["--threads", str(usable_cpus())]
    out = [
        Step("op", tests, 300),
        Step("bandwidth", [python, str(scripts / "bench_attn_span.py")], 180, out=True),
        Step("kept-tokens", [python, str(scripts / "gpu_parity.py"), *threads], 400, out=True),
        Step(
            "bench",
            [python, "-m", "st3_edge", "bench", "--shape", shape, "--against", "off", "--n-gpu-layers", "-1", "--json"],
            500,
            prints=True,
        ),
        Step(
            "scoring",
            [
                *(python, str(scripts / "bench_schedules.py"), "--shape", shape, "--only", "scoring", "control"),
                *("--n-gpu-layers", "-1", "--prefills", "10"),
            ],
            500,
            out=True,
        ),
        Step("kept-tokens-q8_0", [python, str(scripts / "gpu_parity.py"), "--quantized", *threads], 500, out=True),
    ]
    for tool in SANITIZERS:
        command = [sanitizer() or "compute-sanitizer", "--tool", tool, "--kernel-regex", "kns=attn_span"]
        command += ["--target-processes", "all", "--error-exitcode", "1"]
        out.append(Step(tool, [*command, *tests, "-k", "sanitized"], 300))
    return out


def sanitizer() -> str | None:
    """compute-sanitizer, on the PATH or where CUDA puts it."""
    nvcc = shutil.which("nvcc")
    folders = [Path(nvcc).resolve().parent] if nvcc else []
    folders += [Path("/usr/local/cuda/bin"), Path("/usr/local/cuda/compute-sanitizer")]
    found = shutil.which("compute-sanitizer")
    return found or next((str(f / "compute-sanitizer") for f in folders if (f / "compute-sanitizer").is_file()), None)


def query(what: str) -> str:
    """What nvidia-smi tells of the first card."""
    command = ["nvidia-smi", f"--query-gpu={what}", "--format=csv,noheader"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()[0].strip()


def build(log: Path) -> Path:
    """Libraries for the card of this machine; their folder."""
    folder, architecture = ROOT / "build" / "gpu", query("compute_cap").replace(".", "")
    options = [
        "-DGGML_CUDA=ON",
        f"-DCMAKE_CUDA_ARCHITECTURES={architecture}-real",
        f"-DPython_EXECUTABLE={sys.executable}",
    ]
    with log.open("a") as out:
        for command in (["cmake", "-S", ROOT, "-B", folder, "-G", "Ninja", *options], ["cmake", "--build", folder]):
            if subprocess.run(command, stdout=out, stderr=out, check=False).returncode:
                raise SystemExit(f"the build failed: see {log}")
    return folder / "lib"


def use(libraries: Path) -> None:
    """Has the steps find these libraries, and CUDA's own where the loader does not look (the toolkit's, or pip's)."""
    folders = [Path("/usr/local/cuda/lib64")]
    spec = importlib.util.find_spec("nvidia")
    for package in spec.submodule_search_locations or [] if spec else []:
        folders += sorted({f.parent for f in Path(package).glob("**/lib/lib*.so*")})
    path = [str(f) for f in folders if f.is_dir()] + [os.environ.get("LD_LIBRARY_PATH", "")]
    os.environ |= {
        "ST3_LIB_DIR": str(libraries.resolve()),
        "ST3_NEED_GPU": "1",
        "LD_LIBRARY_PATH": os.pathsep.join(p for p in path if p),
        "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
    }


def check() -> list[dict]:
    """ggml's devices. Raises SystemExit where no step could work, or would go without our kernel."""
    missing = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise SystemExit(f"{sys.executable} lacks {', '.join(missing)}")
    command = [sys.executable, "-m", "st3_edge", "doctor", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    try:
        found = json.loads(done.stdout)
    except ValueError:
        raise SystemExit(f"st3-edge doctor failed: {done.stderr.strip()[-500:]}") from None
    if found["problems"]:
        raise SystemExit(found["problems"][0])
    gpus = [d for d in found["devices"] if d["backend"] != "CPU"]
    if not gpus:
        raise SystemExit(f"no GPU for the libraries in {os.environ['ST3_LIB_DIR']}")
    if KERNEL_FOR - set(gpus[0]["kernel_for"]):
        raise SystemExit(f"{gpus[0]['name']} has no kernel of ours for {', '.join(sorted(KERNEL_FOR))}")
    return gpus


def run(step: Step, results: Path) -> dict:
    """How it went, how long it took, its last line, and the JSON that it wrote."""
    file, begin = results / "step.json", time.monotonic()
    file.unlink(missing_ok=True)
    command = step.command + (["--json", str(file)] if step.out else [])
    try:
        process = subprocess.Popen(
            command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True
        )
        try:
            out, err = process.communicate(timeout=step.limit)
            how = "ok" if process.returncode == 0 else f"failed ({process.returncode})"
        except subprocess.TimeoutExpired:
            how = f"took longer than {step.limit} s"
        finally:  # what it started must not take the card from the next step
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
        if process.returncode is None:
            out, err = process.communicate()
    except OSError as e:
        how, out, err = f"cannot be started: {e.strerror}", b"", b""
    said = (out + err).decode(errors="replace")
    result = {"how": how, "seconds": round(time.monotonic() - begin, 1), "last": (said.splitlines() or [""])[-1][:200]}
    with (results / "log.txt").open("a") as log:
        log.write(f"\n== {step.name}: {' '.join(command)}\n{said}\n== {how}\n")
    text = out.decode() if step.prints and how == "ok" else file.read_text() if file.is_file() else ""
    file.unlink(missing_ok=True)
    if text:
        result |= {"found": json.loads(text), "last": ""}
    return result


def lines(name: str, found: dict) -> list[str]:
    """What a step found, for a person."""
    if name == "bandwidth":
        rows = [f"copy {found['copy_bytes_per_second'] / 1e9:.0f} GB/s"]
        for r in found["results"]:
            rows.append(
                f"{r['shape']:<30}{r['k']:>6}{r['seconds'] * 1e6:>10.1f} us, floor {r['floor'] * 1e6:.1f} us "
                f"({r['floor'] / r['seconds']:.0%} of the copy's bandwidth)"
            )
        return rows
    if name.startswith("kept-tokens"):
        return ["{pictures} pictures: {equal} equal, {near_ties} near-ties, {other} other".format(**found)]
    if name == "bench":
        return [f"{k}: {v['ratio']:.2f} (ideal {v['ideal']:.2f})" for k, v in found["summary"].items()]
    if name == "scoring":
        return [
            f"{pair} {what}: {100 * (of_pair[what]['ratio'] - 1):+.1f} % (rounds {spread(of_pair[what]['rounds'])})"
            for pair, of_pair in found["pairs"].items()
            for what in ("prefill", "decode")
        ]
    return []


def spread(rounds: list[dict]) -> str:
    """The rounds' own ratios."""
    return ", ".join(f"{100 * (r['ratio'] - 1):+.1f}" for r in rounds)


def main() -> None:
    """Parse the command line, check, build if need be, run, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("steps", nargs="*", metavar="STEP", help="these alone, in their order (default: all)")
    parser.add_argument("--libraries", type=Path, help="a folder of libraries that were built for this card")
    parser.add_argument("--results", type=Path, default=ROOT / "build" / "gpu-check")
    parser.add_argument("--shape", default="llava-1.5-7b", choices=SHAPES)
    args = parser.parse_args()
    known = {step.name: step for step in steps(args.shape)}
    if unknown := [name for name in args.steps if name not in known]:
        raise SystemExit(f"there is no step {unknown[0]}: {', '.join(known)}")
    if not shutil.which("nvidia-smi"):
        raise SystemExit("no NVIDIA card here (no nvidia-smi)")
    if args.libraries and not args.libraries.is_dir():
        raise SystemExit(f"there is no folder {args.libraries}")
    args.results.mkdir(parents=True, exist_ok=True)
    log = args.results / "log.txt"
    log.unlink(missing_ok=True)
    use(args.libraries or build(log))
    about = {
        "card": query("name"),
        "driver": query("driver_version"),
        "devices": check(),
        **provenance(),
    }
    results: dict[str, dict] = {}
    for name in args.steps or known:
        results[name] = result = run(known[name], args.results)
        measuring.write_json(args.results / "summary.json", {**about, "steps": results})
        print(f"{name:<20}{result['how']:<24}{result['seconds']:>7.0f} s  {result['last']}", flush=True)
        for line in lines(name, result["found"]) if "found" in result else []:
            print(f"    {line}", flush=True)
    failed = [name for name, result in results.items() if result["how"] != "ok"]
    if failed:
        raise SystemExit(f"failed: {', '.join(failed)} (see {args.results})")


if __name__ == "__main__":
    measuring.run(main)
