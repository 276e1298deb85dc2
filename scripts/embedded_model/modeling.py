"""LLaVA-1.5's architecture, small, in plain torch.

Parameter names are those of a Hugging Face LLaVA file, so a state dict is an export. Attention is
written out: on a CPU, bf16 matrix products with a compiled softmax beat the fused kernel here.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class Shape:
    """Sizes of the model. The tower's last layer is never run (feature layer -2) and never trained."""

    vocab: int = 640
    width: int = 192
    layers: int = 16
    head: int = 64
    ffn: int = 512
    vision_width: int = 192
    vision_layers: int = 6
    vision_heads: int = 4
    vision_ffn: int = 768
    side: int = 336
    patch: int = 14
    context: int = 4096

    @property
    def grid(self) -> int:
        """Patches along one side."""
        return self.side // self.patch

    def as_dict(self) -> dict[str, int]:
        """For a checkpoint."""
        return asdict(self)


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """Softmax attention [B, H, Tq, D]; `mask` is added to the logits and broadcasts to [B, H, Tq, Tk]."""
    if q.is_cuda:  # there without a matrix of all logits in memory
        mask = mask if mask is None else mask.to(q.dtype).expand(*q.shape[:3], k.shape[2])
        return F.scaled_dot_product_attention(q, k, v, mask)
    s = (q @ k.transpose(-1, -2)) * (q.shape[-1] ** -0.5)
    if mask is not None:
        s = s + mask
    return F.softmax(s, -1) @ v


class VisionAttention(nn.Module):
    """CLIP's self-attention, biases everywhere."""

    def __init__(self, c: Shape) -> None:
        super().__init__()
        self.heads = c.vision_heads
        for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
            setattr(self, name, nn.Linear(c.vision_width, c.vision_width))

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        b, t, w = x.shape
        q, k, v = (f(x).view(b, t, self.heads, -1).transpose(1, 2) for f in (self.q_proj, self.k_proj, self.v_proj))
        return self.out_proj(attend(q, k, v, mask).transpose(1, 2).reshape(b, t, w))


class VisionMLP(nn.Module):
    """Two layers with quick-GELU."""

    def __init__(self, c: Shape) -> None:
        super().__init__()
        self.fc1 = nn.Linear(c.vision_width, c.vision_ffn)
        self.fc2 = nn.Linear(c.vision_ffn, c.vision_width)

    def forward(self, x: Tensor) -> Tensor:
        x = self.fc1(x)
        return self.fc2(x * torch.sigmoid(1.702 * x))


class VisionLayer(nn.Module):
    """A pre-norm block of the tower."""

    def __init__(self, c: Shape) -> None:
        super().__init__()
        self.self_attn = VisionAttention(c)
        self.layer_norm1 = nn.LayerNorm(c.vision_width, eps=1e-5)
        self.mlp = VisionMLP(c)
        self.layer_norm2 = nn.LayerNorm(c.vision_width, eps=1e-5)

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        x = x + self.self_attn(self.layer_norm1(x), mask)
        return x + self.mlp(self.layer_norm2(x))


class VisionModel(nn.Module):
    """CLIP's tower up to the layer before the last; the class token is dropped from what comes out."""

    def __init__(self, c: Shape) -> None:
        super().__init__()
        self.c = c
        self.embeddings = nn.Module()
        self.embeddings.class_embedding = nn.Parameter(torch.zeros(c.vision_width))
        self.embeddings.patch_embedding = nn.Conv2d(3, c.vision_width, c.patch, c.patch, bias=False)
        self.embeddings.position_embedding = nn.Embedding(c.grid**2 + 1, c.vision_width)
        self.pre_layrnorm = nn.LayerNorm(c.vision_width, eps=1e-5)
        self.encoder = nn.Module()
        self.encoder.layers = nn.ModuleList(VisionLayer(c) for _ in range(c.vision_layers))
        self.post_layernorm = nn.LayerNorm(c.vision_width, eps=1e-5)

    def patches(self, pixels: Tensor) -> Tensor:
        """Normalised pixels [B, 3, side, side] to patch embeddings with positions [B, grid², width]."""
        c, e = self.c, self.embeddings
        x = pixels.unfold(2, c.patch, c.patch).unfold(3, c.patch, c.patch)  # B 3 g g p p
        x = x.permute(0, 2, 3, 1, 4, 5).reshape(pixels.shape[0], c.grid**2, -1)
        return F.linear(x, e.patch_embedding.weight.flatten(1)) + e.position_embedding.weight[1:]

    def windows(self, pixels: Tensor, shift: int) -> Tensor:
        """As `forward`, but attention stays within quarters of the picture (shifted, for half of the steps).

        A fifth of the attention's cost: for the first vision phase only. The class token stays out.
        """
        c = self.c
        g, h = c.grid, c.grid // 2
        x = self.pre_layrnorm(self.patches(pixels)).view(-1, g, g, c.vision_width).roll((shift, shift), (1, 2))
        x = x.view(-1, 2, h, 2, h, c.vision_width).transpose(2, 3).reshape(-1, h * h, c.vision_width)
        for layer in self.encoder.layers[:-1]:
            x = layer(x, None)
        x = x.view(-1, 2, 2, h, h, c.vision_width).transpose(2, 3).reshape(-1, g, g, c.vision_width)
        return x.roll((-shift, -shift), (1, 2)).flatten(1, 2)

    def forward(self, pixels: Tensor) -> Tensor:
        """[B, 3, side, side] to [B, grid², width]: hidden_states[-2] without its class token."""
        x = self.patches(pixels)
        cls = self.embeddings.class_embedding + self.embeddings.position_embedding.weight[0]
        # padded to a multiple of 16 rows: odd lengths cost bf16 matrix products a factor of three
        pad = -(x.shape[1] + 1) % 16
        x = torch.cat([cls.expand(x.shape[0], 1, -1), x, x.new_zeros(x.shape[0], pad, x.shape[2])], 1)
        mask = x.new_zeros(x.shape[1])
        mask[x.shape[1] - pad :] = -1e4
        x = self.pre_layrnorm(x)
        for layer in self.encoder.layers[:-1]:
            x = layer(x, mask)
        return x[:, 1 : x.shape[1] - pad]


class RMSNorm(nn.Module):
    """LLaMA's norm, computed in float32."""

    def __init__(self, width: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        y = x.float()
        return (y * torch.rsqrt(y.square().mean(-1, keepdim=True) + self.eps)).to(x.dtype) * self.weight


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary positions in Hugging Face's order: the two halves of a head are the two coordinates."""
    a, b = x.chunk(2, -1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)


class DecoderAttention(nn.Module):
    """Causal over the picture's part; each text row sees the picture and what its mask allows."""

    def __init__(self, c: Shape) -> None:
        super().__init__()
        self.head = c.head
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            setattr(self, name, nn.Linear(c.width, c.width, bias=False))

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, first: Tensor, rest: Tensor) -> Tensor:
        b, t, w = x.shape
        n = first.shape[-1]
        q, k, v = (f(x).view(b, t, -1, self.head).transpose(1, 2) for f in (self.q_proj, self.k_proj, self.v_proj))
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        seen = attend(q[:, :, :n], k[:, :, :n], v[:, :, :n], first)
        told = attend(q[:, :, n:], k, v, rest)
        return self.o_proj(torch.cat([seen, told], 2).transpose(1, 2).reshape(b, t, w))

    def weights(self, x: Tensor, rows: Tensor, cos: Tensor, sin: Tensor, rest: Tensor) -> Tensor:
        """Log attention probabilities, float32 [B, H, R, P + V + T], of the text rows `rows` int64 [B, R]."""
        b, t, _ = x.shape
        n = t - rest.shape[2]
        q, k = (f(x).view(b, t, -1, self.head).transpose(1, 2) for f in (self.q_proj, self.k_proj))
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        q = q.gather(2, (n + rows)[:, None, :, None].expand(-1, q.shape[1], -1, self.head))
        mask = rest.gather(2, rows[:, None, :, None].expand(-1, -1, -1, t))
        return ((q @ k.transpose(-1, -2)).float() * self.head**-0.5 + mask).log_softmax(-1)


class DecoderMLP(nn.Module):
    """SwiGLU."""

    def __init__(self, c: Shape) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(c.width, c.ffn, bias=False)
        self.up_proj = nn.Linear(c.width, c.ffn, bias=False)
        self.down_proj = nn.Linear(c.ffn, c.width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class DecoderLayer(nn.Module):
    """A LLaMA block."""

    def __init__(self, c: Shape) -> None:
        super().__init__()
        self.self_attn = DecoderAttention(c)
        self.mlp = DecoderMLP(c)
        self.input_layernorm = RMSNorm(c.width)
        self.post_attention_layernorm = RMSNorm(c.width)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, first: Tensor, rest: Tensor) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), cos, sin, first, rest)
        return x + self.mlp(self.post_attention_layernorm(x))


class Projector(nn.Module):
    """LLaVA-1.5's two layers with GELU."""

    def __init__(self, c: Shape) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(c.vision_width, c.width)
        self.linear_2 = nn.Linear(c.width, c.width)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear_2(F.gelu(self.linear_1(x)))


class Llava(nn.Module):
    """Tower, projector and decoder; `state_dict` keys are the Hugging Face file's."""

    def __init__(self, c: Shape) -> None:
        super().__init__()
        self.c = c
        self.vision_tower = nn.Module()
        self.vision_tower.vision_model = VisionModel(c)
        self.multi_modal_projector = Projector(c)
        self.language_model = nn.Module()
        m = self.language_model.model = nn.Module()
        m.embed_tokens = nn.Embedding(c.vocab, c.width)
        m.layers = nn.ModuleList(DecoderLayer(c) for _ in range(c.layers))
        m.norm = RMSNorm(c.width)
        self.language_model.lm_head = nn.Linear(c.width, c.vocab, bias=False)
        self.start()

    def start(self) -> None:
        """Initial weights (from torch's global seed)."""
        c = self.c
        for name, p in self.named_parameters():
            if p.ndim < 2:
                if name.endswith("bias"):
                    nn.init.zeros_(p)
            elif "embed" in name and "patch" not in name:
                nn.init.normal_(p, std=0.02 if "position" in name else 0.5)
            else:
                nn.init.normal_(p, std=p[0].numel() ** -0.5)
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                p.data.mul_((2 * c.layers) ** -0.5)
            if name.endswith(("out_proj.weight", "fc2.weight")):
                p.data.mul_((2 * c.vision_layers) ** -0.5)
        nn.init.normal_(self.language_model.lm_head.weight, std=0.02)
        start_local(self.vision_tower.vision_model)

    def forward(
        self,
        features: Tensor,
        before: Tensor,
        text: Tensor,
        cos: Tensor,
        sin: Tensor,
        first: Tensor,
        rest: Tensor,
        watch: int = -1,
    ) -> tuple[Tensor, Tensor | None]:
        """Logits [B, T, vocab] of the text rows, and what goes into layer `watch` [B, P + V + T, width].

        features [B, V, vision width]; before [B, P] and text [B, T] token ids; cos, sin
        [B or 1, 1, P + V + T, head / 2]; first and rest are additive masks of the two parts.
        """
        m = self.language_model.model
        x = torch.cat(
            [
                m.embed_tokens(before).to(features.dtype),
                self.multi_modal_projector(features),
                m.embed_tokens(text).to(features.dtype),
            ],
            1,
        )
        watched = None
        for i, layer in enumerate(m.layers):
            if i == watch:
                watched = x
            x = layer(x, cos, sin, first, rest)
        return self.language_model.lm_head(m.norm(x[:, first.shape[-1] :])), watched


def start_local(tower: VisionModel) -> None:
    """Start the tower's heads looking at neighbours, as a convolution would.

    Sine and cosine positions fill the first channels (patches leave them alone); a head's queries are
    those positions turned by its offset, its keys the positions themselves. All of it is then trained.
    """
    c = tower.c
    d = c.vision_width // c.vision_heads
    freqs = torch.linspace(0.2, 2.6, d // 4)
    at = torch.arange(c.grid).float()[:, None] * freqs
    wave = torch.stack([at.sin(), at.cos()], -1).flatten(1)  # grid, d / 2
    pos = torch.cat([wave[None].expand(c.grid, -1, -1), wave[:, None].expand(-1, c.grid, -1)], -1).flatten(0, 1)
    offsets = (
        [(-1, 0), (1, 0), (0, -1), (0, 1)],
        [(-1, -1), (1, -1), (-1, 1), (1, 1)],
        [(-2, 0), (2, 0), (0, -2), (0, 2)],
    )
    gain = math.sqrt(0.35 * math.sqrt(d) / 1.4**2)
    with torch.no_grad():
        tower.embeddings.position_embedding.weight[1:, :d] = 1.4 * pos
        tower.embeddings.patch_embedding.weight[:d] = 0
        for layer, around in zip(tower.encoder.layers, offsets, strict=False):
            for h, (ox, oy) in enumerate(around[: c.vision_heads]):
                turn = torch.zeros(d, d)
                for axis, o in enumerate((ox, oy)):
                    for i, f in enumerate(freqs):
                        j = axis * d // 2 + 2 * i
                        cs, sn = math.cos(f * o), math.sin(f * o)
                        turn[j : j + 2, j : j + 2] = torch.tensor([[cs, sn], [-sn, cs]])
                rows = slice(h * d, (h + 1) * d)
                for linear, start in ((layer.self_attn.q_proj, turn), (layer.self_attn.k_proj, torch.eye(d))):
                    linear.weight[rows] *= 0.2
                    linear.weight[rows, :d] = gain * start


def rope(positions: Tensor, head: int, theta: float = 10000.0) -> tuple[Tensor, Tensor]:
    """cos and sin [..., 1, T, head / 2] of positions [..., T] (they may be fractions: pooled tokens)."""
    freqs = theta ** (-torch.arange(0, head, 2, device=positions.device).float() / head)
    angles = positions.float()[..., None, :, None] * freqs
    return angles.cos(), angles.sin()


def deepen(state: dict[str, Tensor], old: int, new: int) -> dict[str, Tensor]:
    """A decoder of `new` layers that computes what the one of `old` layers does.

    Each layer is followed by copies of itself whose outputs start at zero: they attend where the
    original attends, and learn from there. Raises ValueError unless new is a multiple of old.
    """
    if new % old:
        raise ValueError(f"{new} layers are no multiple of {old}")
    times = new // old
    out = {}
    for key, value in state.items():
        _, mark, tail = key.partition("language_model.model.layers.")
        if not mark:
            out[key] = value
            continue
        index, _, rest = tail.partition(".")
        for k in range(times):
            silent = k > 0 and rest in ("self_attn.o_proj.weight", "mlp.down_proj.weight")
            out[f"{mark}{int(index) * times + k}.{rest}"] = torch.zeros_like(value) if silent else value.clone()
    return out
