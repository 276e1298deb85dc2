"""What `st3-edge inspect` does."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

from .. import _gguf, _options, images
from .._console import Console
from .._files import check_output
from ..llava import Llava
from . import figure, output, page
from .seen import see


def main(console: Console, arguments: argparse.Namespace, load: Callable[[], Llava]) -> int:
    """Asks, streams the answer to standard output, writes the files; returns the exit code. `load` gives the model."""
    *sources, question = arguments.inputs
    # Before the model: loading a large one takes long, and what is wrong would be told of only then.
    targets = output.targets(arguments.output, sources)
    words = [word for word in (*sources, arguments.model, arguments.mmproj) if word]
    inputs = [word for word in words if word != "-" and word[:5].lower() != "data:"]
    for target in targets:
        check_output(target, inputs, force=arguments.force)
    pictures = [images.load_argument(source) for source in sources]

    content = [*({"type": "image", "image": picture} for picture in pictures), {"type": "text", "text": question}]
    with load() as llava:
        chunks: Any = llava.create_chat_completion(
            [{"role": "user", "content": content}],
            stream=True,
            trace=True,
            **_options.answer(arguments),
        )
        for chunk in chunks:
            console.say(chunk["choices"][0]["delta"].get("content", ""), end="")
        console.say()
        report = llava.last_report
        assert report is not None
        header = _gguf.read_header(llava.mmproj_path, "mmproj")
        seen = see(question, sources, pictures, report, llava.model_path, header)
    if note := _options.cut(report, _options.answer(arguments), llava.n_ctx):
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
