"""Sizes of the models that random weights are made for."""

from __future__ import annotations

import math
from dataclasses import dataclass

TYPES = ("Q4_0", "Q4_K", "Q8_0")


@dataclass(frozen=True)
class Shape:
    """Sizes of a decoder.

    n_visual, grid  what its vision encoder gives for one picture, and of how many columns and rows; (0, 0): see grid_of
    arch            "llama", or another with the tensors of `random_model.text_tensors`
    head_dim        0: n_embd / n_head
    sections        of M-RoPE
    n_deepstack     layers to whose input an image adds rows
    window          of the layers that see no further, 5 of 6
    """

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
    grid: tuple[int, int] = (0, 0)
    head_dim: int = 0
    sections: tuple[int, ...] = ()
    n_deepstack: int = 0
    window: int = 0

    @property
    def head(self) -> int:
        """Elements of one head."""
        return self.head_dim or self.n_embd // self.n_head

    def grid_of(self, n_visual: int) -> tuple[int, int]:
        """Columns and rows of so many visual tokens; 0, 0: unknown."""
        side = math.isqrt(n_visual)
        if n_visual == self.n_visual and any(self.grid):
            return self.grid
        return (side, side) if side * side == n_visual else (0, 0)

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
    # pictures of 1008 × 784 and 1024 × 768 pixels
    "qwen2.5-vl-7b": Shape(
        28, 3584, 28, 4, 18944, 152064, 32768, 1e6, 1008, arch="qwen2vl", grid=(36, 28), sections=(16, 24, 24, 0)
    ),
    "qwen3-vl-4b": Shape(
        36,
        2560,
        32,
        8,
        9728,
        151936,
        32768,
        5e6,
        768,
        tied=True,
        arch="qwen3vl",
        grid=(32, 24),
        head_dim=128,
        sections=(24, 20, 20, 0),
        n_deepstack=3,
    ),
    "gemma-3-4b": Shape(
        34, 2560, 8, 4, 10240, 262208, 32768, 1e6, 256, tied=True, arch="gemma3", head_dim=256, window=1024
    ),
    "tinyllama-1.1b": Shape(22, 2048, 32, 4, 5632, n_ctx=2048),
}
SEED = 1
CLIP_L_336 = Tower(23, 1024, 16, 4096, 336, 14)  # LLaVA-1.5's and 1.6's; 1.6 shows it a picture as up to five
