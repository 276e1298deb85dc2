"""What a person can set about visual token pruning. Ranges are those of native/st3.h."""

from __future__ import annotations

import math
import numbers
import re
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from .errors import ConfigError

Override = bool | int | float | str

RANKS = ("score", "distance")
VISION_TYPES = ("auto", "file")
CURVES = ("none", "linear", "cosine", "exponential")
REVISIT = ("never", "turn")  # what a new question sees of earlier pictures; the first is the default
PRESETS = ("off", "st3", "pvtp", "paper", "fastv", "pyramiddrop", "vtw", "random", "downsample")

# Types of the KV cache that flash attention reads; a GGUF type id each (ggml.h).
KV_TYPES = {"f32": 0, "f16": 1, "bf16": 30, "q8_0": 8, "q5_1": 7, "q5_0": 6, "q4_1": 3, "q4_0": 2}

MAX_CTX = 2**20  # tokens

_DEFAULT_PRESET = "st3"
_SCORE_TERM = re.compile(r"(last|text)-(mean|max)(-sum)?")
_U32_MAX = 2**32 - 1
# A string in llama.cpp's override table is char[128] with its NUL.
_MAX_STR = 127


@dataclass(frozen=True)
class ST3Config:
    """How visual tokens are pruned. Each field is a `st3.*` metadata key; None leaves that key to the model file,
    and what the file lacks to the preset.

    preset    one of PRESETS; "off" is stock llama.cpp, and no other field goes with it; None: the model file's, and
              where it has none "st3"
    budget    (0, 1]: mean over layers of visual tokens kept / given; `keep` is solved from it
    start     >= 1: the first cut is after layer start - 1 (layers count from 0)
    stride    >= 1: one cut every `stride` layers after that
    keep      [0, 1]: share of an image's visual tokens that each cut keeps; excludes budget
    min_keep  >= 0: cuts and annealing leave an image at least this many tokens
    min_share [0, 1]: and at least this share of its tokens
    score     terms joined by "+", each <last|text>-<mean|max>[-sum]
    coverage  [0, 1]: share of the kept tokens chosen evenly over the picture, whatever their score
    merge     a kept token stands for the dropped ones that are most like it
    rank      one of RANKS; "distance": a token that resembles one of a higher score counts for less
    seed      >= 0: of the preset "random"

    While an answer grows, visual tokens go on leaving (annealing):

    anneal           one of CURVES: how their share falls from 1 to anneal_floor; "none": they stay
    anneal_tokens    >= 1: generated tokens until anneal_floor is reached
    anneal_floor     [0, 1]: share of what prefill kept that is left in the end; above 0 for "exponential"
    anneal_interval  >= 1: tokens leave at every so many generated ones
    anneal_score     terms as score's, or "random": which of them leave; None: by score

    Before all that, the vision encoder:

    vision_type one of VISION_TYPES; "auto": the one that the CPU is fastest in; "file": its file's, as stock

    Raises ConfigError where a value is of the wrong type or outside its range, or two exclude each other.
    """

    preset: str | None = None
    budget: float | None = None
    start: int | None = None
    stride: int | None = None
    keep: float | None = None
    min_keep: int | None = None
    min_share: float | None = None
    score: str | None = None
    coverage: float | None = None
    merge: bool | None = None
    rank: str | None = None
    seed: int | None = None
    anneal: str | None = None
    anneal_tokens: int | None = None
    anneal_floor: float | None = None
    anneal_interval: int | None = None
    anneal_score: str | None = None
    vision_type: str | None = None

    def __post_init__(self) -> None:
        for field in fields(self):
            object.__setattr__(self, field.name, plain(getattr(self, field.name)))
        if self.preset is not None and self.preset not in PRESETS:
            raise ConfigError(f"unknown preset {self.preset!r}; there are: {', '.join(PRESETS)}")
        idle = [f.name for f in fields(self) if f.name != "preset" and getattr(self, f.name) is not None]
        if self.preset == "off" and idle:
            raise ConfigError(f"preset off drops nothing, so there is nothing for {', '.join(idle)} to say")
        if self.budget is not None and self.keep is not None:
            raise ConfigError("budget and keep exclude each other: keep is solved from budget")
        if self.anneal is not None and self.anneal not in CURVES:
            raise ConfigError(f"anneal must be one of {', '.join(CURVES)}, not {self.anneal!r}")
        if self.anneal == "exponential" and self.anneal_floor == 0:
            raise ConfigError("anneal_floor must be above 0 with anneal exponential, which never reaches it")
        self._real("budget", above=True)
        self._real("keep")
        self._real("min_share")
        self._real("coverage")
        self._real("anneal_floor")
        if self.merge is not None and not isinstance(self.merge, bool):
            raise ConfigError(f"merge must be True or False, not {self.merge!r}")
        if self.rank is not None and self.rank not in RANKS:
            raise ConfigError(f"unknown rank {self.rank!r}; there are: {', '.join(RANKS)}")
        if self.vision_type is not None and self.vision_type not in VISION_TYPES:
            raise ConfigError(f"unknown vision_type {self.vision_type!r}; there are: {', '.join(VISION_TYPES)}")
        self._int("start", 1)
        self._int("stride", 1)
        self._int("min_keep", 0)
        self._int("seed", 0)
        self._int("anneal_tokens", 1)
        self._int("anneal_interval", 1)
        self._terms("score")
        if self.anneal_score != "random":
            self._terms("anneal_score")

    def _terms(self, name: str) -> None:
        value = getattr(self, name)
        if value is None:
            return
        terms = value.split("+") if isinstance(value, str) else [""]
        if not all(_SCORE_TERM.fullmatch(t) for t in terms) or len(value) > _MAX_STR:
            raise ConfigError(f"{name} {value!r} is not terms like last-mean, text-max-sum joined by '+'")

    def _real(self, name: str, above: bool = False) -> None:
        value = getattr(self, name)
        if value is None:
            return
        if not is_number(value) or not (0 < value <= 1 if above else 0 <= value <= 1):
            raise ConfigError(f"{name} must be in {'(' if above else '['}0, 1], not {value!r}")

    def _int(self, name: str, low: int) -> None:
        check_whole(name, getattr(self, name), low, _U32_MAX, optional=True)

    def overrides(self, carried: Mapping[str, Override] | None = None) -> dict[str, Override]:
        """The `kv_overrides` of `llama_cpp.Llama`: the keys given, of the types that st3.h names, and a preset where
        neither they nor `carried`, the model file's own `st3.*` keys, have one.

        Raises ConfigError where budget or keep is given and the file carries the other: no override can take a key out.
        """
        carried = carried or {}
        for given, other in (("budget", "keep"), ("keep", "budget")):
            if getattr(self, given) is not None and f"st3.{other}" in carried:
                raise ConfigError(f"the model file carries st3.{other}, which excludes {given}: give {other} instead")
        real = {"budget", "keep", "min_share", "coverage", "anneal_floor"}
        keys = {} if "st3.preset" in carried else {"preset": _DEFAULT_PRESET}
        keys |= {f.name: getattr(self, f.name) for f in fields(self) if getattr(self, f.name) is not None}
        return {f"st3.{name}": float(v) if name in real else v for name, v in keys.items()}


def is_number(value: Any) -> bool:
    """Whether `value` is a finite number that a double can hold."""
    try:
        return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    except OverflowError:  # a whole number of hundreds of digits
        return False


def plain(value: Any) -> Any:
    """A NumPy scalar as Python's own number; anything else as it is."""
    return value.item() if isinstance(value, numbers.Number) and hasattr(value, "item") else value


def check_whole(name: str, value: Any, low: int, high: int, *, optional: bool = False) -> None:
    """Raises ConfigError where `value` is no whole number from `low` to `high`, nor None where it is optional."""
    if value is None and optional:
        return
    if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
        raise ConfigError(f"{name} must be a whole number from {low} to {high}, not {value!r}")
