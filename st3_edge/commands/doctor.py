"""What `st3-edge doctor` finds out about this installation and machine."""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import platform
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

from .. import demo
from ..errors import St3Error, one_line
from ..native import backends, libraries, log, machine
from .console import Console, run

_PATIENCE_S = 120
_STAGES = (
    "the libraries end the process as they load",
    "one question to the demo model ends the process",
    "the process ends badly, after its work",
)
_REMEDIES = {
    "SIGILL": "they use instructions that this CPU lacks: build the package on this machine, or for any with "
    "CMAKE_ARGS=-DGGML_NATIVE=OFF",
    "SIGKILL": "it was killed, as systems do where memory runs out: end other programs",
}
_REMEDY = "build the package again; if it stays so, report it with the output of st3-edge doctor --json"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Describes the subcommand."""
    parser.description = (
        "Shows versions, libraries, CPU features and devices, and what is missing. The exit code is 1 if something "
        "keeps the package from working."
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def main(console: Console, arguments: argparse.Namespace) -> int:
    """Prints what is found; returns the exit code, 1 where something keeps the package from working."""
    found = run(console, examine)
    console.say(json.dumps(found, indent=2) if arguments.json else describe(found))
    return 1 if found["problems"] else 0


def examine() -> dict[str, Any]:
    """Everything found, as plain values; "problems" lists in one line each what keeps the package from working."""
    problems: list[str] = []
    found: dict[str, Any] = {
        "versions": versions(),
        "libraries": _library_files(),
        "abi": None,
        "ggml": None,
        "cpu": _cpu(),
        "cpu_features": [],
        "amx": None,
        "devices": [],
        "answer": None,
        "demo_model": _demo_model(problems),
        "problems": problems,
    }
    try:
        libraries.check_present()
    except St3Error as e:
        problems.append(str(e))
        return found
    found |= _try(problems)
    return found


def _try(problems: list[str]) -> dict[str, Any]:
    """What a process of its own finds in the libraries, where a crash is one more thing to tell."""
    start = "import sys; sys.path.insert(0, sys.argv[1]); from st3_edge.commands import doctor; doctor.tell()"
    command = [sys.executable, "-c", start, str(Path(__file__).resolve().parents[2])]
    try:
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace", timeout=_PATIENCE_S
        )
    except subprocess.TimeoutExpired:
        problems.append(f"one question to the demo model takes more than {_PATIENCE_S} s: end other programs")
        return {}
    stages: list[dict[str, Any]] = [json.loads(line) for line in done.stdout.splitlines()]
    found = {key: value for of_stage in stages for key, value in of_stage.items()}
    if "problem" in found:
        problems.append(found.pop("problem"))
    elif done.returncode:
        problems.append(_crash(len(stages), done.returncode, done.stderr))
    return found


def _crash(stage: int, code: int, errors: str) -> str:
    """Which of _STAGES ended with an exit code, the last line of its standard error, and what to do."""
    try:
        how = signal.Signals(-code).name
    except ValueError:
        how = f"exit code {code}"
    lines = [line for line in errors.splitlines() if line.strip()]
    last = f" ({one_line(lines[-1])})" if lines else ""
    return f"{_STAGES[stage]}: {how}{last}: {_REMEDIES.get(how, _REMEDY)}"


def tell() -> None:
    """Prints one line of JSON for each of _STAGES: what the libraries say of themselves, and how the embedded model's
    first token came about."""
    try:
        bindings = libraries.load()
        log.route(log.Log())
        features = backends.cpu_features(bindings)
        found = {
            "abi": bindings.lib._lib.st3_abi_version(),
            "ggml": backends.ggml_version(bindings),
            "cpu_features": features,
            "amx": _amx(features),
            "devices": backends.devices(bindings.lib._lib),
        }
        print(json.dumps(found), flush=True)
        print(json.dumps({"answer": _answer()}), flush=True)
    except St3Error as e:
        print(json.dumps({"problem": str(e)}), flush=True)


def _answer() -> dict[str, Any]:
    """One picture is read, one token generated."""
    from ..llava import Llava

    scene = demo.scenes()[0]
    content = [{"type": "image", "image": scene.picture}, {"type": "text", "text": scene.questions[0][0]}]
    with Llava.demo() as llava:
        llava.create_chat_completion([{"role": "user", "content": content}], max_tokens=1, temperature=0)
        report = llava.last_report
        assert report is not None
        return {"mode": report.mode, "encode_ms": report.ms.encode, "prefill_ms": report.ms.prefill}


def describe(found: dict[str, Any]) -> str:
    """The same as text for a person."""
    of_libraries, model = found["libraries"], found["demo_model"]
    lines = [
        "versions      " + ", ".join(f"{name} {version}" for name, version in found["versions"].items()),
        f"libraries     {of_libraries['folder']}",
        *(f"              {name}" for name in of_libraries["files"]),
        f"st3 ABI       {found['abi']} (this package needs {libraries.ABI_VERSION})",
        f"ggml          {found['ggml']}",
        f"CPU           {found['cpu']['model']}, {found['cpu']['usable']} threads usable",
        f"CPU features  {' '.join(found['cpu_features'])}",
    ]
    if found["amx"]:
        lines.append(f"AMX           {found['amx']}")
    for device in found["devices"]:
        lines.append(f"device        {device['name']}: {device['description']} ({device['backend']})")
        lines.append(f"              {_kernel(device)}")
    if model:
        lines.append(f"demo model    {model['model']}")
        lines.append(f"              {model['mmproj']}")
        lines.append(f"              {len(model['pictures'])} pictures")
    if answer := found["answer"]:
        lines.append(
            f"one question  encoded in {answer['encode_ms']:.0f} ms, prefilled in {answer['prefill_ms']:.0f} ms "
            f"({answer['mode']})"
        )
    lines += [f"PROBLEM       {problem}" for problem in found["problems"]]
    if not found["problems"]:
        lines.append("all is well")
    return "\n".join(lines)


def _kernel(device: dict[str, Any]) -> str:
    if device["kernel_for"]:
        return f"attention scores: fused kernel, KV cache in {', '.join(device['kernel_for'])}"
    lacks = "this GPU has no SIMD-group reductions" if device["backend"] == "MTL" else "there is none for this backend"
    return f"attention scores: stock ops, no fused kernel: {lacks}"


def versions() -> dict[str, str]:
    """Of Python, this package and those that it needs."""
    found = {"python": platform.python_version()}
    for name in ("st3-edge", "numpy", "pillow", "huggingface-hub"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def _library_files() -> dict[str, Any]:
    folder = libraries.folder()
    files = sorted(p.name for p in folder.iterdir() if p.is_file()) if folder.is_dir() else []
    return {"folder": str(folder), "files": files}


def _demo_model(problems: list[str]) -> dict[str, Any] | None:
    try:
        model, mmproj = demo.model_paths()
        pictures = [str(scene.picture) for scene in demo.scenes()]
    except St3Error as e:
        problems.append(str(e))
        return None
    return {"model": str(model), "mmproj": str(mmproj), "pictures": pictures}


def _cpu() -> dict[str, Any]:
    return {"model": machine.processor(), "usable": machine.usable_cpus()}


def _amx(features: list[str]) -> str | None:
    if any(name.startswith("AMX") for name in features):
        return "used"
    if sys.platform == "linux" and "amx_int8" in machine.cpuinfo("flags").split():
        return "this CPU has it, and the libraries were built without: build on this machine, with GGML_NATIVE on"
    return None
