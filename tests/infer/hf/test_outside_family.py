"""A model family of another package: imported, answered with and exported without a line of Lumina that names it."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from lumina.cli import main
from lumina.config import UserError
from lumina.infer import export, import_hf, load
from tests.small_tokenizer import VOCABULARY, write_tokenizer

# Biases as Qwen2 has them, one weight under a name of its own, and a key of its own.
SOURCE = """
from lumina.model.families import Family, RowSlice

class Acme(Family):
    def tensors(self, ours, config):
        theirs = super().tensors(ours, config)
        return [RowSlice(t.name.replace("model.norm", "model.last_norm"), t.rows) for t in theirs]

THING = Acme("AcmeForCausalLM", qkv_bias=True, defaults={"max_position_embeddings": 96}, keys={"acme_tone": "dry"})
"""


@pytest.fixture
def acme_class() -> Iterator[type]:
    """transformers' own class of the family: Qwen2 whose last norm has another name."""
    from transformers import AutoConfig, AutoModelForCausalLM, Qwen2Config, Qwen2ForCausalLM
    from transformers.models.qwen2.modeling_qwen2 import Qwen2Model

    class AcmeConfig(Qwen2Config):
        model_type = "acme"

    class AcmeModel(Qwen2Model):
        config_class = AcmeConfig

        def __init__(self, config: AcmeConfig) -> None:
            super().__init__(config)
            self.last_norm = self.norm
            del self.norm

        @property
        def norm(self) -> torch.nn.Module:
            return self.last_norm

    class AcmeForCausalLM(Qwen2ForCausalLM):
        config_class = AcmeConfig

        def __init__(self, config: AcmeConfig) -> None:
            super().__init__(config)
            self.model = AcmeModel(config)

    AutoConfig.register("acme", AcmeConfig)
    AutoModelForCausalLM.register(AcmeConfig, AcmeForCausalLM)
    yield AcmeForCausalLM
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

    CONFIG_MAPPING._extra_content.pop("acme")
    MODEL_FOR_CAUSAL_LM_MAPPING._extra_content.pop(AcmeConfig)


def make_hf(folder: Path, acme_class: type) -> None:
    torch.manual_seed(0)
    config = acme_class.config_class(  # type: ignore[attr-defined]
        vocab_size=VOCABULARY,
        hidden_size=48,
        intermediate_size=80,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=96,
        initializer_range=0.3,
        eos_token_id=2,
        tie_word_embeddings=False,
    )
    model = acme_class(config)
    for parameter in model.parameters():
        if parameter.ndim == 1:  # norms are made of ones and biases of zeros, which would hide a mistake
            torch.nn.init.uniform_(parameter, 0.3, 1.7)
    model.save_pretrained(folder)
    for file in write_tokenizer(folder / "tokenizer").iterdir():
        file.replace(folder / file.name)


def test_in_and_out_again(
    install: Callable[..., None], acme_class: type, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from transformers import AutoModelForCausalLM

    make_hf(tmp_path / "hf", acme_class)
    with pytest.raises(UserError, match="model_type acme is not supported"):
        import_hf(tmp_path / "hf", tmp_path / "run")
    install("lumina.families", "acme", SOURCE)
    with pytest.raises(SystemExit):
        main(["import", "--help"])
    assert "acme" in capsys.readouterr().out

    loaded = load(import_hf(tmp_path / "hf", tmp_path / "run"), precision="fp32")
    assert loaded.config.family == "acme"
    reference = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.float32).eval()
    assert type(reference) is acme_class
    assert sum(p.numel() for p in reference.parameters()) == loaded.config.num_parameters()
    ids = torch.randint(0, VOCABULARY, (1, 30))
    with torch.no_grad():
        own = loaded.model(ids, torch.arange(30)[None])
        torch.testing.assert_close(own, reference(ids).logits, rtol=1e-5, atol=1e-5)

    export(tmp_path / "run", tmp_path / "out")
    written = json.loads((tmp_path / "out/config.json").read_text())
    assert (written["model_type"], written["architectures"]) == ("acme", ["AcmeForCausalLM"])
    assert written["acme_tone"] == "dry"
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("hf", "out"))
    assert "model.last_norm.weight" in before
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert torch.equal(tensor, after[name]), name
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    with torch.no_grad():
        assert torch.equal(again(ids).logits, reference(ids).logits)
