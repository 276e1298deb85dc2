"""What was seen, as one HTML page that needs nothing else: no network, no other file."""

from __future__ import annotations

import base64
import hashlib
import io
from collections.abc import Iterable
from html import escape

import numpy as np
import numpy.typing as npt
from PIL import Image

from ...report import layers
from .figure import GONE, GONE_ALPHA
from .patches import View
from .seen import Seen

_STYLE = """
:root { color-scheme: light dark; --soft: #59636e; --line: #d1d9e0; --now: #bf3989; --ground: #fff; }
@media (prefers-color-scheme: dark) {
  :root { --soft: #9198a1; --line: #3d444d; --now: #ff8ed4; --ground: #0d1117; }
}
body { font: 16px/1.5 system-ui, sans-serif; max-width: 76rem; margin: auto; padding: 1rem;
  background: var(--ground); overflow-wrap: anywhere; }
h1 { font-size: 1.5rem; margin: 0 0 .5rem; }
h2 { font-size: 1.1rem; margin: 2rem 0 .5rem; }
.soft, figcaption, dt { color: var(--soft); }
#answer { max-height: 30vh; overflow: auto; white-space: pre-wrap; margin: 0; }
#answer .now { color: var(--now); text-decoration: underline; }
#answer .later { opacity: .6; }
#bar { position: sticky; top: 0; z-index: 1; padding: .5rem 0; background: var(--ground);
  border-bottom: 1px solid var(--line); }
input, progress { width: 100%; accent-color: var(--now); }
input { margin: .5rem 0 0; }
.panels { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(16rem, 44%), 1fr)); gap: 1rem; }
figure { margin: 0; }
figcaption { font-size: .85rem; }
svg { display: block; width: 100%; }
path { fill: var(--gone); shape-rendering: crispEdges; }
path.owned { fill: var(--now); fill-opacity: .6; }
table { border-collapse: collapse; width: 100%; }
td, th { padding: .1rem .8rem .1rem 0; text-align: right; font-weight: normal; white-space: nowrap; width: 1%; }
td:last-child { width: auto; padding: 0; }
dl { display: grid; grid-template-columns: auto 1fr; gap: .25rem 1rem; }
dd { margin: 0; }
"""

# Without it the page shows what was held when the answer began.
_SCRIPT = """
"use strict";
const slider = document.querySelector("input"), words = [...document.querySelectorAll("#answer span")];
const paths = [...document.querySelectorAll("path[data-left]")], counts = [...document.querySelectorAll("[data-held]")];
function show() {
  const step = +slider.value - 1;
  words.forEach((word, i) => { word.className = i < step ? "" : i === step ? "now" : "later"; });
  for (const path of paths) path.style.display = +path.dataset.left <= step ? "" : "none";
  for (const count of counts) {
    const held = count.dataset.held.split(" ")[step];
    if (count.localName === "progress") count.value = held; else count.textContent = held;
  }
}
slider.addEventListener("input", show);
words.forEach((word, i) => word.addEventListener("click", () => { slider.value = i + 1; show(); }));
document.getElementById("steps").hidden = false;
document.getElementById("answer").style.cursor = "pointer";
show();
"""

_HINT = '<span class="hint" hidden> Point at a patch to see all that the same kept one stands for.</span>'

# Shows which patches the one stands for that the patch pointed at belongs to.
_OWNERS_SCRIPT = """
"use strict";
for (const svg of document.querySelectorAll("svg[data-owners]")) {
  const owners = svg.dataset.owners.split(" "), { width, height } = svg.viewBox.baseVal;
  const owned = svg.querySelector(".owned");
  svg.addEventListener("pointermove", (event) => {
    const box = svg.getBoundingClientRect();
    const x = Math.floor((event.clientX - box.left) / box.width * width);
    const y = Math.floor((event.clientY - box.top) / box.height * height);
    const owner = owners[y * width + x];
    owned.setAttribute("d", owners.map((other, i) =>
      other === owner && owner !== "-1" ? `M${i % width} ${Math.floor(i / width)}h1v1h-1z` : "").join(""));
  });
  svg.addEventListener("pointerleave", () => owned.setAttribute("d", ""));
}
for (const hint of document.querySelectorAll(".hint")) hint.hidden = false;
"""


def html(seen: Seen) -> str:
    """The page: the answer, with a slider along its tokens; the patches that each stage held when the slider's token
    was chosen; visual tokens layer by layer; what was done. Whatever comes from outside is escaped."""
    moves = bool((seen.left[seen.left > 0] < seen.n_steps).any())
    scripts = [_SCRIPT] * moves + [_OWNERS_SCRIPT] * (seen.owners is not None)
    digests = [base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() for script in scripts]
    allowed = " ".join(f"'sha256-{digest}'" for digest in digests) or "'none'"
    policy = f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src {allowed}"
    answer = "".join(f"<span>{escape(piece)}</span>" for piece in seen.trace.pieces) or "(no answer)"
    views = [(picture, view) for picture in seen.pictures for view in picture.views]
    sections = [
        f"<h2>{escape(picture.name)}{f', {view.name}' if view.name else ''}</h2>"
        f'<p class="soft">{picture.width} × {picture.height} pixels, as the vision encoder sees it: '
        f"{view.pixels.shape[1]} × {view.pixels.shape[0]}, in {view.tokens.shape[1]} × {view.tokens.shape[0]} patches. "
        "Gray patches are gone from the layers named."
        f"{_HINT if seen.owners is not None else ''}</p>{_panels(seen, view, f'view{i}')}"
        for i, (picture, view) in enumerate(views)
    ]
    if seen.unknown:
        sections.append(f"<p>The patches are not shown: {escape(seen.unknown)}.</p>")
    images = "".join(_image(view, f"view{i}") for i, (_, view) in enumerate(views))
    facts = "".join(f"<dt>{escape(term)}</dt><dd>{escape(fact)}</dd>" for term, fact in seen.facts())
    return f"""<!DOCTYPE html>
<html>
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escape(seen.question)}</title>
<style>{_STYLE}:root {{ --gone: rgba{(*GONE, GONE_ALPHA)}; }}</style>
</head>
<body>
<h1 dir="auto">{escape(seen.question)}</h1>
<div id="bar">
<p id="answer" dir="auto">{answer}</p>
{_slider(seen.n_steps) if moves else '<p class="soft">The same patches were held at all tokens of the answer.</p>'}
</div>
{f"<p>{escape(seen.notice)}</p>" if seen.notice else ""}
{"".join(sections)}
<h2>Visual tokens in each layer</h2>
{_table(seen)}
<h2>What was done</h2>
<dl>{facts}</dl>
<svg width="0" height="0" style="position:absolute">{images}</svg>
{"".join(f"<script>{script}</script>" for script in scripts)}
</body>
</html>
"""


def _slider(n_steps: int) -> str:
    return f"""<label id="steps" class="soft" hidden>
<input type="range" min="1" max="{n_steps}" value="1">
When token <span data-held="{_list(range(1, n_steps + 1))}">1</span> of {n_steps} was chosen
</label>"""


def _panels(seen: Seen, view: View, name: str) -> str:
    rows, columns = view.tokens.shape
    figures = []
    for i, (stage, of_stage) in enumerate(zip(seen.stages, seen.left, strict=True)):
        left = of_stage[view.tokens]
        owners = "" if seen.owners is None else f' data-owners="{_list(seen.owners[i][view.tokens].ravel())}"'
        steps = [int(step) for step in np.unique(left) if step < seen.n_steps]
        paths = "".join(
            f'<path data-left="{step}" style="{"display:none" if step else ""}" d="{_outline(left == step)}"/>'
            for step in steps
        )
        held = _held(left.ravel(), seen.n_steps)
        figures.append(
            f'<figure><svg viewBox="0 0 {columns} {rows}"{owners}><use href="#{name}"/>{paths}'
            + ('<path class="owned"/>' if owners else "")
            + "</svg>"
            f'<figcaption>{layers(stage)}: <b data-held="{_list(held)}">{held[0]}</b> of {left.size}</figcaption>'
            "</figure>"
        )
    return f'<div class="panels">{"".join(figures)}</div>'


def _table(seen: Seen) -> str:
    lines = []
    for stage, left in zip(seen.stages, seen.left, strict=True):
        held = _held(left, seen.n_steps)
        counts = _list(held)
        lines.append(
            f'<tr><th>{layers(stage)}</th><td data-held="{counts}">{held[0]}</td>'
            f'<td><progress max="{max(1, seen.given)}" value="{held[0]}" data-held="{counts}"></progress></td></tr>'
        )
    return f"<table>{''.join(lines)}</table>"


def _held(left: npt.NDArray[np.int64], n_steps: int) -> list[int]:
    """How many of the tokens with these steps of leaving were held at each step."""
    gone = np.cumsum(np.bincount(left, minlength=n_steps + 1)[:n_steps])
    return [int(len(left) - n) for n in gone]


def _outline(cells: npt.NDArray[np.bool_]) -> str:
    """An SVG path around cells of a grid, run by run; a cell is one unit wide."""
    out = []
    for y, row in enumerate(cells):
        bounds = np.flatnonzero(np.diff(np.concatenate([[False], row, [False]])))
        out += [f"M{a} {y}h{b - a}v1h{a - b}z" for a, b in zip(bounds[::2], bounds[1::2], strict=True)]
    return "".join(out)


def _image(view: View, name: str) -> str:
    rows, columns = view.tokens.shape
    out = io.BytesIO()
    Image.fromarray(view.pixels).save(out, "PNG", optimize=True)
    data = base64.b64encode(out.getvalue()).decode()
    return f'<image id="{name}" width="{columns}" height="{rows}" href="data:image/png;base64,{data}"/>'


def _list(numbers: Iterable[int]) -> str:
    return " ".join(map(str, numbers))
