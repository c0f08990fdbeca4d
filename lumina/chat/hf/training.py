"""Trains a vocabulary: byte-level BPE (Sennrich et al., arXiv:1508.07909) on texts, written as a Hugging Face folder.

A small model on a small subject spends most of its weights and time on a large vocabulary that it never sees: of the 29
million weights of the preset nano, 26 million are the embedding of cl100k_base.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path

from lumina.config import UserError, install_command
from lumina.files import atomic_folder, write_text

BYTES = 256  # every text has ids: those of its bytes at worst
END_OF_TEXT = "<|endoftext|>"


def train_vocabulary(
    texts: Iterable[str], folder: Path, vocab_size: int, chat_template: str, special: Sequence[str]
) -> int:
    """Write the tokenizer of `vocab_size` ids at most, learned from `texts`, into the new `folder`; returns how many
    ids it has, fewer where the texts have no more pairs to join.

    `chat_template` is the Jinja text, `special` the special tokens that it writes beside bos_token and eos_token, which
    are <|endoftext|>.

    Raises:
        UserError: the library is not installed, or `vocab_size` has no room for the bytes and the special tokens.
    """
    try:
        from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    except ImportError:
        raise UserError("training a vocabulary needs tokenizers", install_command("quickstart")) from None
    names = [END_OF_TEXT, *special]
    if vocab_size < BYTES + len(names):
        raise UserError(
            f"a vocabulary of {vocab_size} ids has no room for {BYTES} bytes and {len(names)} special tokens",
            "A few thousand are usual.",
        )
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=names,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": END_OF_TEXT,
        "eos_token": END_OF_TEXT,
        "clean_up_tokenization_spaces": False,
    }
    with atomic_folder(folder) as scratch:
        write_text(scratch / "tokenizer.json", tokenizer.to_str(pretty=True))
        write_text(scratch / "tokenizer_config.json", json.dumps(settings, indent=2))
        write_text(scratch / "chat_template.jinja", chat_template)
    return int(tokenizer.get_vocab_size())
