"""Which GPU kernel is chosen and what it is called with, by stand-ins with the kernels' own signatures: no card."""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from lumina.config import UserError
from lumina.model import attention as attention_module
from lumina.model import varlen
from lumina.model.varlen import Spans, find, spans_kernel

HALF = torch.bfloat16


def reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_q: Tensor,
    cu_k: Tensor,
    used: Tensor | None,
    left: int,
    scale: float | None = None,
) -> Tensor:
    """Attention of each query over its own span, aligned at the end, the definition in float64. `left`: keys before a
    query's own that it sees, -1 for all."""
    group = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, 1).double(), v.repeat_interleave(group, 1).double()
    out = []
    for number in range(len(cu_q) - 1):
        rows, first = slice(int(cu_q[number]), int(cu_q[number + 1])), int(cu_k[number])
        last = int(cu_k[number + 1]) if used is None else first + int(used[number])
        keys, values, queries = k[first:last], v[first:last], q[rows].double()
        scores = torch.einsum("qhd,khd->hqk", queries, keys) * (q.shape[-1] ** -0.5 if scale is None else scale)
        ahead = len(keys) - len(queries)
        distance = torch.arange(len(queries))[:, None] + ahead - torch.arange(len(keys))
        hidden = (distance < 0) | ((distance > left) if left >= 0 else torch.zeros_like(distance, dtype=torch.bool))
        out.append(torch.einsum("hqk,khd->qhd", scores.masked_fill(hidden, -torch.inf).softmax(-1), values))
    return torch.cat(out).to(q.dtype)


class Machine:
    """A card and its packages. What is called is kept in `calls`."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.patch = monkeypatch
        self.calls: list[tuple[str, dict[str, Any]]] = []
        for name in ("flash_attn", "flash_attn.cute", "flash_attn_interface"):
            monkeypatch.setitem(sys.modules, name, None)
        monkeypatch.setattr(varlen, "_present", lambda module: sys.modules.get(module) is not None)
        monkeypatch.setattr(attention_module, "_varlen_kernels", {})
        monkeypatch.delenv("LUMINA_ATTENTION", raising=False)
        # torch's, as in 2.13 (torch/nn/attention/varlen.py)
        import torch.nn.attention.varlen

        def varlen_attn(
            query: Tensor,
            key: Tensor,
            value: Tensor,
            cu_seq_q: Tensor,
            cu_seq_k: Tensor | None,
            max_q: int,
            max_k: int,
            *,
            return_aux: Any = None,
            scale: float | None = None,
            window_size: tuple[int, int] = (-1, -1),
            enable_gqa: bool = False,
            seqused_k: Tensor | None = None,
            block_table: Tensor | None = None,
            num_splits: int | None = None,
        ) -> Tensor:
            assert cu_seq_k is not None
            assert enable_gqa or query.shape[1] == key.shape[1]
            assert isinstance(max_q, int)
            self.calls.append(("torch", {"window_size": window_size, "max": (max_q, max_k)}))
            assert window_size[1] == (0 if seqused_k is None else -1)
            return reference(query, key, value, cu_seq_q, cu_seq_k, seqused_k, window_size[0], scale)

        monkeypatch.setattr(torch.nn.attention.varlen, "varlen_attn", varlen_attn)
        activate = lambda name: self.calls.append(("activate", {"name": name}))
        monkeypatch.setattr(torch.nn.attention, "activate_flash_attention_impl", activate)

    def card(self, major: int, minor: int = 0) -> None:
        self.patch.setattr(torch.cuda, "get_device_capability", lambda *_: (major, minor))

    def install(self, name: str) -> None:
        package = ModuleType(name)
        if name == "flash_attn":
            # flash-attn 2.8 (flash_attn/flash_attn_interface.py)
            def flash_attn_varlen_func(
                q: Tensor,
                k: Tensor,
                v: Tensor,
                cu_seqlens_q: Tensor,
                cu_seqlens_k: Tensor,
                max_seqlen_q: int,
                max_seqlen_k: int,
                dropout_p: float = 0.0,
                softmax_scale: float | None = None,
                causal: bool = False,
                window_size: tuple[int, int] = (-1, -1),
                softcap: float = 0.0,
                alibi_slopes: Tensor | None = None,
                deterministic: bool = False,
                return_attn_probs: bool = False,
                block_table: Tensor | None = None,
            ) -> Tensor:
                assert causal
                self.calls.append(("flash_attn", {"window_size": window_size, "max": (max_seqlen_q, max_seqlen_k)}))
                return reference(q, k, v, cu_seqlens_q, cu_seqlens_k, None, window_size[0], softmax_scale)

            package.flash_attn_varlen_func = flash_attn_varlen_func  # type: ignore[attr-defined]
        self.patch.setitem(sys.modules, name, package)


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Machine:
    return Machine(monkeypatch)


@pytest.mark.parametrize(
    ("card", "packages", "name", "activated"),
    [
        ((8, 0), [], "torch's FlashAttention 2", None),
        ((8, 0), ["flash_attn", "flash_attn_interface", "flash_attn.cute"], "FlashAttention 2 (flash-attn)", None),
        ((9, 0), ["flash_attn"], "FlashAttention 2 (flash-attn)", None),
        (
            (9, 0),
            ["flash_attn", "flash_attn_interface"],
            "FlashAttention 3 (flash_attn_interface) through torch",
            "FA3",
        ),
        ((10, 0), ["flash_attn_interface"], "torch's FlashAttention 2", None),
        ((10, 0), ["flash_attn.cute"], "FlashAttention 4 (flash_attn.cute) through torch", "FA4"),
        ((12, 0), ["flash_attn.cute"], "torch's FlashAttention 2", None),
    ],
)
def test_the_newest_that_the_card_has(
    machine: Machine, card: tuple[int, int], packages: list[str], name: str, activated: str | None
) -> None:
    machine.card(*card)
    for package in packages:
        machine.install(package)
    for _ in range(2):
        assert attention_module.report_kernel(torch.device("cuda:0"), "bf16") == [f"attention: {name}"], "chosen once"
    assert machine.calls == ([("activate", {"name": activated})] if activated else [])
    (said,) = attention_module.report_kernel(torch.device("cuda:0"), "bf16", softcap=50.0)
    assert "soft cap" in said
    assert name not in said, "no kernel that is relied on has it"


@pytest.mark.parametrize(("card", "dtype"), [((7, 5), torch.float16), ((9, 0), torch.float32)])
def test_old_cards_and_float32_have_none(machine: Machine, card: tuple[int, int], dtype: torch.dtype) -> None:
    machine.card(*card)
    machine.install("flash_attn")
    assert find(dtype) is None
    (said,) = attention_module.report_kernel(torch.device("cuda:0"), "fp16" if dtype is torch.float16 else "fp32")
    assert "like lengths" in said
    assert attention_module.report_kernel(torch.device("cpu"), "bf16") == []
    assert spans_kernel(dtype) is None


def test_one_is_forced(machine: Machine) -> None:
    machine.card(9)
    for package in ("flash_attn", "flash_attn_interface", "flash_attn.cute"):
        machine.install(package)
    found = {}
    for way in ("flash2", "flash3", "flash4", "torch", "sdpa"):
        machine.patch.setenv("LUMINA_ATTENTION", way)
        kernel = find(HALF)
        found[way] = "none" if kernel is None else kernel.name.split(" (")[0]
    assert found == {
        "flash2": "FlashAttention 2",
        "flash3": "FlashAttention 3",
        "flash4": "FlashAttention 4",
        "torch": "torch's FlashAttention 2",
        "sdpa": "none",
    }


@pytest.mark.parametrize(
    ("way", "card", "packages", "why"),
    [
        ("flash3", (9, 0), [], "no module flash_attn_interface"),
        ("flash3", (8, 0), ["flash_attn_interface"], "capability 9.x, not 8.x"),
        ("flash4", (10, 0), [], "flash-attn-4 is not installed"),
        ("flash2", (9, 0), [], "flash-attn is not installed"),
        ("torch", (7, 0), [], "8.0 and later"),
        ("fastest", (9, 0), [], "not a way"),
    ],
)
def test_what_is_not_there_is_refused(
    machine: Machine, way: str, card: tuple[int, int], packages: list[str], why: str
) -> None:
    machine.card(*card)
    for package in packages:
        machine.install(package)
    machine.patch.setenv("LUMINA_ATTENTION", way)
    with pytest.raises(UserError, match=why):
        find(HALF)


def test_a_package_that_is_there_but_broken_is_done_without_unless_it_is_asked_for(machine: Machine) -> None:
    def fail(name: str) -> None:
        raise RuntimeError("Module 'flash_attn_interface' does not expose FA3 backward kernels")

    machine.card(9)
    machine.install("flash_attn_interface")
    machine.patch.setattr(torch.nn.attention, "activate_flash_attention_impl", fail)
    found = find(HALF)
    assert found is not None
    assert found.name == "torch's FlashAttention 2"
    machine.patch.setenv("LUMINA_ATTENTION", "flash3")
    with pytest.raises(UserError, match="backward kernels"):
        find(HALF)


def packed(lengths: list[int], heads: int = 4, kv_heads: int = 2) -> tuple[list[Tensor], Tensor]:
    draw = torch.Generator().manual_seed(0)
    inputs = [torch.randn(sum(lengths), n, 8, generator=draw) for n in (heads, kv_heads, kv_heads)]
    return inputs, torch.tensor([0, *lengths]).cumsum(0).int()


@pytest.mark.parametrize("window", [None, 1, 3])
@pytest.mark.parametrize("package", [None, "flash_attn"])
@pytest.mark.parametrize("scale", [None, 0.7])
def test_the_call_means_what_the_reference_does(
    machine: Machine, scale: float | None, package: str | None, window: int | None
) -> None:
    """Windows too: of n keys, its own among them, where the kernels count those before it."""
    machine.card(8)
    if package is not None:
        machine.install(package)
    kernel = find(HALF)
    assert kernel is not None
    (q, k, v), edges = packed([5, 1, 9])
    scoring = attention_module.Scoring(window, scale)
    found = kernel.attend(q, k, v, edges, 9, window, scale)
    docs = attention_module.Documents.of(q[None, :, 0, 0], edges, None)
    torch.testing.assert_close(found, attention_module.attention(q[None], k[None], v[None], docs, scoring)[0])
    (called,) = machine.calls
    assert called == (
        package or "torch",
        {
            "window_size": (-1, 0)
            if window is None and package is None
            else (-1, -1)
            if window is None
            else (window - 1, 0),
            "max": (9, 9),
        },
    )


def test_torch_before_windows_and_groups(machine: Machine) -> None:
    """torch 2.10's signature: a causal flag, no windows, as many key heads as query heads."""

    def varlen_attn(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        cu_seq_q: Tensor,
        cu_seq_k: Tensor,
        max_q: int,
        max_k: int,
        is_causal: bool = False,
        return_aux: Any = None,
    ) -> Tensor:
        assert is_causal
        assert query.shape == key.shape == value.shape
        return reference(query, key, value, cu_seq_q, cu_seq_k, None, -1)

    machine.card(8)
    machine.patch.setattr(torch.nn.attention.varlen, "varlen_attn", varlen_attn)
    kernel = find(HALF)
    assert kernel is not None
    (q, k, v), edges = packed([5, 9])
    torch.testing.assert_close(kernel.attend(q, k, v, edges, 9, None, None), reference(q, k, v, edges, edges, None, -1))
    with pytest.raises(UserError, match="no sliding windows"):
        kernel.attend(q, k, v, edges, 9, 3, None)
    assert spans_kernel(HALF) is None


def test_spans_of_a_cache(machine: Machine) -> None:
    machine.card(9)
    attend = spans_kernel(HALF)
    assert attend is not None
    (q, _, _), _ = packed([2])
    (_, k, v), edges = packed([6, 6])
    queries, used = torch.tensor([0, 1, 2]).int(), torch.tensor([2, 5]).int()
    found = attend(q, k, v, Spans(queries, edges, used, 5), None)
    torch.testing.assert_close(found, reference(q, k, v, queries, edges, used, -1))
    assert machine.calls == [("torch", {"window_size": (-1, -1), "max": (1, 5)})]
