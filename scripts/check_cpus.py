"""Libraries with ggml's variants for many CPUs, as scripts/wheel.sh makes them, on other CPUs than this: by qemu-user.

python scripts/check_cpus.py [--python PYTHON] [--cpu NAME ...]       such as Nehalem (no AVX) and Haswell (AVX2)

On each the demo model is asked about its pictures. Prints which variant ggml chose, and fails unless each CPU is given
another one, and the kept tokens and answers are the same on all. (The vision encoder computes in the type of its file:
BF16, where a CPU is fast at it, gives other embeddings.) PYTHON is that of an environment where the package is
installed (default: the one that runs this). Needs qemu-user, 7.2 or newer.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys

# NumPy's OpenBLAS chooses its own kernels, and fails where it finds threads of an emulated CPU
OPENBLAS = {"OPENBLAS_NUM_THREADS": "1", "OPENBLAS_CORETYPE": "PRESCOTT"}
CPUS = {"x86_64": ["Nehalem", "Haswell"], "aarch64": ["cortex-a53", "neoverse-n1"]}
ASK = """
import json, sys
from pathlib import Path
from st3_edge import Llava, ST3Config, demo
from st3_edge.native import libraries

libraries.load()
maps = Path("/proc/self/maps").read_text().split()
variants = sorted({Path(word).stem for word in maps if "ggml-cpu" in word})
found = []
with Llava.demo(ST3Config(vision_type='file'), n_threads=1) as llava:
    for scene in demo.scenes()[: int(sys.argv[1])]:
        answer = llava.ask(scene.picture, scene.questions[0][0], temperature=0, max_tokens=16, trace=True)
        found.append({"answer": answer, "kept": llava.last_report.trace.kept, "mode": llava.last_report.mode})
print(json.dumps({"variants": variants, "pictures": found}))
"""


def ask(python: str, cpu: str | None, machine: str, pictures: int) -> dict:
    """What ASK prints on a CPU; None: this machine's own."""
    command = [python, "-c", ASK, str(pictures)]
    if cpu:
        emulator = shutil.which(f"qemu-{machine}")
        if not emulator:
            raise SystemExit(f"there is no qemu-{machine}: install it (Debian, Ubuntu: apt install qemu-user)")
        command = [emulator, "-cpu", cpu, *command]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **OPENBLAS})
    if done.returncode:
        raise SystemExit(f"{cpu or 'this machine'}: exit code {done.returncode}: {done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--python", default=sys.executable)
    parser.add_argument("--cpu", nargs="*")
    parser.add_argument("--pictures", type=int, default=5)
    parser.add_argument("--machine", default=platform.machine(), help="of PYTHON; another one is always emulated")
    arguments = parser.parse_args()
    machine = arguments.machine
    cpus = arguments.cpu if arguments.cpu is not None else CPUS[machine]
    own = [None] if machine == platform.machine() else []
    found = {cpu or "this machine": ask(arguments.python, cpu, machine, arguments.pictures) for cpu in [*own, *cpus]}
    first = next(iter(found.values()))
    for cpu, told in found.items():
        same = told["pictures"] == first["pictures"]
        modes = {picture["mode"] for picture in told["pictures"]}
        print(
            f"{cpu}: {', '.join(told['variants'])}: {'the same' if same else 'OTHER'} kept tokens and answers, {modes}"
        )
    chosen = [tuple(told["variants"]) for told in found.values()]
    if len(set(chosen)) < len(chosen) or any(told["pictures"] != first["pictures"] for told in found.values()):
        raise SystemExit("not every CPU has a variant of its own and the same kept tokens")


if __name__ == "__main__":
    main()
