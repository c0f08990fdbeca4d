"""The command that trains a vocabulary."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from lumina.commands.common import Arguments, Command, Parser
from lumina.terminal import say

if TYPE_CHECKING:
    from lumina.chat import Conversation


def train_tokenizer(arguments: Arguments) -> int:
    """Train a small vocabulary on conversations, for a small model of its own."""
    from lumina.chat import open_tokenizer, train_vocabulary
    from lumina.config import UserError
    from lumina.infer import read_conversations, stock_template

    out = Path(arguments.out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out} already holds something", "Choose another folder, or remove it first.")
    template, special = stock_template(arguments.chat_template)
    skipped: Counter[str] = Counter()
    texts = _texts(read_conversations(arguments.files, skipped))
    size = train_vocabulary(texts, out, arguments.vocab_size, template, special)
    open_tokenizer(out).check_trainable()
    say(f"{out}: {size:,} ids, chat template {arguments.chat_template}")
    for reason, count in skipped.most_common():
        say(f"  left out: {count:,} records ({reason})")
    say(f"Train with it: lumina train --set tokenizer={out} --set vocab_size={size} …")
    return 0


def _texts(conversations: Iterator[Conversation]) -> Iterator[str]:
    for conversation in conversations:
        for message in conversation.messages:
            yield message.content


def _options(parser: Parser) -> None:
    parser.add_argument("files", nargs="+", metavar="FILE", help="conversations in any data format: {FORMATS}")
    parser.add_argument("--out", required=True, metavar="DIR", help="the new tokenizer's folder")
    parser.add_argument("--vocab-size", type=int, default=4096, metavar="N", help="ids at most (4096)")
    parser.add_argument(
        "--chat-template", default="chatml", metavar="NAME", help="chatml, llama3, mistral or zephyr (chatml)"
    )


COMMANDS: dict[str, Command] = {"train-tokenizer": Command(train_tokenizer, _options)}
