"""A small tokenizer of the kind that imported models bring: byte-level BPE of a few hundred tokens, ChatML template.

A model of Lumina's own vocabulary has 100,352 rows in its embedding; with this one a tiny model is tiny, and a real run
of it takes a fraction of the time:

    folder = write_tokenizer(tmp_path / "tokenizer")
    runs.train(arguments(run, data, **small_vocabulary(folder), max_steps=20))
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

VOCABULARY = 512  # ids; the tokenizer itself has fewer
END_OF_TEXT, START, END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"  # ids 0, 1, 2

# The words of runs.write_conversations, so that what is supervised there is a few tokens a sentence.
_TEXTS = [
    "Honestly, my sister makes me happy. You know, our dog was a surprise! Well, the weather could be better?",
    "To be fair, that film reminds me of home. I think the old library is worth the wait. Funny, but your garden",
    "Yesterday I said that a long train ride keeps me awake. As far as I can tell the football team makes me happy.",
    "system user assistant",
    "hello there, how are you today? hello there, how are you today? ",
] * 3

CHATML = (
    "{% for m in messages %}{% if m['role'] not in ('system', 'user', 'assistant') %}{{ raise_exception('bad role') }}"
    "{% endif %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def write_tokenizer(folder: Path, template: str | None = CHATML) -> Path:
    """Write tokenizer.json and its settings into a new folder; returns the folder."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    fast = Tokenizer(models.BPE())
    fast.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    fast.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=[END_OF_TEXT, START, END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    fast.train_from_iterator(_TEXTS, trainer)
    folder.mkdir(parents=True)
    fast.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": END_OF_TEXT,
        "eos_token": END,
        "clean_up_tokenization_spaces": False,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    if template is not None:
        (folder / "chat_template.jinja").write_text(template)
    return folder


def write_spaced_tokenizer(folder: Path, template: str) -> Path:
    """Of Llama 2's kind: a mark in place of spaces and before every text, bytes for what has no token."""
    from tokenizers import Tokenizer, decoders, models, normalizers

    words = ["▁hello", "▁there", "▁how", "▁are", "▁you", "▁today", "INST", "▁[", "▁", "?", ".", "]", "[", "/", "<", ">"]
    letters = sorted({letter for word in words for letter in word} | set("abcdefghijklmnopqrstuvwxyzSYS|\n"))
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *letters]
    merges = []
    for word in words:
        for end in range(2, len(word) + 1):
            if word[:end] not in pieces:
                merges.append((word[: end - 1], word[end - 1]))
                pieces.append(word[:end])
    vocabulary = {piece: number for number, piece in enumerate(dict.fromkeys(pieces))}
    fast = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    fast.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    fast.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    fast.add_special_tokens(["<unk>", "<s>", "</s>"])
    folder.mkdir(parents=True)
    fast.save(str(folder / "tokenizer.json"))
    end = {"__type": "AddedToken", "content": "</s>", "lstrip": False, "normalized": False, "rstrip": False}
    names = {"bos_token": "<s>", "eos_token": end, "unk_token": "<unk>", "chat_template": template}
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False, **names})
    )
    return folder


def write_agent_tokenizer(folder: Path, template: str) -> Path:
    """The same with tokens as Qwen3 has them around reasoning, calls and results: added, and not special ones."""
    from tokenizers import AddedToken, Tokenizer

    write_tokenizer(folder, template)
    fast = Tokenizer.from_file(str(folder / "tokenizer.json"))
    names = [f"<{slash}{name}>" for name in ("think", "tool_call", "tool_response") for slash in ("", "/")]
    fast.add_tokens([AddedToken(name, special=False, normalized=False) for name in names])
    fast.save(str(folder / "tokenizer.json"))
    return folder


def trl_template(name: str) -> str:
    """A stock chat template, of the installed trl."""
    import trl

    return (Path(trl.__file__).parent / "chat_templates" / f"{name}.jinja").read_text(encoding="utf-8")


def small_vocabulary(folder: Path) -> dict[str, Any]:
    """The settings of runs.arguments for a run whose vocabulary is that of `folder`."""
    return {"tokenizer": folder, "vocab_size": VOCABULARY}
