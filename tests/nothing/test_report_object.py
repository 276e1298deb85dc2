"""The report: the object of native/st3.h becomes that of `st3-edge ask --json`."""

import json

import pytest

from st3_edge.report import Milliseconds, Report, Trace

NATIVE = {
    "mode": "pruned-prefill",
    "reason": None,
    "preset": "st3",
    "start": 1,
    "stride": 1,
    "keep": 0.5,
    "min_keep": 1,
    "score": "last-mean",
    "coverage": 0.0,
    "merge": True,
    "rank": "score",
    "cuts": [0],
    "counts": [[2]],
    "budget": 0.75,
    "anneal": {"curve": "linear", "tokens": 8, "floor": 0.5, "interval": 1, "score": "last-mean"},
    "given": 4,
    "per_layer": [4, 2],
    "held": [4, 2],
    "kv_bytes": {"allocated": 100, "live": 60, "full": 80},
    "flops": {"prefill": 7, "prefill_full": 9},
}
KEYS = {
    "answer": str,
    "finish_reason": str,
    "n_generated": int,
    "mode": str,
    "reason": type(None),
    "schedule": {
        "preset": str,
        "cuts": list,
        "counts": list,
        "budget": float,
        "score": str,
        "coverage": float,
        "merge": bool,
        "rank": str,
        "anneal": {"curve": str, "tokens": int, "floor": float, "interval": int, "score": str},
    },
    "visual_tokens": {"given": int, "per_layer": list, "held": list},
    "kv_bytes": {"allocated": int, "live": int, "full": int},
    "flops": {"prefill": int, "prefill_full": int},
    "ms": {"load": float, "encode": float, "prefill": float, "decode": float, "first_token": float},
    "reused": int,
    "kv_bytes_end": {"allocated": int, "live": int, "full": int},
}


@pytest.mark.parametrize(("reason", "rate"), [("length", 20.0), ("stop", 30.0)])
def test_the_rate_is_of_the_tokens_that_were_decoded(reason, rate):
    # broken if the decode of the last word, which showed that the answer ended, were taken for nothing
    report = Report.from_native(NATIVE, Milliseconds(load=0.0, encode=0.0, prefill=0.0, decode=100.0))
    report.n_generated, report.finish_reason = 3, reason
    assert f"({rate:.1f} tokens a second)" in report.summary()


def shape(value, like) -> None:
    if isinstance(like, dict):
        assert value.keys() == like.keys()
        for key in like:
            shape(value[key], like[key])
    else:
        assert isinstance(value, like)


def test_the_object_has_the_documented_keys_and_types():
    # broken if a field were renamed, nested otherwise, or left out
    report = Report.from_native(NATIVE, Milliseconds(1.0, 2.0, 3.0, 4.0))
    plain = report.to_dict()
    shape(plain, KEYS)
    assert json.loads(json.dumps(plain)) == plain


def test_a_trace_adds_its_keys_beside_the_others():
    # broken if it were nested, or there without being asked for
    trace = Trace([1, -1, 2], [[2, 0.5]], [[0, 3]], ["one", " two"], [4], [[1, -1, -1, 1], [-1, 0, 0, -1]])
    plain = Report.from_native(NATIVE, Milliseconds(1.0, 2.0, 3.0, 4.0), trace=trace).to_dict()
    assert plain.keys() == {
        *KEYS,
        "prompt_tokens",
        "first_logits_top",
        "kept",
        "owners",
        "weights",
        "pieces",
        "images",
        "left",
    }
    assert plain["kept"] == [[0, 3]]


def test_the_end_of_an_answer_changes_what_is_held_then_and_nothing_else():
    # broken if annealing during the answer were told as what prefill left, or not told
    report = Report.from_native(NATIVE, Milliseconds(1.0, 2.0, 3.0, 4.0), 5)
    before = report.to_dict()
    report.end({**NATIVE, "held": [2, 1], "kv_bytes": {"allocated": 90, "live": 30, "full": 99}})
    after = report.to_dict()
    assert after.pop("kv_bytes_end") == {"allocated": 90, "live": 30, "full": 99}
    assert after["visual_tokens"].pop("held") == [2, 1]
    assert before.pop("kv_bytes_end") == NATIVE["kv_bytes"] and before["visual_tokens"].pop("held") == [4, 2]
    assert after == before and after["reused"] == 5


def test_a_report_prints_as_a_short_table():
    # broken if print() showed the nested objects, or a number of another field
    report = Report.from_native(
        {**NATIVE, "per_layer": [4, 2, 2, 2], "flops": {"prefill": 7e9, "prefill_full": 9e9}},
        Milliseconds(1.0, 20.4, 30.6, 4.0, 60.2),
    )
    lines = str(report).splitlines()
    assert [line[:13].strip() for line in lines] == [
        "answer", "mode", "visual tokens", "by layer", "prompt reused", "prefill", "KV cache",
        "first token", "decode",
    ]  # fmt: skip
    said = {line[:13].strip(): line[15:] for line in lines}
    assert said["visual tokens"] == "4, 75% of them kept (mean over layers)"
    assert said["by layer"] == "0: 4, 1-3: 2" and said["prefill"] == "7.0 GFLOP of 9.0 without ST3"
    assert said["first token"] == "60 ms, of which encode 20, prefill 31" and said["decode"] == "4 ms"
