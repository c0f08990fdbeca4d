"""The adapters of a run as a folder that peft loads: adapter_config.json and adapter_model.safetensors.

Format: https://huggingface.co/docs/peft/developer_guides/checkpoint (LoraConfig, and names under base_model.model).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from lumina.checkpoint import MergedWeights, open_weights, saved_adapter_settings
from lumina.config import LoraConfig, UserError
from lumina.files import write_json
from lumina.infer.hf.safetensors_file import write_safetensors
from lumina.infer.loading import trainer_state_of
from lumina.model import lora

USAGE = """```python
from peft import PeftModel
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained(BASE)  # lumina export BASE_RUN BASE
model = PeftModel.from_pretrained(model, FOLDER)
```
"""


def write_adapter(folder: Path, checkpoint: Path, dtype: torch.dtype) -> tuple[list[str], int]:
    """Returns the name of the file of weights and the bytes of weights in it. Raises UserError when the checkpoint
    holds whole weights."""
    state = trainer_state_of(checkpoint)
    if not state.lora:
        raise UserError(
            f"{checkpoint} holds a whole model, no adapters", "Export it with --format hf, or train with --lora-rank."
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
    return ["adapter_model.safetensors"], sum(tensor.nbytes for tensor in tensors.values())


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
