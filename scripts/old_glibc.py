"""A system root with an older glibc, for GCC to compile and link against: what is built then runs on older systems.

python scripts/old_glibc.py FOLDER MACHINE VERSION         such as build/sysroot x86_64 2.28

Zig brings the headers of glibc, and can make stubs of its libraries of any version. It is not the compiler: it links a
C++ library of its own into every library with hidden symbols, and an exception of one is then not caught in another.
libstdc++ is GCC's, made one shared library of a name of ours (FOLDER/own), which the wheel brings: linked statically
into each library it frees what another's has made. What it wants and old glibc has not is in old_glibc.c.
Needs GCC for MACHINE, and the package ziglang.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
LIBRARIES = ("libc.so.6", "libm.so.6", "libpthread.so.0", "libdl.so.2", "librt.so.1")
STARTS = ("Scrt1.o", "crt1.o")
MADE = {"usr", "cxx", "own", "done"}  # in FOLDER; the last by wheel.sh
SINCE_2_30 = ("COND_CLOCKWAIT", "MUTEX_CLOCKLOCK", "RWLOCK_CLOCKLOCK")


def run(*command: str | Path, **options: object) -> str:
    """What a command prints."""
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, **options).stdout  # type: ignore[call-overload]


def tool(machine: str, name: str) -> str:
    """The name of a compiler's or binutils' program for a machine."""
    return name if os.uname().machine == machine else f"{machine}-linux-gnu-{name}"


def gcc(machine: str) -> str:
    """The name of GCC's C compiler."""
    return tool(machine, "gcc")


def headers(root: Path, zig: Path, machine: str, version: str) -> None:
    """usr/include: glibc's and Linux' as Zig has them; cxx: what goes before GCC's own for C++."""
    include = root / "usr" / "include"
    family = "x86" if machine == "x86_64" else machine
    for part in ("generic-glibc", f"{family}-linux-gnu", "any-linux-any", f"{family}-linux-any"):
        shutil.copytree(zig / "lib" / "libc" / "include" / part, include, dirs_exist_ok=True)
    # Zig says the version on its command line
    features = include / "features.h"
    features.write_text(f"#define __GLIBC_MINOR__ {version.partition('.')[2]}\n{features.read_text()}")
    for header in include.rglob("*.h"):  # libstdc++ asks whether they are there
        since = re.search(r"did not exist before glibc 2\.(\d+)", header.read_text(errors="replace"))
        if since and int(since[1]) > int(version.partition(".")[2]):
            header.unlink()
    # GCC takes libstdc++'s from where they are; its configuration is of this system's glibc
    cxx = root / "cxx" / "bits"
    cxx.mkdir(parents=True)
    with tempfile.NamedTemporaryFile(suffix=".cpp") as empty:
        made = run(gcc(machine), "-M", "-include", "bits/c++config.h", empty.name)
    config = next(word for word in made.split() if word.endswith("/c++config.h"))
    undefined = "".join(f"#undef _GLIBCXX_USE_PTHREAD_{name}\n" for name in SINCE_2_30)
    (cxx / "c++config.h").write_text(Path(config).read_text() + undefined)


def libraries(root: Path, zig: Path, machine: str, version: str) -> None:
    """usr/lib: the stubs and start files that Zig makes, and libgcc_s."""
    lib, target = root / "usr" / "lib", f"{machine}-linux-gnu"
    lib.mkdir(parents=True)
    cache = root.with_name(f"zig-{root.name}")
    cache.mkdir(exist_ok=True)
    environment = {**os.environ, "ZIG_GLOBAL_CACHE_DIR": str(cache), "ZIG_LOCAL_CACHE_DIR": str(cache)}
    main = cache / "main.c"
    main.write_text("int main(void) { return 0; }\n")
    for kind in ("-fPIE", "-fno-PIE"):
        command = [zig / "zig", "cc", "-target", f"{target}.{version}", kind, main, "-o", cache / "main"]
        run(*command, "-pie" if kind == "-fPIE" else "-no-pie", env=environment)
    made = {path.name: path for path in cache.rglob("*") if path.is_file()}
    for name in LIBRARIES:
        shutil.copy(made[name], lib / name)
    shutil.copy(made["libld.so.2"], lib / "ld.so")
    for name in STARTS:
        if name in made:
            shutil.copy(made[name], lib / name)
    shutil.copy(made["libc_nonshared.a"], lib)
    compat = lib / "old_glibc.o"
    run(gcc(machine), f"--sysroot={root}", "-O2", "-fPIC", "-c", HERE / "old_glibc.c", "-o", compat)
    run(tool(machine, "ar"), "r", lib / "libc_nonshared.a", compat)
    compat.unlink()
    needed = " ".join((*LIBRARIES[1:], "ld.so"))
    (lib / "libc.so").write_text(f"GROUP ( libc.so.6 libc_nonshared.a AS_NEEDED ( {needed} ) )\n")
    for name in LIBRARIES[1:]:
        (lib / name.rpartition(".")[0]).symlink_to(name)
    for name in ("crti.o", "crtn.o", "libgcc_s.so.1"):
        shutil.copy(run(gcc(machine), f"-print-file-name={name}").strip(), lib / name)


def cxx_library(root: Path, machine: str) -> None:
    """own/libst3-stdc++.so, and usr/lib/libstdc++.so for the linker. Its symbols have a version of their own, and none
    is unique in the process: they are never mixed with those of another libstdc++ there."""
    own, compiler = root / "own", gcc(machine)
    own.mkdir()
    archive, versions, unique = own / "libstdc++.a", own / "versions", own / "unique"
    gcc_archive = run(compiler, "-print-file-name=libstdc++.a").strip()
    symbols = [line.split() for line in run(tool(machine, "nm"), gcc_archive).splitlines()]
    unique.write_text("".join(f"{words[2]}\n" for words in symbols if len(words) == 3 and words[1] == "u"))
    run(tool(machine, "objcopy"), f"--weaken-symbols={unique}", gcc_archive, archive)
    versions.write_text("ST3_STDCXX { *; };\n")
    library = own / "libst3-stdc++.so"
    where = (f"--sysroot={root}", f"-B{root}/usr/lib", f"-L{root}/usr/lib")
    options = f"-Wl,-s,-z,defs,-soname,{library.name},--version-script,{versions},--exclude-libs,libc_nonshared.a"
    whole = ("-Wl,--whole-archive", archive, "-Wl,--no-whole-archive")
    run(compiler, "-shared", *where, options, *whole, "-lm", "-lgcc_s", "-o", library)
    for made in (archive, versions, unique):
        made.unlink()
    (root / "usr" / "lib" / "libstdc++.so").symlink_to(library)


def main() -> None:
    if len(sys.argv) != 4 or not re.fullmatch(r"2\.\d+", sys.argv[3]):
        raise SystemExit("usage: python scripts/old_glibc.py FOLDER MACHINE VERSION")
    root, machine, version = Path(sys.argv[1]).resolve(), sys.argv[2], sys.argv[3]
    if root.exists() and not {path.name for path in root.iterdir()} <= MADE:  # what is there is removed
        raise SystemExit(f"{root} holds other files than this script makes")
    if not shutil.which(gcc(machine)):
        raise SystemExit(f"no {gcc(machine)} found")
    zig = Path(run(sys.executable, "-c", "import ziglang; print(ziglang.__path__[0])").strip())
    shutil.rmtree(root, ignore_errors=True)
    headers(root, zig, machine, version)
    libraries(root, zig, machine, version)
    cxx_library(root, machine)


if __name__ == "__main__":
    main()
