"""Measuring candidates: what is kept, when it is enough, and what is never done twice."""

import json
from contextlib import contextmanager

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from st3_edge import St3Error
from st3_edge.commands.tune.evaluate import Evaluator, Measured, Work
from st3_edge.commands.tune.search import Candidate

CANDIDATES = [Candidate(1, 2, 0.3), Candidate(2, 2, 0.5), Candidate(4, 1, 0.62)]


def overrides(candidate):
    return {"st3.preset": "st3", **{f"st3.{k}": v for k, v in candidate._asdict().items()}}


class Model:
    """kl[candidate][prompt]; counts what it is asked for."""

    def __init__(self, kl, fails_at=None):
        self.kl, self.fails_at = kl, fails_at
        self.loads, self.measured = 0, []

    @contextmanager
    def opened(self, keys):
        candidate = Candidate(keys["st3.start"], keys["st3.stride"], keys["st3.budget"])
        self.loads += 1

        def measure(i):
            if len(self.measured) == self.fails_at:
                raise KeyboardInterrupt
            self.measured.append((candidate, i))
            return Measured(self.kl[candidate][i], 10, 9, 30 + i, 100)

        yield measure

    def evaluator(self, folder, n):
        return Evaluator(Work(folder), n, overrides, self.opened)


@st.composite
def models(draw):
    n = draw(st.integers(1, 6))
    kl = st.lists(st.floats(0, 1), min_size=n, max_size=n)
    return n, {c: draw(kl) for c in CANDIDATES}


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=50)
@given(models(), st.floats(0, 1))
def test_giving_up_early_never_changes_the_verdict(tmp_path_factory, model, limit):
    # broken if a candidate within the limit were given up, or one over it kept
    n, kl = model
    fake = Model(kl)
    evaluate = fake.evaluator(tmp_path_factory.mktemp("work"), n)
    for c in CANDIDATES:
        result = evaluate(c, limit)
        mean = sum(kl[c]) / n
        if result.complete:
            assert result.kl == pytest.approx(mean)
        else:
            assert limit < result.kl <= mean * (1 + 1e-12)
        if mean < limit * (1 - 1e-12):
            assert result.complete
    assert evaluate(CANDIDATES[0], None).complete
    assert len(set(fake.measured)) == len(fake.measured)


def test_the_hardest_prompts_are_measured_first(tmp_path):
    # broken if a bad candidate were found out last
    fake = Model({CANDIDATES[0]: [0.0, 0.1, 0.9], CANDIDATES[1]: [0.0, 0.1, 0.9], CANDIDATES[2]: [0.0, 0.1, 0.0]})
    evaluate = fake.evaluator(tmp_path, 3)
    assert evaluate(CANDIDATES[0], None).complete
    given_up = evaluate(CANDIDATES[1], 0.2)
    assert not given_up.complete and fake.measured[3:] == [(CANDIDATES[1], 2)]
    evaluate(CANDIDATES[2], 0.2)
    assert [i for _, i in fake.measured[4:]] == [2, 1, 0]


@pytest.mark.parametrize("fails_at", range(8))
def test_what_was_measured_before_an_interrupt_is_not_measured_again(tmp_path, fails_at):
    # broken if results were written at the end, or the order after a restart were another
    kl = {CANDIDATES[0]: [0.3, 0.1, 0.2, 0.0], CANDIDATES[1]: [0.5, 0.5, 0.0, 0.1]}

    def go(model):
        evaluate = model.evaluator(tmp_path, 4)
        return [evaluate(c, limit) for c, limit in ((CANDIDATES[0], None), (CANDIDATES[1], 0.26))]

    first = Model(kl, fails_at)
    try:
        whole = go(first)
    except KeyboardInterrupt:
        whole = None
    second = Model(kl)
    again = go(second)
    assert len(first.measured) + len(second.measured) == 4 + len(again[1].measured)
    assert not set(first.measured) & set(second.measured)
    assert whole in (None, again)
    third = Model(kl)
    assert go(third) == again and third.loads == 0, "nothing is loaded for what is known"


def test_the_numbers_of_an_evaluation(tmp_path):
    # broken if cost were a mean of ratios, or agreement one over prompts
    kl = {CANDIDATES[0]: [0.1, 0.4, 0.1]}
    result = Model(kl).evaluator(tmp_path, 3)(CANDIDATES[0], None)
    assert result.kl == pytest.approx(0.2) and result.worst == 1
    assert result.cost == pytest.approx((30 + 31 + 32) / 300) and result.same_top == 0.9
    assert result.interval[0] < 0.2 < result.interval[1]


def test_lines_that_are_none_are_passed_over(tmp_path):
    # broken by a line that was cut off, foreign text, or numbers that no measurement gives
    fine = Measured(0.25, 10, 9, 30, 100)
    Work(tmp_path).put(overrides(CANDIDATES[0]), 0, fine)
    path = tmp_path / "results.jsonl"
    line = path.read_text()
    row = json.loads(line)
    bad = [{**row, "kl": kl} for kl in (-1, float("nan"), float("inf"), "0", None)]
    bad += [{**row, "n": 0}, {**row, "same": 11}, {**row, "flops_full": 0}, {**row, "more": 1}, {**row, "prompt": None}]
    bad += [{**row, "schedule": 3}, [], 7, {}]
    texts = [json.dumps({**b, "prompt": 1} if isinstance(b, dict) and b and b.get("prompt") == 0 else b) for b in bad]
    path.write_text("\n".join([*texts, "no line", line, line[: len(line) // 2]]))
    work = Work(tmp_path)
    assert work.get(overrides(CANDIDATES[0]), 0) == fine
    assert work.get(overrides(CANDIDATES[0]), 1) is None
    work.put(overrides(CANDIDATES[1]), 3, fine)
    assert Work(tmp_path).get(overrides(CANDIDATES[1]), 3) == fine, "a cut line does not swallow the next one"


def test_answers_are_kept(tmp_path):
    # broken if logits were rounded: the full model is the measure of all others
    logits = np.random.default_rng(1).standard_normal((3, 50)).astype(np.float32)
    work = Work(tmp_path)
    assert work.answer(2) is None
    work.put_answer(2, [5, 1, 2], logits)
    tokens, kept = Work(tmp_path).answer(2)
    assert tokens == [5, 1, 2] and kept.dtype == np.float32 and np.array_equal(kept, logits)


def test_a_folder_that_cannot_be_used_is_told_in_one_line(tmp_path):
    # broken by a traceback where the cache is not writable, or an answer's file is damaged
    (tmp_path / "file").touch()
    with pytest.raises(St3Error, match="work folder"):
        Work(tmp_path / "file" / "work")
    work = Work(tmp_path)
    (tmp_path / "answer-0.npz").write_bytes(b"PK\x03\x04 no archive")
    with pytest.raises(St3Error, match="work folder"):
        work.answer(0)
