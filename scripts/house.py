"""How large our part of llama.cpp is: lines by file in native/, lines that patches add, public functions.

python scripts/house.py [COMMIT ...]    (HEAD; of several commits a column each)
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
WHERE = ("src/models/", "src/", "ggml/", "")  # llama.cpp's folders, the first that fits


def git(*words: str) -> str:
    done = subprocess.run(["git", "-C", ROOT, *words], capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr.strip())
    return done.stdout


def house(commit: str) -> dict[str, int]:
    """Lines by file of native/, and the sums."""
    listed = git("ls-tree", "-r", "--name-only", commit, "native", "vendor").splitlines()
    text = {name: git("show", f"{commit}:{name}") for name in listed}
    lines = {name: text[name].count("\n") for name in listed if name.startswith("native/")}

    added: dict[str, int] = {}
    for name in sorted(text):
        if name.startswith("vendor/patches/"):
            where: str | None = None
            for line in text[name].splitlines():
                if line.startswith("+++ b/"):
                    where = next(place for place in WHERE if line.startswith(f"+++ b/{place}"))
                elif line.startswith("+") and where is not None:
                    added[where] = added.get(where, 0) + 1
    return {
        **lines,
        "native, all": sum(lines.values()),
        "the longest file": max(lines.values()),
        **{f"added by patches in {place or 'all else'}": added.get(place, 0) for place in WHERE},
        "public functions": len(re.findall(r"^LLAMA_API", text["native/st3.h"], re.M)),
    }


def main() -> None:
    commits = sys.argv[1:] or ["HEAD"]
    columns = [house(commit) for commit in commits]
    names = sorted({name for column in columns for name in column if name.startswith("native/")})
    names += [name for name in columns[0] if not name.startswith("native/")]
    print(f"| | {' | '.join(git('rev-parse', '--short', commit).strip() for commit in commits)} |")
    print("|---" * (1 + len(commits)) + "|")
    for name in names:
        print(f"| {name} | {' | '.join(str(column.get(name, '')) for column in columns)} |")


if __name__ == "__main__":
    main()
