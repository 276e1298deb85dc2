"""Tries random inputs on the package: JSON schemas, messages, pictures, headers of model files.

python scripts/fuzz_inputs.py schemas --minutes 20 --seed 1

For each, all that must hold is checked (tests/inputs/check_*.py): it is refused in one line of our own, or all of it is
used; nothing crashes (native code runs in children), and nothing takes longer than 10 s. Prints the seed, and how many
inputs were tried. The first of a kind that fails is printed and is the last of that kind; the exit code is then 1.
"""

from __future__ import annotations

import argparse
import random
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
from inputs import check_headers, check_images, check_messages, check_schemas  # noqa: E402

KINDS = {
    "schemas": lambda rng, seconds: check_schemas.run(rng, seconds, native=True),
    "messages": check_messages.run,
    "images": check_images.run,
    "headers": check_headers.run,
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kinds", nargs="+", choices=KINDS)
    parser.add_argument("--minutes", type=float, default=1.0, help="for each kind (default 1)")
    parser.add_argument("--seed", type=int, default=20241220)
    args = parser.parse_args()
    if args.minutes <= 0:
        parser.error("--minutes is above 0")
    failed = 0
    for kind in args.kinds:
        print(f"{kind}: seed {args.seed}", flush=True)
        started = time.perf_counter()
        try:
            tried = KINDS[kind](random.Random(args.seed), 60 * args.minutes)
        except AssertionError as e:
            print(f"{kind}: FAILED: {e}\n{e.__cause__ or ''}", flush=True)
            failed = 1
        else:
            counts = ", ".join(f"{n:,} {what}" for what, n in sorted(tried.items()))
            print(f"{kind}: {counts} in {(time.perf_counter() - started) / 60:.1f} minutes; nothing failed", flush=True)
    return failed


if __name__ == "__main__":
    sys.exit(main())
