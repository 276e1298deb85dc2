"""What scripts/quality.py compares: configurations by budget."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import native_runtime
from quality_answers import BANDS

OTHERS = ("paper", "fastv", "pyramiddrop", "random", "downsample")
CURVES, FLOORS, LENGTHS = ("linear", "cosine", "exponential"), (0.5, 0.3, 0.1), (32, 64, 128)
OTHER_SCORES = ("text-max", "last-mean", "last-max")  # beside the default, text-mean


@dataclass(frozen=True)
class Config:
    """One row of the table: a name and the `st3.*` keys behind it."""

    name: str
    keys: tuple[tuple[str, native_runtime.Value], ...]
    against: dict[str, str]  # what it is compared with: the column's word, and that configuration's name

    @property
    def start(self) -> int:
        """The first cut's layer, as far as it is asked for."""
        return int(dict(self.keys).get("st3.start", 0))


def config(name: str, against: dict[str, str] | None = None, **keys: native_runtime.Value) -> Config:
    """A configuration by its keys without their prefix."""
    return Config(name, tuple((f"st3.{k}", v) for k, v in keys.items()), against or {})


def quality_grid(budgets: tuple[float, ...]) -> list[Config]:
    """The default at each budget, without annealing, and without merging."""
    out = [config("off")]
    for b in budgets:
        against = {"off": "off", "st3": f"st3 @ {b:g}"}
        out.append(config(f"st3 @ {b:g}", {"off": "off"}, preset="st3", budget=b))
        out.append(config(f"pvtp @ {b:g}", against, preset="pvtp", budget=b))
        out.append(config(f"st3, no merging @ {b:g}", against, preset="st3", budget=b, merge=False))
    return out


def method_grid(budgets: tuple[float, ...]) -> list[Config]:
    """All presets at each budget, with merging and without. `vtw` has no budget, and nothing is kept that could stand
    for the others."""
    out = [config("off")]
    for b in budgets:
        out.append(config(f"st3 @ {b:g}", {"off": "off"}, preset="st3", budget=b))
        against = {"off": "off", "st3": f"st3 @ {b:g}"}
        for preset in OTHERS:
            alone = f"{preset} @ {b:g}"
            out.append(config(alone, against, preset=preset, budget=b))
            merging = {**against, "no merging": alone}
            out.append(config(f"{preset}, merging @ {b:g}", merging, preset=preset, budget=b, merge=True))
    return out


def choice_grid(budgets: tuple[float, ...]) -> list[Config]:
    """What the defaults were chosen among, without annealing: where cuts are, and what the default's one goes by."""
    others: dict[str, dict[str, native_runtime.Value]] = {f"one cut after {n}": {"start": n} for n in range(2, 9)}
    others |= {f"after 1 and every {n}": {"stride": n} for n in (1, 2, 4, 7, 15)}
    others |= {f"every {n}": {"start": n, "stride": n} for n in (2, 3, 4)}
    others |= {f"score {score}": {"score": score} for score in OTHER_SCORES}
    others |= {"rank score": {"rank": "score"}, "no merging": {"merge": False}}
    others |= {f"coverage {share:g}": {"coverage": share} for share in (0.25, 1.0)}
    out = [config("off")]
    for b in budgets:
        out.append(config(f"default @ {b:g}", {"off": "off"}, preset="pvtp", budget=b))
        against = {"off": "off", "default": out[-1].name}
        out += [config(f"{name} @ {b:g}", against, preset="pvtp", budget=b, **keys) for name, keys in others.items()]
    return out


def anneal_grid(budgets: tuple[float, ...]) -> list[Config]:
    """Annealing alone and after a pruned prefill: curves, floors, lengths and scores around the default."""
    out = [config("off")]
    middle = (CURVES[0], FLOORS[0], LENGTHS[1])  # the default
    curves = [
        middle,
        *((c, *middle[1:]) for c in CURVES[1:]),
        *((middle[0], f, middle[2]) for f in FLOORS if f != middle[1]),
    ]
    curves += [(*middle[:2], t) for t in LENGTHS if t != middle[2]]
    for base, kept in [("all kept", {"keep": 1.0}), *((f"budget {b:g}", {"budget": b}) for b in budgets)]:
        keys = {"preset": "st3", **kept}
        out.append(config(base, {"off": "off"}, anneal="none", **keys))
        against = {"off": "off", "no annealing": base}
        for curve, floor, tokens in curves:
            name = f"{base} {curve} {floor:g} T{tokens}"
            keys |= {"anneal": curve, "anneal_floor": floor, "anneal_tokens": tokens}
            out.append(config(f"{name} random", against, **keys, anneal_score="random"))
            out.append(config(name, {**against, "random": f"{name} random"}, **keys))
            if (curve, floor, tokens) == middle:
                for s in OTHER_SCORES:
                    out.append(config(f"{name} {s}", {**against, "random": f"{name} random"}, **keys, anneal_score=s))
    return out


def long_grid(budgets: tuple[float, ...]) -> list[Config]:
    """Annealing on and off in conversations that go on."""
    out = [config("off")]
    for b in budgets:
        stay = f"pvtp @ {b:g}"
        out.append(config(stay, {"off": "off"}, preset="pvtp", budget=b))
        against = {"off": "off", "no annealing": stay}
        out.append(config(f"st3 @ {b:g}", against, preset="st3", budget=b))
        for floor in (0.75, 0.3):
            out.append(config(f"st3 floor {floor:g} @ {b:g}", against, preset="st3", budget=b, anneal_floor=floor))
        for n in (256, 512):
            out.append(config(f"st3 along {n} @ {b:g}", against, preset="st3", budget=b, anneal_tokens=n))
    return out


def tile_grid(budgets: tuple[float, ...]) -> list[Config]:
    """A picture as one image, and as several with a quota each: bands of whole rows, so that no token moves."""
    out = [config("off")]
    for b in budgets:
        whole = config(f"one image @ {b:g}", {"off": "off"}, preset="pvtp", budget=b)
        against = {"off": "off", "one image": whole.name}
        out.append(whole)
        out += [Config(f"{n} images @ {b:g}", (*whole.keys, (BANDS, n)), against) for n in (2, 4, 8)]
    return out


@dataclass(frozen=True)
class Grid:
    """What a page compares: its configurations by budgets, and what they are asked (quality_answers.run)."""

    configs: Callable[[tuple[float, ...]], list[Config]]
    budgets: tuple[float, ...]
    scenes: int  # of each style
    measures: tuple[str, ...]
    title: str
    legend: str

    def made(self, budgets: tuple[float, ...], layers: int) -> list[Config]:
        """Those whose first cut is early enough for their budget in a model of so many layers."""
        return [c for c in self.configs(budgets) if c.start < dict(c.keys).get("st3.budget", 1.0) * layers]


GRIDS = {
    "quality": Grid(
        quality_grid,
        (0.5, 0.3, 0.2, 0.1),
        340,
        ("facts", "captions", "second"),
        "Answers against budget",
        "`@`: the budget that was asked for; `budget`: the one that the runtime reports. `pvtp` is `st3` without "
        "annealing. `- st3`: to `st3` at the same budget; below zero, `st3` is better.",
    ),
    "methods": Grid(
        method_grid,
        (0.5, 0.3, 0.2, 0.1),
        120,
        ("facts", "captions"),
        "Methods at the same budget",
        "`@`: the budget. `- st3`: to the preset `st3` at the same budget; below zero, `st3` is better. `- no "
        "merging`: to the same method as it is; above zero, merging helps it.",
    ),
    "choices": Grid(
        choice_grid,
        (0.5, 0.2),
        100,
        ("facts", "captions"),
        "What the defaults were chosen among",
        "The preset `pvtp`, which is `st3` without annealing: one cut after the first layer. Each other row changes "
        "what it says: layers count from 1 here; `coverage 1`: evenly spread, whatever the score. `@`: the budget. "
        "`- default`: to the first row of the same budget; below zero, that one is better.",
    ),
    "anneal": Grid(
        anneal_grid,
        (0.5, 0.2),
        20,
        ("every caption",),
        "Descriptions under annealing",
        "`all kept`: nothing dropped in prefill; `budget`: a pruned prefill. Then the curve, the floor that it falls "
        "to, and the generated tokens T over which it does; `random`: as many tokens leave, but drawn by lot.",
    ),
    "tiles": Grid(
        tile_grid,
        (0.3, 0.2, 0.1),
        100,
        ("facts", "captions"),
        "A quota for each tile or for the picture",
        "The preset `pvtp`, which is `st3` without annealing. `one image`: all 576 tokens share one quota; `n images`: "
        "the same tokens at the same positions, announced as n bands of whole rows with a quota each, as tiles are. "
        "`- one image`: above zero, a quota for each is better.",
    ),
    "long": Grid(
        long_grid,
        (0.5, 0.2),
        20,
        ("long",),
        "Long conversations about one picture",
        "Descriptions, in all wordings, and single facts by turns, until 512 tokens are generated; each question comes "
        "without what was said before, but with the picture as it was left. `early`, `middle`, `late`: descriptions "
        "(F1) that begin before 128 generated tokens, before 256, and after that. `kl 256` and `kl 512`: along the "
        "full model's own conversation, over its first 256 generated tokens and from there to 512.",
    ),
}
