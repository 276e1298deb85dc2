"""The stages with a decoder: the encoder and its projector through the frozen decoder, then a LoRA of it as well.

The loss is the cross-entropy of answers, and a share of what stage one asks of every patch. Early on the decoder
sees 144 tokens, averages of 2 x 2 patches at their places' rotary positions; later all 576. No token is ever dropped.
"""

from __future__ import annotations

import random
from collections import defaultdict
from dataclasses import dataclass

import llama
import numpy as np
import smol
import torch
import torch.nn.functional as F
import vision
from assets import Assets
from embedded import modeling
from packs import TEXT, Pack, blocks, pack
from pictures import Scene, labels, scene
from talk import Question, describe_question, description, held_out_questions
from torch import Tensor, nn
from torch.utils.data import IterableDataset
from vision import DEVICE, SHAPE, WEIGHTS, Head, Table, Words, losses, pixels_of, turns

PACKS = 2  # sets of questions that are kept for one picture
SENTENCES = 0.3  # weight of a description's token; a short answer's is 1
PATCHES = 0.2  # weight of what every patch is asked


class Pair(nn.Module):
    """Encoder, projector and decoder, and what patches are asked by: the encoder's head, embeddings of `words`."""

    def __init__(self, decoder: llama.Decoder, things: int, words: Words) -> None:
        super().__init__()
        self.head, self.table = Head(things), Table(words, decoder.model.embed_tokens.weight)
        self.vision_model = modeling.VisionModel(SHAPE)
        self.projector = modeling.Projector(SHAPE)
        self.decoder = decoder


@dataclass
class Sample(vision.Sample):
    """A picture with its labels, and packs of questions about it."""

    packs: list[Pack]


class Maker:
    """Makes samples of scenes."""

    def __init__(self, assets: Assets, tokenizer) -> None:
        self.assets, self.tokenizer, self.words = assets, tokenizer, Words.of(assets, tokenizer)

    def sample(self, s: Scene, packs: list[Pack]) -> Sample:
        """A scene with these packs."""
        return Sample(**vars(vision.sample(s, labels(s), self.assets, self.words)), packs=packs)

    def train(self, index: int) -> Sample:
        """Sample number `index` of the training split."""
        s, rng = scene(self.assets, index, "train"), random.Random(f"talk train {index}")
        return self.sample(s, [pack(s, rng, self.assets.names, self.tokenizer) for _ in range(PACKS)])

    def held_out(self, index: int, style: str) -> Sample:
        """A held-out scene with its short answers, each on its own."""
        s = scene(self.assets, index, "held-out", style)
        asked = [[q] for q in held_out_questions(s, index, style, self.assets.names)]
        return self.sample(s, [blocks(asked, self.tokenizer)])

    def described(self, index: int) -> Sample:
        """A held-out scene with its description."""
        s = scene(self.assets, index, "held-out")
        q = Question("describe", describe_question(random.Random(index)), description(s))
        return self.sample(s, [blocks([[q]], self.tokenizer)])


class Stream(IterableDataset):
    """Training samples without end, from picture number `first` on."""

    def __init__(self, maker: Maker, first: int) -> None:
        self.maker, self.first = maker, first

    def __iter__(self):
        yield from map(self.maker.train, turns(self.first))


def pool(features: Tensor, tokens: int) -> Tensor:
    """Average square groups of patches until `tokens` are left. [B, 576, W] to [B, tokens, W]."""
    b, n, w = features.shape
    g, k = int(tokens**0.5), int((n // tokens) ** 0.5)
    return features if k == 1 else features.view(b, g, k, g, k, w).mean((2, 4)).view(b, tokens, w)


class Layout:
    """What surrounds the picture: the prompt before it, rotary tables and masks."""

    def __init__(self, tokenizer, tokens: int) -> None:
        self.before = torch.tensor(tokenizer.encode(smol.BEFORE_IMAGE).ids, device=DEVICE)
        self.tokens = tokens
        # padded in front to a multiple of 16 rows: odd lengths cost bf16 matrix products a factor of three
        self.pad = -(len(self.before) + tokens) % 16
        n = self.n = self.pad + len(self.before) + tokens
        g, k = int(tokens**0.5), int((576 // tokens) ** 0.5)
        line = torch.arange(g, device=DEVICE) * k + (k - 1) / 2
        seen = len(self.before) + (line[:, None] * 24 + line).flatten()
        before = torch.arange(len(self.before), device=DEVICE)
        self.places = torch.cat([torch.zeros(self.pad, device=DEVICE), before, seen])
        self.first = torch.full((n, n), -1e4, device=DEVICE).triu(1)
        self.first[:, : self.pad] = -1e4

    def feed(self, packs: list[Pack]) -> dict[str, Tensor]:
        """ids, labels [B, T]; cos, sin, first and rest as `Decoder.hidden` takes them, bf16."""
        ids, labels, block, offset = (
            torch.from_numpy(np.stack([getattr(p, k) for p in packs])).to(DEVICE)
            for k in ("ids", "labels", "block", "offset")
        )
        places = torch.cat([self.places.expand(len(packs), -1), len(self.before) + 576 + offset], 1)
        cos, sin = modeling.rope(places, llama.HEAD, llama.THETA)
        own = (block[:, :, None] == block[:, None, :]).tril()
        picture = self.first.new_zeros(len(packs), ids.shape[1], self.n)
        picture[:, :, : self.pad] = -1e4
        rest = torch.cat([picture, torch.where(own, 0.0, -1e4)], 2)[:, None]
        half = {"cos": cos, "sin": sin, "first": self.first, "rest": rest}
        return {"ids": ids, "labels": labels, **{k: v.bfloat16() for k, v in half.items()}}


class Task:
    """What `loop.Loop` trains in these stages."""

    def __init__(self, assets: Assets, tokenizer, decoder: llama.Decoder, tokens: int, rates: dict[str, float]) -> None:
        self.maker = Maker(assets, tokenizer)
        self.net = Pair(decoder, len(assets.names), self.maker.words).to(DEVICE)
        decoder.bfloat16()
        for name, p in decoder.named_parameters():
            if "lora" in name:
                p.data = p.data.float()
        self.part = rates
        self.stream = Stream(self.maker, 0)
        self.layout = Layout(tokenizer, tokens)
        self.encode = torch.compile(self.net.vision_model.forward)
        for layer in decoder.model.layers:
            layer.compile()
        self.rng = random.Random(tokens)
        self.kept: dict[str, list[Sample]] = {}

    def rates(self) -> dict[str, float]:
        """Each part's share of the rate."""
        return self.part

    def _rows(self, features: Tensor, packs: list[Pack]) -> tuple[Tensor, Tensor, Tensor]:
        """Normed outputs of the rows that have a label, the labels, and where they are in [B, T]."""
        seen = self.net.projector(pool(features, self.layout.tokens)).bfloat16()
        put = self.layout.feed(packs)
        table = self.net.decoder.model.embed_tokens
        b = len(packs)
        x = torch.cat(
            [
                table(torch.zeros(b, self.layout.pad, dtype=torch.long, device=DEVICE)),
                table(self.layout.before.expand(b, -1)),
                seen,
                table(put["ids"]),
            ],
            1,
        )
        h = self.net.decoder.hidden(x, put["cos"], put["sin"], put["first"], put["rest"])
        where = put["labels"] >= 0
        return h[where], put["labels"][where], where

    def loss(self, samples: list[Sample], step: int) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss to go down, and what to log."""
        packs = [self.rng.choice(s.packs) for s in samples]
        features = self.encode(pixels_of(samples))
        h, labels, where = self._rows(features, packs)
        logits = self.net.decoder.logits(h)
        weight = torch.ones(len(packs), TEXT)
        for i, p in enumerate(packs):
            for kind, (first, last) in zip(p.kinds, p.spans, strict=True):
                weight[i, first:last] = SENTENCES if kind == "describe" else 1.0
        w = weight.to(DEVICE)[where]
        loss = (F.cross_entropy(logits, labels, reduction="none") * w).sum() / w.sum()
        right = (logits.argmax(-1) == labels)[w == 1].float().mean()
        patches, shares = losses(self.net, features, samples)
        rest = sum(v * WEIGHTS[k] for k, v in patches.items())
        return loss + PATCHES * rest, {"answer_loss": loss, "tokens_right": right, **shares}

    @torch.no_grad()
    def right(self, samples: list[Sample]) -> list[list[tuple[str, bool]]]:
        """For every answer of the first packs, its kind and whether greedy decoding gives just it.

        That is so if and only if each of its tokens is the arg max where those before it are the answer's.
        """
        packs = [s.packs[0] for s in samples]
        h, labels, where = self._rows(self.encode(pixels_of(samples)), packs)
        hit = torch.zeros_like(where)
        hit[where] = self.net.decoder.logits(h).argmax(-1) == labels
        return [
            [(k, bool(hit[i, p:q].all())) for k, (p, q) in zip(pk.kinds, pk.spans, strict=True)]
            for i, pk in enumerate(packs)
        ]

    def accuracy(self, samples: list[Sample], batch: int) -> dict:
        """Share of right answers by kind and over all, with their number."""
        found: dict[str, list[bool]] = defaultdict(list)
        for k in range(0, len(samples), batch):
            for rows in self.right(samples[k : k + batch]):
                for kind, ok in rows:
                    found[kind].append(ok)
                    found["all"].append(ok)
        return {k: [round(float(np.mean(v)), 3), len(v)] for k, v in sorted(found.items())}

    def evaluate(self, batch: int, n: int = 32) -> dict:
        """Right short answers on held-out scenes of both styles."""
        out = {}
        for style in ("known", "other"):
            if style not in self.kept:
                self.kept[style] = [self.maker.held_out(i, style) for i in range(n)]
            out[style] = self.accuracy(self.kept[style], batch)
        return out
