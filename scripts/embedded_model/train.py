"""Train the embedded model: vision first, then the decoder on pooled tokens, then on all of them.

    python train.py --out DIR     every phase in order; an interrupted run goes on where it was
    python train.py --out DIR --phase full --start FROM --steps N
                                  one phase, from a checkpoint, a Hugging Face folder or the
                                  folder of the shipped GGUF pair

Seeds are fixed, progress is one JSON object a line in DIR/log.jsonl, and a CUDA device is used where
there is one. Pooled tokens (24 x 24 features averaged to 12 x 12, at their original rotary positions)
stand for the picture in the phase before the last; the last phase sees all 576, and nothing is ever dropped.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import time
from dataclasses import dataclass, replace
from pathlib import Path

import data
import modeling
import numpy as np
import torch
import torch.nn.functional as F
import vocab
from optim import Muon, is_matrix
from torch import Tensor, nn

MEAN = torch.tensor([0.48145466, 0.4578275, 0.40821073])
STD = torch.tensor([0.26862954, 0.26130258, 0.27577711])
AUX = (8, 9, 37, 10, 2)  # shape, color, glyph, place, centre: classes of scenes.patch_labels
AUX_WEIGHT = (1.0, 0.7, 1.6, 0.3, 0.5)


@dataclass(frozen=True)
class Phase:
    """One stretch of training. Rates are Muon's; AdamW's are a tenth of them."""

    name: str
    steps: int
    batch: int
    vision_rate: float  # 0: the tower is frozen
    decoder_rate: float  # 0: no decoder, auxiliary loss only
    tokens: int = 576  # visual tokens the decoder sees
    layers: int = 16
    windows: bool = False
    dense: float = 0.0  # share of crowded pictures
    fresh: float = 0.25  # share of a batch that was not seen before
    aux: float = 0.0  # weight of the auxiliary loss beside the decoder's
    look: float = 0.0  # weight of the loss that makes one layer look at what a question is about
    decay: float = 0.5  # last share of the steps over which rates fall
    first: int = 0  # number of the first picture: phases do not repeat each other's


PHASES = (
    Phase("windows", 2320, 24, 0.02, 0, layers=8, windows=True, dense=0.8, fresh=0.5, decay=0.4),
    Phase("vision", 125, 24, 0.008, 0, layers=8, dense=0.7, fresh=0.5, decay=0.9, first=10_000_000),
    Phase("pooled", 750, 16, 0, 0.006, tokens=144, layers=8, look=0.3, first=20_000_000),
    Phase("full", 1000, 8, 0, 0.004, layers=16, fresh=0.5, decay=0.8, first=40_000_000),
)


class Trainee(nn.Module):
    """The model and the head that labels patches (dropped at export)."""

    def __init__(self, shape: modeling.Shape) -> None:
        super().__init__()
        self.model = modeling.Llava(shape)
        self.aux = nn.Linear(shape.vision_width, sum(AUX))
        nn.init.normal_(self.aux.weight, std=0.02)


def aux_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy of the patch labels, float32 scalar; patches of the ground count a tenth.

    logits [B, 576, 66], labels int64 [B, 576, 5].
    """
    weight = torch.where(labels[..., 0] > 0, 1.0, 0.1).flatten()
    total = logits.new_zeros((), dtype=torch.float32)
    for part, target, scale in zip(logits.float().split(AUX, -1), labels.unbind(-1), AUX_WEIGHT, strict=True):
        each = F.cross_entropy(part.flatten(0, 1), target.flatten(), reduction="none")
        total = total + scale * (each * weight).sum() / weight.sum()
    return total


def answer_loss(logits: Tensor, labels: Tensor, weight: Tensor) -> Tensor:
    """Weighted cross-entropy over answer tokens. logits [B, T, vocab], labels and weight [B, T]."""
    each = F.cross_entropy(logits.float().flatten(0, 1), labels.flatten(), reduction="none", ignore_index=-100)
    return (each * weight.flatten()).sum() / weight.sum()


def pixels_of(samples: list[data.Sample], device: torch.device) -> Tensor:
    """Normalised pictures, float32 [B, 3, 336, 336]."""
    x = torch.from_numpy(np.stack([s.pixels for s in samples])).to(device).float() / 255
    return ((x - MEAN.to(device)) / STD.to(device)).permute(0, 3, 1, 2)


def pool(features: Tensor, tokens: int) -> Tensor:
    """Average square groups of patches until `tokens` are left. [B, 576, W] to [B, tokens, W]."""
    b, n, w = features.shape
    if tokens == n:
        return features
    g, k = int(tokens**0.5), int((n // tokens) ** 0.5)
    return features.view(b, g, k, g, k, w).mean((2, 4)).view(b, tokens, w)


def layout(packs: list[data.Pack], tokens: int, before: int, head: int, device: torch.device) -> dict[str, Tensor]:
    """Everything but the picture that the decoder is fed: ids, labels, rotary tables and masks."""
    ids, labels, block, offset, about = (
        torch.from_numpy(np.stack([getattr(p, k) for p in packs])).to(device).long()
        for k in ("ids", "labels", "block", "offset", "about")
    )
    weight = torch.from_numpy(np.stack([p.weight for p in packs])).to(device)
    g, k = int(tokens**0.5), int((576 // tokens) ** 0.5)
    line = torch.arange(g, device=device) * k + (k - 1) / 2
    seen = torch.cat([torch.arange(before, device=device), before + (line[:, None] * 24 + line).flatten()])
    places = torch.cat([seen.expand(len(packs), -1), before + 576 + offset], 1)
    cos, sin = modeling.rope(places, head)
    n = before + tokens
    first = torch.full((n, n), -1e4, device=device).triu(1)
    same = block[:, :, None] == block[:, None, :]
    own = same & torch.ones(ids.shape[1], ids.shape[1], dtype=torch.bool, device=device).tril()
    rest = torch.cat([torch.zeros(len(packs), ids.shape[1], n, device=device), torch.where(own, 0.0, -1e4)], 2)
    half = torch.bfloat16
    return {
        "ids": ids,
        "labels": labels,
        "weight": weight,
        "cos": cos.to(half),
        "sin": sin.to(half),
        "first": first.to(half),
        "rest": rest[:, None].to(half),
        "about": about,
    }


def load_start(path: Path) -> dict[str, Tensor]:
    """Weights by Hugging Face name, from a checkpoint, an exported folder, or a folder with the GGUF pair."""
    if path.is_file():
        return torch.load(path, map_location="cpu", weights_only=True)["model"]
    import export

    return export.read_weights(path)


def n_layers(state: dict[str, Tensor]) -> int:
    """Decoder layers in a state dict."""
    return 1 + max(int(k.split(".layers.")[1].split(".")[0]) for k in state if "language_model.model.layers." in k)


class Run:
    """One phase in progress."""

    def __init__(self, phase: Phase, out: Path, start: Path | None) -> None:
        torch.manual_seed(1000 + phase.first // 1_000_000)
        self.rng = random.Random(phase.first)
        self.phase, self.out = phase, out
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.net = Trainee(modeling.Shape(layers=phase.layers))
        self.step = 0
        self.saved = out / f"{phase.name}.pt"
        checkpoint = None
        if self.saved.exists():
            checkpoint = torch.load(self.saved, map_location="cpu", weights_only=True)
            self.net.load_state_dict({**{"model." + k: v for k, v in checkpoint["model"].items()}, **checkpoint["aux"]})
            self.step = checkpoint["step"]
        elif start:
            state = load_start(start)
            if n_layers(state) != phase.layers:
                state = modeling.deepen(state, n_layers(state), phase.layers)
            self.net.model.load_state_dict(state)
            if start.is_file():
                self.net.load_state_dict(torch.load(start, map_location="cpu", weights_only=True)["aux"], strict=False)
        self.net.to(self.device)
        self._optimizers()
        if checkpoint:
            for o, s in zip(self.optimizers, checkpoint["optimizers"], strict=True):
                o.load_state_dict(s)
        self.tokenizer_path = out / "tokenizer.model"
        tokenizer = vocab.load(self.tokenizer_path)
        self.before = torch.tensor([vocab.BOS, *tokenizer.encode(vocab.BEFORE_IMAGE)], device=self.device)
        tower = self.net.model.vision_tower.vision_model
        self.windows = torch.compile(tower.windows)
        self.encode = torch.compile(tower.forward)
        self.decode = torch.compile(self.net.model.forward)
        self.buffer: list[tuple[data.Sample, Tensor | None]] = []

    def _optimizers(self) -> None:
        p = self.phase
        groups: dict[tuple[bool, float], list[nn.Parameter]] = {}
        for name, w in self.net.named_parameters():
            vision = "vision_model" in name
            rate = (
                p.vision_rate
                if vision
                else max(p.decoder_rate, p.vision_rate)
                if name.startswith("aux")
                else p.decoder_rate
            )
            w.requires_grad_(rate > 0)
            if rate > 0:
                groups.setdefault((is_matrix(name, w), rate), []).append(w)
        muon = [{"params": w, "lr": r} for (m, r), w in groups.items() if m]
        adam = [{"params": w, "lr": r / 10} for (m, r), w in groups.items() if not m]
        self.optimizers = [Muon(muon), torch.optim.AdamW(adam, betas=(0.9, 0.98), weight_decay=0.0)]
        for o in self.optimizers:
            for g in o.param_groups:
                g["peak"] = g["lr"]

    def _rate(self, spent: float) -> float:
        """Warm up, hold, fall; `spent` is the share of the time given that is gone."""
        p = self.phase
        left = (1 - max(self.step / p.steps, spent)) / p.decay
        return min(1.0, (self.step + 1) / 60, 0.03 + 0.97 * left)

    def _batch(self, stream: data.Stream) -> tuple[list[data.Sample], Tensor | None]:
        """Fresh pictures and ones seen before; with a frozen tower their features are kept, pooled."""
        p = self.phase
        fresh = stream.take(max(1, round(p.batch * p.fresh)))
        kept: list[tuple[data.Sample, Tensor | None]] = [(s, None) for s in fresh]
        if p.vision_rate == 0:
            with torch.no_grad(), torch.autocast(self.device.type, torch.bfloat16):
                features = pool(self.encode(pixels_of(fresh, self.device)), p.tokens).bfloat16()
            kept = [(replace(s, pixels=s.pixels[:0]), f.clone()) for s, f in zip(fresh, features, strict=True)]
        again = self.rng.sample(self.buffer, min(p.batch - len(kept), len(self.buffer)))
        for item in kept:
            if len(self.buffer) < 3000 if p.vision_rate == 0 else len(self.buffer) < 700:
                self.buffer.append(item)
            else:
                self.buffer[self.rng.randrange(len(self.buffer))] = item
        batch = kept + again
        while len(batch) < p.batch:
            batch.append(self.rng.choice(kept))
        features = torch.stack([f for _, f in batch]) if p.vision_rate == 0 else None
        return [s for s, _ in batch], features

    def _loss(self, samples: list[data.Sample], features: Tensor | None) -> dict[str, Tensor]:
        p = self.phase
        out: dict[str, Tensor] = {}
        with torch.autocast(self.device.type, torch.bfloat16):
            if features is None:
                pixels = pixels_of(samples, self.device)
                shift = 6 * (self.step % 2)
                features = self.windows(pixels, shift) if p.windows else self.encode(pixels)
                if p.aux or not p.decoder_rate:
                    labels = (
                        torch.from_numpy(np.stack([s.labels for s in samples])).to(self.device).long().flatten(1, 2)
                    )
                    logits = self.net.aux(features)
                    out["aux"] = aux_loss(logits, labels)
                    if self.step % 20 == 0:
                        self.seen = patch_accuracy(logits, labels)
                features = pool(features, p.tokens)
            if p.decoder_rate:
                packs = [self.rng.choice(s.packs) for s in samples]
                put = layout(packs, p.tokens, len(self.before), self.net.model.c.head, self.device)
                watch = p.layers // 2 if p.look else -1
                logits, watched = self.decode(
                    features,
                    self.before.expand(len(samples), -1),
                    put["ids"],
                    put["cos"],
                    put["sin"],
                    put["first"],
                    put["rest"],
                    watch,
                )
                if watched is not None:
                    out["look"] = self._look(watched, watch, put, samples)
                out["answer"] = answer_loss(logits, put["labels"], put["weight"])
                if self.step % 20 == 0:
                    self.seen = answer_accuracy(
                        logits, put["labels"], torch.from_numpy(np.stack([q.block for q in packs]))
                    )
        return out

    def _look(self, x: Tensor, index: int, put: dict[str, Tensor], samples: list[data.Sample]) -> Tensor:
        """How badly two heads of a layer, where an answer begins, look at the things it rests on.

        Minus the log of their attention on those things' tokens. It ends a long plateau in which
        answers are about any thing of the picture.
        """
        layer, tokens = self.net.model.language_model.model.layers[index], self.phase.tokens
        rows = put["about"].ne(0).to(torch.int8).topk(24, 1).indices
        bits = put["about"].gather(1, rows)
        seen = layer.self_attn.weights(layer.input_layernorm(x), rows, put["cos"], put["sin"], put["rest"])[:, :2]
        things = torch.from_numpy(np.stack([s.things for s in samples])).to(self.device).long().flatten(1)
        belongs = F.one_hot(things, 7)[..., 1:].float()  # B 576 6
        belongs = pool(belongs, tokens) > 0
        wanted = ((bits[:, :, None] >> torch.arange(6, device=self.device)) & 1).float()
        hit = (wanted @ belongs.float().transpose(1, 2)) > 0  # B R tokens
        before = len(self.before)
        mass = seen[..., before : before + tokens].masked_fill(~hit[:, None], -1e4).logsumexp(-1)
        counts = (bits > 0)[:, None].float().expand_as(mass)
        return -(mass * counts).sum() / counts.sum()

    def go(self, minutes: float) -> None:
        """Train to the end of the phase, or for so many minutes; saves now and then."""
        p = self.phase
        stream = data.Stream(
            str(self.tokenizer_path), p.first + self.step * p.batch, dense=p.dense, texts=p.decoder_rate > 0
        )
        begun = last = time.time()
        while self.step < p.steps:
            samples, features = self._batch(stream)
            losses = self._loss(samples, features)
            loss = (
                losses.get("look", 0) * p.look
                + losses.get("answer", 0)
                + losses.get("aux", 0) * (p.aux if p.decoder_rate else 1.0)
            )
            loss.backward()
            torch.nn.utils.clip_grad_norm_([w for w in self.net.parameters() if w.requires_grad], 1.0)
            rate = self._rate((time.time() - begun) / (60 * minutes))
            for o in self.optimizers:
                for g in o.param_groups:
                    g["lr"] = g["peak"] * rate
                o.step()
                o.zero_grad(set_to_none=True)
            if self.step % 20 == 0:
                row = {
                    "phase": p.name,
                    "step": self.step,
                    **{k: round(v.item(), 4) for k, v in losses.items()},
                    **self.seen,
                }
                row |= {"rate": round(rate, 3), "seconds": round(time.time() - begun, 1)}
                with (self.out / "log.jsonl").open("a") as log:
                    log.write(json.dumps(row) + "\n")
            self.step += 1
            if time.time() - last > 120:
                self.save()
                last = time.time()
            if time.time() - begun > 60 * minutes:
                break
        self.save()
        stream.close()

    def save(self) -> None:
        """Write the phase's checkpoint, whole or not at all."""
        state = {
            "model": self.net.model.state_dict(),
            "aux": {k: v for k, v in self.net.state_dict().items() if k.startswith("aux.")},
            "optimizers": [o.state_dict() for o in self.optimizers],
            "step": self.step,
        }
        torch.save(state, self.saved.with_suffix(".new"))
        self.saved.with_suffix(".new").replace(self.saved)


def patch_accuracy(logits: Tensor, labels: Tensor) -> dict[str, float]:
    """Share of right labels, over the patches of things (glyphs: of things that have one)."""
    out = {}
    on = labels[..., 0] > 0
    names = ("shape", "color", "glyph", "place", "centre")
    for name, part, target in zip(names, logits.split(AUX, -1), labels.unbind(-1), strict=True):
        where = on if name != "glyph" else target > 0
        out[name] = round((part.argmax(-1) == target)[where].float().mean().item(), 3)
    return out


def answer_accuracy(logits: Tensor, labels: Tensor, block: Tensor) -> dict[str, float]:
    """Share of conversations that are right throughout, captions among them, and of right answer tokens."""
    wrong = ((logits.argmax(-1) != labels) & (labels != -100)).cpu()
    right = [
        not (wrong[i] & (block[i] == b)).any().item() for i in range(len(block)) for b in range(int(block[i].max()) + 1)
    ]
    tokens = (labels != -100).cpu()
    return {
        "whole": round(float(np.mean(right)), 3),
        "tokens": round(1 - wrong[tokens].float().mean().item(), 4),
    }


def main() -> None:
    """Parse the command line and train."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for checkpoints, tokenizer and log")
    parser.add_argument("--phase", choices=[p.name for p in PHASES], help="only this phase")
    parser.add_argument(
        "--start", type=Path, help="weights to start from: checkpoint file, Hugging Face or GGUF folder"
    )
    parser.add_argument("--steps", type=int, help="steps of that phase, instead of its own number")
    parser.add_argument("--minutes", type=float, default=1e9, help="end each phase by then, rates included")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    if not (args.out / "tokenizer.model").exists():
        shutil.copyfile(vocab.MODEL, args.out / "tokenizer.model")
    start = args.start
    for phase in PHASES:
        if args.phase in (None, phase.name):
            run = Run(replace(phase, steps=args.steps or phase.steps), args.out, start)
            run.go(args.minutes)
            start = args.out / f"{phase.name}.pt"


if __name__ == "__main__":
    main()
