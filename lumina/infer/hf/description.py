"""What stands beside an export's weights: config.json, generation_config.json, the tokenizer and its chat template.

All of it follows from what the run was trained with and how Lumina generates, so that greedy text and its end are the
same outside as inside (tests/infer/hf/test_export_text.py).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from lumina.chat import (
    ChatTokenizer,
    Conversation,
    Message,
    Tokenizer,
    hf_tokenizer_files,
    read_json,
    tokenizer_config,
    tokenizer_json,
)
from lumina.config import ModelConfig, UserError
from lumina.files import write_json, write_text
from lumina.infer.generation.sampling import Sampling, forbidden_tokens
from lumina.model.families import family_of

# Of an imported generation_config.json: how tokens are drawn. Everything else there changes greedy text, which Lumina
# generates without it (repetition_penalty, no_repeat_ngram_size, forced tokens), or is derived.
_DRAWING = ("do_sample", "temperature", "top_k", "top_p", "min_p")


def describe(folder: Path, config: ModelConfig, dtype: str, tokenizer: ChatTokenizer) -> None:
    """Write every file of a transformers folder but the weights and the card."""
    stops = stop_ids(tokenizer)
    config_json = family_of(config).hf_config(config, dtype, stops if len(stops) > 1 else stops[0], tokenizer.pad_id)
    write_described(folder / "config.json", config_json)
    write_described(folder / "generation_config.json", generation_config(tokenizer, config))
    for name, text in tokenizer_files(tokenizer, config).items():
        write_text(folder / name, text)


def tokenizer_files(tokenizer: ChatTokenizer, config: ModelConfig) -> dict[str, str]:
    """Names and contents of tokenizer.json, tokenizer_config.json and, for an imported one, chat_template.jinja."""
    if tokenizer.folder is not None:
        return hf_tokenizer_files(tokenizer.folder, config.seq_length, stop_ids(tokenizer)[0], tokenizer.pad_id)
    own = Tokenizer.load(tokenizer.chat_template)
    values = {"tokenizer.json": tokenizer_json(own), "tokenizer_config.json": tokenizer_config(own, config.seq_length)}
    return {name: json.dumps(value, indent=2, ensure_ascii=False) for name, value in values.items()}


def write_described(path: Path, value: Any) -> None:
    """As transformers writes its own."""
    write_json(path, value, indent=2, sort_keys=False, ensure_ascii=False)


def stop_ids(tokenizer: ChatTokenizer) -> list[int]:
    """The ids that end an answer, that which the template writes first: readers that know one end take the first."""
    try:
        turns = Conversation([Message("user", "a"), Message("assistant", "b")])
        ids, spans = tokenizer.message_spans(turns)[-1]
        ending = ids[spans[-1].end - 1]
    except UserError:  # a base model without a template, or a template that no answer can be found in
        ending = min(tokenizer.stop_ids)
    return sorted(tokenizer.stop_ids, key=lambda token: (token != ending, token))


def generation_config(tokenizer: ChatTokenizer, config: ModelConfig) -> dict[str, Any]:
    """generation_config.json: where an answer ends, what is never said, and how tokens are drawn by default: as the
    imported model's own file has it, else as `lumina generate` does."""
    stops = stop_ids(tokenizer)
    usual = Sampling(seed=0)
    drawing = {"do_sample": True, "temperature": usual.temperature, "top_k": usual.top_k, "top_p": usual.top_p}
    imported = None if tokenizer.folder is None else tokenizer.folder / "generation_config.json"
    if imported is not None and imported.is_file():
        values = read_json(imported)[1]
        if values.get("do_sample") is True:
            drawing = {name: values[name] for name in _DRAWING if values.get(name) is not None}
    return {
        "eos_token_id": stops if len(stops) > 1 else stops[0],
        "pad_token_id": tokenizer.pad_id,
        "suppress_tokens": forbidden_tokens(tokenizer, config.vocab_size).nonzero()[:, 0].tolist(),
        "max_length": config.seq_length,
        **drawing,
    }
