"""What `st3-edge inspect` does."""

from __future__ import annotations

import argparse
import os
from typing import Any

from ...files.output import check_output
from ...files.pair import projector_of
from ...prompts import images
from .. import loading, options, which
from ..console import Console, run
from . import figure, output, page
from .seen import see


def main(console: Console, arguments: argparse.Namespace) -> int:
    """Asks, streams the answer to standard output, writes the files; returns the exit code."""
    return run(console, lambda: _inspect(console, arguments))


def _inspect(console: Console, arguments: argparse.Namespace) -> int:
    config = options.config(arguments)
    *sources, question = arguments.inputs
    # Check what is written and read before the slow model load.
    targets = output.targets(arguments.output, sources)
    pictures = [images.load_argument(source) for source in sources]
    found = which.find(console, arguments)
    files = [file for source in sources if (file := images.file_of(source))]
    inputs: list[str | os.PathLike[str]] = [*files, found.model, found.mmproj, *loading.adapters(arguments)]
    for target in targets:
        check_output(target, inputs, force=arguments.force)

    content = [*({"type": "image", "image": picture} for picture in pictures), {"type": "text", "text": question}]
    with loading.load(console, arguments, config, found) as llava:
        found.say(console)
        if note := options.idle(arguments):
            console.note(note)
        chunks: Any = llava.create_chat_completion(
            [*options.system(arguments), {"role": "user", "content": content}],
            stream=True,
            trace=True,
            **options.answer(arguments),
        )
        for chunk in chunks:
            console.say(chunk["choices"][0]["delta"].get("content", ""), end="")
        console.say()
        report = llava.last_report
        assert report is not None
        kind = projector_of(llava.mmproj_path)
        seen = see(question, sources, pictures, llava.tiles, report, llava.model_path, kind)
    if note := options.cut(report, options.answer(arguments), llava.n_ctx):
        console.note(note)
    console.note(report.summary())
    if seen.unknown:
        console.note(f"The patches are not shown: {seen.unknown}.")

    console.stage("drawing")
    for target in targets:
        data = figure.png(seen) if target.suffix.lower() == ".png" else page.html(seen).encode(errors="replace")
        output.write(target, data, inputs, force=arguments.force)
        console.note(f"Written: {target}")
    return 0
