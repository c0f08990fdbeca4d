"""Each family against transformers' own model of it. The table: python -m tests.infer.hf.exported_runs."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.infer.hf.family_checks import check

FAMILIES = ["gemma2", "gemma3_text", "granite", "olmo2", "phi3", "smollm3", "mistral-window", "qwen2-window"]
FAMILIES += ["llama-yarn", "qwen3"]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_is_transformers(tmp_path: Path, family: str) -> None:
    found = check(tmp_path, family)
    assert found.logits < 1e-5
    assert found.losses < 1e-4
    assert found.changed == 0
    assert found.decoded < 1e-9
