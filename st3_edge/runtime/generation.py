"""An answer, token by token."""

from __future__ import annotations

import time
from dataclasses import dataclass

from ..errors import St3Error
from ..native import libraries, log
from ..native.batch import Batch
from ..report import Report
from . import tracing
from .conversation import Conversation
from .prefill import ms_since, report_of
from .sampling import Chain
from .text_model import TextModel
from .text_stream import TextStream
from .vision import Tokenized


class Answer:
    """A call, and its answer as far as it has come. report: from the prompt's prefill on; n_prompt: its tokens."""

    def __init__(self, n_prompt: int) -> None:
        self.n_prompt = n_prompt
        self.report: Report | None = None


class Decoder:
    """Decodes a conversation's next token."""

    def __init__(self, llama: TextModel, conversation: Conversation) -> None:
        self.llama, self.conversation, self.lib = llama, conversation, libraries.load().lib
        self._batch = Batch(1)

    def close(self) -> None:
        """Frees its batch."""
        self._batch.close()

    def decode(self, token: int) -> None:
        """Raises St3Error."""
        log.forget()
        with self.conversation.adding([token]):
            self._batch.fill([token], self.conversation.n_positions, all_logits=False)
            code = self.lib.llama_decode(self.llama.ctx, self._batch.native)
            if code:
                raise St3Error(f"decoding failed ({code}){log.why()}")


@dataclass
class Generation:
    """What an Answer is made with. token: chosen, and not decoded yet; call: its number among the session's."""

    tokenized: Tokenized
    sampler: Chain
    text: TextStream
    limit: int
    call: int = 0
    token: int = 0

    def step(self, decoder: Decoder, report: Report) -> tuple[str, bool]:
        """The next piece of the answer, which may be "", and whether it is the last; the report grows with it."""
        llama, text = decoder.llama, self.text
        started = time.perf_counter()
        if report.n_generated:
            decoder.decode(self.token)
        self.token = token = self.sampler.sample(llama.ctx)
        report.ms.decode += ms_since(started)
        if report.trace:
            tracing.note_left(report, llama.ctx)
        if decoder.lib.llama_vocab_is_eog(llama.vocab, token):
            report.finish_reason = "stop"
            return self._end(decoder, report), True
        piece = text.push(llama.piece(token, first=report.n_generated == 0))
        report.n_generated += 1
        report.answer += piece
        if report.trace:
            report.trace.pieces.append(piece)
        if text.stopped:
            report.finish_reason = "stop"
        if text.stopped or report.n_generated >= self.limit:
            return piece + self._end(decoder, report), True
        return piece, False

    def _end(self, decoder: Decoder, report: Report) -> str:
        """What of the answer's text was waiting for more."""
        piece = self.text.finish()
        report.answer += piece
        if piece and report.trace:
            report.trace.pieces[-1] += piece
        report.end(report_of(decoder.llama.ctx, decoder.conversation))
        return piece
