"""What scripts that measure share: options that are checked before hours go by, files that are whole or not there."""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT))
from st3_edge.commands.bench.cache import random_text  # noqa: E402
from st3_edge.commands.bench.shapes import SHAPES, TYPES  # noqa: E402
from st3_edge.commands.options import whole  # noqa: E402
from st3_edge.errors import LibraryError, ModelError, OutputError, St3Error, one_line  # noqa: E402
from st3_edge.files.output import cache_folder, check_output, replacing  # noqa: E402
from st3_edge.native import libraries  # noqa: E402

count = whole(1, 10**6)


def budget(text: str) -> float:
    """The type of an option: a budget."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"a number above 0 to 1, not {text!r}")
    return value


def budgets(text: str) -> tuple[float, ...]:
    """The type of an option: budgets with commas between."""
    return tuple(budget(part) for part in text.split(","))


def result_file(text: str) -> Path:
    """The type of an option: a file that can be written when the measurement is over."""
    path = Path(text)
    try:
        check_output(path, [], force=True)
    except OutputError as e:
        raise argparse.ArgumentTypeError(str(e)) from e
    return path


def write_text(path: Path, text: str) -> None:
    """The text in place of what the file had; an interrupt leaves it as it was."""
    with replacing(path) as file:
        file.write(text.encode())


def write_json(path: Path, figures: dict[str, Any]) -> None:
    """The figures, as `write_text`."""
    write_text(path, json.dumps(figures, indent=1) + "\n")


def number(value: float) -> str:
    """Three digits that count, and no exponent."""
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"


def spread(values: Sequence[float], write: Callable[[float], str] = number) -> str:
    """Median, smallest and largest."""
    return f"{write(statistics.median(values))} ({write(min(values))} to {write(max(values))})"


def ratio(value: float) -> str:
    """Two decimals."""
    return f"{value:.2f}"


def add_shape(parser: argparse.ArgumentParser, default: str | None = None) -> None:
    """The options that `random_model` takes."""
    parser.add_argument("--shape", default=default, choices=SHAPES)
    parser.add_argument("--type", default=TYPES[0], choices=TYPES)
    parser.add_argument("--cache", type=Path, default=cache_folder(), help="where random weights are kept")


def random_model(args: argparse.Namespace) -> Path:
    """The file of random weights of the shape that was asked for. Raises ModelError."""
    if args.type not in SHAPES[args.shape].types:
        raise ModelError(f"--type {args.type} does not fit --shape {args.shape}")
    return random_text(args.shape, args.type, args.cache)


def stock_folder() -> Path:
    """The libraries of stock llama.cpp. Raises LibraryError where they are not there."""
    folder = Path(os.environ.get("ST3_STOCK_LIB_DIR") or ROOT / "build" / "stock" / "lib").resolve()
    if not libraries.stock_path(folder, "llama").is_file():
        raise LibraryError(f"no stock llama.cpp in {folder}: set ST3_STOCK_LIB_DIR (scripts/test.sh builds it)")
    return folder


def run(main: Callable[[], int | None]) -> NoReturn:
    """Ends the process as `main` does; where it fails for a reason of the outside, with a line and no traceback."""
    try:
        sys.exit(main())
    except (St3Error, OSError) as e:
        sys.exit(f"error: {one_line(e)}")
    except subprocess.CalledProcessError as e:  # which has said why
        sys.exit(f"error: {Path(e.cmd[0]).name} ended with exit code {e.returncode}")
    except KeyboardInterrupt:
        sys.exit(130)
