"""What a client is told when the tokenizer has no answer for it."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from lumina.chat import OutOfBoundsError, ProcessEndedError
from lumina.infer.serve.errors import ApiError
from lumina.infer.serve.service import Service


@pytest.mark.parametrize(("error", "status"), [(OutOfBoundsError, 504), (ProcessEndedError, 503)])
def test_a_process_that_was_ended_took_no_time(error: type[OutOfBoundsError], status: int) -> None:
    def ended() -> None:
        raise error("the tokenizer")

    nothing: Any = None
    service = Service(nothing, nothing, nothing, nothing, 1, 1.0, 1.0)
    with pytest.raises(ApiError) as raised:
        asyncio.run(service.apart(ended, "messages"))
    assert raised.value.status == status
