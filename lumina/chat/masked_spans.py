"""Masked spans: the tokens of those characters of a content that a record sets aside.

Shapes: T tokens.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

from lumina.chat.cl100k import Cl100kEncoder
from lumina.chat.conversation import Message


def mask_spans(
    encoder: Cl100kEncoder,
    ids_T: NDArray[np.int32],
    mask_T: NDArray[np.uint8],
    contents: Iterable[tuple[Message, int, int]],
) -> None:
    """Clear the loss mask at the tokens with a byte in one of their message's masked spans. contents: each message,
    where its content begins in ids_T and its tokens."""
    for message, start, tokens in contents:
        if message.masked:
            own = slice(start, start + tokens)
            mask_T[own] &= ~_masked_tokens(encoder, ids_T[own], message)


def _masked_tokens(encoder: Cl100kEncoder, ids_T: NDArray[np.int32], message: Message) -> NDArray[np.bool_]:
    """Which tokens of a message's content (T) have a byte in one of its masked spans."""
    end_T = np.cumsum([len(encoder.token_bytes(token)) for token in ids_T.tolist()])
    start_T = np.concatenate([[0], end_T[:-1]])
    found_T = np.zeros(len(ids_T), dtype=np.bool_)
    for first, last in message.masked:
        begin, end = (len(message.content[:at].encode()) for at in (first, last))
        found_T |= (start_T < end) & (end_T > begin)
    return found_T
