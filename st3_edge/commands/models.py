"""`st3-edge models`: the models that were downloaded, how large they are, and how ST³ prunes them."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from ..errors import St3Error
from .console import Console, amount


@dataclass(frozen=True)
class Cached:
    """name: as --hf takes it; size: bytes of both files; architecture: the text model's; schedule: the `st3.*` keys of
    its file, {}: none, so the default schedule prunes it; problem: why it cannot be used, or None."""

    name: str
    size: int
    model: str
    mmproj: str
    architecture: str
    schedule: dict[str, int | float | bool | str]
    problem: str | None


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Describes the subcommand."""
    parser.description = (
        "Lists the vision models in Hugging Face's cache, which --hf takes without a network: their size, and the "
        "pruning schedule that their files carry (st3-edge tune writes one)."
    )
    parser.epilog = "To download one, use it: st3-edge chat --hf OWNER/REPO[:QUANT]. To remove one: hf cache rm."
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def main(console: Console, arguments: argparse.Namespace) -> int:
    """Lists them; returns the exit code."""
    found = cached()
    if arguments.json:
        console.say(json.dumps([asdict(one) for one in found], indent=2))
        return 0
    if not found:
        console.note("No models yet. `st3-edge chat --hf OWNER/REPO` downloads one and talks to it.")
        return 0
    width = max(len(one.name) for one in found)
    console.say(console.strong(f"{'NAME':<{width}}  {'SIZE':>7}  {'MODEL':<8}  SCHEDULE"))
    for one in found:
        said = one.problem or pruning(one.schedule)
        console.say(f"{one.name:<{width}}  {amount(one.size):>7}  {one.architecture:<8}  {said}")
    return 0


def pruning(schedule: Mapping[str, object]) -> str:
    """What the `st3.*` keys of a file say, for a person."""
    if not schedule:
        return "default schedule"
    if schedule.get("st3.preset") == "off":
        return "off, by its file"
    words = [
        f"{key.removeprefix('st3.')} {value:.3g}" if isinstance(value, float) else f"{key.removeprefix('st3.')} {value}"
        for key, value in schedule.items()
    ]
    return f"by its file: {', '.join(words)}"


def cached() -> list[Cached]:
    """The pairs of text model and mmproj in the cache, by name."""
    from ..files import choose, hub

    found = []
    for repository, folder in hub.snapshots():
        names = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
        models, vision = choose.halves(names)
        for model in models if vision else []:
            parts = choose.parts(model)
            if names.issuperset(parts):
                half = choose.half(model, vision)[0]
                label = choose.quant_of(model)
                name = f"{repository}:{label}" if label else repository
                found.append(_read(name, folder, parts, half))
    return sorted(found, key=lambda one: one.name.lower())


def _read(name: str, folder: Path, parts: list[str], half: str) -> Cached:
    from ..files.pair import check_pair

    model, mmproj = str(folder / parts[0]), str(folder / half)
    size = sum((folder / part).stat().st_size for part in (*parts, half))
    try:
        header = check_pair(model, mmproj)
    except St3Error as e:
        return Cached(name, size, model, mmproj, "", {}, str(e))
    return Cached(name, size, model, mmproj, header.architecture, header.schedule, None)
