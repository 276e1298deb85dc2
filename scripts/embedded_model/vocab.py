"""The tokenizer: SentencePiece BPE, 640 pieces with byte fallback, trained on questions and captions.

No blank is put before a text (`add_dummy_prefix` off, `add_space_prefix` false in the GGUF), so the
pieces on both sides of the picture come out the same in SentencePiece, Hugging Face and llama.cpp.
"""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import questions
import scenes
import sentencepiece
from things import Scene

MODEL = Path(__file__).with_name("tokenizer.model")  # `python vocab.py` makes it anew
UNK, BOS, EOS, IMAGE = 0, 1, 2, 3
SIZE = 640
BEFORE_IMAGE = "USER: "
CHAT_TEMPLATE = (
    "{{ bos_token }}"
    "{% for message in messages %}"
    "{% if message['role'] == 'system' %}{{ message['content'] + ' ' }}"
    "{% else %}"
    "{{ 'USER: ' if message['role'] == 'user' else 'ASSISTANT: ' }}"
    "{% if message['content'] is string %}{{ message['content'] }}"
    "{% else %}"
    "{% for part in message['content'] if part['type'] in ['image', 'image_url'] %}"
    "{{ '<image>\\n' }}{% endfor %}"
    "{% for part in message['content'] if part['type'] == 'text' %}{{ part['text'] }}{% endfor %}"
    "{% endif %}"
    "{{ ' ' if message['role'] == 'user' else eos_token }}"
    "{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)


def turn(question: str) -> str:
    """What stands between the picture (or the last answer's end) and the answer."""
    return f"{question} ASSISTANT:"


def train(path: Path, n_scenes: int = 4000) -> None:
    """Write a SentencePiece model file, trained on texts of training scenes (seeds 0 to n_scenes)."""
    lines = []
    for seed in range(n_scenes):
        rng = np.random.default_rng([scenes.SPLITS["train"], 0, seed])
        picture = Scene(None, scenes.random_things(rng), str(rng.choice(["light", "dark"])))
        lines += [f"USER: {turn(q.text)} {q.answer}" for q in questions.ask_several(picture, rng, 6, plain=False)]
        lines.append(f"USER: {turn(questions.caption_question(rng))} {questions.caption(picture)}")
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines),
        model_writer=model,
        model_type="bpe",
        vocab_size=SIZE,
        byte_fallback=True,
        character_coverage=1.0,
        add_dummy_prefix=False,
        remove_extra_whitespaces=False,
        normalization_rule_name="identity",
        required_chars="\n",
        split_digits=True,
        unk_id=UNK,
        bos_id=BOS,
        eos_id=EOS,
        pad_id=-1,
        control_symbols=["<image>"],
        num_threads=1,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    path.write_bytes(model.getvalue())


def load(path: Path) -> sentencepiece.SentencePieceProcessor:
    """The tokenizer from its model file."""
    return sentencepiece.SentencePieceProcessor(model_file=str(path))


if __name__ == "__main__":
    train(MODEL)
