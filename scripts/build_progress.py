"""Shows how far a build is: `{ BUILD; echo "exit $?"; } 2>&1 | python scripts/build_progress.py LOG`.

Reads the build's output, writes it to LOG, and prints ninja's counts: in a terminal on one line, elsewhere every tenth
of the way. Ends with the build's exit code; where that is not 0 the last lines of its output are printed.
"""

from __future__ import annotations

import collections
import re
import sys
from pathlib import Path

COUNT = re.compile(r"\[(\d+)/(\d+)\] (?:Building|Linking|Generating)")
EXIT = re.compile(r"exit (\d+)")
TAIL = 20


def main() -> int:
    """Returns the exit code."""
    log = Path(sys.argv[1])
    log.parent.mkdir(parents=True, exist_ok=True)
    last = collections.deque[str](maxlen=TAIL)
    code, tenth, shown = 1, 0, False
    with log.open("w") as file:
        for line in sys.stdin:
            if found := EXIT.fullmatch(line.strip()):
                code = int(found[1])
                continue
            file.write(line)
            last.append(line)
            if found := COUNT.search(line):
                done, total = int(found[1]), int(found[2])
                if sys.stdout.isatty():
                    print(f"\r  {done} of {total}", end="", flush=True)
                    shown = True
                elif 10 * done // total > tenth:
                    tenth = 10 * done // total
                    print(f"  {done} of {total}", flush=True)
    if shown:
        print()
    if code:
        print("".join(last), end="", file=sys.stderr)
        print(f"the build failed: all of its output is in {log}", file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
