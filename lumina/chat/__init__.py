"""Conversations and chat tokenizers: messages in, token ids and loss mask out, by Lumina's template or an imported one.

Room's door: everything that other rooms use.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from lumina.chat.cl100k import SPECIAL_TOKENS
from lumina.chat.conversation import (
    ROLE_ALIASES,
    ROLES,
    SUPERVISED_ROLES,
    TEXT_ROLE,
    TOOL_ROLE,
    Conversation,
    Message,
    MessageColumns,
    ToolCall,
    full_text,
    full_texts,
    is_supervised,
    message_columns,
)
from lumina.chat.loading import open_tokenizer, recorded_template
from lumina.chat.protocol import (
    BLOCK_SECONDS,
    AnswerDelta,
    AnswerReader,
    ChatTokenizer,
    ContentReader,
    IncrementalDecoder,
    MessageSpan,
    RenderedBlock,
)
from lumina.chat.template import FIRST_TEMPLATE, NEWEST_TEMPLATE, TEMPLATES, Rendered, render, render_many
from lumina.chat.tokenizer import Tokenizer
from lumina.chat.tool_calls import json_text
from lumina.lazy import names_of

if TYPE_CHECKING:
    from lumina.chat.hf import (
        STEP_SECONDS,
        STOPS,
        TOKENIZER_FILES,
        ClosedError,
        HFTokenizer,
        OutOfBoundsError,
        ProcessEndedError,
        RefusalError,
        bounded_call,
        copy_files,
        hf_tokenizer_files,
        read_json,
        train_vocabulary,
        with_special_tokens,
    )
    from lumina.chat.hf_export import tokenizer_config, tokenizer_json

# Not loaded with the others: prepare's workers must start fast.
__getattr__ = names_of(
    __name__,
    {
        "ClosedError": "hf",
        "HFTokenizer": "hf",
        "OutOfBoundsError": "hf",
        "ProcessEndedError": "hf",
        "RefusalError": "hf",
        "STEP_SECONDS": "hf",
        "STOPS": "hf",
        "TOKENIZER_FILES": "hf",
        "bounded_call": "hf",
        "copy_files": "hf",
        "hf_tokenizer_files": "hf",
        "read_json": "hf",
        "tokenizer_config": "hf_export",
        "tokenizer_json": "hf_export",
        "train_vocabulary": "hf",
        "with_special_tokens": "hf",
    },
)

__all__ = [
    "BLOCK_SECONDS",
    "FIRST_TEMPLATE",
    "NEWEST_TEMPLATE",
    "ROLES",
    "ROLE_ALIASES",
    "SPECIAL_TOKENS",
    "STEP_SECONDS",
    "STOPS",
    "SUPERVISED_ROLES",
    "TEMPLATES",
    "TEXT_ROLE",
    "TOKENIZER_FILES",
    "TOOL_ROLE",
    "AnswerDelta",
    "AnswerReader",
    "ChatTokenizer",
    "ClosedError",
    "ContentReader",
    "Conversation",
    "HFTokenizer",
    "IncrementalDecoder",
    "Message",
    "MessageColumns",
    "MessageSpan",
    "OutOfBoundsError",
    "ProcessEndedError",
    "RefusalError",
    "Rendered",
    "RenderedBlock",
    "Tokenizer",
    "ToolCall",
    "bounded_call",
    "copy_files",
    "full_text",
    "full_texts",
    "hf_tokenizer_files",
    "is_supervised",
    "json_text",
    "message_columns",
    "open_tokenizer",
    "read_json",
    "recorded_template",
    "render",
    "render_many",
    "tokenizer_config",
    "tokenizer_json",
    "train_vocabulary",
    "with_special_tokens",
]
