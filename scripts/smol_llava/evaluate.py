"""Right answers on held-out scenes, through torch in bf16, of a checkpoint of the stages with a decoder.

    python scripts/smol_llava/evaluate.py --state DIR CHECKPOINT [--scenes 150] [--style known|other]

Prints one JSON object: share right and number of answers, by kind of question and over all. An answer counts
if greedy decoding gives just its tokens; `describe` are whole descriptions, which is a hard test.
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path

import assets
import learn
import llama
import smol
import torch
from pictures import STYLES
from train import STAGES, load


def main() -> None:
    """Parse the command line and print the shares."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--state", type=Path, default=os.environ.get("ST3_SMOL_STATE"), help="where everything is kept")
    parser.add_argument("--scenes", type=int, default=150)
    parser.add_argument("--style", choices=STYLES, default="known")
    parser.add_argument("--descriptions", type=int, default=0, help="of so many scenes, too")
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    if not args.state:
        parser.error("name the folder for data and checkpoints: --state DIR")
    torch.set_num_threads(args.threads)
    file = smol.extract(Path(args.state))
    a, tokenizer, net = assets.load(Path(args.state)), smol.tokenizer(file), load(args.checkpoint)
    decoder = llama.Decoder(llama.weights(file))
    ranks = {v.shape[0] for k, v in net.items() if k.endswith("lora_a")}
    if ranks:
        decoder.widen(ranks.pop())
    tokens = next((s.tokens for s in STAGES if s.name == args.checkpoint.stem and s.tokens), 576)
    task = learn.Task(a, tokenizer, decoder, tokens, {"": 1.0})
    task.net.load_state_dict(net, strict=False)
    samples = [task.maker.held_out(i, args.style) for i in range(args.scenes)]
    samples += [task.maker.described(i) for i in range(args.descriptions)]
    with torch.autocast("cpu", torch.bfloat16):
        found = task.accuracy(samples, 8)
    print(json.dumps({"checkpoint": args.checkpoint.name, "style": args.style, "tokens": tokens, "right": found}))


if __name__ == "__main__":
    main()
