"""Sizes of the models that random weights are made for."""

from __future__ import annotations

from dataclasses import dataclass

TYPES = ("Q4_0", "Q4_K", "Q8_0")


@dataclass(frozen=True)
class Shape:
    """Sizes of a decoder. `n_visual` is what its vision encoder gives for one picture; `arch` is "llama", or "qwen2",
    which has biases as well."""

    n_layer: int
    n_embd: int
    n_head: int
    n_head_kv: int
    n_ff: int
    n_vocab: int = 32000
    n_ctx: int = 4096
    rope_base: float = 10000.0
    n_visual: int = 576
    tied: bool = False
    arch: str = "llama"
    qk_gain: float = 1.2  # standard deviation of the elements of q and k: how peaked attention is

    @property
    def head(self) -> int:
        """Elements of one head."""
        return self.n_embd // self.n_head

    @property
    def types(self) -> tuple[str, ...]:
        """The types whose blocks its rows divide into."""
        return tuple(t for t in TYPES if t != "Q4_K" or not (self.n_embd % 256 or self.n_ff % 256))


@dataclass(frozen=True)
class Tower:
    """Sizes of a CLIP vision encoder, with the blocks up to LLaVA's feature layer: the last but one."""

    n_layer: int
    n_embd: int
    n_head: int
    n_ff: int
    image_size: int
    patch_size: int

    @property
    def n_visual(self) -> int:
        """Visual tokens of one picture."""
        return (self.image_size // self.patch_size) ** 2


SHAPES = {
    "llava-1.5-7b": Shape(32, 4096, 32, 32, 11008),
    "llava-1.5-13b": Shape(40, 5120, 40, 40, 13824),
    "llava-1.6-7b": Shape(32, 4096, 32, 32, 11008, n_visual=2880),
    "mistral-7b": Shape(32, 4096, 32, 8, 14336, n_ctx=32768, rope_base=1e6, n_visual=2880),
    # 16 tiles and the overview, of 64 visual tokens each
    "smolvlm-500m": Shape(32, 960, 15, 5, 2560, 49280, 8192, 1e5, n_visual=1088, tied=True),
    # six tiles and the overview, of 256 each
    "internvl3-2b": Shape(28, 1536, 12, 2, 8960, 151674, 32768, 1e6, n_visual=1792, tied=True, arch="qwen2"),
    "tinyllama-1.1b": Shape(22, 2048, 32, 4, 5632, n_ctx=2048),
}
SEED = 1
CLIP_L_336 = Tower(23, 1024, 16, 4096, 336, 14)  # LLaVA-1.5's and 1.6's; 1.6 shows it a picture as up to five
