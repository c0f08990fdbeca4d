"""What the endpoints of a server share: the model, its tokenizer, the batcher and the limits."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import TypeVar

from starlette.concurrency import run_in_threadpool

from lumina.chat import STEP_SECONDS, ChatTokenizer, OutOfBoundsError, ProcessEndedError, open_tokenizer
from lumina.config import UserError
from lumina.infer.generation.constraint import CallTokens, GrammarCompiler
from lumina.infer.generation.forms import call_tokens, calling_tokens, reasoning_tokens
from lumina.infer.generation.generate import check_prompt
from lumina.infer.loading import Loaded
from lumina.infer.serve.batcher import ContinuousBatcher
from lumina.infer.serve.errors import ApiError
from lumina.infer.serve.metrics import Metrics

log = logging.getLogger("lumina")

_T = TypeVar("_T")


@dataclass
class Service:
    """What the endpoints share. `tokenizer` is not the batcher's own: two threads may not use one at once."""

    loaded: Loaded
    tokenizer: ChatTokenizer
    batcher: ContinuousBatcher
    metrics: Metrics
    most_tokens: int  # new ones, of one answer
    seconds: float  # for a whole request, the queue included
    stall: float  # without a client reading
    one_at_a_time: asyncio.Lock = field(default_factory=asyncio.Lock)

    @property
    def name(self) -> str:
        return self.loaded.checkpoint.parent.parent.name

    @property
    def context_length(self) -> int:
        """The most tokens that a prompt and its answer have together."""
        return self.batcher.context_length

    @cached_property
    def grammars(self) -> GrammarCompiler:
        return GrammarCompiler(self._grammar_tokenizer, self.loaded.config.vocab_size)

    @cached_property
    def _grammar_tokenizer(self) -> ChatTokenizer:
        """The decoding thread waits for its steps, so they do not wait for those of clients' prompts."""
        own = self.tokenizer
        if own.folder is None:
            return own
        return open_tokenizer(own.folder, own.chat_template, min(self.seconds, STEP_SECONDS), purpose="grammars")

    @cached_property
    def calling_tokens(self) -> frozenset[int]:
        """The tokens that begin a tool call; see there."""
        return calling_tokens(self.tokenizer)

    @cached_property
    def call_tokens(self) -> CallTokens | None:
        """How calls are written; see there."""
        return call_tokens(self.tokenizer)

    @cached_property
    def reasoning_tokens(self) -> frozenset[int]:
        """The tokens that begin reasoning; see there."""
        return reasoning_tokens(self.tokenizer)

    def close(self) -> None:
        """End the batcher, and steps of the tokenizers that are being made."""
        self.tokenizer.close()
        if "_grammar_tokenizer" in vars(self):
            self._grammar_tokenizer.close()
        self.batcher.close()

    async def apart(self, work: Callable[[], _T], param: str) -> _T:
        """Work with the tokenizer, which may take a second: not in the event loop. Raises ApiError, which names the
        field `param`, for a UserError."""
        try:
            await asyncio.wait_for(self.one_at_a_time.acquire(), self.seconds)
        except TimeoutError:
            raise ApiError(504, f"The request was not looked at after {self.seconds:g} s.", "timeout") from None
        try:
            return await run_in_threadpool(work)
        except ProcessEndedError as error:
            log.warning("%s", error.message)
            said = "The process of the model's tokenizer was ended: try again."
            raise ApiError(503, said, "tokenizer_ended", param, retry_after=1) from None
        except OutOfBoundsError as error:
            log.warning("%s", error.message)
            raise ApiError(504, "The model's tokenizer or chat template took too long.", "timeout", param) from None
        except UserError as error:
            raise ApiError(400, " ".join(str(error).split()), param=param) from None
        finally:
            self.one_at_a_time.release()

    async def tokenized(self, work: Callable[[], list[int]], param: str) -> list[int]:
        """A prompt's ids, which leave room for an answer. Raises ApiError."""
        ids = await self.apart(work, param)
        try:
            check_prompt(len(ids), self.context_length)
        except UserError as error:
            raise ApiError(400, str(error), "context_length_exceeded", param) from None
        return ids
