"""Continuous batching: one thread runs the model for many requests, over a fixed number of slots.

Every pass of its loop takes in waiting sequences as slots are free, feeds up to CHUNK tokens of prompts, and makes one
decoding step for all sequences that are past their prompt. So a request joins and leaves between any two tokens of the
others, and a long prompt holds up the others' tokens by one chunk at most.

Prompts are prefilled one sequence a pass, in chunks that depend on the prompt alone; generation/batch.py says why.

The thread never waits for a client. What it makes is handed over at once, and a client that reads slowly finds it
waiting: at most its own max_tokens, a few hundred bytes each at worst. Its slot is free as soon as its answer is done.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

from lumina.chat import AnswerDelta, AnswerReader
from lumina.config import UserError
from lumina.infer.generation.batch import Finish, Sequence, SequenceBatch, Token
from lumina.infer.generation.detokenizer import Detokenizer
from lumina.infer.generation.prefix_cache import PrefixCache
from lumina.infer.loading import Loaded
from lumina.infer.serve.errors import ApiError, shutting_down
from lumina.infer.serve.metrics import Metrics

log = logging.getLogger("lumina")

CHUNK = 512  # tokens of prompts fed between two decoding steps


class Delta(NamedTuple):
    """What one token added to an answer, often nothing; the token, unless it is the stop token."""

    sequence: Sequence
    said: AnswerDelta
    token: Token | None
    finish: Finish | None


@dataclass(eq=False)
class GenerationRequest:
    """The sequences of one HTTP request. `deliver` is called from the batcher's thread with each delta, or with the
    error that ends the request; it must not block. Times are of time.monotonic().

    `reader` makes what reads an answer, `begun` are tokens of it that the prompt ends with, and an answer ends with its
    tool call number `most_calls`.
    """

    sequences: list[Sequence]
    reader: Callable[[], AnswerReader]
    deliver: Callable[[Delta | ApiError], None]
    deadline: float
    begun: list[int] = field(default_factory=list)
    most_calls: int | None = None
    arrived: float = field(default_factory=time.monotonic)
    ended: bool = False


@dataclass(eq=False)
class _Entry:
    """A sequence of a request and its detokenizer; what that has read and was not handed over yet."""

    request: GenerationRequest
    sequence: Sequence
    detokenizer: Detokenizer
    read: AnswerDelta = AnswerDelta()  # noqa: RUF009 - a tuple
    calls: int = 0

    def push(self, tokens: list[int]) -> None:
        for token in tokens:
            self._add(self.detokenizer.push(token))

    def end(self) -> None:
        self._add(self.detokenizer.end())

    def _add(self, new: AnswerDelta) -> None:
        calls, most = new.tool_calls, self.request.most_calls
        calls = calls if most is None else calls[: most - self.calls]
        self.calls += len(calls)
        had = self.read
        self.read = AnswerDelta(had.reasoning + new.reasoning, had.content + new.content, had.tool_calls + calls)

    def taken(self) -> AnswerDelta:
        """What has been read since the last time."""
        read, self.read = self.read, AnswerDelta()
        return read

    @property
    def complete(self) -> bool:
        """Whether a stop text, or the last call that was asked for, has come."""
        return self.detokenizer.stopped or self.calls == self.request.most_calls


class ContinuousBatcher:
    """Runs one model for many requests."""

    def __init__(
        self,
        loaded: Loaded,
        slots: int,
        most_waiting: int,
        metrics: Metrics,
        prefixes: PrefixCache | None = None,
        context_length: int | None = None,
    ) -> None:
        """`slots` sequences at a time; `most_waiting` more may wait for one. `prefixes` keeps those that ended.
        `context_length`: of a prompt and its answer, if less than the model's."""
        self._metrics, self._most_waiting, self._prefixes = metrics, most_waiting, prefixes
        self.context_length = context_length or loaded.config.seq_length
        self._batch = SequenceBatch(loaded.model, loaded.tokenizer, slots, self.context_length, prefixes=prefixes)
        self._wake = threading.Condition()
        self._waiting: deque[_Entry] = deque()  # guarded by _wake, as is _closing
        self._closing = False
        self._filling: deque[_Entry] = deque()
        self._active: dict[Sequence, _Entry] = {}
        self._thread = threading.Thread(target=self._run, name="lumina-batcher", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def close(self) -> None:
        """Fail what is left and end the thread."""
        with self._wake:
            self._closing = True
            self._wake.notify()
        if self._thread.is_alive():
            self._thread.join()

    @property
    def alive(self) -> bool:
        return self._thread.is_alive()

    def submit(self, request: GenerationRequest) -> None:
        """Queue a request. Raises ApiError when the queue is full or the server is going down."""
        entries = [_Entry(request, s, Detokenizer(request.reader(), s.sampling.stop)) for s in request.sequences]
        with self._wake:
            if self._closing or not self.alive:
                raise shutting_down()
            if len(self._waiting) + len(entries) > self._most_waiting + self._batch.free:
                raise ApiError(429, "Too many requests are waiting.", "queue_full", retry_after=1)
            self._waiting.extend(entries)
            self._wake.notify()

    def cancel(self, request: GenerationRequest) -> None:
        """Cancel a request whose client has gone: its slots are free before the next token."""
        request.ended = True

    def _run(self) -> None:
        while True:
            with self._wake:
                while not (self._waiting or self._active or self._filling or self._closing):
                    self._wake.wait()
                if self._closing:
                    break
            try:
                self._turn()
            except UserError as error:  # the model's weights are not finite
                self._fail_all(ApiError(500, str(error), "model_error"))
            except Exception:
                log.exception("a pass of the model failed: the requests in it are given up")
                self._fail_all(ApiError(500, "The model failed on this request.", "model_error"))
        self._fail_all(shutting_down())

    def _turn(self) -> None:
        """Take in, prefill, decode; those that ended leave."""
        self._sweep()
        self._admit()
        fed = 0
        while self._filling and fed < CHUNK:
            entry = self._filling[0]
            before = entry.sequence.fed
            tokens = self._batch.prefill([entry.sequence], CHUNK)
            fed += entry.sequence.fed - max(before, entry.sequence.reused)
            if tokens:
                self._filling.popleft()
                self._metrics.prompt_tokens.inc(entry.sequence.fed - entry.sequence.reused)
                self._metrics.reused_tokens.inc(entry.sequence.reused)
                self._metrics.first_token.observe(time.monotonic() - entry.request.arrived)
            self._hand_over(tokens)
        if self._batch.going:
            self._metrics.batch.observe(len(self._batch.going))
            self._hand_over(self._batch.step())
        self._metrics.running.set(len(self._active))

    def _admit(self) -> None:
        with self._wake:
            while self._waiting and self._batch.free:
                entry = self._waiting.popleft()
                self._active[entry.sequence] = entry  # first: what fails from here on is told its request
                self._batch.join(entry.sequence)
                entry.push(entry.request.begun)
                self._filling.append(entry)
                self._metrics.queued.observe(time.monotonic() - entry.request.arrived)
            self._metrics.waiting.set(len(self._waiting))
            self._metrics.running.set(len(self._active))

    def _sweep(self) -> None:
        """Remove cancelled and timed-out sequences from the batch and the queue."""
        now = time.monotonic()
        for entry in self._all():
            request = entry.request
            if not request.ended and now < request.deadline:
                continue
            if not request.ended:
                request.ended = True
                seconds = round(request.deadline - request.arrived)
                request.deliver(ApiError(504, f"The answer was not complete after {seconds} s.", "timeout"))
            self._drop(entry, "timeout" if now >= request.deadline else "cancelled")

    def _all(self) -> list[_Entry]:
        with self._wake:
            return [*self._active.values(), *self._waiting]

    def _drop(self, entry: _Entry, how: str) -> None:
        with self._wake:
            if entry in self._waiting:
                self._waiting.remove(entry)
        if entry in self._filling:
            self._filling.remove(entry)
        self._active.pop(entry.sequence, None)
        self._batch.leave(entry.sequence, keep=how != "error")
        if self._prefixes is not None:
            self._metrics.kept_bytes.set(self._prefixes.bytes)
        self._metrics.ended.labels(how).inc()
        self._metrics.seconds.observe(time.monotonic() - entry.request.arrived)

    def _hand_over(self, tokens: list[Token]) -> None:
        self._metrics.tokens.inc(len(tokens))
        for token in tokens:
            entry = self._active[token.sequence]
            finish, stops = token.finish, token.finish == "stop"
            if not stops:
                entry.push([token.id])
            if entry.complete:
                finish = "stop"
            elif finish is not None:
                entry.end()
            if finish is not None:
                self._drop(entry, finish)
            if not entry.request.ended:
                entry.request.deliver(Delta(token.sequence, entry.taken(), None if stops else token, finish))

    def _fail_all(self, error: ApiError) -> None:
        for entry in self._all():
            if not entry.request.ended:
                entry.request.ended = True
                entry.request.deliver(error)
            self._drop(entry, "error")
        self._metrics.running.set(0)
