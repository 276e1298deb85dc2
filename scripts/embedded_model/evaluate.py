"""Accuracy on held-out scenes, through torch in float32, of a Hugging Face folder or a GGUF pair.

    python evaluate.py FOLDER [--scenes 1000] [--style known|other|gray] [--no-captions]

Prints one JSON object: exact match by kind of question, over all single facts, and the share of caption
objects whose colour, shape and place are named right. Answers are greedy.
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from pathlib import Path

import data
import export
import modeling
import numpy as np
import questions
import scenes
import torch
import train
import vocab
from torch import Tensor


class Reader:
    """The decoder with a key-value cache, over a batch of pictures."""

    def __init__(self, model: modeling.Llava, before: list[int], pixels: Tensor) -> None:
        self.m = model.language_model
        self.head = model.c.head
        self.cache: list[tuple[Tensor, Tensor]] = []
        b = pixels.shape[0]
        seen = model.multi_modal_projector(model.vision_tower.vision_model(pixels))
        x = torch.cat([self.m.model.embed_tokens(torch.tensor(before)).expand(b, -1, -1), seen], 1)
        self.n = x.shape[1]
        self._run(x, torch.arange(self.n).expand(b, -1), torch.full((self.n, self.n), -1e9).triu(1), keep=True)

    def _run(self, x: Tensor, positions: Tensor, mask: Tensor, keep: bool) -> Tensor:
        cos, sin = modeling.rope(positions, self.head)
        for i, layer in enumerate(self.m.model.layers):
            a, y = layer.self_attn, layer.input_layernorm(x)
            q, k, v = (f(y).view(*y.shape[:2], -1, self.head).transpose(1, 2) for f in (a.q_proj, a.k_proj, a.v_proj))
            q, k = modeling.rotate(q, cos, sin), modeling.rotate(k, cos, sin)
            if len(self.cache) > i:
                k, v = torch.cat([self.cache[i][0], k], 2), torch.cat([self.cache[i][1], v], 2)
            if keep:
                self.cache[i : i + 1] = [(k, v)]
            x = x + a.o_proj(modeling.attend(q, k, v, mask).transpose(1, 2).flatten(2))
            x = x + layer.mlp(layer.post_attention_layernorm(x))
        return x

    def logits(self, ids: Tensor, offsets: Tensor, mask: Tensor, keep: bool) -> Tensor:
        """Logits [B, T, vocab] of text rows `offsets` [B, T] behind the picture; `mask` is additive."""
        x = self._run(self.m.model.embed_tokens(ids), self.n + offsets, mask, keep)
        return self.m.lm_head(self.m.model.norm(x))


def facts(reader: Reader, packs: list[data.Pack]) -> list[list[bool]]:
    """Whether greedy decoding gives each block's answer: if and only if every token of it is the arg max."""
    ids, labels, block, offset = (
        torch.from_numpy(np.stack([getattr(p, k) for p in packs])).long() for k in ("ids", "labels", "block", "offset")
    )
    own = (block[:, :, None] == block[:, None, :]) & torch.ones(ids.shape[1], ids.shape[1], dtype=torch.bool).tril()
    mask = torch.cat([torch.zeros(len(packs), ids.shape[1], reader.n), torch.where(own, 0.0, -1e9)], 2)[:, None]
    wrong = (reader.logits(ids, offset, mask, keep=False).argmax(-1) != labels) & (labels != -100)
    return [
        [not bool((wrong[i] & (block[i] == b)).any()) for b in range(int(block[i].max()) + 1)]
        for i in range(len(packs))
    ]


def captions(reader: Reader, tokenizer, n: int, limit: int = 130) -> list[str]:
    """Greedy answers to `Describe the image.`; ends the reader's usefulness, its cache grows."""
    prompt = tokenizer.encode("\n" + vocab.turn(questions.CAPTION_QUESTION))
    ids = torch.tensor(prompt).expand(n, -1)
    at = torch.arange(len(prompt)).expand(n, -1)
    mask = torch.cat([torch.zeros(len(prompt), reader.n), torch.full((len(prompt), len(prompt)), -1e9).triu(1)], 1)
    said = torch.empty(n, 0, dtype=torch.long)
    for step in range(limit):
        new = reader.logits(ids, at, mask, keep=True)[:, -1].argmax(-1, keepdim=True)
        said = torch.cat([said, new], 1)
        if bool((said == vocab.EOS).any(1).all()):
            break
        ids, at, mask = new, torch.full((n, 1), len(prompt) + step), torch.zeros(1)
    return [tokenizer.decode(row[: row.index(vocab.EOS)] if vocab.EOS in row else row) for row in said.tolist()]


@torch.no_grad()
def evaluate(
    folder: Path, tokenizer, n_scenes: int, style: str, with_captions: bool, first: int = 0, batch: int = 20
) -> dict:
    """Accuracies over held-out scenes first to first + n_scenes of that style."""
    state = export.read_weights(folder)
    model = modeling.Llava(modeling.Shape(layers=train.n_layers(state)))
    model.load_state_dict(state)
    model.eval()
    before = [vocab.BOS, *tokenizer.encode(vocab.BEFORE_IMAGE)]
    right: dict[str, list[bool]] = defaultdict(list)
    objects, lengths = np.zeros(3, int), []
    for start in range(first, first + n_scenes, batch):
        indices = range(start, min(start + batch, first + n_scenes))
        pictures = [scenes.scene(i, style=style) for i in indices]
        asked = [questions.held_out_questions(i, style) for i in indices]
        pixels = torch.from_numpy(np.stack([np.asarray(p.image) for p in pictures])).float() / 255
        reader = Reader(model, before, ((pixels - train.MEAN) / train.STD).permute(0, 3, 1, 2))
        packs = [data.blocks([[(q.text, q.answer, 1.0, 0)] for q in qs], tokenizer) for qs in asked]
        for qs, results in zip(asked, facts(reader, packs), strict=True):
            for q, ok in zip(qs, results, strict=True):
                right[q.kind].append(ok)
        if with_captions:
            for picture, said in zip(pictures, captions(reader, tokenizer, len(pictures)), strict=True):
                objects += questions.caption_objects(said, picture)
                lengths.append(len(tokenizer.encode(" " + said)) + 1)
    every = [ok for results in right.values() for ok in results]
    out = {
        "style": style,
        "scenes": n_scenes,
        "questions": len(every),
        "facts": round(float(np.mean(every)), 4),
    }
    out |= {kind: round(float(np.mean(right[kind])), 4) for kind in questions.KINDS}
    if with_captions:
        right_ones, named, there = map(int, objects)
        out |= {"found": round(right_ones / there, 4), "named": round(right_ones / max(1, named), 4), "objects": there}
        out |= {"caption_tokens": [min(lengths), round(float(np.mean(lengths)), 1), max(lengths)]}
    return out


def main() -> None:
    """Parse the command line and print the accuracies."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="Hugging Face folder, or a folder with the GGUF pair")
    parser.add_argument("--tokenizer", type=Path, default=vocab.MODEL, help="tokenizer.model")
    parser.add_argument("--scenes", type=int, default=1000)
    parser.add_argument("--style", choices=sorted(scenes.STYLES), default="known")
    parser.add_argument("--no-captions", action="store_true")
    args = parser.parse_args()
    print(json.dumps(evaluate(args.folder, vocab.load(args.tokenizer), args.scenes, args.style, not args.no_captions)))


if __name__ == "__main__":
    main()
