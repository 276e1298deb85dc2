"""The machine that this runs on, and what of this project runs on it: figures name both."""

from __future__ import annotations

import ctypes
import os
import platform
import re
import shlex
import subprocess
import sys
from pathlib import Path

from . import libraries

if sys.platform != "win32":
    import resource

_ROOT = Path(__file__).resolve().parents[2]
_COMPILER = re.compile(rb"GCC: \([ -~]{1,80}\) [\d.]+|(?:[A-Za-z]+ )?clang version [ -~]{1,80}")


def cpuinfo(key: str) -> str:
    """The first value of `key` in Linux's /proc/cpuinfo; "" where there is none."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return ""
    return next((line.partition(":")[2].strip() for line in lines if line.startswith(key)), "")


def processor() -> str:
    """The processor's name."""
    return cpuinfo("model name") or platform.processor() or platform.machine()


def usable_cpus() -> int:
    """Hardware threads that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def default_threads() -> tuple[int, int]:
    """CPU threads for decoding and for prefill, which gains from every hardware thread: decoding waits for memory, and
    loses by the second of a core."""
    usable = usable_cpus()
    return usable if usable <= 4 else usable // 2, usable


def load() -> float:
    """Programs that were running or waiting over the last minute; 0 on Windows, which does not count them."""
    if sys.platform == "win32":
        return 0.0
    return os.getloadavg()[0]


def memory() -> int | None:
    """The machine's bytes; None on Windows, where Python does not tell."""
    if sys.platform == "win32":
        return None
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def available_memory() -> int | None:
    """Bytes that can be used without swapping; None where the system does not tell (other than Linux)."""
    return _kib("/proc/meminfo", "MemAvailable")


def peak_memory() -> int:
    """The most bytes that this process had resident, since `reset_peak_memory` where that can be (Linux)."""
    peak = _kib("/proc/self/status", "VmHWM")
    if peak is not None:
        return peak
    if sys.platform != "win32":
        most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return most if sys.platform == "darwin" else most * 1024
    return _windows_peak()


def _windows_peak() -> int:
    """PeakWorkingSetSize of PROCESS_MEMORY_COUNTERS."""

    class Counters(ctypes.Structure):
        _fields_ = [
            ("size", ctypes.c_uint32),
            ("faults", ctypes.c_uint32),
            ("peak", ctypes.c_size_t),
            ("others", ctypes.c_size_t * 7),
        ]

    kernel = getattr(ctypes, "windll").kernel32  # noqa: B009
    kernel.GetCurrentProcess.restype = ctypes.c_void_p
    kernel.K32GetProcessMemoryInfo.argtypes = [ctypes.c_void_p, ctypes.POINTER(Counters), ctypes.c_uint32]
    counters = Counters(size=ctypes.sizeof(Counters))
    kernel.K32GetProcessMemoryInfo(kernel.GetCurrentProcess(), ctypes.byref(counters), counters.size)
    return int(counters.peak)


def reset_peak_memory() -> None:
    """Lets `peak_memory` begin anew."""
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    except OSError:  # no Linux, or a sandbox: the peak is then that of all of the process
        return


def _kib(path: str, key: str) -> int | None:
    try:
        lines = Path(path).read_text(encoding="ascii", errors="replace").splitlines()
    except OSError:
        return None
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith(f"{key}:")), None)


def compiler(library: Path) -> str | None:
    """The compiler that an ELF library names in itself (.comment); None where it names none."""
    found = _COMPILER.search(library.read_bytes())
    return found[0].decode() if found else None


def commit() -> str:
    """The commit of the source checkout that this runs from, `-dirty` where its tree differs; "unknown" elsewhere."""
    if not (_ROOT / "vendor" / "upstream.json").is_file():  # installed: what git says would be of another repository
        return "unknown"
    command = ["git", "-C", str(_ROOT), "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError:
        return "unknown"
    return done.stdout.strip() or "unknown"


def provenance() -> dict[str, str | None]:
    """What goes beside figures that a script of this project writes: its command, where absolute paths are names alone,
    the commit, the compiler of the native libraries in use, and the processor."""
    script, *arguments = (Path(a).name if Path(a).is_absolute() else a for a in sys.argv)
    return {
        "command": f"python scripts/{Path(script).name} {shlex.join(arguments)}".rstrip(),
        "commit": commit(),
        "compiler": compiler(libraries.path_of("llama")),
        "processor": processor(),
    }
