"""The tokenizer and the one chat template: turns in, token ids and loss mask out."""

from lumina.chat.template import (
    ROLE_ALIASES,
    TEMPLATE_VERSION,
    TEXT_ROLE,
    Conversation,
    Message,
    Rendered,
    RenderedBlock,
    prompt_ids,
    render,
    render_many,
)
from lumina.chat.tokenizer import CONTROL_TOKENS, Tokenizer

__all__ = [
    "CONTROL_TOKENS",
    "ROLE_ALIASES",
    "TEMPLATE_VERSION",
    "TEXT_ROLE",
    "Conversation",
    "Message",
    "Rendered",
    "RenderedBlock",
    "Tokenizer",
    "prompt_ids",
    "render",
    "render_many",
]
