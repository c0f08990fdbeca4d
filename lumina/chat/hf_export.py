"""Lumina's tokenizer and chat template as files that transformers loads: tokenizer.json and tokenizer_config.json.

tokenizer.json is byte-level BPE. tiktoken joins whichever adjacent pair makes the token of lowest rank; here that is
written as a list of all pairs that make a token, ordered by the rank of what they make. A word that is a token as it
stands is taken whole (`ignore_merges`), as tiktoken does.

The base vocabulary's own special tokens are left out: nothing produces them, and its <|endoftext|> is
spelled as ours is.
"""

from __future__ import annotations

import base64
from typing import Any

from lumina.chat.cl100k import find_ranks
from lumina.chat.conversation import ROLE_ALIASES
from lumina.chat.template import TEMPLATES
from lumina.chat.tokenizer import Tokenizer

# cl100k_base's published pattern without possessive quantifiers, which Oniguruma (inside `tokenizers`) reads otherwise:
# there `{1,3}+` repeats the whole. Both forms cut every text the same way.
_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)

# The layout of im-roles-1, which has no form for tools: their results are what the user says.
_WITHOUT_PARTS = """
{%- for message in messages -%}
{%- if message['role'] == 'text' -%}
{{- '<|endoftext|>' + message['content'] + '<|endoftext|>' -}}
{%- elif message['role'] in roles -%}
{{- '<|im_start|><|' + roles[message['role']] + '|>' + message['content'] + '<|im_end|>' -}}
{%- else -%}
{{- raise_exception('unknown role: ' + message['role']) -}}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|><|assistant|>' -}}{%- endif -%}
"""
# That of im-roles-2 (agent_parts.py). Arguments and tools are JSON texts, or objects that are written as json_text
# does; arguments may be missing, a content may be null, or a list of parts of text. What training has no form for is
# refused here too, as far as Jinja can see it.
_WITH_PARTS = """
{%- macro said(content) -%}
{%- if content is string -%}{{- content -}}
{%- elif content -%}
{%- for part in content -%}
{%- if part is string -%}{{- part -}}
{%- elif part['text'] is string -%}{{- part['text'] -}}
{%- else -%}{{- raise_exception('only parts of text have a form') -}}
{%- endif -%}
{%- endfor -%}
{%- endif -%}
{%- endmacro -%}
{%- macro json(value) -%}{{- value if value is string else value | tojson -}}{%- endmacro -%}
{%- macro definitions(tools) -%}
{%- for tool in tools or [] -%}{{- '<|tool_def|>' + json(tool) -}}{%- endfor -%}
{%- endmacro -%}
{%- set seen = namespace(by_id={}, in_order=[]) -%}
{%- if tools and not (messages and roles.get(messages[0]['role']) == 'system') -%}
{{- '<|im_start|><|system|>' + definitions(tools) + '<|im_end|>' -}}
{%- endif -%}
{%- for message in messages -%}
{%- if message['role'] == 'text' -%}
{{- '<|endoftext|>' + said(message['content']) + '<|endoftext|>' -}}
{%- elif message['role'] not in roles -%}
{{- raise_exception('unknown role: ' + message['role']) -}}
{%- else -%}
{%- set role = roles[message['role']] -%}
{{- '<|im_start|><|' + role + '|>' -}}
{%- if role == 'tool' -%}
{{- (message['name'] or seen.by_id.get(message['tool_call_id']) or seen.in_order[0] or '') + '<|tool_result|>' -}}
{%- set seen.in_order = seen.in_order[1:] -%}
{%- endif -%}
{%- set reasoning = message['reasoning_content'] or message['reasoning'] -%}
{%- if role != 'assistant' and (reasoning or message['tool_calls']) -%}
{{- raise_exception('reasoning or tool calls in a message that is not the assistant\\'s') -}}
{%- endif -%}
{%- if reasoning -%}
{{- '<|reasoning|>' + reasoning + '<|reasoning_end|>' -}}
{%- endif -%}
{{- said(message['content']) -}}
{%- if loop.first and role == 'system' -%}{{- definitions(tools) -}}{%- endif -%}
{%- if message['tool_calls'] -%}{%- set seen.in_order = [] -%}{%- endif -%}
{%- for call in message['tool_calls'] or [] -%}
{%- set function = call['function'] or call -%}
{%- set arguments = function['arguments'] or {} -%}
{{- '<|tool_call|>{"name": ' + function['name'] | tojson + ', "arguments": ' + json(arguments) -}}
{{- '}<|tool_call_end|>' -}}
{%- set seen.in_order = seen.in_order + [function['name']] -%}
{%- if call['id'] -%}{%- set seen.by_id = dict(seen.by_id, **{call['id']: function['name']}) -%}{%- endif -%}
{%- endfor -%}
{{- '<|im_end|>' -}}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{- '<|im_start|><|assistant|>' + ('<|reasoning|>' if enable_thinking else '') -}}
{%- endif -%}
"""


def chat_template(name: str) -> str:
    """The own template of that name in Jinja, as transformers and vLLM run it."""
    has_parts = "<|tool_call|>" in TEMPLATES[name]
    roles = ROLE_ALIASES if has_parts else ROLE_ALIASES | {"tool": "user"}
    pairs = ", ".join(f"'{alias}': '{role}'" for alias, role in roles.items())
    return f"{{%- set roles = {{{pairs}}} -%}}{(_WITH_PARTS if has_parts else _WITHOUT_PARTS).strip()}"


def _alphabet() -> list[str]:
    """A printable character for each byte, as byte-level BPE files write them (GPT-2's table): printable Latin-1 bytes
    stand for themselves, the others for U+0100 onwards in order."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    spare = iter(range(0x100, 0x200))
    return [chr(byte) if byte in printable else chr(next(spare)) for byte in range(256)]


def tokenizer_json(tokenizer: Tokenizer) -> dict[str, Any]:
    """The contents of tokenizer.json."""
    alphabet = _alphabet()
    fields = find_ranks()[1].split()
    ranks = dict(zip(map(base64.b64decode, fields[::2]), map(int, fields[1::2]), strict=True))
    spelled = {token: "".join(alphabet[byte] for byte in token) for token in ranks}
    merges = []
    for token in sorted(ranks, key=ranks.__getitem__):
        for cut in range(1, len(token)):
            left, right = token[:cut], token[cut:]
            if left in ranks and right in ranks:
                merges.append([spelled[left], spelled[right]])
    plain: dict[str, Any] = {
        "single_word": False,
        "lstrip": False,
        "rstrip": False,
        "normalized": False,
        "special": True,
    }
    added = [{**plain, "id": token, "content": name} for name, token in tokenizer.special_ids.items()]
    # `tokenizers` numbers added tokens on from the vocabulary's size, unless the vocabulary has them: so it does, and
    # the base's special ids between are filled with names that no text can spell (a space is written otherwise).
    first = min(tokenizer.special_ids.values())
    unused = {f"<unused {token}>": token for token in range(len(ranks), first)}
    bytes_to_text = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    words = {"type": "Split", "pattern": {"Regex": _PATTERN}, "behavior": "Isolated", "invert": False}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [words, bytes_to_text]},
        "post_processor": None,
        "decoder": bytes_to_text,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": True,
            "vocab": {spelled[token]: rank for token, rank in ranks.items()} | unused | tokenizer.special_ids,
            "merges": merges,
        },
    }


def tokenizer_config(tokenizer: Tokenizer, context_length: int) -> dict[str, Any]:
    """The contents of tokenizer_config.json, with the chat template in Jinja."""
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": context_length,
        "eos_token": "<|im_end|>",
        "pad_token": "<|pad|>",
        "additional_special_tokens": [name for name in tokenizer.special_ids if name not in ("<|im_end|>", "<|pad|>")],
        "clean_up_tokenization_spaces": False,
        "chat_template": chat_template(tokenizer.chat_template),
        "lumina_fingerprint": tokenizer.fingerprint,
    }
