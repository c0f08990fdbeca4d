"""An imported model's chat tokenizer, from the files of its Hugging Face folder.

Its names are loaded on first use: who has Lumina's own tokenizer needs neither tokenizers nor jinja2.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from lumina.lazy import names_of

if TYPE_CHECKING:
    from lumina.chat.hf.bounded import (
        STEP_SECONDS,
        BoundedTokenizer,
        ClosedError,
        OutOfBoundsError,
        ProcessEndedError,
        bounded_call,
    )
    from lumina.chat.hf.export import hf_tokenizer_files
    from lumina.chat.hf.files import STOPS, TOKENIZER_FILES, copy_files, read_json, with_special_tokens
    from lumina.chat.hf.jinja import RefusalError
    from lumina.chat.hf.tokenizer import HFTokenizer
    from lumina.chat.hf.training import train_vocabulary

__getattr__ = names_of(
    __name__,
    {
        "BoundedTokenizer": "bounded",
        "ClosedError": "bounded",
        "HFTokenizer": "tokenizer",
        "OutOfBoundsError": "bounded",
        "ProcessEndedError": "bounded",
        "RefusalError": "jinja",
        "STEP_SECONDS": "bounded",
        "STOPS": "files",
        "TOKENIZER_FILES": "files",
        "bounded_call": "bounded",
        "copy_files": "files",
        "hf_tokenizer_files": "export",
        "read_json": "files",
        "train_vocabulary": "training",
        "with_special_tokens": "files",
    },
)

__all__ = [
    "STEP_SECONDS",
    "STOPS",
    "TOKENIZER_FILES",
    "BoundedTokenizer",
    "ClosedError",
    "HFTokenizer",
    "OutOfBoundsError",
    "ProcessEndedError",
    "RefusalError",
    "bounded_call",
    "copy_files",
    "hf_tokenizer_files",
    "read_json",
    "train_vocabulary",
    "with_special_tokens",
]
