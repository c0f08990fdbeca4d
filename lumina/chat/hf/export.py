"""An imported model's tokenizer files as they go out again: what Lumina read and trained with, under the field's names.

They are derived, not copied. tokenizer.json stays byte for byte, since it is the vocabulary; what stands beside it is
written anew, so that no key of another time contradicts it: the end of a turn, the padding, the longest text, the one
chat template, and which tokens are special.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

from lumina.chat.hf import files as hf_files

# Keys that name files or code that do not go with the export, or that change what tokenizer.json says of itself: it is
# loaded as it stands, and so it must be by the others.
_LEFT_OUT = (
    *("auto_map", "chat_template", "name_or_path", "tokenizer_file", "special_tokens_map_file", "vocab_file"),
    *("merges_file", "sp_model_kwargs", "legacy", "from_slow", "add_bos_token", "add_eos_token", "add_prefix_space"),
    *("tokenizer_class", "processor_class", "model_max_length", "max_length", "truncation", "truncation_side"),
    *("padding", "padding_side", "pad_to_multiple_of", "stride", "added_tokens_decoder", "use_default_system_prompt"),
    "clean_up_tokenization_spaces",
)
_DATED = re.compile(r"""strftime_now\(\s*(['"])(.*?)\1\s*\)""")


def hf_tokenizer_files(folder: Path, context_length: int, stop_id: int, pad_id: int) -> dict[str, str]:
    """File names and contents of the tokenizer in `folder`: `stop_id` is what ends a turn, `pad_id` what fills one.

    Raises UserError: a file is missing or damaged.
    """
    raw, spec = hf_files.read_json(folder / "tokenizer.json")
    settings = hf_files.read_settings(folder)
    names, text = hf_files.special_names(settings), hf_files.template_text(folder, settings)
    added = {int(token["id"]): token for token in spec.get("added_tokens") or []}
    kept = {name: value for name, value in settings.items() if name not in _LEFT_OUT}
    if stop_id in added and "eos_token" not in (text or ""):  # a template that writes it means the one that it has
        names["eos_token"] = added[stop_id]["content"]
    if "pad_token" not in names and pad_id in added:
        names["pad_token"] = added[pad_id]["content"]
    written = kept | {
        **names,
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": context_length,
        "clean_up_tokenization_spaces": False,
        "added_tokens_decoder": {
            str(number): {name: value for name, value in token.items() if name != "id"}
            for number, token in sorted(added.items())
        },
    }
    found = {"tokenizer.json": raw}
    if text is not None:
        day = hf_files.find_date(folder, text)
        if day is not None:  # elsewhere the template would write today's
            text = _DATED.sub(lambda call: repr(day.strftime(call[2])), text)
        # Both places: releases of transformers before 4.43, and llama.cpp's converter, know only the key.
        found["chat_template.jinja"], written["chat_template"] = text, text
    return found | {"tokenizer_config.json": json.dumps(written, indent=2, ensure_ascii=False)}
