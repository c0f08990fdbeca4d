"""What is used of torch beyond its documented interface, in each version that is allowed."""

from __future__ import annotations

import pytest
import torch

from lumina.train.torch_private import empty_host_cache


@pytest.mark.parametrize("public", [True, False], ids=["as torch 2.13", "as torch 2.11"])
def test_pinned_memory_is_given_back(public: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    called: list[str] = []
    monkeypatch.setattr(torch._C, "_host_emptyCache", lambda: called.append("private"), raising=False)
    monkeypatch.setattr(torch.accelerator, "empty_host_cache", lambda: called.append("public"), raising=False)
    if not public:
        monkeypatch.delattr(torch.accelerator, "empty_host_cache")
    empty_host_cache()
    assert called == ["public" if public else "private"]
