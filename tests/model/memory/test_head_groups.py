"""Attention for a group of heads at a time is attention for all of them, in less memory."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor

from lumina.config import LoraConfig
from lumina.model import Transformer, lora
from tests.model.tiny_models import Packed, make_model, pack

LENGTHS = (20, 9, 31)


def computed(model: Transformer, batch: Any) -> list[Tensor]:
    """The loss and the gradient of each trained parameter."""
    model.zero_grad()
    loss = model(*batch)
    loss.backward()
    gradients = [p.grad for p in model.parameters() if p.requires_grad]
    assert None not in gradients
    return [loss.detach(), *(g.to_dense() for g in gradients if g is not None)]


def near(found: list[Tensor], expected: list[Tensor], to: float) -> None:
    assert torch.equal(found[0], expected[0])
    for number, (a, b) in enumerate(zip(found, expected, strict=True)):
        assert (a - b).norm() <= to * b.norm(), number


FAMILIES: list[dict[str, Any]] = [
    {},
    {"family": "qwen2"},
    {"family": "qwen3"},
    {"family": "mistral", "sliding_window": 9},
    {"family": "gemma2", "attention_softcap": 4.0, "attention_scale": 0.2},
    {"family": "gemma3_text"},
    {"family": "smollm3", "nope_layers": [0]},
    {"partial_rotary_factor": 0.5, "family": "phi3"},
]


@pytest.mark.parametrize("family", FAMILIES, ids=[str(one.get("family", "llama")) for one in FAMILIES])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=["float64", "bfloat16"])
def test_the_loss_is_the_same_and_gradients_to_rounding(family: dict[str, Any], dtype: torch.dtype) -> None:
    """Each head's numbers are its own; queries of the backward pass are another product's, and gradients of norms of
    queries and keys add up by group. One row of documents and two rows; recomputed or not."""
    model, batch = make_model(dtype=dtype, num_heads=4, num_kv_heads=4, **family), pack(LENGTHS)
    two_rows = Packed(batch.ids.view(2, -1), batch.positions.view(2, -1) % 30, *batch[2:])
    for args in (batch, (*two_rows[:2], None, None, *(x.view(2, -1) for x in batch[4:]))):
        model.group_heads(1)
        model.checkpoint_every = 0
        expected = computed(model, args)
        for groups, every in ((2, 0), (4, 1)):
            model.group_heads(groups)
            model.checkpoint_every = every
            near(computed(model, args), expected, 4 * torch.finfo(dtype).eps)


@pytest.mark.usefixtures("path")
def test_every_kernel() -> None:
    """Of one key/value head for two queries."""
    model, batch = make_model(dtype=torch.bfloat16), pack(LENGTHS)
    expected = computed(model, batch)
    model.group_heads(2)
    near(computed(model, batch), expected, 4 * torch.finfo(torch.bfloat16).eps)


@pytest.mark.parametrize("targets", [["q_proj", "v_proj"], ["k_proj", "o_proj"]])
def test_adapters(targets: Any) -> None:
    """Over frozen weights; with one of the queries, and without."""
    found = []
    for groups in (1, 2):
        torch.manual_seed(1)
        model = make_model(dtype=torch.float64)
        lora.attach(model, LoraConfig(lora_rank=3, lora_targets=targets))
        for name, parameter in model.named_parameters():
            if name.endswith(".b"):
                torch.nn.init.normal_(parameter)
        model.double().group_heads(groups)
        model.checkpoint_every = 1
        found.append(computed(model, pack(LENGTHS)))
    near(found[1], found[0], 1e-15)


@pytest.mark.parametrize("every", [0, 1])
def test_attention_runs_once_a_pass_and_each_gradient_is_given_once(
    every: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """DeepSpeed reduces a gradient whenever autograd has one. A recomputed layer runs twice forward, as ever."""
    from lumina.model import transformer

    model = make_model(family="qwen3", num_heads=4, num_kv_heads=4)
    model.group_heads(2)
    model.checkpoint_every = every
    heads: list[int] = []
    given: dict[str, int] = {}
    real = transformer.attention

    def noted(q: Tensor, *rest: Any, **more: Any) -> Tensor:
        heads.append(q.shape[2])
        return real(q, *rest, **more)

    def note(name: str) -> Any:
        return lambda _: given.update({name: given.get(name, 0) + 1})

    monkeypatch.setattr(transformer, "attention", noted)
    for name, parameter in model.named_parameters():
        parameter.register_post_accumulate_grad_hook(note(name))
    computed(model, pack(LENGTHS))
    assert heads == [2] * 2 * 2 * (1 + every)
    assert given == {name: 1 for name, _ in model.named_parameters()}


def test_nothing_as_wide_as_a_group_is_kept() -> None:
    """Between the passes there is the projection's memory, and what attention sums up of each row of scores; and all of
    it is given up without a backward pass, though nobody looks for cycles."""
    from lumina.model import transformer

    model, made = make_model(dtype=torch.bfloat16, num_layers=1), []
    model.group_heads(2)
    real = transformer.attention

    def noted(q: Tensor, k: Tensor, v: Tensor, **more: Any) -> Tensor:
        result = real(q, k, v, **more)
        made.extend(weakref.ref(x.untyped_storage()) for x in (q, k, result))  # values lie in the projection's memory
        return result

    gc.collect()
    gc.disable()
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(transformer, "attention", noted)
            loss = model(*pack(LENGTHS))
        node = weakref.ref(loss.grad_fn)
        assert [one() for one in made] == [None] * 3 * 2
        del loss
        assert node() is None
    finally:
        gc.enable()


def test_a_graph_runs_backward_once() -> None:
    model = make_model(num_layers=1)
    model.group_heads(2)
    loss = model(*pack(LENGTHS))
    loss.backward(retain_graph=True)
    with pytest.raises((AssertionError, RuntimeError), match=r"runs backward once|modified inplace"):
        loss.backward()


def test_in_evaluation() -> None:
    model, batch = make_model(dtype=torch.float64).eval(), pack(LENGTHS)
    with torch.no_grad():
        expected = model(*batch)
        model.group_heads(2)
        assert torch.equal(model(*batch), expected)


class Padded(torch.autograd.Function):
    """A kernel that fills heads up to a width that it takes, and saves what it filled."""

    @staticmethod
    def forward(ctx: Any, *qkv: Tensor) -> Tensor:
        q, k, v = (torch.nn.functional.pad(x, (0, 3)) for x in qkv)
        out = scores(q, k).softmax(-1) @ v.transpose(1, 2)
        ctx.save_for_backward(*qkv, out)
        return out.transpose(1, 2)[..., :-3]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, ...]:
        *qkv, out = ctx.saved_tensors
        assert torch.isfinite(out).all()
        with torch.enable_grad():
            q, k, v = (x.detach().requires_grad_() for x in qkv)
            found = (scores(q, k).softmax(-1) @ v.transpose(1, 2)).transpose(1, 2)
        return torch.autograd.grad(found, (q, k, v), grads[0])


def scores(q: Tensor, k: Tensor) -> Tensor:
    s = q.transpose(1, 2) @ k.transpose(1, 2).mT
    return s.masked_fill(~torch.ones_like(s, dtype=torch.bool).tril(), -torch.inf)


def test_a_result_that_is_a_part_of_what_is_saved(monkeypatch: pytest.MonkeyPatch) -> None:
    """flash-attn's own package pads heads whose width is no multiple of 8."""
    from lumina.model import transformer

    monkeypatch.setattr(transformer, "attention", lambda *qkv, **more: Padded.apply(*qkv[:3]))
    model, batch = make_model(dtype=torch.float64, num_heads=4, num_kv_heads=4, head_size=20), pack([40])
    expected = computed(model, batch)
    model.group_heads(2)
    near(computed(model, batch), expected, 1e-15)


def test_norms_alone_are_trained() -> None:
    """Nothing that goes into the projection has a gradient, nor has the projection."""
    found = []
    for groups in (1, 2):
        model = make_model(dtype=torch.float64, family="qwen3")
        model.requires_grad_(False)
        model.blocks[0].attention.k_norm.weight.requires_grad_(True)
        model.group_heads(groups)
        found.append(computed(model, pack(LENGTHS)))
    assert found[0][1].norm() > 0
    near(found[1], found[0], 1e-14)
