"""Adapters as peft reads them: what training computes, what merging gives, and what export writes, held to peft."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from lumina import checkpoint
from lumina.cli import main
from lumina.config import LoraConfig, RopeScaling, UserError
from lumina.files import write_json
from lumina.infer import export, import_hf, load
from lumina.infer.hf.peft import _description
from lumina.model import Transformer, lora
from tests.infer.adapters import adapt, rehash, write_adapters
from tests.infer.hf_models import make_hf
from tests.infer.small_models import as_transformers, make_model, write_run
from tests.small_tokenizer import VOCABULARY, write_tokenizer

SOME = LoraConfig(lora_rank=4, lora_alpha=6.0, lora_targets=["q_proj", "v_proj", "down_proj", "up_proj"])
ALL = LoraConfig(lora_rank=3)


def with_peft(base: Any, settings: LoraConfig, model: Transformer) -> Any:
    """transformers' model with peft's own layers, and our adapters in them."""
    import peft

    theirs = peft.get_peft_model(
        base,
        peft.LoraConfig(
            r=settings.lora_rank,
            lora_alpha=settings.lora_scale * settings.lora_rank,
            target_modules=list(settings.lora_targets),
        ),
    )
    named = dict(model.named_parameters())
    tensors = {name: named[ours].detach() for ours, name in lora.peft_names(model.config, settings)}
    peft.set_peft_model_state_dict(theirs, tensors)
    assert peft.get_peft_model_state_dict(theirs).keys() == tensors.keys()
    return theirs


@pytest.mark.parametrize("settings", [SOME, ALL], ids=["some", "all"])
def test_training_computes_what_peft_does(settings: LoraConfig) -> None:
    """Logits and the gradient of every adapter matrix."""
    base = make_model(vocab_size=61)
    theirs = with_peft(as_transformers(base), settings, model := adapt(base, settings))
    ids = torch.randint(0, 61, (1, 30))
    own, expected = model(ids, torch.arange(30)[None]), theirs(ids).logits
    torch.testing.assert_close(own, expected, rtol=1e-5, atol=1e-5)
    for logits in (own, expected):
        torch.nn.functional.cross_entropy(logits[0, :-1], ids[0, 1:]).backward()
    gradients = {name: p.grad for name, p in theirs.named_parameters() if p.requires_grad}
    named = dict(model.named_parameters())
    for ours, name in lora.peft_names(model.config, settings):
        gradient = gradients[name.replace(".weight", ".default.weight")]
        torch.testing.assert_close(named[ours].grad, gradient, rtol=1e-4, atol=1e-6, msg=name)


def test_first_draw_is_pefts_distribution() -> None:
    """A is drawn within the bounds that peft draws from, and B is zero."""
    import peft

    model = make_model(vocab_size=61)
    base = as_transformers(model)
    lora.attach(model, ALL)
    theirs = peft.get_peft_model(base, peft.LoraConfig(r=3, target_modules=list(ALL.lora_targets)))
    expected = peft.get_peft_model_state_dict(theirs)
    named = dict(model.named_parameters())
    for ours, name in lora.peft_names(model.config, ALL):
        own, other = named[ours].detach(), expected[name]
        assert own.shape == other.shape
        assert float(own.std()) == pytest.approx(float(other.std()), rel=0.35), name
        assert float(own.abs().max()) == pytest.approx(float(other.abs().max()), rel=0.1), name


@pytest.mark.parametrize("family", ["llama3", "qwen2", "qwen3"])
def test_exported_adapter_loads_and_merged_logits_are_equal(tmp_path: Path, family: str) -> None:
    import peft
    from transformers import AutoModelForCausalLM

    make_hf(tmp_path / "hf", family)
    base = import_hf(tmp_path / "hf", tmp_path / "base")
    model = adapt(load(base, precision="fp32").model, ALL)
    run = write_adapters(tmp_path / "run", base, model, ALL)
    assert main(["export", str(run), str(tmp_path / "adapter"), "--format", "peft"]) == 0
    export(run, tmp_path / "merged")

    ids = torch.randint(0, 300, (2, 30))
    start = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.float32).eval()
    with torch.no_grad():
        untouched = start(ids).logits
        theirs = peft.PeftModel.from_pretrained(start, tmp_path / "adapter").eval()
        expected = theirs(ids).logits
        assert (expected - untouched).abs().max() > 0.1, "adapters that do nothing prove nothing"
        merged = theirs.merge_and_unload()(ids).logits
        exported = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()(ids).logits
        own = load(run, precision="fp32").model(ids, torch.arange(30).expand(2, -1))
    for name, found in {"peft, merged": merged, "our export": exported, "our own": own}.items():
        # Of the largest: peft's own merge is no nearer to its unmerged model, logit by logit.
        assert (found - expected).abs().max() <= 1e-5 * expected.abs().max(), name


def test_what_export_writes(tmp_path: Path) -> None:
    import peft

    base = write_base(tmp_path / "base")
    run = write_adapters(tmp_path / "run", base, adapt(make_model(vocab_size=VOCABULARY), SOME), SOME)
    done = export(run, tmp_path / "adapter", dtype="bfloat16", form="peft")
    assert done.shards == ["adapter_model.safetensors"]
    tensors = load_file(tmp_path / "adapter/adapter_model.safetensors")
    assert done.bytes == sum(tensor.nbytes for tensor in tensors.values())
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}
    assert {path.name for path in (tmp_path / "adapter").iterdir()} == {
        *done.shards,
        "adapter_config.json",
        "README.md",
    }
    assert "| Adapters | rank 4 over base |" in (tmp_path / "adapter/README.md").read_text()
    config = peft.PeftConfig.from_pretrained(tmp_path / "adapter")
    assert (config.r, config.lora_alpha, set(config.target_modules)) == (4, 6.0, set(SOME.lora_targets))
    written = json.loads((tmp_path / "adapter/adapter_config.json").read_text())
    assert written == {**_description(SOME), "target_modules": sorted(SOME.lora_targets)}

    with pytest.raises(UserError, match="holds a whole model, no adapters"):
        export(base, tmp_path / "none", form="peft")
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"rope_scaling": RopeScaling(type="linear", factor=2.0)}, "rope_scaling"),
        ({"rope_theta": 5e5}, "rope_theta 500000.0, its base has 10000.0"),
        ({"rms_norm_eps": 1e-3}, "rms_norm_eps"),
        ({"rope_scaling": RopeScaling(type="dynamic", factor=2.0)}, "rope_scaling dynamic up to seq_length 256"),
    ],
)
def test_a_model_that_the_bases_export_is_not(tmp_path: Path, changes: dict[str, Any], told: str) -> None:
    """The adapters were trained in a model that computes something else, which no reader of them would know. Merged it
    is told; a longer context alone changes no logits."""
    dynamic = "dynamic" in told
    base = write_base(tmp_path / "base", **(changes if dynamic else {}))
    longer = make_model(vocab_size=VOCABULARY, seq_length=256, **changes)
    run = write_adapters(tmp_path / "run", base, adapt(longer, SOME), SOME)
    with pytest.raises(UserError, match=told) as caught:
        export(run, tmp_path / "out", form="peft")
    assert "--format hf" in str(caught.value)
    assert not (tmp_path / "out").exists()
    merged = json.loads((export(run, tmp_path / "out").folder / "config.json").read_text())
    assert merged["max_position_embeddings"] == 256

    plain = write_base(tmp_path / "plain")
    only_longer = adapt(make_model(vocab_size=VOCABULARY, seq_length=256), SOME)
    export(write_adapters(tmp_path / "longer", plain, only_longer, SOME), tmp_path / "adapter", form="peft")


def test_another_chat_template_goes_with_the_adapters(tmp_path: Path) -> None:
    """They were trained with it, and the base's export has the base's."""
    from transformers import AutoTokenizer

    base = write_base(tmp_path / "base")
    run = write_adapters(tmp_path / "run", base, adapt(make_model(vocab_size=VOCABULARY), SOME), SOME)
    path = run / "tokenizer/chat_template.jinja"
    other = path.read_text().replace("<|im_start|>", "<|im_start|> ", 1)
    path.write_text(other)
    export(run, tmp_path / "adapter", form="peft")
    theirs = AutoTokenizer.from_pretrained(tmp_path / "adapter")
    assert theirs.chat_template == other
    assert "AutoTokenizer.from_pretrained(FOLDER)" in (tmp_path / "adapter/README.md").read_text()


@pytest.mark.parametrize("where", ["backup", "gone", "damaged"])
def test_a_base_without_its_runs_settings(where: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Nothing tells whether the base's export is the adapters' model, or what its tokenizer is. Another's file in the
    place where a run's would be is not taken for it."""
    base = write_base(tmp_path / "base")
    saved, model = base / "checkpoints" / checkpoint.name_of(5), make_model(vocab_size=VOCABULARY)
    facts = json.loads((saved / "trainer.json").read_text()) | {"model": checkpoint.model_shape(model.config)}
    write_json(saved / "trainer.json", facts)
    rehash(saved)
    run = write_adapters(tmp_path / "run", base, adapt(model, SOME), SOME)
    if where == "backup":
        moved = (tmp_path / "backups/base").joinpath(saved.name)
        moved.parent.mkdir(parents=True)
        saved.rename(moved)
        (tmp_path / "backups/config.yaml").write_text("preset: nano\nrope_theta: 7.0\n")
        facts = json.loads((run / "checkpoints" / saved.name / "trainer.json").read_text())
        facts["base"] |= checkpoint.base_reference(moved, run)
        write_json(run / "checkpoints" / saved.name / "trainer.json", facts)
        rehash(run / "checkpoints" / saved.name)
    elif where == "gone":
        (base / "config.yaml").unlink()
    else:
        (base / "config.yaml").write_text("a: [")
    export(run, tmp_path / "adapter", form="peft")
    assert load_file(tmp_path / "adapter/adapter_model.safetensors")
    assert (tmp_path / "adapter/tokenizer.json").exists()
    assert "are not known" in (tmp_path / "adapter/README.md").read_text()
    (said,) = [text for text in caplog.messages if "config.yaml" in text]
    assert "--format hf" in said


def write_base(folder: Path, **changes: Any) -> Path:
    write_tokenizer(folder / "tokenizer")
    return write_run(folder, make_model(vocab_size=VOCABULARY, **changes))


def test_adapters_are_merged_with_what_they_were_trained_over_or_not_at_all(tmp_path: Path) -> None:
    base = write_base(tmp_path / "old/base")
    model = adapt(make_model(vocab_size=VOCABULARY), ALL)
    run = write_adapters(tmp_path / "old/run", base, model, ALL)
    expected = dict(load(run, precision="fp32").model.named_parameters())
    (tmp_path / "old").rename(tmp_path / "new")  # both together
    run, base = tmp_path / "new/run", tmp_path / "new/base"
    found = dict(load(run, precision="fp32").model.named_parameters())
    assert all(torch.equal(found[name], value) for name, value in expected.items())

    saved = base / "checkpoints" / checkpoint.name_of(5)
    weights = next(saved.glob("rank-*"))
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(UserError, match=r"which the adapters of .* belong to, is damaged: rank-.* does not match"):
        load(run, precision="fp32")
    rehash(saved)  # sound again, and other weights than those trained over
    with pytest.raises(UserError, match="which has other contents now"):
        load(run, precision="fp32")
    base.rename(tmp_path / "gone")
    with pytest.raises(UserError, match="old/base/checkpoints/step-00000005, which is not there"):
        load(run, precision="fp32")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"lora": {"lora_rank": 2}}, "trainer.json describes 2 x"),
        ({"lora": {"lora_rank": 3, "lora_targets": ["q_proj"]}}, "not those that trainer.json describes"),
        ({"lora": {"lora_rank": -1}}, "does not describe its adapters"),
        ({"lora": "all"}, "is whole"),
        ({"base": {"checkpoint": 3}}, "is whole"),
        ({"base": {}}, "which is not there"),
        ({"model": {"hidden_size": 64}}, "does not describe its adapters"),
        ({"lora": {}}, "holds .* bytes, its config.yaml describes"),
    ],
)
def test_a_wrong_description_is_one_message(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    base = write_base(tmp_path / "base")
    run = write_adapters(tmp_path / "run", base, adapt(make_model(vocab_size=VOCABULARY), ALL), ALL)
    saved = run / "checkpoints" / checkpoint.name_of(5)
    facts = json.loads((saved / "trainer.json").read_text())
    write_json(saved / "trainer.json", facts | change)
    rehash(saved)
    with pytest.raises(UserError, match=message):
        load(run, precision="fp32")
