"""Opens a chat tokenizer: Lumina's own, or an imported model's from its folder."""

from __future__ import annotations

from pathlib import Path

from lumina.chat.protocol import ChatTokenizer
from lumina.chat.tokenizer import Tokenizer


def open_tokenizer(folder: str | Path | None) -> ChatTokenizer:
    """Lumina's tokenizer, or with a folder an imported model's own and its chat template.

    Raises:
        UserError: a file is missing or damaged, or the libraries that read it are not installed.
    """
    if folder is None:
        return Tokenizer.load()
    from lumina.chat.hf import HFTokenizer  # not at the top: prepare's workers must start fast

    return HFTokenizer(Path(folder))
