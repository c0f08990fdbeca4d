"""Small models with weights large enough that their distributions are far from flat."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from lumina.chat import NEWEST_TEMPLATE
from lumina.config import ModelConfig
from lumina.config import load as load_config
from lumina.model import Transformer
from tests.small_tokenizer import VOCABULARY, write_tokenizer

SHAPE = {"hidden_size": 64, "num_layers": 2, "num_heads": 4, "num_kv_heads": 2, "seq_length": 128, "init_std": 0.2}


def make_model(seed: int = 0, dtype: torch.dtype = torch.float32, **changes: object) -> Transformer:
    torch.manual_seed(seed)
    model = Transformer(ModelConfig(**(SHAPE | changes)))  # type: ignore[arg-type]
    for parameter in model.parameters():
        if parameter.ndim == 1:  # norm weights that are not all one
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
    return model.to(dtype).requires_grad_(False).eval()


def write_run(folder: Path, model: Transformer, steps: tuple[int, ...] = (5,), world: int = 2) -> Path:
    """A run's folder as training leaves it: every parameter split over the ranks' files."""
    folder.mkdir(parents=True, exist_ok=True)
    shape = {name: getattr(model.config, name) for name in ModelConfig.model_fields}
    if (folder / "tokenizer").is_dir():
        shape["tokenizer"] = str(folder / "tokenizer")
    (folder / "config.yaml").write_text(load_config("nano", shape).to_yaml())
    for step in steps:
        checkpoint = folder / "checkpoints" / f"step-{step:08d}"
        checkpoint.mkdir(parents=True)
        for rank in range(world):
            tensors, ranges = {"rng/cpu": torch.get_rng_state()}, {}
            for name, parameter in model.named_parameters():
                flat = parameter.detach().float().flatten()
                start, end = len(flat) * rank // world, len(flat) * (rank + 1) // world
                ranges[name] = [start, end - start]
                for key in ("master", "exp_avg"):
                    tensors[f"{key}/{name}"] = flat[start:end].clone()
            metadata = {"ranges": json.dumps(ranges)}
            save_file(tensors, checkpoint / f"rank-{rank:05d}-of-{world:05d}.safetensors", metadata=metadata)
        template = {} if "tokenizer" in shape else {"chat_template": NEWEST_TEMPLATE}
        (checkpoint / "trainer.json").write_text(json.dumps({"step": step, **template}))
        files = [
            {"name": p.name, "bytes": p.stat().st_size, "sha256": hashlib.sha256(p.read_bytes()).hexdigest()}
            for p in sorted(checkpoint.iterdir())
        ]
        (checkpoint / "manifest.json").write_text(json.dumps({"format": 1, "files": files}))
    return folder


def write_small_run(folder: Path, **changes: object) -> Path:
    """A run of a model with its own small tokenizer: its vocabulary takes a hundredth of the time and space."""
    write_tokenizer(folder / "tokenizer")
    return write_run(folder, make_model(vocab_size=VOCABULARY, **changes))


def as_transformers(model: Transformer) -> Any:
    """transformers' LlamaForCausalLM with the same weights, put together here and not by lumina.infer."""
    from transformers import LlamaConfig, LlamaForCausalLM

    c = model.config
    llama = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=c.vocab_size,
            hidden_size=c.hidden_size,
            intermediate_size=c.ffn_size,
            num_hidden_layers=c.num_layers,
            num_attention_heads=c.num_heads,
            num_key_value_heads=c.num_kv_heads,
            max_position_embeddings=c.seq_length,
            rms_norm_eps=c.rms_norm_eps,
            rope_parameters={"rope_type": "default", "rope_theta": c.rope_theta},
            tie_word_embeddings=c.tie_word_embeddings,
        )
    )
    weights = {"model.embed_tokens.weight": model.embedding.weight, "model.norm.weight": model.norm.weight}
    weights["lm_head.weight"] = model.output.weight
    for layer, block in enumerate(model.blocks):
        qkv, (gate, up) = block.attention.qkv.weight, block.feed_forward.gate_up.weight.chunk(2)
        q, k, v = qkv.split([heads * c.head_dim for heads in (c.num_heads, c.num_kv_heads, c.num_kv_heads)])
        own = {
            "self_attn.q_proj": q,
            "self_attn.k_proj": k,
            "self_attn.v_proj": v,
            "self_attn.o_proj": block.attention.out.weight,
            "mlp.gate_proj": gate,
            "mlp.up_proj": up,
            "mlp.down_proj": block.feed_forward.down.weight,
            "input_layernorm": block.attention_norm.weight,
            "post_attention_layernorm": block.feed_forward_norm.weight,
        }
        weights |= {f"model.layers.{layer}.{name}.weight": weight for name, weight in own.items()}
    llama.load_state_dict({name: weight.clone() for name, weight in weights.items()})
    return llama.to(model.embedding.weight.dtype).eval()
