"""What the endpoints of a server share: the model, its tokenizer, the batcher and the limits."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field

from starlette.concurrency import run_in_threadpool

from lumina.chat import ChatTokenizer
from lumina.config import UserError
from lumina.infer.generation.generate import check_prompt
from lumina.infer.loading import Loaded
from lumina.infer.serve.batcher import ContinuousBatcher
from lumina.infer.serve.errors import ApiError
from lumina.infer.serve.metrics import Metrics


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

    async def tokenized(self, work: Callable[[], list[int]], param: str) -> list[int]:
        """A prompt's ids. Megabytes of text take a second: not in the event loop. Raises ApiError, which names
        the field `param`."""
        async with self.one_at_a_time:
            try:
                ids = await run_in_threadpool(work)
            except UserError as error:
                raise ApiError(400, str(error), param=param) from None
        try:
            check_prompt(len(ids), self.loaded.config.seq_length)
        except UserError as error:
            raise ApiError(400, str(error), "context_length_exceeded", param) from None
        return ids
