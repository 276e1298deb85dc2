"""What each layer of a full model looks at while it reads a question about a picture.

python scripts/attention.py [--smol STATE --model GGUF --mmproj GGUF] [--scenes 60] [--first N] [--out FILE]

Attention is computed in double precision by the reference of the tests (tests/oracle), on pictures as the vision
encoder gives them; nothing is dropped. For every layer, means over questions:

visual       share of the text rows' attention that goes to the picture, and of the last row's (`visual last`)
first        share that goes to the prompt's first token, where attention rests that has nothing to look for
half         how many of the 576 visual tokens hold half of what the picture gets
fixed        share of what the picture gets that goes to the five patches that get most over all pictures
a score      of the patches that show what is asked about, how many per cent are among the fifth of highest score;
             by chance 20

A page (Markdown) and the figures (JSON) go to --out.
"""

from __future__ import annotations

import argparse
import sys
from collections import defaultdict

import measuring
import native_runtime
import native_vision
import numpy as np
import quality
from quality_subjects import Subject
from quality_tables import lines, write

from st3_edge.native.machine import provenance

sys.path.append(str(measuring.ROOT / "tests"))
from oracle.conversation import Image
from oracle.llama import Decoder
from oracle.schedule import best

SCORES = ("text-mean", "text-max", "last-mean", "last-max")
SHARE = 0.2  # of highest score


def scores(p: np.ndarray) -> dict[str, np.ndarray]:
    """Each score's term of the probabilities [n_head, rows, n_visual] that visual tokens get: [n_visual]."""
    last = p[:, -1:]
    return dict(zip(SCORES, (p.mean((0, 1)), p.max((0, 1)), last.mean((0, 1)), last.max((0, 1))), strict=True))


def found(score: np.ndarray, patches: np.ndarray) -> float:
    """Per cent of the patches (bool [n]) that are among the fifth of highest score."""
    return 100 * float(patches[best(score, round(SHARE * len(score)))].sum() / patches.sum())


def half(map_: np.ndarray) -> int:
    """How many of the tokens hold half of it."""
    shares = np.sort(map_)[::-1].cumsum() / map_.sum()
    return int(np.searchsorted(shares, 0.5)) + 1


def watch(subject: Subject, numbers: range) -> tuple[int, list[dict[str, float]]]:
    """How many questions were asked, and each layer's figures."""
    text, mmproj = subject.files
    folder = native_runtime.built()
    rt, decoder = native_runtime.Runtime(folder), Decoder(text)
    values: list[dict[str, list[float]]] = [defaultdict(list) for _ in range(subject.layers)]
    maps = np.zeros((subject.layers, 576))
    asked = 0
    with native_runtime.Model(rt, text) as model:
        vision = native_vision.Vision(model, mmproj, 2)
        before = [*model.bos(), *model.tokenize(subject.before)]
        for i in numbers:
            style = subject.styles[i % len(subject.styles)]
            questions = [(q, at.ravel()) for q, at in subject.looked_for(style, i) if at.any()]
            if not questions:
                continue
            q, patches = questions[i % len(questions)]
            image = Image(vision.encode(subject.image(style, i)).embd, 24, 24)
            span = slice(len(before), len(before) + 576)
            asked += 1
            print(f"{asked} questions", file=sys.stderr)
            for layer, p in enumerate(decoder.attention([before, image, model.tokenize(subject.after(q.text))])):
                seen, row = p[:, :, span], values[layer]
                each = scores(seen)
                row["visual"].append(float(seen.sum(-1).mean()))
                row["visual last"].append(float(seen[:, -1].sum(-1).mean()))
                row["first"].append(float(p[:, :, 0].mean()))
                row["half"].append(half(each["text-mean"]))
                maps[layer] += each["text-mean"] / each["text-mean"].sum()
                for name, score in each.items():
                    row[name].append(found(score, patches))
        vision.close()
    rt.close()
    if not asked:
        raise SystemExit("none of these scenes has a question about a thing that is there")
    means = [{k: round(float(np.mean(v)), 4) for k, v in row.items()} for row in values]
    fixed = np.sort(maps / asked, 1)[:, -5:].sum(1)
    return asked, [{**row, "fixed": round(float(share), 4)} for row, share in zip(means, fixed, strict=True)]


def page(result: dict) -> str:
    """The figures as a page."""
    shares, other = ("visual", "visual last", "first", "fixed"), ("half", *SCORES)
    out = [f"# What each layer looks at, {result['title']}", ""]
    out.append(
        f"{result['questions']} questions about held-out scenes from number {result['first']} on. `visual`, `visual "
        "last`, `first`: per cent of the attention of text rows (and of the last one) that goes to the picture, and to "
        "the prompt's first token. `half`: visual tokens that hold half of what the picture gets; `fixed`: per cent of "
        "it that goes to the five patches that get most over all pictures. A score: per cent of the patches of what is "
        "asked about that are among the fifth of highest score (chance: 20)."
    )
    out += ["", f"`{result['command']}`, commit {result['commit']}, {result['processor']}."]
    cells = [
        [str(i), *(f"{100 * row[k]:.1f}" for k in shares), *(f"{row[k]:.0f}" for k in other)]
        for i, row in enumerate(result["layers"])
    ]
    out += lines(["layer", *shares, *other], cells)
    return "\n".join(out) + "\n"


def main() -> None:
    """Parse the command line, watch, write page and figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    quality.add_subject(parser)
    parser.add_argument("--scenes", type=measuring.count, default=60)
    parser.add_argument("--first", type=measuring.whole(0, 10**9), default=30_000, help="number of the first scene")
    parser.add_argument("--out", type=measuring.result_file, help="default: docs/results, by the model")
    args = parser.parse_args()
    subject = quality.chosen(args.model, args.mmproj, args.smol)
    asked, layers = watch(subject, range(args.first, args.first + args.scenes))
    result = {"title": subject.title, "questions": asked, "first": args.first, **provenance(), "layers": layers}
    out = args.out or measuring.ROOT / "docs" / "results" / ("smol-attention" if args.smol else "attention")
    text = page(result)
    write(out, result, text)
    print(text)


if __name__ == "__main__":
    measuring.run(main)
