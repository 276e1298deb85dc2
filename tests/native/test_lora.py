"""LoRA adapters, of token_embd too: a pruned prompt with them is one of the model that they are merged into."""

from __future__ import annotations

from pathlib import Path

import cases
import gguf
import numpy as np
import pytest
from annealing import MOST_ERROR, Conversation, native
from cases import SEED
from native_runtime import Context, Model
from oracle import llama as oracle
from oracle import schedule

SHAPE = cases.SHAPES["mha-64"]
KEYS = {"st3.preset": "st3", "st3.keep": 0.5, "st3.start": 2, "st3.stride": 2, "st3.anneal_tokens": 16}
RANK, ALPHA = 4, 8.0
ADAPTED = ("token_embd.weight", "blk.0.attn_q.weight", "blk.2.ffn_down.weight", "blk.5.attn_v.weight")


def write_adapter(path: Path, source: Path, names: tuple[str, ...], kind: str, seed: int) -> dict[str, np.ndarray]:
    """A random adapter of these tensors; returns what it adds to each at strength 1."""
    kind = gguf.GGMLQuantizationType[kind]
    shapes = {t.name: [int(n) for n in reversed(t.shape)] for t in gguf.GGUFReader(source).tensors}
    w, out = gguf.GGUFWriter(path, "llama"), {}
    w.add_type("adapter")
    w.add_string("adapter.type", "lora")
    w.add_float32("adapter.lora.alpha", ALPHA)
    for i, name in enumerate(names):
        rng = np.random.default_rng([SEED, seed, i])
        rows, columns = shapes[name]
        a, b = rng.standard_normal((RANK, columns)), 0.2 * columns**-0.5 * rng.standard_normal((rows, RANK))
        if name == "token_embd.weight":  # a token chooses a row of a there
            a, b = rng.standard_normal((rows, RANK)), 0.3 * rng.standard_normal((columns, RANK))
        packed = [gguf.quants.quantize(x.astype(np.float32), kind) for x in (a, b)]
        for x, part in zip(packed, "ab", strict=True):
            w.add_tensor(f"{name}.lora_{part}", x, raw_dtype=kind)
        a, b = (gguf.quants.dequantize(x, kind).astype(np.float64) for x in packed)
        out[name] = ALPHA / RANK * (a @ b.T if name == "token_embd.weight" else b @ a)
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_tensors_to_file()
    w.close()
    return out


class Merged(oracle.Decoder):
    """A model with what adapters add to its weights."""

    def __init__(self, path: Path, added: list[tuple[dict[str, np.ndarray], float]]) -> None:
        super().__init__(path)
        self.added = added

    def w(self, name: str) -> np.ndarray:
        """A tensor as float64, rows first."""
        return super().w(name) + sum(strength * of[name] for of, strength in self.added if name in of)


def prompt(number: int = 0) -> list:
    return cases.prompt(np.random.default_rng([SEED, 80, number]), SHAPE, 2, 70)


@pytest.fixture(scope="module")
def path(random_gguf):
    return random_gguf(SHAPE)


@pytest.mark.parametrize("names", [ADAPTED, ADAPTED[:1], ADAPTED[1:]], ids=["all", "token_embd", "layers"])
@pytest.mark.parametrize("kind", ["F32", "F16"])
def test_an_adapted_prompt_is_the_merged_models(rt, path, tally, tmp_path: Path, names, kind: str) -> None:
    """Breaks if the prefill or the answer leaves an adapter out, or takes its rank, alpha or strength otherwise."""
    added = [write_adapter(tmp_path / f"{i}.gguf", path, names, kind, 81 + i) for i in range(2)]
    merged = Merged(path, list(zip(added, (0.75, -0.5), strict=True)))
    s = schedule.resolve(SHAPE.n_layer, **{k.removeprefix("st3."): v for k, v in KEYS.items()})
    with Model(rt, path, KEYS) as model, Context(model, n_ctx=512) as ctx:
        loaded = [model.adapter(tmp_path / f"{i}.gguf") for i in range(2)]
        assert ctx.adapt(list(zip(loaded, (0.75, -0.5), strict=True))) == 0
        talk = Conversation(ctx, merged, s, "F16", tally, "lora")
        talk.prefill(prompt())
        assert ctx.report()["mode"] == "pruned-prefill"
        plain = oracle.Decoder(path).prefill(prompt(), s, "F16")
        assert oracle.nmse(plain.logits, talk.result.logits) > 100 * MOST_ERROR["F16"], "the adapters change nothing"
        for token in range(20, 32):
            talk.step(token)
        talk.close()


def test_adapters_that_change_while_an_image_waits(rt, path, tmp_path: Path) -> None:
    """Breaks if an image that was given before an adapter is read with it, or one after it without."""
    write_adapter(tmp_path / "a.gguf", path, ADAPTED, "F32", 81)
    got = []
    for wait in (False, True):
        with Model(rt, path, KEYS) as model, Context(model, n_ctx=512) as ctx:
            adapter, at = model.adapter(tmp_path / "a.gguf"), 0
            *first, question = native(prompt())
            for piece in first:
                if isinstance(piece, list):
                    assert ctx.decode(piece, at, "none") == 0
                    at += len(piece)
                    continue
                if wait:
                    assert ctx.picture(piece, at) == 0
                else:  # computed at once
                    ctx.announce(len(piece.embd), piece.nx, piece.ny)
                    assert ctx.decode(piece.embd, at, "last") == 0
                at += len(piece.embd)
            assert ctx.adapt([(adapter, 1.0)]) == 0
            assert ctx.report()["waiting"] == 0
            assert ctx.decode(question, at) == 0
            got.append(ctx.logits())
    assert oracle.nmse(got[1], got[0]) < MOST_ERROR["F16"]
