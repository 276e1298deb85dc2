"""The embedded model through our libraries against Hugging Face's LlavaForConditionalGeneration, F32 weights.

The Hugging Face folder is not shipped: both sides are rebuilt here from the shipped GGUF pair.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="torch is not installed: no reference to compare with")
transformers = pytest.importorskip("transformers", reason="transformers is not installed: no reference")
pytest.importorskip("safetensors", reason="safetensors is not installed: no reference")

ROOT = Path(__file__).resolve().parents[2]
for folder in (ROOT / "scripts", ROOT / "scripts" / "embedded_model"):
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))

import gguf  # noqa: E402
import native_runtime  # noqa: E402
import native_vision  # noqa: E402
import questions  # noqa: E402
import scenes  # noqa: E402

DEMO = ROOT / "st3_edge" / "data" / "demo"
N_PICTURES, N_PROMPTS = 20, 100


class Tokens:
    """A GGUF's vocabulary with the methods of a SentencePieceProcessor that the GGUF writer asks for."""

    def __init__(self, path: Path) -> None:
        reader = gguf.GGUFReader(path)
        fields = {k: reader.get_field(f"tokenizer.ggml.{k}").contents() for k in ("tokens", "scores", "token_type")}
        self.pieces, self.scores, self.kinds = fields["tokens"], fields["scores"], fields["token_type"]

    def vocab_size(self) -> int:
        return len(self.pieces)

    def id_to_piece(self, i: int) -> str:
        return self.pieces[i]

    def get_score(self, i: int) -> float:
        return self.scores[i]

    def is_unknown(self, i: int) -> bool:
        return self.kinds[i] == gguf.TokenType.UNKNOWN

    def is_control(self, i: int) -> bool:
        return self.kinds[i] == gguf.TokenType.CONTROL

    def is_byte(self, i: int) -> bool:
        return self.kinds[i] == gguf.TokenType.BYTE

    def unk_id(self) -> int:
        return 0

    def bos_id(self) -> int:
        return 1

    def eos_id(self) -> int:
        return 2


@pytest.fixture(scope="module")
def rebuilt(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """The shipped weights as a Hugging Face model and as an F32 GGUF pair."""
    pytest.importorskip("sentencepiece", reason="sentencepiece is not installed: export.py needs it")
    import export
    import gguf_writer
    import modeling
    import vocab
    from safetensors.torch import save_file

    shipped = next(DEMO.glob("st3-demo-*.gguf"), None)
    if shipped is None:
        pytest.fail("the embedded model is missing")
    torch.manual_seed(0)
    torch.set_num_threads(1)  # small matrices: more threads only wait for each other
    weights = {k: v.float().contiguous() for k, v in export.read_weights(DEMO).items()}
    n_layer = 1 + max(int(k.split(".layers.")[1].split(".")[0]) for k in weights if "language_model.model.layers" in k)
    config = export.hf_config(modeling.Shape(layers=n_layer))
    hf = tmp_path_factory.mktemp("hf")
    (hf / "config.json").write_text(json.dumps(config))
    save_file(weights, hf / "model.safetensors", metadata={"format": "pt"})
    reference, told = transformers.LlavaForConditionalGeneration.from_pretrained(
        hf, dtype=torch.float32, attn_implementation="eager", output_loading_info=True
    )
    assert not told["missing_keys"] and not told["unexpected_keys"], told
    text, mmproj = export.pair_paths(tmp_path_factory.mktemp("f32"), "F32")
    plain = {k: v.numpy() for k, v in weights.items()}
    gguf_writer.write_text(text, plain, config, Tokens(shipped), vocab.CHAT_TEMPLATE, "F32")
    gguf_writer.write_mmproj(mmproj, plain, config, export.MEAN, export.STD, "F32")
    return SimpleNamespace(hf=reference.eval(), text=text, mmproj=mmproj, mean=export.MEAN, std=export.STD)


@pytest.fixture(scope="module")
def ours(rebuilt: SimpleNamespace) -> SimpleNamespace:
    """The F32 pair on our libraries."""
    folder = native_runtime.lib_dir()
    if folder is None:
        pytest.fail("no native libraries: build the package (pip install .) or set ST3_LIB_DIR", pytrace=False)
    rt = native_runtime.Runtime(folder)
    model = native_runtime.Model(rt, rebuilt.text)
    vision = native_vision.Vision(model, rebuilt.mmproj, threads=1)
    ctx = native_runtime.Context(model, n_ctx=1024, kv="F32", threads=1)
    yield SimpleNamespace(model=model, vision=vision, ctx=ctx)
    ctx.close()
    vision.close()
    model.close()
    rt.close()


def pixels(rebuilt: SimpleNamespace, picture: np.ndarray) -> torch.Tensor:
    """A 336 x 336 picture as the processor gives it: no resizing is left to do."""
    scaled = (picture.astype(np.float32) / 255 - np.float32(rebuilt.mean)) / np.float32(rebuilt.std)
    return torch.from_numpy(scaled.transpose(2, 0, 1)[None].copy())


def features(rebuilt: SimpleNamespace, picture: np.ndarray) -> np.ndarray:
    """Hugging Face's image features [576, width]."""
    with torch.no_grad():
        out = rebuilt.hf.get_image_features(pixel_values=pixels(rebuilt, picture))
    while not isinstance(out, torch.Tensor):
        out = out.pooler_output if hasattr(out, "pooler_output") else out[0]
    return out.reshape(-1, out.shape[-1]).numpy()


def test_every_visual_token(rebuilt: SimpleNamespace, ours: SimpleNamespace) -> None:
    """Breaks if the class token, a position, the feature layer, an activation or the projector is wrong."""
    worst = 1.0
    for i in range(N_PICTURES):
        picture = np.asarray(scenes.scene(i).image)
        want, got = features(rebuilt, picture), ours.vision.encode(picture)
        assert (got.nx, got.ny) == (24, 24)
        assert got.embd.shape == want.shape == (576, ours.model.n_embd)
        cosine = (got.embd * want).sum(1) / np.linalg.norm(got.embd, axis=1) / np.linalg.norm(want, axis=1)
        worst = min(worst, float(cosine.min()))
        assert worst >= 0.9999, f"picture {i}: token {cosine.argmin()} has cosine {cosine.min():.6f}"
    print(f"{N_PICTURES} pictures, smallest cosine of a visual token: {worst:.7f}")


def test_next_token(rebuilt: SimpleNamespace, ours: SimpleNamespace) -> None:
    """Breaks if picture, prompt, positions or weights differ anywhere on the way to the logits."""
    image_token = rebuilt.hf.config.image_token_id
    before = [1, *ours.model.tokenize("USER: ")]
    prompts = ((i, q) for i in range(N_PROMPTS) for q in questions.held_out_questions(i))
    done, worst = 0, 0.0
    seen: tuple[int, native_runtime.Image | None, torch.Tensor | None] = (-1, None, None)
    for i, question in prompts:
        if done == N_PROMPTS:
            break
        if seen[0] != i:
            picture = np.asarray(scenes.scene(i).image)
            seen = i, ours.vision.encode(picture), pixels(rebuilt, picture)
        after = ours.model.tokenize(f"\n{question.text} ASSISTANT:")
        ours.ctx.clear()
        assert ours.ctx.prefill([before, seen[1], after]) == 0
        got = ours.ctx.logits()
        ids = torch.tensor([[*before, *[image_token] * 576, *after]])
        with torch.no_grad():
            out = rebuilt.hf(input_ids=ids, pixel_values=seen[2], attention_mask=torch.ones_like(ids))
        want = out.logits[0, -1].numpy()
        assert got.argmax() == want.argmax(), f"scene {i}: {question.text}"
        worst = max(worst, float(np.square(got - want).sum() / np.square(want).sum()))
        done += 1
    assert done == N_PROMPTS
    assert worst < 1e-4
    print(f"{done} prompts: argmax equal, worst NMSE of the logits {worst:.1e}")
