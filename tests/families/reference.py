"""A Hugging Face decoder as the oracle of a pruned prompt: rows leave and merge between its own layers, in double.

The cuts, records and steps are the oracle's (tests/oracle/llama.py). What a layer computes is Hugging Face's: only its
attention goes through a function of ours, registered as its library foresees, which remembers keys and values and adds
the logarithms of weights to the mask.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from oracle import gemma3, rounding
from oracle.llama import TILE_ROWS, Array, Decoder, Image, Layer, Piece
from transformers import Granite4VisionTextConfig, Granite4VisionTextModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

ATTENTION = "st3_oracle"


class Call:
    """One layer at work: what it remembers and what becomes of it."""

    now: Call

    def __init__(self, decoder: HfDecoder, past: Layer, pos: Array, visual: Array, weight: Array, kv: str) -> None:
        self.decoder, self.past, self.pos, self.visual, self.weight, self.kv = decoder, past, pos, visual, weight, kv
        self.q: Array = np.zeros(0)
        self.layer: Layer = past
        Call.now = self

    def attend(self, q: Array, k: Array, v: Array) -> Array:
        """The attention [n_head, n, head] of queries of that shape; k and v are remembered first."""
        past, kv = self.past, self.kv
        self.q = q
        self.layer = Layer(
            np.concatenate([past.k, rounding.stored(k, kv)], 1),
            np.concatenate([past.v, rounding.stored(v, kv)], 1),
            np.append(past.pos, self.pos),
            np.append(past.visual, self.visual),
            np.append(past.weight, self.weight),
        )
        p = self.decoder._attention(rounding.stored(q, kv) if len(self.pos) < TILE_ROWS else q, self.layer)
        return p @ np.repeat(self.layer.v, len(q) // len(v), 0)


def attention(
    module: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: Any, scaling: float, **_: Any
) -> Any:
    """As Hugging Face's attention functions: q [1, n_head, n, head] -> [1, n, n_head, head], and no probabilities."""
    assert q.dtype == torch.float64
    Call.now.decoder.scale = scaling
    out = Call.now.attend(q[0].numpy(), k[0].numpy(), v[0].numpy())
    return torch.from_numpy(out).swapaxes(0, 1)[None].contiguous(), None


ALL_ATTENTION_FUNCTIONS.register(ATTENTION, attention)


class HfDecoder(Decoder):
    """The text model of a Hugging Face model: `model` has the layers and what is around them, `head` gives logits.

    image_scale: what upstream's graph multiplies embeddings of images by, where the model does so with tokens alone.
    A subclass says what else a family needs: `rotary` (several positions a token), `run_layer` (what is added to rows).
    places: of rows with several positions, as `oracle.mrope` has them; inexact: relative error of a layer's input that
    explains the errors of its logits.
    """

    places: list[tuple[int, ...]]
    inexact = 1e-6

    def __init__(self, model: Any, head: Any, image_scale: float = 1.0) -> None:
        config = model.config
        self.model, self.head_of, self.config = model.double().eval(), head.double().eval(), config
        config._experts_implementation = "eager"  # others have no kernel for double precision
        self.image_scale = image_scale
        self.input_scale = getattr(config, "embedding_multiplier", 1.0)  # of all rows, at the graph's beginning
        self.n_layer = config.num_hidden_layers
        self.n_embd = self.n_embd_inp = config.hidden_size
        self.n_head = config.num_attention_heads
        self.n_head_kv = getattr(config, "num_key_value_heads", None) or self.n_head
        self.head = getattr(config, "head_dim", None) or self.n_embd // self.n_head
        self.scale = self.head**-0.5
        self.mask = "F32"
        self.noise = None

    def embed(self, pieces: list[Piece]) -> Array:
        """The residual stream's first rows."""
        with torch.no_grad():
            rows = [
                torch.from_numpy(p.embd).double() * self.image_scale
                if isinstance(p, Image)
                else self.model.get_input_embeddings()(torch.tensor(p)).double()
                for p in pieces
            ]
        return torch.cat(rows).numpy() * self.input_scale

    def rotary(self, i: int, x: torch.Tensor, pos: Array) -> Any:
        """Cosines and sines of layer i for rows x [1, n, width] at positions [n]."""
        return self.model.rotary_emb(x, position_ids=torch.from_numpy(pos)[None])

    def run_layer(self, i: int, x: torch.Tensor, pos: Array, **kwargs: Any) -> torch.Tensor:
        """Hugging Face's layer i on rows x [1, n, width]."""
        out = self.model.layers[i](
            x,
            attention_mask=None,
            position_ids=torch.from_numpy(pos)[None],
            position_embeddings=self.rotary(i, x, pos),
            **kwargs,
        )
        return out[0] if isinstance(out, tuple) else out

    def seen_by(self, i: int, x: Array) -> Array:
        """What the attention of layer i sees of rows x."""
        with torch.no_grad():
            return self.model.layers[i].input_layernorm(torch.from_numpy(x)).numpy()

    def _layer(
        self, i: int, x: Array, pos: Array, past: Layer, visual: Array, weight: Array, kv: str
    ) -> tuple[Array, Array, Layer]:
        if self.noise is not None:
            x = x * (1 + self.inexact * self.noise.standard_normal(x.shape))
        call, before = Call(self, past, pos, visual, weight, kv), self.config._attn_implementation
        self.config._attn_implementation = ATTENTION
        try:
            with torch.no_grad():
                out = self.run_layer(i, torch.from_numpy(x)[None], pos)
        finally:
            self.config._attn_implementation = before
        return out[0].numpy(), call.q, call.layer

    def _logits(self, row: Array) -> Array:
        norm = self.model.norm if hasattr(self.model, "norm") else self.model.final_layernorm
        with torch.no_grad():
            out = self.head_of(norm(torch.from_numpy(row)[None]))[0].numpy()
        return out / getattr(self.config, "logits_scaling", 1.0)

    def whole(self, pieces: list[Piece]) -> Array:
        """Logits [n, vocabulary] of all rows by Hugging Face's own forward pass, with nothing of ours in it."""
        x = torch.from_numpy(self.embed(pieces) / self.input_scale)[None]
        with torch.no_grad():
            out = self.head_of(self.model(inputs_embeds=x, use_cache=False).last_hidden_state)[0].numpy()
        return out / getattr(self.config, "logits_scaling", 1.0)


class WideDecoder(HfDecoder):
    """A decoder behind whose rows lies what is added to them later, as deepstack does: `n_parts` times their width."""

    def __init__(self, model: Any, head: Any, n_parts: int) -> None:
        super().__init__(model, head)
        self.n_parts, self.n_embd_inp = n_parts, (1 + n_parts) * self.n_embd

    def embed(self, pieces: list[Piece]) -> Array:
        """The first rows, and what is added to them: nothing to text, whose rows alone are scaled."""
        more = self.n_embd_inp - self.n_embd
        with torch.no_grad():
            rows = [
                p.embd.astype(np.float64)
                if isinstance(p, Image)
                else np.pad(self.model.get_input_embeddings()(torch.tensor(p)).numpy(), ((0, 0), (0, more)))
                * self.input_scale
                for p in pieces
            ]
        return np.concatenate(rows)

    def part(self, rows: Any, i: int) -> Any:
        """Part i of what lies behind rows."""
        return rows[..., (1 + i) * self.n_embd : (2 + i) * self.n_embd]

    def seen_by(self, i: int, x: Array) -> Array:
        """What the attention of layer i sees of rows x."""
        return super().seen_by(i, x[:, : self.n_embd])

    def _logits(self, row: Array) -> Array:
        return super()._logits(row[: self.n_embd])


class MropeDecoder(WideDecoder):
    """A decoder whose tokens have several positions each; after layer i, part i is added."""

    def __init__(self, model: Any, head: Any, n_deepstack: int = 0) -> None:
        super().__init__(model, head, n_deepstack)

    def rotary(self, i: int, x: torch.Tensor, pos: Array) -> Any:
        """The same for the three positions of each row that `pos` names."""
        places = np.asarray(self.places)[pos, :3]
        return self.model.rotary_emb(x, torch.from_numpy(places.T.copy())[:, None])

    def run_layer(self, i: int, x: torch.Tensor, pos: Array, **kwargs: Any) -> torch.Tensor:
        """Hugging Face's layer i, and what comes on top of its rows."""
        out = super().run_layer(i, x[..., : self.n_embd], pos, **kwargs)
        if i < self.n_parts:
            out = out + self.part(x, i)
        return torch.cat([out, x[..., self.n_embd :]], -1)


class StreamsDecoder(WideDecoder):
    """Granite 4 Vision's: before layer `layers[i]`, part i is added."""

    def __init__(self, model: Any, head: Any, layers: tuple[int, ...]) -> None:
        super().__init__(model, head, len(layers))
        self.layers = layers

    def run_layer(self, i: int, x: torch.Tensor, pos: Array, **kwargs: Any) -> torch.Tensor:
        """Hugging Face's layer i on rows with what comes on top of them."""
        rows = x[..., : self.n_embd]
        if i in self.layers:
            rows = rows + self.part(x, self.layers.index(i))
        return torch.cat([super().run_layer(i, rows, pos, **kwargs), x[..., self.n_embd :]], -1)

    def whole(self, pieces: list[Piece]) -> Array:
        """Logits [n, vocabulary] of all rows by Hugging Face's own forward pass."""
        kinds = [isinstance(p, Image) for p in pieces for _ in (p.embd if isinstance(p, Image) else p)]
        x, of_image = torch.from_numpy(self.embed(pieces)), torch.tensor(kinds)
        model = Granite4VisionTextModel(Granite4VisionTextConfig(**self.config.to_dict())).double().eval()
        model.load_state_dict(self.model.state_dict())
        with torch.no_grad():
            out = model(
                inputs_embeds=x[None, :, : self.n_embd] / self.input_scale,
                vision_mask=of_image[None, :, None],
                deepstack_features={layer: self.part(x[of_image], i) for i, layer in enumerate(self.layers)},
                use_cache=False,
            )
            logits = self.head_of(out.last_hidden_state)[0].numpy()
        return logits / self.config.logits_scaling


class WindowDecoder(gemma3.Windows, HfDecoder):
    """A decoder of layers with and without a sliding window, and of images whose tokens see each other."""

    def __init__(self, model: Any, head: Any) -> None:
        super().__init__(model, head)
        self.window = self.config.sliding_window
        self.slides = [kind == "sliding_attention" for kind in self.config.layer_types]

    def rotary(self, i: int, x: torch.Tensor, pos: Array) -> Any:
        """By the kind of layer."""
        return self.model.rotary_emb(x, torch.from_numpy(pos)[None], self.config.layer_types[i])

    def _layer(self, i: int, *args: Any) -> tuple[Array, Array, Layer]:
        self._at = i
        return super()._layer(i, *args)
