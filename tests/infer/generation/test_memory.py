"""The context length that memory leaves room for."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch

from lumina.chat import Tokenizer
from lumina.config import UserError
from lumina.infer import Loaded
from lumina.infer.generation.memory import fitting_context, free_memory
from lumina.model import KVCache
from tests.infer.small_models import make_model

TOKEN = 2 * 2 * 2 * 16 * 4  # bytes: keys and values, layers, heads, width, float32


@pytest.fixture(scope="module")
def loaded() -> Loaded:
    return Loaded(make_model(seq_length=4096), Tokenizer.load(), Path("run/checkpoints/step-00000000"), 0)


def test_the_bytes_are_those_of_the_cache(loaded: Loaded) -> None:
    cache = KVCache(loaded.config, 3, 50, loaded.model.embedding.weight)
    held = (cache.keys.numel() + cache.values.numel()) * cache.keys.element_size()
    assert KVCache.bytes_of(loaded.config, 3, 50, 4) == held == 3 * 50 * TOKEN


@pytest.mark.parametrize(
    ("asked", "free", "length"),
    [
        (None, 2 * 8 * 4096 * TOKEN, 4096),  # all of it in half of what is free
        (None, 8 * 4096 * TOKEN, 2048),
        (None, 8 * 1100 * TOKEN, 512),  # a multiple of 64
        (1000, 8 * 1100 * TOKEN, 1000),
        (2, 1 << 30, 2),
    ],
)
def test_what_fits(loaded: Loaded, asked: int | None, free: int, length: int, caplog: pytest.LogCaptureFixture) -> None:
    assert fitting_context(loaded, 8, asked, free) == length
    said = [record for record in caplog.records if record.levelno == logging.WARNING]
    assert len(said) == (asked is None and length < 4096)


@pytest.mark.parametrize(
    ("asked", "free", "says"),
    [
        (None, 8 * 500 * TOKEN, "answers of 512 tokens take 0.0 GiB"),
        (4096, 8 * 4096 * TOKEN, "answers of 4096 tokens"),
        (4097, 1 << 40, "is not between 2 and the model's 4096"),
        (1, 1 << 40, "is not between 2"),
    ],
)
def test_what_does_not_fit_is_refused(loaded: Loaded, asked: int | None, free: int, says: str) -> None:
    with pytest.raises(UserError, match=says):
        fitting_context(loaded, 8, asked, free)


def test_free_memory_of_the_cpu() -> None:
    assert 0 < free_memory(torch.device("cpu")) < 1 << 50
