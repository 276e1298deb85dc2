"""Conversations side by side, their masks, and the LoRA of the decoder that learns to see. Needs torch."""

from __future__ import annotations

import random
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="torch is not installed")
pytest.importorskip("tokenizers", reason="tokenizers is not installed")
pytest.importorskip("gguf", reason="gguf is not installed")
sys.path.insert(0, str(Path(__file__).parents[2] / "scripts" / "smol_llava"))
learn = pytest.importorskip("learn")
packs = pytest.importorskip("packs")
smol = pytest.importorskip("smol")
llama = pytest.importorskip("llama")


class Bytes:
    """A tokenizer whose tokens are bytes."""

    @staticmethod
    def encode(text: str) -> SimpleNamespace:
        return SimpleNamespace(ids=list(text.encode()))


TALKS = [
    [packs.Question("what", "What is this?", "fox"), packs.Question("color", "Which color?", "red")],
    [packs.Question("count", "How many?", "3")],
    [packs.Question("describe", "Tell me.", "x" * 900)],
    [packs.Question("where", "Where is it?", "top left")],
]


@pytest.fixture(scope="module")
def made() -> packs.Pack:
    """Three of the four talks: one is too long."""
    return packs.blocks(TALKS, Bytes, 400)


def test_rows_are_the_chat_template(made) -> None:
    # broken by a lost end of answer, a wrong turn marker, or by the talk that does not fit
    for number, talk in ((0, TALKS[0]), (1, TALKS[1]), (3, TALKS[3])):
        rows = made.block == number
        parts = [("\n" if k == 0 else "\n<|im_start|>user\n", q.text, q.answer) for k, q in enumerate(talk)]
        want: list[int] = []
        for before, asked, answer in parts:
            want += f"{before}{asked}<|im_end|>\n<|im_start|>assistant\n{answer}".encode() + bytes([smol.EOS])
        assert made.ids[rows].tolist() == want
        assert made.offset[rows].tolist() == list(range(len(want)))
    assert not (made.block == 2).any()
    assert made.kinds == ["what", "color", "count", "where"]


def test_labels_are_the_next_tokens_of_answers(made) -> None:
    # broken by a shift of one between rows, labels and spans
    answers = [q.answer for t in (TALKS[0], TALKS[1], TALKS[3]) for q in t]
    spans = np.zeros(len(made.ids), bool)
    for answer, (first, last) in zip(answers, made.spans, strict=True):
        assert made.labels[first:last].tolist() == [*answer.encode(), smol.EOS]
        assert made.ids[first + 1 : last + 1].tolist() == made.labels[first:last].tolist()
        spans[first:last] = True
    assert ((made.labels >= 0) == spans).all()


def test_a_row_sees_the_picture_and_its_own_talk(made) -> None:
    # broken by a mask that lets talks, padding or what comes later through
    layout = learn.Layout(Bytes, 144)
    put = layout.feed([made])
    assert layout.n % 16 == 0
    seen = (put["rest"][0, 0] == 0).numpy()
    n = layout.n
    assert not seen[:, : layout.pad].any() and seen[:, layout.pad : n].all()
    rows = np.arange(len(made.ids))
    own = (made.block[:, None] == made.block) & (rows[:, None] >= rows)
    assert (seen[:, n:] == own).all()
    first = (put["first"] == 0).numpy()[layout.pad :, layout.pad :]
    assert (first == np.tril(np.ones_like(first))).all()


def test_positions_follow_all_576_tokens() -> None:
    # broken if pooled tokens lost their places, or text its distance from the picture
    whole, pooled = learn.Layout(Bytes, 576), learn.Layout(Bytes, 144)
    before = len(whole.before)
    assert whole.places[whole.pad :].tolist() == list(range(before + 576))
    grid = whole.places[-576:].view(12, 2, 12, 2).mean((1, 3)).flatten()
    assert torch.allclose(pooled.places[-144:], grid)


def test_pooling_averages_neighbours() -> None:
    # broken by a reshape that mixes rows and columns
    x = torch.arange(576.0).view(1, 24, 24, 1)
    want = torch.nn.functional.avg_pool2d(x.permute(0, 3, 1, 2), 2).permute(0, 2, 3, 1).reshape(1, 144, 1)
    assert torch.equal(learn.pool(x.view(1, 576, 1), 144), want)


def test_lora_adds_its_product() -> None:
    # broken by a transposed or scaled update; it starts at nothing
    torch.manual_seed(random.Random(5).randrange(2**31))
    m = llama.Linear(6, 10)
    x = torch.randn(4, 6)
    before = m(x)
    m.widen(3)
    assert torch.equal(m(x), before)
    m.lora_b.data.normal_()
    assert torch.allclose(m(x), x @ (m.weight + m.lora_b @ m.lora_a).T, atol=1e-5)
    assert [n for n, p in m.named_parameters() if p.requires_grad] == ["lora_a", "lora_b"]


@pytest.mark.parametrize("n", [0, 7, 11])
def test_attention_in_parts_is_attention_of_all(n: int) -> None:
    # broken by a half that misses its keys, or by key heads that go with other query heads
    torch.manual_seed(6)
    a, x = llama.Attention(), torch.randn(2, 11, llama.WIDTH)
    cos, sin = llama.modeling.rope(torch.arange(11.0)[None], llama.HEAD, llama.THETA)
    mask = torch.full((11, 11), -1e4).triu(1)
    got = a(x, cos, sin, mask[:n, :n], mask[None, None, n:])
    q, k, v = (f(x).view(2, 11, -1, llama.HEAD).transpose(1, 2) for f in (a.q_proj, a.k_proj, a.v_proj))
    q, k = llama.modeling.rotate(q, cos, sin), llama.modeling.rotate(k, cos, sin)
    want = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    assert torch.allclose(got, a.o_proj(want.transpose(1, 2).reshape(2, 11, -1)), atol=1e-5)
