"""Text tokens on their way to llama_decode."""

from __future__ import annotations

from collections.abc import Sequence

from . import libraries


class Batch:
    """A llama_batch (`native`) for up to `size` text tokens of sequence 0."""

    def __init__(self, size: int) -> None:
        self._lib = libraries.load().lib
        self.native = self._lib.llama_batch_init(size, 0, 1)
        self._open = True
        for i in range(size):
            self.native.n_seq_id[i] = 1
            self.native.seq_id[i][0] = 0

    def fill(self, tokens: Sequence[int], p0: int, all_logits: bool) -> None:
        """Makes it hold `tokens` from position p0 on, of which each gives logits, or the last one alone."""
        batch = self.native
        batch.n_tokens = len(tokens)
        for i, token in enumerate(tokens):
            batch.token[i], batch.pos[i] = token, p0 + i
            batch.logits[i] = all_logits or i == len(tokens) - 1

    def close(self) -> None:
        """Frees it. Called again it does nothing."""
        if self._open:
            self._open = False
            self._lib.llama_batch_free(self.native)
