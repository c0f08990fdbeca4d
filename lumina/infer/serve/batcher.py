"""The thread that runs the model: continuous batching over a fixed number of slots.

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

from lumina.config import UserError
from lumina.infer.generation.batch import Batch, Finish, Sequence, Token
from lumina.infer.generation.detokenizer import Detokenizer
from lumina.infer.loading import Loaded
from lumina.infer.serve.errors import ApiError, closing
from lumina.infer.serve.metrics import Metrics

log = logging.getLogger("lumina")

CHUNK = 512  # tokens of prompts fed between two decoding steps


class Piece(NamedTuple):
    """What one token added to an answer: text, often empty; the token, unless it is the stop token."""

    sequence: Sequence
    text: str
    token: Token | None
    finish: Finish | None


@dataclass(eq=False)
class Job:
    """The sequences of one request. `deliver` is called from the engine's thread with each piece, or with the error
    that ends the job; it must not block. Times are of time.monotonic()."""

    sequences: list[Sequence]
    deliver: Callable[[Piece | ApiError], None]
    deadline: float
    arrived: float = field(default_factory=time.monotonic)
    ended: bool = False


@dataclass(eq=False)
class _Voiced:
    """A sequence of a job and its text."""

    job: Job
    sequence: Sequence
    detokenizer: Detokenizer


class Engine:
    """Runs one model for many requests."""

    def __init__(self, loaded: Loaded, slots: int, most_waiting: int, metrics: Metrics) -> None:
        """`slots` sequences at a time; `most_waiting` more may wait for one."""
        self._tokenizer, self._metrics, self._most_waiting = loaded.tokenizer, metrics, most_waiting
        self._batch = Batch(loaded.model, loaded.tokenizer, slots, loaded.config.seq_length)
        self._wake = threading.Condition()
        self._waiting: deque[_Voiced] = deque()  # guarded by _wake, as is _closing
        self._closing = False
        self._filling: deque[_Voiced] = deque()
        self._active: dict[Sequence, _Voiced] = {}
        self._thread = threading.Thread(target=self._run, name="lumina-engine", daemon=True)

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

    def submit(self, job: Job) -> None:
        """Queue a job. Raises ApiError when the queue is full or the server is going down."""
        voiced = [
            _Voiced(job, s, Detokenizer(self._tokenizer.incremental_decoder(), s.sampling.stop)) for s in job.sequences
        ]
        with self._wake:
            if self._closing or not self.alive:
                raise closing()
            if len(self._waiting) + len(voiced) > self._most_waiting + self._batch.free:
                raise ApiError(429, "Too many requests are waiting.", "queue_full", retry_after=1)
            self._waiting.extend(voiced)
            self._wake.notify()

    def cancel(self, job: Job) -> None:
        """Nobody listens any more: its slots are free before the next token."""
        job.ended = True

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
        self._fail_all(closing())

    def _turn(self) -> None:
        """Take in, prefill, decode; those that ended leave."""
        self._sweep()
        self._admit()
        fed = 0
        while self._filling and fed < CHUNK:
            voiced = self._filling[0]
            before = voiced.sequence.fed
            tokens = self._batch.prefill([voiced.sequence], CHUNK)
            fed += voiced.sequence.fed - before
            if tokens:
                self._filling.popleft()
                self._metrics.prompt_tokens.inc(voiced.sequence.fed)
                self._metrics.first_token.observe(time.monotonic() - voiced.job.arrived)
            self._hand_over(tokens)
        if self._batch.going:
            self._metrics.batch.observe(len(self._batch.going))
            self._hand_over(self._batch.step())
        self._metrics.running.set(len(self._active))

    def _admit(self) -> None:
        with self._wake:
            while self._waiting and self._batch.free:
                voiced = self._waiting.popleft()
                self._batch.join(voiced.sequence)
                self._active[voiced.sequence] = voiced
                self._filling.append(voiced)
                self._metrics.queued.observe(time.monotonic() - voiced.job.arrived)
            self._metrics.waiting.set(len(self._waiting))
            self._metrics.running.set(len(self._active))

    def _sweep(self) -> None:
        """Give up what is cancelled or late, in the batch and in the queue."""
        now = time.monotonic()
        for voiced in self._all():
            job = voiced.job
            if not job.ended and now < job.deadline:
                continue
            if not job.ended:
                job.ended = True
                seconds = round(job.deadline - job.arrived)
                job.deliver(ApiError(504, f"The answer was not complete after {seconds} s.", "timeout"))
            self._drop(voiced, "timeout" if now >= job.deadline else "cancelled")

    def _all(self) -> list[_Voiced]:
        with self._wake:
            return [*self._active.values(), *self._waiting]

    def _drop(self, voiced: _Voiced, how: str) -> None:
        with self._wake:
            if voiced in self._waiting:
                self._waiting.remove(voiced)
        if voiced in self._filling:
            self._filling.remove(voiced)
        self._active.pop(voiced.sequence, None)
        self._batch.leave(voiced.sequence)
        self._metrics.ended.labels(how).inc()
        self._metrics.seconds.observe(time.monotonic() - voiced.job.arrived)

    def _hand_over(self, tokens: list[Token]) -> None:
        self._metrics.tokens.inc(len(tokens))
        for token in tokens:
            voiced = self._active[token.sequence]
            text, finish, stops = "", token.finish, token.finish == "stop"
            if not stops:
                text = voiced.detokenizer.push(token.id)
            if voiced.detokenizer.stopped:
                finish = "stop"
            elif finish is not None:
                text += voiced.detokenizer.end()
            if finish is not None:
                self._drop(voiced, finish)
            if not voiced.job.ended:
                voiced.job.deliver(Piece(token.sequence, text, None if stops else token, finish))

    def _fail_all(self, error: ApiError) -> None:
        for voiced in self._all():
            if not voiced.job.ended:
                voiced.job.ended = True
                voiced.job.deliver(error)
            self._drop(voiced, "error")
        self._metrics.running.set(0)
