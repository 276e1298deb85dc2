"""Whether two GGUF files are the halves of a vision model: read from their headers, before anything is loaded.

Upstream takes much of an mmproj file as it is: a value of another type, a shape that does not fit or a tile that is no
multiple of another aborts the process. So what all vision encoders have is checked here, and every value and every
tensor that LLaVA's graph uses is in a table.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from ..errors import ModelError
from . import gguf

# Keys that upstream reads of a vision half (clip-impl.h) by their types, which it does not ask for.
_KINDS: dict[str, str] = {
    "general.name": "string",
    "general.description": "string",
    "clip.has_vision_encoder": "bool",
    "clip.has_audio_encoder": "bool",
    "clip.has_gen_audio_encoder": "bool",
    "clip.projector_type": "string",
    "clip.use_gelu": "bool",
    "clip.use_silu": "bool",
    "clip.minicpmv_version": "i32",
    "clip.minicpmv_query_num": "u32",
    "clip.vision.projector_type": "string",
    "clip.vision.embedding_length": "u32",
    "clip.vision.feed_forward_length": "u32",
    "clip.vision.block_count": "u32",
    "clip.vision.projection_dim": "u32",
    "clip.vision.attention.head_count": "u32",
    "clip.vision.attention.head_count_kv": "u32",
    "clip.vision.attention.head_dim": "u32",
    "clip.vision.attention.layer_norm_epsilon": "f32",
    "clip.vision.image_size": "u32",
    "clip.vision.patch_size": "u32",
    "clip.vision.image_mean": "[f32]",
    "clip.vision.image_std": "[f32]",
    "clip.vision.feature_layer": "[i32]",
    "clip.vision.image_grid_pinpoints": "[i32]",
    "clip.vision.mm_patch_merge_type": "string",
}

_PATCHES, _POSITIONS = "v.patch_embd.weight", "v.position_embd.weight"
_F32, _F16, _BF16 = 0, 1, 30
_NO_WEIGHTS = range(24, 29)  # I8 to F64: no op takes them for weights
_ROPE_SCALING = ("none", "linear", "yarn", "longrope")  # upstream aborts on any other

LLAVA = "mlp"  # its projector's name

_MROPE_FOR_IMAGES = ("glm4", "glm4moe")  # upstream aborts at the first picture where the file has none

_MAX_TILES = 64  # of a picture; LLaVA-1.6 has up to 4, LLaVA-OneVision 36


def check_pair(model: str, mmproj: str) -> gguf.Header:
    """Reads both headers and returns the text model's; raises ModelError where the two files are not a text model and
    a vision half, or hold values that upstream aborts the process for."""
    header = gguf.read_header(model)
    if header.architecture == "clip":
        raise ModelError(f"model {model!r} is a vision half (mmproj); the text model belongs here")
    _check_text(model, header)
    other = gguf.read_header(mmproj, "mmproj")
    if other.architecture != "clip":
        raise ModelError(f"mmproj {mmproj!r} is a text model; the vision half (mmproj) belongs here")
    for key, kind in _KINDS.items():
        if (found := other.kinds.get(key, kind)) != kind:
            raise ModelError(f"mmproj {mmproj!r} is damaged: its {key} is of the type {found}, not {kind}")
    sections = header.arrays.get(f"{header.architecture}.rope.dimension_sections", ())
    if header.architecture in _MROPE_FOR_IMAGES and not all((*sections, 0, 0)[:2]):
        raise ModelError(
            f"model {model!r} has no M-RoPE, without which it reads no pictures: convert it with a newer llama.cpp"
        )
    _Vision(mmproj, other).check_values()
    if projector(other) == LLAVA:
        width = _Llava(mmproj, other).check()
        expected = header.metadata.get(f"{header.architecture}.embedding_length", width)
        if width != expected:
            raise ModelError(
                f"mmproj {mmproj!r} is of another model: its visual tokens are {width} wide, "
                f"those of the text model {expected}"
            )
    return header


def projector(mmproj: gguf.Header) -> str:
    """The projector of a vision half, by which upstream tells families apart. The first converters wrote no such key:
    patch 0020 reads their files as LLaVA's, too."""
    kinds = (str(mmproj.metadata.get(f"clip.{key}projector_type", "")) for key in ("", "vision."))
    return next((kind for kind in kinds if kind), LLAVA)


def projector_of(mmproj: str) -> str:
    """`projector` of a file. Raises ModelError."""
    return projector(gguf.read_header(mmproj, "mmproj"))


def is_llava(mmproj: str) -> bool:
    """Whether a vision half is LLaVA's, which was trained with a new line behind each picture. Raises ModelError."""
    return projector_of(mmproj) == LLAVA


def check_adapter(path: str, model: gguf.Header) -> None:
    """Raises ModelError where a file is no LoRA adapter, or one that upstream aborts the process for."""
    header = gguf.read_header(path, "adapter")
    if tuple(header.metadata.get(key) for key in ("general.type", "adapter.type")) != ("adapter", "lora"):
        raise ModelError(f"adapter {path!r} is no LoRA adapter: convert_lora_to_gguf.py of llama.cpp writes them")
    if "token_embd.weight.lora_a" in header.tensors and "output.weight" not in model.tensors:
        raise ModelError(f"adapter {path!r} adapts token_embd, which llama.cpp cannot where it is the output as well")


def _check_text(model: str, header: gguf.Header) -> None:
    """llama.cpp checks a text model's shapes itself, and for these values it aborts, or goes on and crashes."""

    def value(key: str, default: float | str) -> object:
        return header.metadata.get(f"{header.architecture}.{key}", default)

    for key, least, most in (
        ("context_length", 0, 2**32 - 1),
        ("block_count", 1, 512),  # LLAMA_MAX_LAYERS
        ("expert_count", 0, 1024),  # LLAMA_MAX_EXPERTS
        ("attention.head_count", 1, 2**16),
        ("attention.layer_norm_rms_epsilon", 0.0, 1.0),
        ("attention.layer_norm_epsilon", 0.0, 1.0),
        ("rope.freq_base", 1e-6, 1e30),
    ):
        found = value(key, 1)
        whole = isinstance(least, int)
        if not isinstance(found, (int, float)) or not least <= found <= most or (whole and not isinstance(found, int)):
            raise ModelError(f"model {model!r} is damaged: its {key} is {found!r}")
    by_layer = header.kinds.get(f"{header.architecture}.expert_used_count", "").startswith("[")
    _check_experts(model, {key: value(key, 0) for key in _EXPERTS}, by_layer)
    layers, extra = value("block_count", 0), value("nextn_predict_layers", 0)
    if not isinstance(extra, int) or not isinstance(layers, int) or not 0 <= extra <= layers:
        raise ModelError(f"model {model!r} is damaged: its nextn_predict_layers is {extra!r}, of {layers!r}")
    found = value("rope.scaling.type", "linear")
    if found not in _ROPE_SCALING:
        raise ModelError(f"model {model!r} is damaged: its rope.scaling.type is {found!r}")
    for name, kind in header.types.items():
        # Norms and biases are added and multiplied, for which there are no ops of other types.
        if kind in _NO_WEIGHTS or (len(header.shapes[name]) == 1 and kind != _F32):
            raise ModelError(f"model {model!r} is damaged: {name} is of the ggml type {kind}")


_EXPERTS = ("expert_count", "expert_used_count", "expert_group_count", "expert_group_used_count")


def _check_experts(model: str, values: dict[str, object], used_by_layer: bool) -> None:
    """Counts of a mixture of experts, as llama_model_base::load_hparams asserts them."""
    experts, used, groups, used_groups = (v if isinstance(v, int) else -1 for v in values.values())
    good = 0 <= used <= experts and 0 <= groups <= max(0, experts - 1) and (used or used_by_layer or not experts)
    if groups > 1:
        good = good and experts % groups == 0 and 0 < used_groups < groups
    if not good:
        said = ", ".join(f"{key} {value!r}" for key, value in values.items())
        raise ModelError(f"model {model!r} is damaged: its numbers of experts do not fit: {said}")


@dataclass(frozen=True)
class _Tensor:
    """What a tensor must be: its shape, the innermost dimension first (None: any size), and whether it is needed."""

    name: str
    shape: tuple[int | None, ...]
    needed: bool = True


class _Vision:
    """Any vision half."""

    def __init__(self, mmproj: str, header: gguf.Header) -> None:
        self._name, self._header = mmproj, header

    def check_values(self) -> None:
        """Raises ModelError where a value is one that no picture can be computed with."""
        if not self._header.metadata.get("clip.has_vision_encoder", True):
            raise ModelError(f"mmproj {self._name!r} has no vision encoder")
        for key, least in (("patch_size", 0), ("image_size", 0), ("block_count", 0), ("spatial_merge_size", 1)):
            if f"clip.vision.{key}" in self._header.metadata:
                self._whole(key, least=least)
        epsilon = self._header.metadata.get("clip.vision.attention.layer_norm_epsilon", 0.0)
        self._fits(0 <= float(epsilon) <= 1, f"its attention.layer_norm_epsilon is {epsilon}")
        for key in ("image_mean", "image_std"):
            if f"clip.vision.{key}" in self._header.kinds:
                values = self._header.arrays.get(f"clip.vision.{key}", ())[:3]
                good = len(values) == 3 and all(map(math.isfinite, values)) and (key == "image_mean" or all(values))
                self._fits(good, f"its {key} is {list(values)}")
        for name, kind in self._header.types.items():
            self._fits(kind not in _NO_WEIGHTS, f"{name} is of the ggml type {kind}")

    def _whole(self, key: str, *, least: int = 1, default: int | None = None) -> int:
        found = self._header.metadata.get(f"clip.vision.{key}", default)
        if not isinstance(found, int) or not least <= found < 2**31:
            raise ModelError(f"mmproj {self._name!r} is damaged: its {key} is {found!r}")
        return found

    def _fits(self, fits: bool, otherwise: str) -> None:
        if not fits:
            raise ModelError(f"mmproj {self._name!r} is damaged: {otherwise}")


class _Llava(_Vision):
    def check(self) -> int:
        """How wide the embeddings are. Raises ModelError."""
        image, patch = self._whole("image_size"), self._whole("patch_size")
        embd, heads = self._whole("embedding_length"), self._whole("attention.head_count")
        for key in ("feed_forward_length", "projection_dim"):
            self._whole(key, least=0)
        head_dim = self._whole("attention.head_dim", least=0, default=0) or embd // heads
        self._fits(image >= patch, f"patch_size {patch} is larger than image_size {image}")
        self._fits(embd % heads == 0, f"attention.head_count {heads} does not divide embedding_length {embd}")
        self._fits(head_dim * heads == embd, f"attention.head_dim {head_dim} does not fit embedding_length {embd}")
        for key in ("attention.layer_norm_epsilon", "image_mean", "image_std"):
            self._fits(f"clip.vision.{key}" in self._header.kinds, f"it has no {key}")
        self._check_grid(image)
        layers = self._whole("block_count")
        chosen = {v for v in self._header.arrays.get("clip.vision.feature_layer", ()) if v >= 0}
        self._fits(all(v <= layers for v in chosen), f"a feature_layer is above its block_count {layers}")
        for tensor in self._tensors(embd, patch, layers, max(1, len(chosen))):
            self._check_tensor(tensor)
        rows = (image // patch) ** 2 + ("v.class_embd" in self._header.tensors)
        held = math.prod(self._header.shapes[_POSITIONS]) // embd
        self._fits(held >= rows, f"{_POSITIONS} has not the {rows} rows of its image_size {image}")
        types = self._header.types
        self._fits(types[_PATCHES] in (_F32, _F16, _BF16), f"{_PATCHES} is quantized")
        return self._header.shapes[self._last][0]

    @property
    def _last(self) -> str:
        return "mm.4.bias" if "mm.3.weight" in self._header.tensors else "mm.2.bias"

    def _tensors(self, embd: int, patch: int, layers: int, stacked: int) -> Iterator[_Tensor]:
        """What the LLaVA graph uses (tools/mtmd/models/llava.cpp), asking or not whether it is there."""
        yield _Tensor(_PATCHES, (patch, patch, 3, embd))
        yield _Tensor(_POSITIONS, (embd, None))
        for name in (
            "v.patch_embd.bias",
            "v.class_embd",
            *(f"v.{n}_ln.{w}" for n in ("pre", "post") for w in ("weight", "bias")),
        ):
            yield _Tensor(name, (embd,), needed=False)
        for i in range(layers):
            block = f"v.blk.{i}."
            for name in ("attn_q", "attn_k", "attn_v", "attn_out"):
                yield _Tensor(f"{block}{name}.weight", (embd, embd))
                yield _Tensor(f"{block}{name}.bias", (embd,), needed=False)
            for name in ("ln1", "ln2"):
                yield _Tensor(f"{block}{name}.weight", (embd,))
                yield _Tensor(f"{block}{name}.bias", (embd,), needed=False)
            # Older converters named these two the other way round; upstream tells by the shape.
            down = self._shape(f"{block}ffn_down.weight")
            up, down_ = ("ffn_down", "ffn_up") if down[0] == embd else ("ffn_up", "ffn_down")
            wide = self._shape(f"{block}{up}.weight")[-1]
            yield _Tensor(f"{block}{up}.weight", (embd, wide))
            yield _Tensor(f"{block}{up}.bias", (wide,), needed=False)
            yield _Tensor(f"{block}{down_}.weight", (wide, embd))
            yield _Tensor(f"{block}{down_}.bias", (embd,), needed=False)
            gate = f"{block}ffn_gate.weight"
            self._fits(gate not in self._header.tensors, f"{gate} is no tensor of a LLaVA")
        middle = self._shape("mm.0.weight")[-1]
        yield _Tensor("mm.0.weight", (embd * stacked, middle))
        yield _Tensor("mm.0.bias", (middle,))
        if self._last == "mm.4.bias":  # Yi-VL: norms behind the two layers
            out = self._shape("mm.3.weight")[-1]
            yield from (_Tensor(f"mm.1.{w}", (middle,)) for w in ("weight", "bias"))
            yield _Tensor("mm.3.weight", (middle, out))
            yield from (_Tensor(name, (out,)) for name in ("mm.3.bias", "mm.4.weight", "mm.4.bias"))
        else:
            out = self._shape("mm.2.weight")[-1]
            yield _Tensor("mm.2.weight", (middle, out))
            yield _Tensor("mm.2.bias", (out,))

    def _check_tensor(self, tensor: _Tensor) -> None:
        if tensor.name not in self._header.tensors and not tensor.needed:
            return
        # A dimension of one element may be written or not.
        found = list(self._shape(tensor.name))
        while len(found) > len(tensor.shape) and found[-1] == 1:
            found.pop()
        fits = len(found) == len(tensor.shape) and all(
            b is None or a == b for a, b in zip(found, tensor.shape, strict=False)
        )
        expected = "×".join("?" if n is None else str(n) for n in tensor.shape)
        self._fits(fits, f"{tensor.name} is {'×'.join(map(str, found))}, not {expected}")
        kind = self._header.types[tensor.name]
        allowed = kind == _F32 if len(found) == 1 else kind not in _NO_WEIGHTS
        self._fits(allowed, f"{tensor.name} is of the ggml type {kind}")

    def _shape(self, name: str) -> tuple[int, ...]:
        if name not in self._header.tensors:
            raise ModelError(f"mmproj {self._name!r} lacks the tensor {name}: it is damaged, or no LLaVA's")
        shape = self._header.shapes[name]
        self._fits(bool(shape) and all(0 < n < 2**31 for n in shape), f"{name} has an impossible shape")
        return shape

    def _check_grid(self, image: int) -> None:
        sides = self._header.arrays.get("clip.vision.image_grid_pinpoints", ())
        if "clip.vision.image_grid_pinpoints" in self._header.kinds and not sides:
            raise ModelError(f"mmproj {self._name!r} is damaged: its image_grid_pinpoints is empty or too long")
        self._fits(len(sides) % 2 == 0, "its image_grid_pinpoints are no pairs")
        for width, height in zip(sides[::2], sides[1::2], strict=True):
            size = f"a grid of {width:g}×{height:g} in its image_grid_pinpoints"
            tiled = width > 0 and height > 0 and width % image == 0 and height % image == 0
            self._fits(tiled, f"{size} is not made of tiles of its image_size {image}")
            self._fits(width * height <= _MAX_TILES * image**2, f"{size} has more than {_MAX_TILES} tiles")
