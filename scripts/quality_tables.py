"""What scripts/quality.py makes of answers: shares right, differences with intervals, and the page."""

from __future__ import annotations

from pathlib import Path

import measuring
import numpy as np
from quality_grids import GRIDS, Config
from quality_subjects import Subject

F1 = ("captions", "early", "middle", "late")
PARTS = ("found", "named")  # of `captions`: right ones by those that are there, and by those that are named
COUNTED = {
    "facts": "single facts",
    "count": "of them counts",
    "found": "caption objects",
    "second": "second questions of a conversation",
}
KL = ("kl facts", "kl captions", "kl 256", "kl 512")
ALL = "all"  # styles together
BOOTSTRAP = 4000

Rows = dict[tuple[str, int], dict]  # of a configuration, by style and scene


def units(subject: Subject) -> tuple[str, ...]:
    """What configurations are compared by."""
    return ("facts", *subject.compared, *F1, "second")


def f1(right: int, named: int, there: int) -> tuple[int, int]:
    """The F1 of some objects as a share: numerator and denominator, which add up over scenes."""
    return 2 * right, named + there


def tally(rows: Rows, ids: list[tuple[str, int]], subject: Subject) -> dict[str, np.ndarray]:
    """Right and asked by scene, for KL nats and tokens: arrays [n, 2] for each measure and each kind of fact."""
    out = {k: np.zeros((len(ids), 2)) for k in (*units(subject), *PARTS, *subject.kinds, *KL)}
    for at, key in enumerate(ids):
        row = rows[key]
        for kind, ok in row.get("facts", ()):
            for k in ("facts", kind):
                out[k][at] += (bool(ok), 1)
        if "objects" in row:
            right, named, there = row["objects"]
            out["captions"][at] += f1(right, named, there)
            out["found"][at] += (right, there)
            out["named"][at] += (right, named)
        for k in F1[1:]:
            for objects in row.get(k, ()):
                out[k][at] += f1(*objects)
        for k in ("second", *KL):
            out[k][at] += row.get(k, 0)
    return out


def interval(a: np.ndarray, b: np.ndarray, rng: np.random.Generator) -> list[float]:
    """a's share right minus b's, in points, with the bootstrap 95 % interval over scenes."""
    asked = (a[:, 1] > 0) & (b[:, 1] > 0)  # the others would leave some draws with fewer
    a, b = a[asked], b[asked]
    drawn = np.vstack([np.ones(len(a), int), rng.multinomial(len(a), np.full(len(a), 1 / len(a)), BOOTSTRAP)])
    (a_right, a_asked), (b_right, b_asked) = (drawn @ a).T, (drawn @ b).T
    mean, *samples = 100 * (a_right / a_asked - b_right / b_asked)
    return [round(float(x), 2) for x in (mean, *np.percentile(samples, [2.5, 97.5]))]


def table(configs: list[Config], done: dict[str, Rows], styles: list[str], subject: Subject) -> list[dict]:
    """For each style, and for all together where there are several, one row a configuration over the scenes that all
    configurations have."""
    out = []
    for style in [*([ALL] if len(styles) > 1 else []), *styles]:
        ids = sorted(set.intersection(*(set(done[c.name]) for c in configs)))
        ids = [key for key in ids if style in (ALL, key[0])]
        if not ids:
            return []
        tallies = {c.name: tally(done[c.name], ids, subject) for c in configs}
        out += [one_row(c, style, done[c.name], ids, tallies, units(subject)) for c in configs]
    return out


def one_row(
    c: Config, style: str, rows: Rows, ids: list[tuple[str, int]], tallies: dict, compared: tuple[str, ...]
) -> dict:
    """What a configuration gets right of some scenes, and its differences to others."""
    t = tallies[c.name]
    row: dict = {"style": style, "name": c.name, "keys": dict(c.keys), "scenes": len(ids), "asked": {}}
    row["schedule"] = next((r["schedule"] for r in rows.values() if "schedule" in r), {})
    for k, v in t.items():
        mean = float(v[:, 0].sum() / max(1.0, v[:, 1].sum()))
        row[k] = round(mean, 5) if k in KL else round(100 * mean, 2)
        row["asked"][k] = int(v[:, 1].sum())
    described = [rows[key] for key in ids if "tokens" in rows[key]]
    if described:
        lengths = [r["tokens"] for r in described]
        row["tokens"] = {"mean": round(float(np.mean(lengths)), 1), "min": min(lengths), "max": max(lengths)}
    held = [rows[key]["held"] for key in ids if "held" in rows[key]]
    if held:
        row["held"] = round(100 * float(np.mean(held)), 1)
    for word, other in c.against.items():
        for k in compared:
            if other in tallies and np.any((t[k] * tallies[other][k])[:, 1]):  # some scene asked both
                row[f"{k} - {word}"] = interval(t[k], tallies[other][k], np.random.default_rng(1))
    return row


def lines(head: list[str], cells: list[list[str]]) -> list[str]:
    """A table in Markdown."""
    return ["", *("| " + " | ".join(c) + " |" for c in (head, ["---"] * len(head), *cells))]


def asked_of_all(rows: list[dict]) -> dict[str, int]:
    """How often each measure was asked, or 0 where some row lacks it: rows may know more, from other grids."""
    return {k: n if all(row["asked"][k] for row in rows) else 0 for k, n in rows[0]["asked"].items()}


def shares_table(rows: list[dict], measures: tuple[str, ...]) -> list[str]:
    """Shares right and KL."""
    asked = asked_of_all(rows)
    shares, kl = ([k for k in some if asked[k]] for some in (measures, KL))
    held, tokens = (all(k in row for row in rows) for k in ("held", "tokens"))
    cells = []
    for row in rows:
        line = [row["name"], f"{row['schedule'].get('budget', 1):.3f}"]
        line += [f"{row[k]:.1f}" for k in shares] + [f"{row[k]:.4f}" for k in kl]
        line += [f"{row['held']:.0f} %"] if held else []
        line += ["{mean:.0f} ({min}-{max})".format(**row["tokens"])] if tokens else []
        cells.append(line)
    head = ["configuration", "budget", *shares, *kl, *(["held"] if held else []), *(["tokens"] if tokens else [])]
    return lines(head, cells)


def differences_table(rows: list[dict], against: str | None = None) -> list[str]:
    """Differences with their intervals: to all, or to one."""
    asked = asked_of_all(rows)
    keys = dict.fromkeys(k for row in rows for k in row if " - " in k)
    spans = [k for k in keys if asked[k.split(" - ")[0]] and against in (None, k.split(" - ")[1])]
    if not spans:
        return []
    values = [[row["name"], *(row.get(k) for k in spans)] for row in rows[1:]]
    return lines(
        ["configuration", *spans],
        [[name, *(f"{v[0]:+.1f} [{v[1]:+.1f}, {v[2]:+.1f}]" if v else "" for v in spans)] for name, *spans in values],
    )


def write(out: Path, figures: dict, page: str) -> None:
    """The figures as `out`.json and the page as `out`.md."""
    measuring.write_json(out.with_name(out.name + ".json"), figures)
    measuring.write_text(out.with_name(out.name + ".md"), page)


def markdown(rows: list[dict], about: dict, subject: Subject) -> str:
    """The tables as a page."""
    grid = GRIDS[about["grid"]]
    styles = list(dict.fromkeys(row["style"] for row in rows))
    first = [row for row in rows if row["style"] == styles[0]]
    asked = asked_of_all(first)
    counted = ", ".join(f"{asked[k]:,} {what}" for k, what in COUNTED.items() if asked[k])
    names = " and ".join(s for s in styles if s != ALL)
    notes = [
        f"{first[0]['scenes']:,} held-out scenes from number {about['first']} on, style {names}"
        + (f"; {counted}" if counted else "")
        + f". Greedy answers, per cent right; differences in points with 95 % intervals (paired by scene, {BOOTSTRAP} "
        "bootstrap draws).",
        grid.legend,
    ]
    if asked["captions"]:
        notes.append(
            "`captions`: F1 of the objects that descriptions name; of those that are there `found` per cent are named "
            "right, and of those that are `named`. `held`: share of visual tokens left when the answer ends, mean over "
            "layers; `tokens`: length of the descriptions."
        )
    if any(asked[k] for k in KL):
        notes.append("`kl`: mean KL divergence from the full model in nats a token, along its own answers.")
    out = [f"# {grid.title}, {subject.title}", "", " ".join(notes), ""]
    out.append(f"`{about['command']}`, commit {about['commit']}, {about['processor']}.")
    others = (k for k in subject.kinds if k not in subject.compared)
    out += shares_table(first, (*units(subject), *PARTS, *others))
    out += differences_table(first)
    for style in styles[1:]:
        of = [row for row in rows if row["style"] == style]
        out += ["", f"## Style {style}", f"{of[0]['scenes']} scenes."]
        out += shares_table(of, units(subject)) + differences_table(of, "off")
    return "\n".join(out) + "\n"
