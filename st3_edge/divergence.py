"""How far a pruned model's next words are from the full model's: the KL divergence of next-token distributions.

It needs no right answers, so it works on any model and pictures. The full model (preset "off") answers greedily; the
pruned one is given that answer token by token (teacher forcing), and at each position both say what comes next.

Where a `context` is asked for, it is a llama_context pointer of the package's libraries. Its sequence 0 is used, and
emptied before.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from .errors import St3Error
from .native import libraries, log, st3

Logits = npt.NDArray[np.float32]

BOOTSTRAP_DRAWS = 4000


def kl_divergence(full: Logits, pruned: Logits) -> npt.NDArray[np.float64]:
    """KL(full || pruned) of the distributions that logits [n][n_vocab] give, in nats: float64 [n], each >= 0.

    Computed in float64, by log-softmax over the whole vocabulary. Raises ValueError where the shapes differ.
    """
    if full.shape != pruned.shape:
        raise ValueError(f"logits of shapes {full.shape} and {pruned.shape}")
    log_p, log_q = _log_softmax(full), _log_softmax(pruned)
    p = np.exp(log_p)
    with np.errstate(invalid="ignore"):  # a token that the full model rules out adds 0, and not 0 times infinity
        terms = np.where(p > 0, p * (log_p - log_q), 0.0)
    result: npt.NDArray[np.float64] = np.maximum(terms.sum(-1), 0.0)  # rounding alone can go below
    return result


def _log_softmax(logits: Logits) -> npt.NDArray[np.float64]:
    x = logits.astype(np.float64)
    x -= x.max(-1, keepdims=True)
    x -= np.log(np.exp(x).sum(-1, keepdims=True))
    return x


def same_top(full: Logits, pruned: Logits) -> npt.NDArray[np.bool_]:
    """Whether the likeliest token is the same, for logits [n][n_vocab]: bool [n]."""
    result: npt.NDArray[np.bool_] = full.argmax(-1) == pruned.argmax(-1)
    return result


def bootstrap_interval(values: Sequence[float], seed: int = 1) -> tuple[float, float]:
    """The 95 % interval of the mean of `values`: percentiles over BOOTSTRAP_DRAWS resamples."""
    n = len(values)
    drawn = np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), BOOTSTRAP_DRAWS)
    low, high = np.percentile(drawn @ np.asarray(values, np.float64) / n, [2.5, 97.5])
    return float(low), float(high)


def greedy_answer(context: Any, pieces: Sequence[st3.Piece], n_tokens: int) -> tuple[list[int], Logits]:
    """The likeliest token, `n_tokens` times or until one ends the answer, which is then the last.

    Returns the token ids, at least one, and the logits float32 [tokens][n_vocab] that each was chosen by. Raises
    St3Error where llama.cpp fails.
    """
    lib = libraries.load().lib
    vocab = _vocab(context)
    at = _prefill(context, pieces)
    answer, rows = [], [_logits(context, -1)]
    while True:
        answer.append(int(rows[-1].argmax()))
        if len(answer) == n_tokens or lib.llama_vocab_is_eog(vocab, answer[-1]):
            return answer, np.stack(rows)
        rows += _decode(context, answer[-1:], at)
        at += 1


def teacher_forced_logits(context: Any, pieces: Sequence[st3.Piece], answer: Sequence[int]) -> Logits:
    """What the model says comes next while it is given an answer: float32 [len(answer)][n_vocab]; row i follows the
    prompt and answer[:i]. Raises St3Error where llama.cpp fails."""
    at = _prefill(context, pieces)
    rows = [_logits(context, -1)]
    given = list(answer[:-1])
    # Annealing counts batches of one token as steps; without it one batch gives the same, much sooner.
    steps = [[token] for token in given] if st3.anneals(context) else [given] if given else []
    for tokens in steps:
        rows += _decode(context, tokens, at)
        at += len(tokens)
    return np.stack(rows)


def _prefill(context: Any, pieces: Sequence[st3.Piece]) -> int:
    """Prefills into the empty sequence; returns the position that follows."""
    log.forget()
    st3.remove(context, 0)
    code = st3.prefill(context, 0, pieces)
    if code:
        reason = st3.last_error()
        raise St3Error(f"prefill failed ({code})" + (f": {reason}" if reason else log.why()))
    return st3.n_positions(context)


def _decode(context: Any, tokens: list[int], p0: int) -> list[Logits]:
    log.forget()
    code = st3.decode(context, p0, tokens)
    if code:
        raise St3Error(f"decoding failed ({code}){log.why()}")
    return [_logits(context, i) for i in range(len(tokens))]


def _vocab(context: Any) -> Any:
    lib = libraries.load().lib
    return lib.llama_model_get_vocab(lib.llama_get_model(context))


def _logits(context: Any, i: int) -> Logits:
    """A copy of the logits of output i of the last batch."""
    lib = libraries.load().lib
    n_vocab = lib.llama_vocab_n_tokens(_vocab(context))
    row: Logits = np.ctypeslib.as_array(lib.llama_get_logits_ith(context, i), (n_vocab,)).copy()
    return row
