"""Stage one: the vision encoder learns names, words and places from patches; its projector, their embeddings.

The encoder is `modeling.VisionModel` (CLIP's graph, so that llama.cpp runs it). Every patch is asked what
thing it shows, the colour of its card or ink, its characters, where its thing's centre is and how large it
is; the projector's output is asked for the tokens of the name or word among all that scenes use, with the
decoder's own embedding table as the classifier. Heads are dropped at export.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from assets import COLORS, Assets
from embedded import modeling
from pictures import CHARS, GRID, LAYOUTS, PLACES, SLOTS, Labels, Scene, labels, scene
from torch import Tensor, nn
from torch.utils.data import IterableDataset, get_worker_info

MEAN = torch.tensor([0.48145466, 0.4578275, 0.40821073])
STD = torch.tensor([0.26862954, 0.26130258, 0.27577711])
SHAPE = modeling.Shape(
    vocab=49152, width=576, vision_width=320, vision_layers=8, vision_heads=5, vision_ffn=1280, context=8192
)
TOKENS = 6  # tokens of a name or word that are asked for
TOLD = {"name": (0, TOKENS, 0.5), "place": (TOKENS, TOKENS + 2, 0.3), "ink": (TOKENS + 2, TOKENS + 3, 0.2)}
"""What the projector's output tells of a patch: columns of `Sample.tokens` from, to; share of the loss."""
COLOR_NAMES = list(COLORS)


@dataclass(frozen=True)
class Words:
    """The decoder's tokens that name what scenes show, as numbers of a small vocabulary of their own."""

    ids: list[int]  # in the decoder's vocabulary
    spelled: dict[str, list[int]]  # name or lowercase word -> numbers, at most TOKENS

    @classmethod
    def of(cls, assets: Assets, tokenizer) -> Words:
        """All names, words, colours and digits of the assets."""
        texts = sorted(
            {*assets.names, *assets.words, *COLORS, *" ".join(PLACES).split(), *map(str, range(10)), ".", "total"}
        )
        coded = {t: tokenizer.encode(" " + t if not t.isdigit() and t != "." else t).ids for t in texts}
        ids = sorted({i for c in coded.values() for i in c})
        place = {i: k for k, i in enumerate(ids)}
        return cls(ids, {t: [place[i] for i in c][:TOKENS] for t, c in coded.items()})

    def spell(self, text: str) -> list[int]:
        """The numbers of a name or a word as drawn; of a number, its digits. Empty where it has none."""
        if text.lower() in self.spelled or text in self.spelled:
            return self.spelled.get(text) or self.spelled[text.lower()]
        if text.replace(".", "").isdigit():
            return [k for c in text for k in self.spelled[c]][:TOKENS]
        return []


@dataclass
class Sample:
    """A picture and the labels of its 576 patches."""

    pixels: np.ndarray  # uint8 [336, 336, 3]
    thing: np.ndarray  # int64 [576]: 0 ground, class of a thing from 1, the last one a word
    color: np.ndarray  # int64 [576]: 0 none
    chars: np.ndarray  # int64 [576, SLOTS]
    offset: np.ndarray  # float32 [576, 3]
    tokens: np.ndarray  # int64 [576, TOKENS + 3]: numbers of `Words`, -1 none; columns as TOLD has them


def sample(s: Scene, found: Labels, assets: Assets, words: Words) -> Sample:
    """Labels as the losses take them."""
    n = len(s.things)
    kind, color, tokens = np.zeros(n + 1, int), np.zeros(n + 1, int), np.full((n + 1, TOKENS + 3), -1)
    for k, t in enumerate(s.things, 1):
        kind[k] = len(assets.names) + 1 if t.word else assets.index[t.name]
        color[k] = 1 + COLOR_NAMES.index(t.color) if t.color else 0
        told = {"name": words.spell(t.name), "ink": words.spelled[t.color][:1] if t.color else []}
        told["place"] = [words.spelled[w][0] for w in t.place.split()]
        for part, spelled in told.items():
            first = TOLD[part][0]
            tokens[k, first : first + len(spelled)] = spelled
    at = found.thing.ravel()
    return Sample(
        np.asarray(s.image),
        kind[at],
        color[at],
        found.chars.reshape(-1, SLOTS).astype(int),
        found.offset.reshape(-1, 3).astype(np.float32),
        tokens[at],
    )


def turns(first: int) -> itertools.count:
    """Picture numbers from `first` on; of several workers, each gets its own."""
    worker = get_worker_info()
    return itertools.count(first + (worker.id if worker else 0), worker.num_workers if worker else 1)


class Stream(IterableDataset):
    """Samples without end, from picture number `first` on; `dense` of them are crowds and pages."""

    def __init__(self, assets: Assets, words: Words, first: int, dense: float) -> None:
        self.assets, self.words, self.first, self.dense = assets, words, first, dense

    def one(self, index: int, split: str = "train", style: str = "known") -> Sample:
        """Sample number `index`."""
        rng = random.Random(f"layout {split} {index}")
        layout = rng.choices(list(LAYOUTS), list(LAYOUTS.values()))[0]
        if rng.random() < self.dense:
            layout = rng.choice(("crowd", "crowd", "page"))
        s = scene(self.assets, index, split, style, layout)
        return sample(s, labels(s), self.assets, self.words)

    def __iter__(self):
        yield from map(self.one, turns(self.first))


class Head(nn.Linear):
    """What every patch is asked, in one matrix; dropped at export."""

    def __init__(self, things: int) -> None:
        self.parts = {"thing": things + 2, "color": len(COLORS) + 1, "chars": SLOTS * (len(CHARS) + 1)}
        self.parts |= {"offset": 3, "center": 2}
        super().__init__(SHAPE.vision_width, sum(self.parts.values()))


class Table(nn.Module):
    """The decoder's embeddings of `words`, float32 [n, 576], their mean, and which of them each part of TOLD may be."""

    def __init__(self, words: Words, embeddings: Tensor) -> None:
        super().__init__()
        weight = embeddings[words.ids].float()
        allowed = torch.zeros(len(TOLD), len(weight), dtype=torch.bool)
        parts: dict[str, Iterable[str]] = {"name": words.spelled, "place": " ".join(PLACES).split(), "ink": COLORS}
        for row, part in zip(allowed, TOLD, strict=True):
            row[[i for text in parts[part] for i in words.spelled[text]]] = True
        for name, value in (("weight", weight), ("middle", weight.mean(0)), ("allowed", allowed)):
            self.register_buffer(name, value, persistent=False)


class Trainee(nn.Module):
    """Encoder, projector and head."""

    def __init__(self, things: int, table: Table) -> None:
        super().__init__()
        self.vision_model = modeling.VisionModel(SHAPE)
        self.projector = modeling.Projector(SHAPE)
        self.head = Head(things)
        self.table = table
        self.start()

    def start(self) -> None:
        """Initial weights, as the embedded model's (from torch's global seed)."""
        for name, p in self.named_parameters():
            if p.ndim < 2:
                if name.endswith("bias"):
                    nn.init.zeros_(p)
            elif "embed" in name and "patch" not in name:
                nn.init.normal_(p, std=0.02)
            else:
                nn.init.normal_(p, std=p[0].numel() ** -0.5)
            if name.endswith(("out_proj.weight", "fc2.weight")):
                p.data.mul_((2 * SHAPE.vision_layers) ** -0.5)
        nn.init.normal_(self.head.weight, std=0.02)
        self.projector.linear_2.weight.data.mul_(float(self.table.weight.std()))
        self.projector.linear_2.bias.data.copy_(self.table.middle)
        modeling.start_local(self.vision_model)


DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def pixels_of(samples: list) -> Tensor:
    """Normalised pictures, float32 [B, 3, 336, 336]."""
    x = torch.from_numpy(np.stack([s.pixels for s in samples])).to(DEVICE).float() / 255
    return ((x - MEAN.to(DEVICE)) / STD.to(DEVICE)).permute(0, 3, 1, 2)


WEIGHTS = {"thing": 1.0, "token": 1.0, "chars": 2.0, "color": 0.3, "offset": 1.0, "center": 3.0, "embed": 0.5}


def together(samples: list, *names: str) -> list[Tensor]:
    """Labels of all patches of some samples, [B * 576, ...] each."""
    return [torch.from_numpy(np.stack([getattr(s, k) for s in samples])).to(DEVICE).flatten(0, 1) for k in names]


def patch_losses(head: Head, features: Tensor, samples: list) -> tuple[dict, dict]:
    """What patches show: each loss, and shares of right labels. features [B, 576, width]."""
    kind, hue, text, place = together(samples, "thing", "color", "chars", "offset")
    thing, color, chars, offset, center = head(features.flatten(0, 1)).float().split(list(head.parts.values()), -1)
    on, word = kind > 0, thing.shape[-1] - 1
    out, right = {}, {}
    weight = torch.where(on, 1.0, 0.1)
    out["thing"] = (F.cross_entropy(thing, kind, reduction="none") * weight).sum() / weight.sum()
    hit = (thing.argmax(-1) == kind).float()
    right["thing"], right["ground"] = hit[on & (kind < word)].mean(), hit[~on].mean()
    out["color"] = F.cross_entropy(color, hue)
    right["color"] = (color.argmax(-1) == hue)[hue > 0].float().mean()
    chars = chars.view(-1, SLOTS, len(CHARS) + 1)
    each = F.cross_entropy(chars.flatten(0, 1), text.flatten(), reduction="none").view(-1, SLOTS)
    weight = (kind == word).float()[:, None] * (1 + 3 * (text > 0)) + 0.02
    out["chars"] = (each * weight).sum() / weight.sum()
    right["char"] = (chars.argmax(-1) == text)[text > 0].float().mean()
    out["offset"] = F.smooth_l1_loss(offset[on], place[on], beta=0.1)
    # without being asked where in the picture a thing is, the encoder forgets it
    line = torch.arange(GRID, device=DEVICE)
    here = torch.stack(torch.meshgrid(line, line, indexing="xy"), -1).flatten(0, 1).repeat(len(samples), 1)
    middle = place[:, :2] + (here + 0.5 - GRID / 2) / 12  # from the picture's centre
    out["center"] = F.smooth_l1_loss(center[on], middle[on], beta=0.1)
    right["off"] = (offset[on][:, :2] - place[on][:, :2]).abs().mean() * 12
    right["far"] = (center[on] - middle[on]).abs().mean() * 12
    return out, right


def token_losses(net: Trainee, features: Tensor, samples: list, seen: int) -> tuple[dict, dict]:
    """As `patch_losses`, of the tokens that the projector's output names; `seen` patches are drawn."""
    kind, tokens = together(samples, "thing", "tokens")
    named = (tokens[:, 0] >= 0).nonzero()[:, 0]
    named = named[torch.randperm(len(named), device=DEVICE)[:seen]]
    y, tokens = net.projector(features.flatten(0, 1)[named]).float(), tokens[named]
    there, at = tokens >= 0, tokens.clamp(min=0)
    spot = torch.where(there, tokens, len(net.table.weight))  # the last column is for what is not there
    table = net.table.weight - net.table.middle
    logits = 12 * (y - net.table.middle) @ table.T / float(table.square().sum(1).mean())
    loss, right, goal = 0.0, {}, torch.zeros_like(y)
    for (part, (first, last, weight)), allowed in zip(TOLD.items(), net.table.allowed, strict=True):
        asked, its = there[:, first:last], at[:, first:last]
        share = asked / asked.sum(1, keepdim=True).clamp(min=1)
        # a name need not be louder than the place and the colour beside it
        free = torch.cat([allowed, allowed[:1]]).expand(len(y), -1).clone()
        free.scatter_(1, spot, False).scatter_(1, spot[:, first:last], True)
        logp = logits.masked_fill(~free[:, :-1], -1e4).log_softmax(1)
        loss = loss - weight * (logp.gather(1, its) * share).sum() / share.sum().clamp(min=1)
        goal = goal + weight * (net.table.weight[its] * share[..., None]).sum(1)
        # right is a token among as many best ones as are asked for
        least = logp.topk(last - first, 1).values.gather(1, asked.sum(1, keepdim=True).clamp(min=1) - 1)
        hit = (logp.gather(1, its) >= least) & asked
        right[f"{part}_token"] = hit.sum() / asked.sum()
        if part == "name":
            words = kind[named] == net.head.parts["thing"] - 1
            right["word_token"] = hit[words].sum() / asked[words].sum()
    told = sum(w * there[:, a:b].any(1, keepdim=True) for a, b, w in TOLD.values())
    embed = (y - goal / told).square().mean() / float(net.table.weight.var())
    return {"token": loss, "embed": embed}, right


def losses(net: Trainee, features: Tensor, samples: list, seen: int = 1536) -> tuple[dict, dict]:
    """All of them."""
    patches, tokens = patch_losses(net.head, features, samples), token_losses(net, features, samples, seen)
    out, right = ({**p, **t} for p, t in zip(patches, tokens, strict=True))
    return out, right


class Task:
    """What `loop.Loop` trains in this stage: windows (attention within quarters of the picture) or all of it."""

    def __init__(self, assets: Assets, words: Words, table: Tensor, windows: bool, dense: float) -> None:
        self.net = Trainee(len(assets.names), Table(words, table)).to(DEVICE)
        self.windows = windows
        self.stream = Stream(assets, words, 0, dense)
        tower = self.net.vision_model
        self.encode = torch.compile(tower.windows if windows else tower.forward)
        self.held_out: dict[str, list[Sample]] = {}

    def rates(self) -> dict[str, float]:
        """Each part's share of the rate. The projector's outputs are small: at the full rate it is noise."""
        return {"": 1.0, "projector": 0.3}

    def _features(self, samples: list[Sample], step: int) -> Tensor:
        pixels = pixels_of(samples)
        return self.encode(pixels, 6 * (step % 2)) if self.windows else self.encode(pixels)

    def loss(self, samples: list[Sample], step: int) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss to go down, and what to log."""
        found, right = losses(self.net, self._features(samples, step), samples)
        total = sum(found[k] * w for k, w in WEIGHTS.items())
        return total, {**{f"{k}_loss": v for k, v in found.items()}, **right}

    @torch.no_grad()
    def evaluate(self, batch: int, n: int = 48) -> dict:
        """Losses and shares on held-out scenes of both styles (ordinary layouts, no crowds)."""
        out = {}
        for style in ("known", "other"):
            if style not in self.held_out:
                plain = Stream(self.stream.assets, self.stream.words, 0, 0.0)
                self.held_out[style] = [plain.one(i, "held-out", style) for i in range(n)]
            rows = []
            for k in range(0, n, batch):
                part = self.held_out[style][k : k + batch]
                rows.append(losses(self.net, self._features(part, 0), part, 10**6)[1])
            out[style] = {k: round(float(np.nanmean([r[k].item() for r in rows])), 3) for k in rows[0]}
        return out
