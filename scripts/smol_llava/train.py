"""Train the pair, stage after stage; the same command goes on wherever a run was cut off.

    python scripts/smol_llava/train.py --state DIR          (or ST3_SMOL_STATE=DIR)

DIR keeps the packages' contents, checkpoints and log.jsonl. README.md says what must be in DIR/pkgs.
"""

from __future__ import annotations

import argparse
import os
import re
from dataclasses import dataclass, fields, replace
from pathlib import Path

import assets
import learn
import llama
import smol
import torch
import vision
from loop import Loop


@dataclass(frozen=True)
class Stage:
    """One stretch of training. Rates are Muon's; AdamW's are a tenth of them."""

    name: str
    steps: int
    batch: int
    rate: float
    first: int  # number of the first picture: stages do not repeat each other's
    start: str | None = None  # the stage whose weights it starts from
    windows: bool = False  # attention within quarters of the picture
    fall: float = 0.3  # the last part of the stage, over which the rate falls to nothing
    seconds: float = 0  # it ends after so many, whatever its steps; 0: by its steps
    fresh: float = 0.5  # share of a batch that was not seen before
    evaluate: int = 500  # steps from one evaluation to the next; 0: none
    dense: float = 0.0  # share of crowds and pages
    tokens: int = 0  # visual tokens that the decoder sees; 0: no decoder
    rank: int = 0  # of the LoRA; 0: the decoder is frozen


STAGES = (
    Stage("windows", 3200, 16, 0.02, 0, windows=True, dense=0.7),
    Stage("whole", 1800, 16, 0.016, 10_000_000, "windows", fall=0.6, dense=0.5),
    Stage("frozen", 250, 8, 0.006, 20_000_000, "whole", tokens=144),
    Stage("pooled", 2000, 8, 0.005, 30_000_000, "frozen", tokens=144, rank=24),
    Stage("full", 700, 8, 0.003, 40_000_000, "pooled", tokens=576, rank=24),
)
PARTS = {
    "decoder": 2.5,
    "projector": 0.5,
    "vision_model": 0.4,
    "head": 0.4,
}  # shares of the rate, once the decoder is there


def changed(items: list[str]) -> list[Stage]:
    """The stages with `STAGE.FIELD=VALUE` of each item in place. Raises ValueError where one makes no sense."""
    stages, kinds = {s.name: s for s in STAGES}, {"int": int, "float": float}
    for item in items:
        match = re.fullmatch(r"(\w+)\.(\w+)=(.+)", item)
        kind = kinds.get(next((f.type for f in fields(Stage) if match and f.name == match[2]), ""))
        if not match or match[1] not in stages or kind is None:
            raise ValueError(f"not STAGE.FIELD=VALUE of a number: {item!r}")
        stages[match[1]] = replace(stages[match[1]], **{match[2]: kind(match[3])})
    return list(stages.values())


def load(path: Path) -> dict[str, torch.Tensor]:
    """The weights that a stage trained."""
    return torch.load(path, map_location="cpu", weights_only=True)["net"]


def task(stage: Stage, state: Path) -> vision.Task | learn.Task:
    """What a stage trains, with the weights that it starts from."""
    file = smol.extract(state)
    a, tokenizer = assets.load(state, smol.vocabulary(file)), smol.tokenizer(file)
    torch.manual_seed(17)
    weights = llama.weights(file)
    if stage.tokens:
        decoder = llama.Decoder(weights)
        if stage.rank:
            decoder.widen(stage.rank)
        out: vision.Task | learn.Task = learn.Task(a, tokenizer, decoder, stage.tokens, PARTS)
    else:
        words = vision.Words.of(a, tokenizer)
        out = vision.Task(a, words, weights["model.embed_tokens.weight"], stage.windows, stage.dense)
    if stage.start:
        strange = out.net.load_state_dict(load(state / f"{stage.start}.pt"), strict=False).unexpected_keys
        if any(not k.startswith("head.") for k in strange):
            raise ValueError(f"{stage.start}.pt holds weights that {stage.name} has no place for: {strange[:3]}")
    out.stream.first = stage.first
    return out


def main() -> None:
    """Parse the command line and train."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--state", type=Path, default=os.environ.get("ST3_SMOL_STATE"), help="where everything is kept")
    parser.add_argument("--stage", choices=[s.name for s in STAGES], help="only this stage")
    parser.add_argument(
        "--change", nargs="+", default=[], metavar="STAGE.FIELD=VALUE", help="as pooled.steps=700 full.batch=48"
    )
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--workers", type=int, default=1, help="processes that draw scenes")
    args = parser.parse_args()
    if not args.state:
        parser.error("name the folder for data and checkpoints: --state DIR")
    try:
        stages = changed(args.change)
    except ValueError as e:
        parser.error(str(e))
    state = Path(args.state)
    torch.set_num_threads(args.threads)
    for stage in stages:
        if args.stage in (None, stage.name) and not Loop.finished(state, stage.name):
            Loop(task(stage, state), stage, state, args.workers).run()


if __name__ == "__main__":
    main()
