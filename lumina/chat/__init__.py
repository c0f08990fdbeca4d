"""The tokenizer and the one chat template, ours or an imported model's: turns in, token ids and loss mask out."""

from lumina.chat.template import (
    ROLE_ALIASES,
    TEMPLATE_VERSION,
    TEXT_ROLE,
    AnyTokenizer,
    Conversation,
    Message,
    Rendered,
    RenderedBlock,
    open_tokenizer,
    prompt_ids,
    render,
    render_many,
    render_sound,
    template_version,
)
from lumina.chat.tokenizer import CONTROL_TOKENS, Tokenizer

__all__ = [
    "CONTROL_TOKENS",
    "ROLE_ALIASES",
    "TEMPLATE_VERSION",
    "TEXT_ROLE",
    "AnyTokenizer",
    "Conversation",
    "Message",
    "Rendered",
    "RenderedBlock",
    "Tokenizer",
    "open_tokenizer",
    "prompt_ids",
    "render",
    "render_many",
    "render_sound",
    "template_version",
]
