"""`st3-edge demo`: the embedded model at work."""

from __future__ import annotations

import argparse
import statistics
from typing import TYPE_CHECKING, Any

from .. import demo
from ..config import ST3Config
from ..report import Report, layers
from .console import Console, run

if TYPE_CHECKING:
    from ..llava import Llava

_SCENES = 3
_QUESTIONS = 2
_PAIRS = 7
_AGREE = 1.5  # largest ratio of the pairs by the smallest, at most
_BAR_WIDTH = 40
_CAPTION = "Describe the image."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Describes the subcommand."""
    parser.description = (
        "Shows pictures to the small model that comes with the package, streams its answers, and measures what ST3 "
        "saves on this machine. Takes less than a minute."
    )


def main(console: Console, _: argparse.Namespace) -> int:
    """Asks the embedded model about its pictures, and shows beside the answers what ST3 did; returns the exit code."""
    return run(console, lambda: _show(console))


def _show(console: Console) -> int:
    from ..llava import Llava

    model, mmproj = demo.model_paths()
    size = sum(path.stat().st_size for path in (model, mmproj)) / 1e6
    console.say(f"The embedded model: a LLaVA of {size:.0f} MB, trained from scratch on rendered scenes like these.")
    console.say(
        "ST3 drops visual tokens between the decoder's layers while the prompt is read; the kept stand for all.\n"
    )

    console.stage("loading the model")
    with Llava.demo() as st3, Llava.demo(ST3Config(preset="off")) as off:
        console.stage(None)
        right = asked = 0
        scenes = demo.scenes()[:_SCENES]
        for scene in scenes:
            console.say(console.strong(str(scene.picture)))
            for question, expected in scene.questions[:_QUESTIONS]:
                console.say(f"  {question}  ", end="")
                answer = _ask(console, st3, scene, question)
                asked += 1
                right += answer == expected
                console.say("" if answer == expected else f"   (right: {expected})")
            console.say()
        console.say(f"{right} of {asked} right. {_CAPTION} The first picture, with and without ST3, and as it is:")
        for label, llava in (("ST3", st3), ("off", off)):
            console.say(f"  {label}: ", end="")
            _ask(console, llava, scenes[0], _CAPTION)
            console.say()
        console.say(f"  is:  {scenes[0].caption}")
        _numbers(console, st3, off, scenes[0])
    return 0


def _ask(console: Console, llava: Llava, scene: demo.Scene, question: str) -> str:
    answer = ""
    for chunk in _stream(llava, scene, question):
        piece = chunk["choices"][0]["delta"].get("content", "")
        console.say(piece, end="")
        answer += piece
    return answer.strip()


def _stream(llava: Llava, scene: demo.Scene, question: str, max_tokens: int = 160) -> Any:
    content = [{"type": "image", "image": scene.picture}, {"type": "text", "text": question}]
    messages = [{"role": "user", "content": content}]
    return llava.create_chat_completion(messages, stream=True, temperature=0, max_tokens=max_tokens)


def _numbers(console: Console, st3: Llava, off: Llava, scene: demo.Scene) -> None:
    reports: dict[Llava, list[Report]] = {st3: [], off: []}
    console.stage("measuring")
    for _ in range(_PAIRS):
        for llava, of_llava in reports.items():
            llava.reset()
            for _ in _stream(llava, scene, _CAPTION, max_tokens=1):
                pass
            assert llava.last_report is not None
            of_llava.append(llava.last_report)
    console.stage(None)

    pruned, full = reports[st3][-1], reports[off][-1]
    given = pruned.visual_tokens.given
    console.say(f"\nVisual tokens that each layer holds after prefill (of {given}; preset {pruned.schedule.preset}):")
    for stage in pruned.stages:
        count = pruned.visual_tokens.per_layer[stage[0]]
        bar = console.bar * round(_BAR_WIDTH * count / max(given, 1))
        console.say(f"  {layers(stage):12}  {count:4}  {bar}")

    times = [[r.ms.prefill for r in reports[llava]] for llava in (st3, off)]
    kv, stock_kv = pruned.kv_bytes.live, full.kv_bytes.live
    console.say()
    console.say(f"                        {'ST3':>12} {'off':>12}")
    console.say(f"  visual tokens (mean)  {given * pruned.schedule.budget:>12.0f} {given:>12}")
    console.say(f"  KV cache in use       {kv / 1e6:>9.2f} MB {stock_kv / 1e6:>9.2f} MB   {stock_kv / kv:.2f} x less")
    console.say(f"  prefill               {_prefill(*times)}")
    console.say(
        f"\nPrefill is the prompt's way through the decoder, the vision encoder apart: medians of {_PAIRS} pairs of "
        "runs on this machine,\nST3 and off in turn. This model is small: in a large one the decoder's share is "
        "larger, and so is what ST3 saves."
    )


def _prefill(st3: list[float], off: list[float]) -> str:
    """Milliseconds of pairs of runs as the table's cells: medians and the ratio with its range; a remark in place of
    all of them where the pairs disagree."""
    ratios = [b / a for a, b in zip(st3, off, strict=True)]
    low, high = min(ratios), max(ratios)
    if high > _AGREE * low:
        return f"not compared: pairs of runs differ ({low:.1f} to {high:.1f}); other programs are running"
    ratio = statistics.median(ratios)
    with_st3, without = statistics.median(st3), statistics.median(off)
    return f"{with_st3:>9.1f} ms {without:>9.1f} ms   {ratio:.2f} x as fast ({low:.2f} to {high:.2f})"
