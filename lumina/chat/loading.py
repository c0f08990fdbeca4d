"""Opens a chat tokenizer: Lumina's own, or an imported model's from its folder; and which template a model has."""

from __future__ import annotations

from pathlib import Path

from lumina.chat.protocol import ChatTokenizer
from lumina.chat.template import FIRST_TEMPLATE
from lumina.chat.tokenizer import Tokenizer


def open_tokenizer(
    folder: str | Path | None,
    chat_template: str | None = None,
    step_seconds: float | None = None,
    tried: bool = False,
    purpose: str = "",
) -> ChatTokenizer:
    """Lumina's tokenizer with the chat template of that name, or with a folder an imported model's own and the chat
    template that it brings. That one's files are programs of others: they are run in a process of their own
    (hf/bounded.py), in which a step may take `step_seconds` (20, and 600 for a block of data). Steps for one `purpose`
    do not wait for those for another. With `tried` they are run in this process, for a worker, which ends when a step
    takes too long, and whose parent has opened the files.

    Raises:
        UserError: a file is missing or damaged, the libraries that read it are not installed, or there is no such chat
            template.
    """
    if folder is None:
        return Tokenizer.load(chat_template)
    from lumina.chat.hf import BoundedTokenizer, HFTokenizer  # not at the top: prepare's workers must start fast

    return HFTokenizer(Path(folder)) if tried else BoundedTokenizer(Path(folder), step_seconds, purpose=purpose)


def recorded_template(recorded: str) -> str:
    """Lumina's chat template of a model with Lumina's tokenizer, by what its checkpoint records: version 0.2.0 and
    earlier recorded none, and had the first."""
    return recorded or FIRST_TEMPLATE
