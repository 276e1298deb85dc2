#!/usr/bin/env python3
"""Put the pinned upstream, patched, into a folder.

    python vendor/upstream.py                       fetch and check the archive, print where it is
    python vendor/upstream.py --dest DIR            unpack its llama.cpp into DIR, with fixes/ and patches/, and the
                                                    modules that declare its C interface into DIR/bindings
    python vendor/upstream.py --dest DIR --stock    the same with fixes/ alone

The archive named by --sdist or ST3_SDIST is used when there is one; else pip fetches it, once, into build/.
Only files whose content changes are written, so a build system rebuilds no more than it must.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import json
import os
import re
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path
from typing import NoReturn

HERE = Path(__file__).resolve().parent
PIN = json.loads((HERE / "upstream.json").read_text())
REQUIREMENT = f"{PIN['package']}=={PIN['version']}"
STAMP = ".st3-upstream"
# Two thirds of the bytes, and nothing that is compiled. (.git points outside of the archive.)
UNUSED = (".git", "docs/", "models/", "media/", "benches/")
BINDINGS = ("llama_cpp/_ctypes_extensions.py", "llama_cpp/llama_cpp.py", "llama_cpp/mtmd_cpp.py", "LICENSE.md")
HUNK = re.compile(rb"@@ -(\d+)(?:,(\d+))? \+\d+(?:,(\d+))? @@")


def fail(message: str) -> NoReturn:
    sys.exit(f"vendor/upstream.py: {message}")


def archive_name() -> str:
    return f"{PIN['package'].replace('-', '_')}-{PIN['version']}.tar.gz"


def check(archive: Path) -> Path:
    if not archive.is_file():
        fail(f"there is no archive {archive}: correct ST3_SDIST, or unset it to let pip fetch {REQUIREMENT}")
    with archive.open("rb") as file:
        digest = hashlib.sha256()
        while block := file.read(1 << 20):
            digest.update(block)
    if digest.hexdigest() != PIN["sha256"]:
        fail(f"{archive} has SHA-256 {digest.hexdigest()}, the pin says {PIN['sha256']}: remove it and try again")
    return archive


def fetch(folder: Path) -> Path:
    """Let pip find and load the archive: it knows the user's index, proxy and cache."""
    archive = folder / archive_name()
    if archive.is_file():
        return check(archive)
    if not importlib.util.find_spec("pip"):
        fail(f"this Python has no pip to fetch {REQUIREMENT} with: install pip, or name an archive with ST3_SDIST")
    folder.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    command += ["--no-binary", PIN["package"]]
    # pip asks every source archive for its metadata. Inside a build the tool for that is already here.
    if importlib.util.find_spec("scikit_build_core"):
        command.append("--no-build-isolation")
    # An outer pip's bookkeeping is not ours.
    env = {key: value for key, value in os.environ.items() if key != "PIP_BUILD_TRACKER"}
    with tempfile.TemporaryDirectory(dir=folder) as temporary:
        done = subprocess.run([*command, "--dest", temporary, REQUIREMENT], env=env, capture_output=True, text=True)
        found = list(Path(temporary).glob("*.tar.gz"))
        if done.returncode or len(found) != 1:
            errors = [line for line in done.stderr.splitlines() if "error" in line.lower()] or ["no archive came"]
            fail(
                f"pip could not fetch {REQUIREMENT} ({errors[-1].strip()}): "
                "check the network, or name an archive on disk with ST3_SDIST"
            )
        check(found[0]).replace(archive)
    return archive


def read(archive: Path) -> dict[str, bytes]:
    """The files of llama.cpp in the archive, by path, and the bindings below bindings/."""
    top = f"{archive_name().removesuffix('.tar.gz')}/"
    root = f"{top}vendor/llama.cpp/"
    bindings = {top + name: f"bindings/{Path(name).name}" for name in BINDINGS}
    tree = {}
    with tarfile.open(archive) as tar:
        for member in tar:
            path = bindings.get(member.name) or member.name.removeprefix(root)
            if member.isfile() and path != member.name and not path.startswith(UNUSED):
                file = tar.extractfile(member)
                assert file is not None
                tree[path] = file.read()
    return tree


def apply(patch: Path, tree: dict[str, bytes]) -> None:
    """Apply a unified diff exactly: no fuzz, and a moved hunk only where one place fits."""
    lines = iter(patch.read_bytes().splitlines(keepends=True))
    path, source, shift, hunks = "", list[bytes](), 0, 0
    for line in lines:
        if line.startswith(b"--- "):
            path = line[4:].decode().strip().removeprefix("a/")
            if path not in tree and line.startswith((b"--- a/", b"--- /dev/null")):
                fail(f"{patch.name}: upstream has no file {path} (new files belong in native/, not in a patch)")
            source, shift = tree.get(path, b"").splitlines(keepends=True), 0
        elif match := HUNK.match(line):
            start, n_old, n_new = (int(group or 1) for group in match.groups())
            old, new = list[bytes](), list[bytes]()
            while len(old) < n_old or len(new) < n_new:
                body = next(lines, b"")
                if body[:1] not in (b" ", b"-", b"+"):
                    fail(f"{patch.name}: the hunk at {path}:{start} is malformed")
                if body[:1] in b" -":
                    old.append(body[1:])
                if body[:1] in b" +":
                    new.append(body[1:])
            at = start - 1 + shift
            if source[at : at + n_old] != old:
                fits = [i for i in range(len(source)) if source[i : i + n_old] == old]
                if len(fits) != 1:
                    fail(f"{patch.name} does not apply to {path}:{start}: redo it on {REQUIREMENT} (vendor/README.md)")
                at = fits[0]
            source[at : at + n_old] = new
            shift = at - (start - 1) + len(new) - n_old
            tree[path] = b"".join(source)
            hunks += 1
    if not hunks:
        fail(f"{patch.name} changes nothing")


def write(tree: dict[str, bytes], dest: Path) -> None:
    """Make dest hold exactly the tree, leaving files that are right as they are."""
    dest.mkdir(parents=True, exist_ok=True)
    if any(dest.iterdir()) and not (dest / STAMP).is_file():
        fail(f"{dest} holds files that are not upstream's: name an empty folder")
    (dest / STAMP).write_text("unfinished")
    keep = {STAMP, *tree}
    for old in dest.rglob("*"):
        if old.is_file() and old.relative_to(dest).as_posix() not in keep:
            old.unlink()
    for path, data in tree.items():
        file = dest / path
        if not file.is_file() or file.read_bytes() != data:
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(data)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dest", type=Path, help="folder that llama.cpp is put into")
    parser.add_argument("--stock", action="store_true", help="leave patches/ out")
    parser.add_argument("--sdist", default=os.environ.get("ST3_SDIST"), help="an archive that is already on disk")
    args = parser.parse_args()

    folders = ["fixes"] if args.stock else ["fixes", "patches"]
    patches = [patch for folder in folders for patch in sorted((HERE / folder).glob("*.patch"))]
    parts = [Path(__file__), HERE / "upstream.json", *patches]
    fingerprint = hashlib.sha256(b"".join(hashlib.sha256(part.read_bytes()).digest() for part in parts)).hexdigest()
    if args.dest and (args.dest / STAMP).is_file() and (args.dest / STAMP).read_text() == fingerprint:
        return

    archive = check(Path(args.sdist)) if args.sdist else fetch(HERE.parent / "build")
    if not args.dest:
        print(archive)
        return
    tree = read(archive)
    for patch in patches:
        apply(patch, tree)
    write(tree, args.dest)
    (args.dest / STAMP).write_text(fingerprint)


if __name__ == "__main__":
    try:
        main()
    except OSError as error:
        fail(f"{error} (where build/ cannot be written, name an archive on disk with ST3_SDIST)")
