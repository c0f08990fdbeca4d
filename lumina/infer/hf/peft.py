"""The adapters of a run as a folder that peft loads: adapter_config.json and adapter_model.safetensors.

Format: https://huggingface.co/docs/peft/developer_guides/checkpoint (LoraConfig, and names under base_model.model).
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from lumina.chat import ChatTokenizer
from lumina.checkpoint import (
    MergedWeights,
    base_checkpoint,
    check_same_model,
    model_shape,
    open_weights,
    saved_adapter_settings,
)
from lumina.config import LoraConfig, ModelConfig, UserError
from lumina.files import write_json, write_text
from lumina.infer.hf.description import tokenizer_files
from lumina.infer.hf.safetensors_file import write_safetensors
from lumina.infer.loading import read_config, read_tokenizer, trainer_state_of
from lumina.model import lora

log = logging.getLogger("lumina")

USAGE = """```python
from peft import PeftModel
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained(BASE)  # lumina export BASE_RUN BASE
model = PeftModel.from_pretrained(model, FOLDER)
```
"""


TOKENIZER_USAGE = """
The tokenizer and chat template that they were trained with are in this folder: those of the base model are others, or
are not known.

```python
from transformers import AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained(FOLDER)
```
"""

# What a model computes does not hang on these: its context length (but see `_other_settings`), how weights are drawn,
# and losses of training.
_NOT_COMPUTED_WITH = {"seq_length", "init_std", "router_aux_loss_coef", "router_z_loss_coef"}


def write_adapter(
    folder: Path, checkpoint: Path, config: ModelConfig, tokenizer: ChatTokenizer, dtype: torch.dtype
) -> tuple[list[str], int]:
    """Write the adapters, and the tokenizer where it is not known to be the base's. Returns the name of the file of
    weights and the bytes of weights in it.

    Raises:
        UserError: the checkpoint holds whole weights, or the base's export would compute another model.
    """
    state = trainer_state_of(checkpoint)
    if not state.lora:
        raise UserError(
            f"{checkpoint} holds a whole model, no adapters", "Export it with --format hf, or train with --lora-rank."
        )
    base = base_checkpoint(checkpoint, state)
    assert base is not None
    of_base = _config_of_base(base)
    if of_base is None:
        check_same_model(trainer_state_of(base).model, model_shape(config), base)
        log.warning(
            "no config.yaml says what the base %s computes: if the adapters were trained with other settings than that "
            "(rope_scaling, rope_theta, ...), readers of them cannot know; export them merged then, with --format hf",
            base,
        )
    elif other := _other_settings(config, of_base):
        raise UserError(
            f"{checkpoint} was trained with {'; '.join(other)}: adapter_config.json has no place for what the model "
            "under the adapters computes, and readers take that from the base",
            "Export it merged, with --format hf.",
        )
    settings, shape = saved_adapter_settings(checkpoint, state)
    try:
        weights = open_weights(checkpoint)
        assert isinstance(weights, MergedWeights)
        tensors = {theirs: weights.adapter(ours).to(dtype) for ours, theirs in lora.peft_names(shape, settings)}
    except (SafetensorError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"{checkpoint} cannot be read: {error}") from None
    write_safetensors(folder / "adapter_model.safetensors", tensors)
    write_json(folder / "adapter_config.json", _description(settings), indent=2, sort_keys=False)
    if of_base is None or tokenizer.fingerprint != read_tokenizer(base).fingerprint:
        for name, text in tokenizer_files(tokenizer, config).items():
            write_text(folder / name, text)
    return ["adapter_model.safetensors"], sum(tensor.nbytes for tensor in tensors.values())


def _config_of_base(base: Path) -> ModelConfig | None:
    """None of a base in a backup, which has no run around it, or whose run's config.yaml cannot be read."""
    try:
        return read_config(base) if base.parent.name == "checkpoints" else None
    except UserError:
        return None


def _other_settings(config: ModelConfig, of_base: ModelConfig) -> list[str]:
    """The model's settings that are not the base's, for people, of those that its outputs depend on."""
    ours, theirs = (
        {**one.model_dump(), "intermediate_size": one.ffn_size, "head_size": one.head_dim} for one in (config, of_base)
    )
    found = [
        f"{name} {ours[name]}, its base has {theirs[name]}"
        for name in ours
        if name not in _NOT_COMPUTED_WITH and ours[name] != theirs[name]
    ]
    dynamic = config.rope_scaling is not None and config.rope_scaling.type == "dynamic"
    if dynamic and config.seq_length > of_base.seq_length:  # transformers scales beyond the base's
        found.append(f"rope_scaling dynamic up to seq_length {config.seq_length}, its base has {of_base.seq_length}")
    return found


def _description(settings: LoraConfig) -> dict[str, Any]:
    """adapter_config.json. The base is the user's to name: where its export lies is not known here."""
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": None,
        "r": settings.lora_rank,
        "lora_alpha": settings.lora_alpha,
        "target_modules": list(settings.lora_targets),
        "bias": "none",
        "fan_in_fan_out": False,
        "use_rslora": False,
        "modules_to_save": None,
        "inference_mode": True,
    }
