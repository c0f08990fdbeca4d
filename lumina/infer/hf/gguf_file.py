"""An export as one GGUF file, which llama.cpp and its like load: weights, vocabulary, template and stop tokens.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. Tensors' names and key-value names are the `gguf`
package's; what is decided here is how our weights and vocabulary map to them.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lumina.chat import ChatTokenizer
from lumina.config import ModelConfig, UserError
from lumina.infer.hf.description import stop_ids, tokenizer_files
from lumina.infer.loading import weights
from lumina.model import Transformer
from lumina.model.families import family_of

DTYPES = {"float32": "F32", "float16": "F16", "q8_0": "Q8_0"}
_BLOCK = 32  # weights that share a scale in Q8_0; a row of another length stays float16
_ROTATED = {"llama": "interleaved", "mistral": "interleaved", "qwen2": "halves", "qwen3": "halves"}
"""How llama.cpp rotates the heads of each family: neighbours, or the two halves (as transformers does for all)."""

# Pre-tokenizers of byte-level vocabularies by their pattern, under llama.cpp's names; None is GPT-2's, built into
# ByteLevel itself. The second tells whether llama.cpp takes a word that is a token whole, whatever the merges say.
_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_PRE_TOKENIZERS = {
    None: ("gpt-2", False),
    _WORDS % r"\p{N}{1,3}": ("llama-bpe", True),
    _WORDS % r"\p{N}": ("qwen2", False),
}


def write_gguf(
    folder: Path, checkpoint: Path, config: ModelConfig, dtype: str, tokenizer: ChatTokenizer, name: str
) -> tuple[list[str], int]:
    """Write `folder`/model.gguf; returns its name and the bytes of weights in it. Raises UserError: a dtype, family or
    vocabulary that it has no form for, or the package is missing."""
    if dtype not in DTYPES:
        raise UserError(f"dtype {dtype} is not one of GGUF's here: {', '.join(DTYPES)}")
    if config.family not in _ROTATED:
        raise UserError(f"family {config.family} has no GGUF form here", "Export it with --format hf.")
    if any(layer.window is not None for layer in config.layers):
        raise UserError(f"sliding_window {config.sliding_window} has no GGUF form here", "Export it with --format hf.")
    if config.rope_scaling is not None and config.rope_scaling.type == "yarn":
        raise UserError("rope_scaling yarn has no GGUF form here", "Export it with --format hf.")
    try:
        import gguf
    except ImportError:
        raise UserError("GGUF files need the gguf package", "Install it with `pip install gguf`.") from None

    file = f"model-{DTYPES[dtype]}.gguf"
    architecture = "llama" if config.family == "mistral" else config.family
    writer = gguf.GGUFWriter(folder / file, architecture)
    _add_model(writer, config, name, gguf.LlamaFileType[_file_type(dtype)])
    _add_vocabulary(writer, config, tokenizer)
    total = 0
    with torch.device("meta"):
        shapes = {ours: torch.empty(p.shape) for ours, p in Transformer(config).named_parameters()}
    names = gguf.get_tensor_name_map(_architecture(gguf, architecture), config.num_layers)

    def renamed(stream: Iterator[tuple[str, torch.Tensor]]) -> Iterator[tuple[str, torch.Tensor]]:
        factors = _rope_factors(config)
        if factors is not None:
            yield "rope_freqs.weight", factors
        for ours, weight in stream:
            for theirs, tensor in family_of(config).split(ours, weight, config):
                yield str(names.get_name(theirs, try_suffixes=(".weight", ".bias"))), tensor

    for name_, tensor in renamed(iter(shapes.items())):
        kind = gguf.GGMLQuantizationType[_kind(tensor, dtype)]
        block, size = gguf.GGML_QUANT_SIZES[kind]
        held = tensor.numel() // block * size
        writer.add_tensor_info(name_, tuple(tensor.shape), _numpy_type(kind.name), held, raw_dtype=kind)
        total += held
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for name_, tensor in renamed(weights(checkpoint, config)):
        kind = gguf.GGMLQuantizationType[_kind(tensor, dtype)]
        writer.write_tensor_data(gguf.quants.quantize(_rotated(name_, tensor.float(), config).numpy(), kind))
    writer.close()
    return [file], total


def _file_type(dtype: str) -> str:
    return {"float32": "ALL_F32", "float16": "MOSTLY_F16", "q8_0": "MOSTLY_Q8_0"}[dtype]


def _architecture(gguf: Any, name: str) -> Any:
    return next(arch for arch, text in gguf.MODEL_ARCH_NAMES.items() if text == name)


def _kind(tensor: torch.Tensor, dtype: str) -> str:
    """Vectors stay float32: they are few, and llama.cpp's operators want them so."""
    if tensor.ndim == 1 or dtype == "float32":
        return "F32"
    return "Q8_0" if dtype == "q8_0" and tensor.shape[-1] % _BLOCK == 0 else "F16"


def _numpy_type(kind: str) -> Any:
    # Not uint8 for Q8_0: the writer would take the shape for one in bytes.
    return np.dtype(np.float16 if kind == "F16" else np.float32)


def _rotated(name: str, tensor: torch.Tensor, config: ModelConfig) -> torch.Tensor:
    """Rows of queries and keys in the order in which llama.cpp rotates neighbours: first of the one half, first of the
    other, and so on, head by head."""
    heads = {"attn_q": config.num_heads, "attn_k": config.num_kv_heads}.get(name.split(".")[-2])
    if heads is None or _ROTATED[config.family] == "halves":
        return tensor.contiguous()
    halves = tensor.reshape(heads, 2, config.head_dim // 2, *tensor.shape[1:])
    return halves.transpose(1, 2).reshape(tensor.shape).contiguous()


def _rope_factors(config: ModelConfig) -> torch.Tensor | None:
    """What llama3 scaling divides each frequency by (head_dim / 2); llama.cpp knows linear scaling itself."""
    scaling = config.rope_scaling
    if scaling is None or scaling.type != "llama3":
        return None
    low, high, context = scaling.low_freq_factor, scaling.high_freq_factor, scaling.original_max_position_embeddings
    assert low is not None, "the schema checks it"
    assert high is not None
    assert context is not None
    exponents = torch.arange(0, config.head_dim, 2, dtype=torch.float64) / config.head_dim
    turns = context * config.rope_theta**-exponents / (2 * math.pi)  # of each frequency within the trained context
    smooth = ((turns - low) / (high - low)).clamp(0, 1)
    return (1 / ((1 - smooth) / scaling.factor + smooth)).float()


def _add_model(writer: Any, config: ModelConfig, name: str, file_type: Any) -> None:
    writer.add_name(name)
    writer.add_file_type(int(file_type))
    writer.add_quantization_version(2)
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.seq_length)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_layers)
    writer.add_feed_forward_length(config.ffn_size)
    writer.add_head_count(config.num_heads)
    writer.add_head_count_kv(config.num_kv_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_theta)
    if config.rope_scaling is not None and config.rope_scaling.type == "linear":
        import gguf

        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(config.rope_scaling.factor)


def _add_vocabulary(writer: Any, config: ModelConfig, tokenizer: ChatTokenizer) -> None:
    """Tokens, merges, the ends of an answer and the chat template."""
    import gguf

    files = tokenizer_files(tokenizer, config)
    spec, settings = (json.loads(files[name]) for name in ("tokenizer.json", "tokenizer_config.json"))
    tokens = [f"[unused {i}]" for i in range(config.vocab_size)]
    types = [gguf.TokenType.UNUSED] * config.vocab_size
    for token, number in spec["model"]["vocab"].items():
        tokens[number], types[number] = token, gguf.TokenType.NORMAL
    for added in spec["added_tokens"]:
        special = added["special"]
        tokens[added["id"]] = added["content"]
        types[added["id"]] = gguf.TokenType.CONTROL if special else gguf.TokenType.USER_DEFINED
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(_pre_tokenizer(spec))
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    merges = spec["model"]["merges"]
    writer.add_token_merges([merge if isinstance(merge, str) else " ".join(merge) for merge in merges])
    ends = (writer.add_eos_token_id, writer.add_eot_token_id, writer.add_eom_token_id)
    for add, token in zip(ends, stop_ids(tokenizer), strict=False):  # more than three there is no key for
        add(token)
    writer.add_pad_token_id(tokenizer.pad_id)
    begins = tokenizer.folder is not None and tokenizer.text_ids("") == [tokenizer.begin_id]
    if begins:
        writer.add_bos_token_id(tokenizer.begin_id)
    writer.add_add_bos_token(begins)
    if "chat_template" in settings:
        writer.add_chat_template(settings["chat_template"])


def _pre_tokenizer(spec: dict[str, Any]) -> str:
    """llama.cpp's name for how the vocabulary cuts text into words. Raises UserError: none is known here."""
    steps = spec.get("pre_tokenizer") or {}
    steps = steps.get("pretokenizers", [steps])
    byte_level = [step for step in steps if step.get("type") == "ByteLevel" and not step.get("add_prefix_space")]
    splits = [step.get("pattern", {}).get("Regex") for step in steps if step.get("type") == "Split"]
    known = spec["model"].get("type") == "BPE" and len(byte_level) == 1 and len(splits) + 1 == len(steps)
    pattern = None if byte_level and byte_level[0].get("use_regex", True) and not splits else (splits or [""])[0]
    name, whole = _PRE_TOKENIZERS.get(pattern, ("", False))
    normal = (spec.get("normalizer") or {"type": "NFC"}).get("type") == "NFC"
    if not known or not name or not normal or len(splits) > 1 or whole != bool(spec["model"].get("ignore_merges")):
        raise UserError(
            "this vocabulary cuts text in a way that has no GGUF name here",
            "Byte-level BPE of GPT-2's, Llama 3's and Qwen2's kind has one; export with --format hf.",
        )
    return name
