"""Runs of adapters as training leaves them, without training."""

from __future__ import annotations

from pathlib import Path

import torch

from lumina import checkpoint
from lumina.checkpoint import adapter_settings, base_reference
from lumina.config import LoraConfig
from lumina.files import write_json
from lumina.model import Transformer, lora
from tests.infer.small_models import write_run
from tests.small_tokenizer import write_tokenizer


def adapt(model: Transformer, settings: LoraConfig) -> Transformer:
    """Adapters with a B that is not zero, as training leaves them."""
    torch.manual_seed(3)
    lora.attach(model, settings)
    for name, parameter in model.named_parameters():
        if name.endswith(".b"):
            torch.nn.init.normal_(parameter, std=0.2)
    return model


def write_adapters(run: Path, base: Path, model: Transformer, settings: LoraConfig) -> Path:
    """A run of adapters as training leaves it: a checkpoint of the trained parameters, and what they belong to."""
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    model.named_parameters = lambda *_, **__: iter(trained.items())  # type: ignore[method-assign]
    if (base / "tokenizer").is_dir() and not run.exists():
        write_tokenizer(run / "tokenizer")
    write_run(run, model)
    saved = run / "checkpoints" / checkpoint.name_of(5)
    shape = {k: getattr(model.config, k) for k in ("hidden_size", "num_layers", "num_heads", "num_kv_heads")}
    shape |= {k: getattr(model.config, k) for k in ("vocab_size", "ffn_size", "tie_word_embeddings", "family")}
    experts = None if model.config.experts is None else model.config.experts.model_dump()
    facts = {
        "step": 5,
        "model": shape | {"head_size": model.config.head_size, "experts": experts},
        "lora": adapter_settings(settings),
        "base": base_reference(checkpoint.list_checkpoints(base / "checkpoints")[0], run),
    }
    write_json(saved / "trainer.json", facts)
    rehash(saved)
    return run


def rehash(saved: Path) -> None:
    files = [checkpoint.manifest_entry(path) for path in sorted(saved.iterdir()) if path.name != "manifest.json"]
    write_json(saved / "manifest.json", {"format": 1, "files": files})
