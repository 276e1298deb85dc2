"""`st3.*` keys that make no sense: refused when the context is made, with a message that names the key."""

from __future__ import annotations

import pytest
from native_runtime import Context, Model, NativeError
from oracle import schedule

from st3_edge.commands.bench.shapes import Shape

pytestmark = pytest.mark.no_device

RANGES = {
    "st3.start": (99, "[1, 8]"),
    "st3.budget": (2.0, "(0, 1]"),
    "st3.anneal_floor": (3.0, "[0, 1]"),
    "st3.stride": (0, "[1, 4294967295]"),
}
SHAPE = Shape(8, 32, 1, 1, 32, n_vocab=272)
BAD = {
    "preset unknown": ("preset", {"st3.preset": "st4"}),
    "preset empty": ("preset", {"st3.preset": ""}),
    "preset number": ("preset", {"st3.preset": 3}),
    "budget zero": ("budget", {"st3.budget": 0.0}),
    "budget negative": ("budget", {"st3.budget": -0.3}),
    "budget above one": ("budget", {"st3.budget": 1.01}),
    "budget nan": ("budget", {"st3.budget": float("nan")}),
    "budget infinite": ("budget", {"st3.budget": float("inf")}),
    "budget text": ("budget", {"st3.budget": "much"}),
    "budget unreachable": ("budget", {"st3.budget": 0.3, "st3.start": 7}),
    "budget and keep": ("keep", {"st3.budget": 0.3, "st3.keep": 0.5}),
    "start zero": ("start", {"st3.start": 0}),
    "start behind the end": ("start", {"st3.start": 8}),
    "start negative": ("start", {"st3.start": -1}),
    "start fraction": ("start", {"st3.start": 1.5}),
    "stride zero": ("stride", {"st3.stride": 0}),
    "stride negative": ("stride", {"st3.stride": -4}),
    "keep above one": ("keep", {"st3.keep": 1.5}),
    "keep nan": ("keep", {"st3.keep": float("nan")}),
    "keep negative": ("keep", {"st3.keep": -0.5}),
    "min_keep negative": ("min_keep", {"st3.min_keep": -1}),
    "score unknown": ("score", {"st3.score": "first-mean"}),
    "score empty": ("score", {"st3.score": ""}),
    "score trailing plus": ("score", {"st3.score": "last-mean+"}),
    "score doubled sum": ("score", {"st3.score": "last-mean-sum-sum"}),
    "score blank": ("score", {"st3.score": "last-mean + text-max"}),
    "min_share above one": ("min_share", {"st3.min_share": 1.5}),
    "min_share out of the budget": ("min_share", {"st3.budget": 0.3, "st3.min_share": 0.3}),
    "coverage above one": ("coverage", {"st3.coverage": 1.5}),
    "coverage negative": ("coverage", {"st3.coverage": -0.5}),
    "coverage nan": ("coverage", {"st3.coverage": float("nan")}),
    "merge word": ("merge", {"st3.merge": "yes"}),
    "merge number": ("merge", {"st3.merge": 1}),
    "merge empty": ("merge", {"st3.merge": ""}),
    "rank unknown": ("rank", {"st3.rank": "cosine"}),
    "rank number": ("rank", {"st3.rank": 0}),
    "anneal unknown": ("anneal", {"st3.anneal": "slowly"}),
    "anneal empty": ("anneal", {"st3.anneal": ""}),
    "anneal number": ("anneal", {"st3.anneal": 1}),
    "anneal_tokens zero": ("anneal_tokens", {"st3.anneal_tokens": 0}),
    "anneal_tokens fraction": ("anneal_tokens", {"st3.anneal_tokens": 2.5}),
    "anneal_floor negative": ("anneal_floor", {"st3.anneal_floor": -0.1}),
    "anneal_floor above one": ("anneal_floor", {"st3.anneal_floor": 1.1}),
    "anneal_floor nan": ("anneal_floor", {"st3.anneal_floor": float("nan")}),
    "anneal_floor never reached": ("anneal_floor", {"st3.anneal": "exponential", "st3.anneal_floor": 0.0}),
    "anneal_interval zero": ("anneal_interval", {"st3.anneal_interval": 0}),
    "anneal_interval negative": ("anneal_interval", {"st3.anneal_interval": -1}),
    "anneal_score unknown": ("anneal_score", {"st3.anneal_score": "last"}),
    "anneal_score empty": ("anneal_score", {"st3.anneal_score": ""}),
    "anneal_score with chance": ("anneal_score", {"st3.anneal_score": "random+last-mean"}),
    "vision_type unknown": ("vision_type", {"st3.vision_type": "f16"}),
    "key unknown": ("anneal_speed", {"st3.anneal_speed": 3}),
}


@pytest.mark.parametrize("from_file", [False, True], ids=["override", "file"])
@pytest.mark.parametrize("name", list(BAD))
def test_refused(rt, random_gguf, name: str, from_file: bool) -> None:
    """Breaks if a malformed key is accepted, crashes, or is refused without saying which."""
    word, keys = BAD[name]
    keys = {"st3.preset": "st3", **keys}
    path = random_gguf(SHAPE, metadata=keys if from_file else None)
    with Model(rt, path, None if from_file else keys) as model:
        message = model.check()
        assert message and f"st3.{word}" in message, message
        assert "\n" not in message.strip()
        with pytest.raises(NativeError, match=f"st3.{word}"):
            Context(model, n_ctx=64)


@pytest.mark.parametrize("from_file", [False, True], ids=["override", "file"])
def test_integers_stand_for_reals(rt, random_gguf, from_file: bool) -> None:
    """Breaks if `st3.budget = 1` must be spelled 1.0, or a file's own keys are not read."""
    keys = {"st3.preset": "st3", "st3.budget": 1, "st3.coverage": 0, "st3.start": 2}
    path = random_gguf(SHAPE, metadata=keys if from_file else None)
    with Model(rt, path, None if from_file else keys) as model:
        assert model.check() is None
        with Context(model, n_ctx=64) as ctx:
            report = ctx.report()
    assert (report["keep"], report["start"], report["coverage"]) == (1.0, 2, 0.0)


@pytest.mark.parametrize("from_file", [False, True], ids=["override", "file"])
@pytest.mark.parametrize(("value", "merge"), [(True, True), (False, False), ("true", True), ("false", False)])
def test_merging_is_said_by_a_bool_or_its_name(
    rt, random_gguf, value: bool | str, merge: bool, from_file: bool
) -> None:
    """Breaks if a file's bool, an override's, or `--override-kv st3.merge=str:true` is not understood."""
    keys = {"st3.preset": "st3" if not merge else "fastv", "st3.merge": value, "st3.rank": "distance"}
    keys |= {"st3.start": 2, "st3.budget": 0.5}
    path = random_gguf(SHAPE, metadata=keys if from_file else None)
    with Model(rt, path, None if from_file else keys) as model, Context(model, n_ctx=64) as ctx:
        assert (ctx.report()["merge"], ctx.report()["rank"]) == (merge, "distance")


@pytest.mark.parametrize("preset", ["st3", "pvtp", "paper", "fastv", "pyramiddrop", "vtw", "random", "downsample"])
def test_annealing_defaults(rt, random_gguf, preset: str) -> None:
    """Breaks if a preset other than st3 anneals unasked, a default is another one, or a key does not win."""
    want = schedule.resolve(SHAPE.n_layer, preset)
    default_score = dict.fromkeys(("paper", "fastv", "pyramiddrop", "vtw"), "last-mean") | {"random": "random"}
    for keys, curve in (({}, want.anneal), ({"st3.anneal": "cosine"}, "cosine")):
        with Model(rt, random_gguf(SHAPE), {"st3.preset": preset, **keys}) as model, Context(model, n_ctx=64) as ctx:
            assert ctx.report()["anneal"] == {
                "curve": curve,
                "tokens": want.anneal_tokens,
                "floor": want.anneal_floor,
                "interval": want.anneal_interval,
                "score": default_score.get(preset, schedule.DEFAULT_SCORE),
            }


@pytest.mark.parametrize("keys", [{}, {"st3.preset": "off"}, {"st3.preset": "off", "st3.budget": 0.3}])
def test_off(rt, random_gguf, keys: dict) -> None:
    """Breaks if a model without keys, or with the preset off, is pruned."""
    with Model(rt, random_gguf(SHAPE), keys) as model, Context(model, n_ctx=64) as ctx:
        assert model.check() is None
        assert ctx.prefill([[1, 2, 3]]) == 0
        assert ctx.report()["mode"] == "off"


@pytest.mark.parametrize("key", RANGES)
def test_a_range_is_told_as_it_is(rt, random_gguf, key: str) -> None:
    """Breaks if zeros are cut off a bound, or a bound is written with an exponent."""
    value, told = RANGES[key]
    with Model(rt, random_gguf(SHAPE), {key: value}) as model:
        assert (model.check() or "").endswith(f"is not a number in {told}")
