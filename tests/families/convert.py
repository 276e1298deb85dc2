"""Upstream's converter, as a process that converts one folder after the other: `Converter` starts it.

python convert.py UPSTREAM_FOLDER: reads JSON lines {"folder", "out", "mmproj", "arch"}, answers each with "ok" or an
error.

The converter knows real tokenizers by a hash of what they make of a text. The tiny models have none: their vocabulary,
and that alone, is written here instead.
"""

from __future__ import annotations

import json
import subprocess
import sys
import traceback
from pathlib import Path
from typing import Any

MARKERS = "st3_markers"  # in config.json: special tokens at the end of the vocabulary


class Converter:
    """The running process. Raises RuntimeError with the converter's own words where it refuses a model."""

    def __init__(self, upstream: Path) -> None:
        self._log: list[str] = []
        self._process = subprocess.Popen(
            [sys.executable, __file__, str(upstream)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def __call__(self, folder: Path, out: Path, mmproj: bool = False, arch: str | None = None) -> Path:
        """Converts the model in a folder into the file `out`, in F32. arch: overrides what its config says it is."""
        job = {"folder": str(folder), "out": str(out), "mmproj": mmproj, "arch": arch}
        assert self._process.stdin and self._process.stdout
        self._process.stdin.write(json.dumps(job) + "\n")
        self._process.stdin.flush()
        answer = self._process.stdout.readline()
        if answer != '"ok"\n':
            raise RuntimeError(f"{folder.name}: {json.loads(answer or chr(34) * 2)}")
        return out

    def close(self) -> None:
        """End the process."""
        assert self._process.stdin
        self._process.stdin.close()
        self._process.wait(timeout=60)


def vocabulary(n: int, markers: list[str]) -> tuple[list[str], list[float], list[int]]:
    """Tokens, scores and types of a vocabulary of n, the last of which are the markers."""
    sys.path.append(str(Path(__file__).resolve().parents[2]))
    from st3_edge.commands.bench.random_model import vocabulary as plain

    tokens, scores, kinds = plain(n - len(markers))
    control = kinds[1]
    return tokens + markers, scores + [0.0] * len(markers), kinds + [control] * len(markers)


def set_vocab(model: Any) -> None:
    """In place of a converter class's own method."""
    tokens, scores, kinds = vocabulary(model.hparams["vocab_size"], model.hparams.get(MARKERS) or [])
    w = model.gguf_writer
    w.add_tokenizer_model("llama")
    w.add_tokenizer_pre("default")
    w.add_token_list(tokens)
    w.add_token_scores(scores)
    w.add_token_types(kinds)
    w.add_bos_token_id(1)
    w.add_eos_token_id(2)
    w.add_unk_token_id(0)


def main() -> None:
    """Serve jobs until the input ends."""
    sys.path.insert(0, sys.argv[1])
    import convert_hf_to_gguf as script
    from conversion.llama import LlamaModel

    answers, sys.stdout = sys.stdout, sys.stderr
    LlamaModel.set_vocab = set_vocab  # of the classes that others are built of
    plain_class, plain_architecture = script.get_model_class, script.get_model_architecture
    job: dict[str, Any] = {}

    def get_model_class(name: str, mmproj: bool = False) -> Any:
        made = plain_class(name, mmproj=mmproj)
        if not mmproj:  # a class that is built of another one writes that one's vocabulary
            made.no_mtp = True  # no heads that guess tokens ahead
            made.set_vocab = lambda self: set_vocab(getattr(self, "impl", self))
        return made

    script.get_model_class = get_model_class
    script.get_model_architecture = lambda hparams, kind: job["arch"] or plain_architecture(hparams, kind)
    for line in sys.stdin:
        job = json.loads(line)
        sys.argv[1:] = [job["folder"], "--outfile", job["out"], "--outtype", "f32", *(["--mmproj"] * job["mmproj"])]
        answer = "ok"
        try:
            script.main()
        except (Exception, SystemExit):
            answer = traceback.format_exc()[-3000:]
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


if __name__ == "__main__":
    main()
