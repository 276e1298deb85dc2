"""Sizes of the models that random weights are made for."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Shape:
    """Sizes of a decoder. `n_visual` is what its vision encoder gives for one picture."""

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
    qk_gain: float = 1.2  # standard deviation of the elements of q and k: how peaked attention is

    @property
    def head(self) -> int:
        """Elements of one head."""
        return self.n_embd // self.n_head


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
    "tinyllama-1.1b": Shape(22, 2048, 32, 4, 5632, n_ctx=2048),
}
TYPES = ("Q4_0", "Q4_K", "Q8_0")
SEED = 1
CLIP_L_336 = Tower(23, 1024, 16, 4096, 336, 14)  # LLaVA-1.5's and 1.6's; 1.6 shows it a picture as up to five
