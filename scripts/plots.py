"""The results as pictures: every JSON file of docs/results that has one, its shapes together in one, and the default
schedule, to docs/img.

python scripts/plots.py [RESULT.json ...] [--out DIR]

Needs matplotlib: pip install -e ".[plot]". What a file holds says how it is drawn: ratio bars (`st3-edge bench
--json`), right answers against the budget and captions under annealing (scripts/quality.py), KV bytes over the answer
(scripts/bench_kv_memory.py). The heat map of the schedule is arithmetic, from the reference in tests/oracle.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import matplotlib as mpl
import matplotlib.pyplot as plt
import measuring
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

sys.path.insert(0, str(measuring.ROOT / "tests"))
from oracle import schedule as reference

from st3_edge.commands.bench.figures import label
from st3_edge.files.output import replacing

SHAPES = measuring.ROOT / "docs" / "results" / "shapes"  # one file a shape

# Okabe and Ito's, which people with any colour vision tell apart; the first is ST³'s.
COLOURS = ("#d55e00", "#0072b2", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#000000")
MARKERS = "osD^vP*X"
GRAY = "#6e7781"
LOWEST = 50  # per cent right; what is worse runs out of the picture, and leaves room for what may be used
PANELS = (("facts", "Single facts"), ("count", "Of them counts"), ("captions", "Objects in descriptions, F1"))
COUNTED = {"captions": "found"}  # of an F1: what is there

STYLE = {
    "figure.facecolor": "white",  # a card of its own on a dark page
    "figure.constrained_layout.use": True,
    "font.size": 11,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.titlelocation": "left",
    "axes.grid": True,
    "grid.color": "#e5e8eb",
    "legend.frameon": False,
    "svg.fonttype": "path",
    "svg.hashsalt": "st3-edge",  # the same file from the same data
}


def ratios(result: dict) -> Figure:
    """`st3-edge bench --json`: for each metric the median ratio, the range over pairs, and the ideal."""
    rows, setup = result["summary"], result["setup"]
    fig, ax = plt.subplots(figsize=(9, 1.6 + 0.42 * len(rows)))
    for y, row in enumerate(rows.values()):
        low, high = min(row["ratio_pairs"]), max(row["ratio_pairs"])
        ax.barh(y, row["ratio"], 0.62, color=COLOURS[0])
        ax.hlines(y, low, high, "black", linewidth=1.2)
        ax.vlines([low, high], y - 0.12, y + 0.12, "black", linewidth=1.2)
        ax.vlines(row["ideal"], y - 0.42, y + 0.42, COLOURS[1], linewidth=2.5)
        told = f"{row['ratio']:.2f}, {row['share']:.0%} of {row['ideal']:.2f}"
        ax.text(max(high, row["ideal"]), y, f"  {told}", va="center")
    ax.axvline(1, color="black", linewidth=1)
    ax.set(yticks=range(len(rows)), yticklabels=[label(name) for name in rows], xlim=(0, None))
    ax.invert_yaxis()
    ax.margins(x=0.2)
    ax.grid(axis="y", visible=False)
    ax.set_xlabel("times as good as stock llama.cpp (1: the same)")
    schedule = setup.get("schedule", {})
    what = f"{setup['shape']}, random {setup['type']} weights" if setup.get("shape") else setup.get("model", "")
    ax.set_title(
        f"{what}: {setup.get('visual')} visual and {setup.get('text')} text tokens, {setup.get('generate')} generated\n"
        f"preset {schedule.get('preset')}, budget {schedule.get('budget', 0):.2f}; {len(result['pairs'])} pairs, "
        f"{result['machine'].get('processor')}",
        fontsize=11,
    )
    handles = [
        plt.Rectangle((0, 0), 1, 1, color=COLOURS[0], label="median of pairs"),
        plt.Line2D([], [], color="black", label="smallest and largest"),
        plt.Line2D([], [], color=COLOURS[1], linewidth=2.5, label="what the schedule allows"),
    ]
    fig.legend(handles=handles, loc="outside lower center", ncols=3)
    return fig


def shapes(results: list[dict]) -> Figure:
    """`st3-edge bench --json` of several shapes: median ratios, the range over pairs, and the ideal."""
    metrics = ("prefill_ms", "first_token_ms", "decode_64_tps")
    fig, ax = plt.subplots(figsize=(9, 1.6 + 0.8 * len(results)))
    names = []
    for i, result in enumerate(results):
        setup = result["setup"]
        names.append(f"{setup['shape']} {setup['type']}\n{setup['visual']} visual tokens")
        for j, metric in enumerate(metrics):
            row, y = result["summary"][metric], i + 0.25 * (j - 1)
            ax.barh(y, row["ratio"], 0.23, color=COLOURS[j], label=label(metric) if i == 0 else None)
            ax.hlines(y, min(row["ratio_pairs"]), max(row["ratio_pairs"]), "black", linewidth=1.2)
            ideal = "what the schedule allows" if i == j == 0 else None
            ax.vlines(row["ideal"], y - 0.12, y + 0.12, "black", linewidth=2.5, label=ideal)
            ax.text(max(*row["ratio_pairs"], row["ideal"]), y, f"  {row['ratio']:.2f}", va="center", fontsize=9)
    ax.axvline(1, color="black", linewidth=1)
    ax.set(yticks=range(len(results)), yticklabels=names, xlim=(0, None))
    ax.invert_yaxis()
    ax.grid(axis="y", visible=False)
    ax.set_xlabel("times as good as stock llama.cpp (1: the same)")
    schedules = {(s["preset"], round(s["budget"], 2)) for s in (result["setup"]["schedule"] for result in results)}
    which = "; ".join(f"preset {preset}, budget {budget:.2f}" for preset, budget in sorted(schedules))
    ax.set_title(f"Random weights; {which}; {results[0]['machine'].get('processor')}")
    fig.legend(loc="outside lower center", ncols=4)
    return fig


def budgets(result: dict) -> Figure:
    """quality.py: right answers against the budget, a line a configuration. What differs from its preset by merging
    has the preset's colour, dashed."""
    rows = [row for row in result["rows"] if row.get("style") == result["rows"][0].get("style")]
    off = rows[0]
    methods: dict[str, list[dict]] = {}
    for row in rows[1:]:
        methods.setdefault(row["name"].partition(" @ ")[0], []).append(row)
    presets = list(dict.fromkeys(name.partition(",")[0] for name in methods))
    panels = [(key, title) for key, title in PANELS if off["asked"][key]]
    fig, axes = plt.subplots(1, len(panels), figsize=(max(8, 4.6 * len(panels)), 5.2), squeeze=False)
    for ax, (key, title) in zip(axes[0], panels, strict=True):
        ax.axhline(off[key], color=GRAY, linestyle="--", label="nothing dropped")
        step = 0.007 * np.ptp([row["schedule"]["budget"] for of in methods.values() for row in of])
        for i, (name, of) in enumerate(methods.items()):
            of = sorted(of, key=lambda row: row["schedule"]["budget"])
            beside = step * (i - (len(methods) - 1) / 2)  # intervals that lie on each other cannot be read
            x = np.array([row["schedule"]["budget"] + beside for row in of])
            preset, other, _ = name.partition(",")
            line(ax, x, of, off, key, name, presets.index(preset), "--" if other else "-")
        if ax.get_ylim()[0] < LOWEST:
            ax.set_ylim(LOWEST, None)
        ax.set_title(f"{title} ({off['asked'][COUNTED.get(key, key)]:,})")
        ax.set_xlabel("budget")
    axes[0][0].set_ylabel("right, %")
    legend_below(fig, axes[0][0], 4)
    return fig


def annealing(result: dict) -> Figure:
    """quality.py's grid `anneal`: caption objects right against what is held at the caption's end."""
    rows = [row for row in result["rows"] if row.get("style") == result["rows"][0].get("style")]
    off = rows[0]
    fig, ax = plt.subplots(figsize=(9, 5.2))
    ax.axhline(off["captions"], color=GRAY, linestyle="--", label="nothing dropped")
    bases = [row for row in rows if row["keys"].get("st3.anneal") == "none"]
    for i, base in enumerate(bases):
        for random in (False, True):
            same = [
                row
                for row in rows
                if row["name"].startswith(f"{base['name']} ")
                and row["keys"].get("st3.anneal_score") == ("random" if random else None)
            ]
            same = sorted([*same, base], key=lambda row: row["held"])
            how = "removed at random" if random else "removed by score"
            x = np.array([row["held"] for row in same])
            line(ax, x, same, off, "captions", f"{base['name']}, {how}", 2 * i + random, "--" if random else "-")
    ax.set_xscale("log")
    ticks = [t for t in (2, 5, 10, 20, 30, 50, 70, 100) if t >= min(row["held"] for row in rows) * 0.9]
    ax.set_xticks(ticks, [f"{t}" for t in ticks])
    ax.minorticks_off()
    ax.set_xlabel("visual tokens held when the caption ends, % of those given, mean over layers")
    ax.set_ylabel("caption objects right, %")
    n = off.get("scenes") or result["scenes"]
    ax.set_title(f"Annealing: F1 of {off['asked']['found']} objects in descriptions of {n} scenes")
    legend_below(fig, ax, 3)
    return fig


def line(ax: Axes, x: np.ndarray, rows: list[dict], off: dict, key: str, name: str, i: int, style: str = "-") -> None:
    """A method's shares right, with the intervals of their differences to `off`."""
    y = np.array([row[key] for row in rows])
    spans = np.array([row.get(f"{key} - off", [0, 0, 0]) for row in rows])
    bars = np.abs(off[key] + spans[:, 1:].T - y)
    colour = COLOURS[i % len(COLOURS)]
    ax.errorbar(
        x, y, bars, color=colour, ecolor=(colour, 0.4), marker=MARKERS[i % len(MARKERS)], linestyle=style, label=name
    )


def legend_below(fig: Figure, ax: Axes, columns: int) -> None:
    """One legend for all panels, which covers none of them."""
    handles, names = ax.get_legend_handles_labels()
    title = "bars: 95 % interval of the difference to nothing dropped, paired by scene"
    fig.legend(handles, names, loc="outside lower center", ncols=columns, title=title, title_fontsize=10)


def kv_bytes(result: dict) -> Figure:
    """bench_kv_memory.py: bytes of the KV cache that a picture takes, over the answer."""
    fig, ax = plt.subplots(figsize=(9, 4.4))
    for how, name, style in (("told", "as llama.cpp tells", "-"), ("anon", "as the process grows", ":")):
        of = result[how]
        stock = of["stock"]["visual"] / 1e6
        share = np.array(of["share_by_step"])[how == "anon" :]  # before the first token compute buffers are counted too
        x = np.arange(len(share)) + (how == "anon")
        ax.axhline(stock, color=COLOURS[1], linestyle=style, label=f"stock, {name}")
        ax.plot(x, stock * share, color=COLOURS[0], linestyle=style, linewidth=1.8, label=f"ST³, {name}")
    told = result["told"]
    ax.set(xlim=(0, result["answer"]), ylim=(0, None), xlabel="tokens of the answer")
    ax.set_ylabel(f"KV cache of {result['visual']} visual tokens, MB")
    ax.set_title(
        f"{result['model'].partition('-Q')[0]}, {result['kv']} KV: ST³ takes {told['share_after_prefill']:.0%} "
        f"of stock's after prefill, {told['share_over_answer']:.0%} over the answer"
    )
    fig.legend(loc="outside lower center", ncols=2)
    return fig


def schedule_map(n_layer: int = 32, visual: int = 576, tokens: int = 160) -> Figure:
    """Visual tokens that each layer holds, from the prefill on, by the preset `st3`."""
    plan = reference.resolve(n_layer, "st3")
    start = plan.per_layer([visual])
    held = np.array([[plan.target(visual, n, t) for t in range(tokens + 1)] for n in start])
    fig, ax = plt.subplots(figsize=(9, 5))
    extent = (-0.5, tokens + 0.5, n_layer - 0.5, -0.5)
    image = ax.imshow(held, aspect="auto", cmap="cividis", vmin=0, vmax=visual, extent=extent, interpolation="nearest")
    for first, last in pairwise((0, *(cut + 1 for cut in plan.cuts), n_layer)):
        ax.axhline(first - 0.5, color="white", linewidth=0.8)
        for at, side in ((0, "left"), (tokens, "right")):
            ink = "black" if held[first, at] > visual / 2 else "white"
            x, y = at + (2 if side == "left" else -2), (first + last - 1) / 2
            ax.text(x, y, held[first, at], ha=side, va="center", color=ink)
    fig.colorbar(image, label="visual tokens")
    ax.grid(visible=False)
    ax.set(xlabel="tokens of the answer", ylabel="layer")
    ax.set_title(f"Visual tokens in each layer: preset st3, {n_layer} layers, {visual} given")
    return fig


def drawing(result: dict) -> Callable[[dict], Figure] | None:
    """How a result is drawn; None: it is not."""
    if result.get("summary") and "pairs" in result:
        return ratios
    if "share_by_step" in result.get("told", ()):
        return kv_bytes
    return {"quality": budgets, "methods": budgets, "anneal": annealing}.get(result.get("grid", ""))


def main() -> None:
    """Parse the command line and draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", nargs="*", type=Path, help="default: docs/results/*.json, and the schedule")
    parser.add_argument("--out", type=Path, default=measuring.ROOT / "docs" / "img")
    args = parser.parse_args()
    mpl.use("Agg")
    mpl.rcParams.update(STYLE)
    args.out.mkdir(parents=True, exist_ok=True)
    figures: list[tuple[str, Figure]] = []
    for path in args.results or sorted((measuring.ROOT / "docs" / "results").glob("*.json")):
        try:
            result = json.loads(path.read_text(encoding="utf-8"))
        except ValueError:
            raise SystemExit(f"{path} is no JSON") from None
        if draw := drawing(result):
            figures.append((path.stem, draw(result)))
        elif args.results:
            raise SystemExit(f"{path} is no result that is drawn")
    if not args.results:
        figures.append(("schedule", schedule_map()))
        if several := [json.loads(path.read_text(encoding="utf-8")) for path in sorted(SHAPES.glob("*.json"))]:
            figures.append(("shapes", shapes(several)))
    for name, fig in figures:
        target = args.out / f"{name}.svg"
        with replacing(target) as file:
            fig.savefig(file, format="svg", metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
        print(target)


if __name__ == "__main__":
    measuring.run(main)
