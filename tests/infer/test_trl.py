"""The preference loss held to TRL's own trainer."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch

from lumina.model import PREFERENCE_FIGURES, Transformer
from tests.infer.small_models import as_transformers, make_model
from tests.small_tokenizer import VOCABULARY, write_tokenizer

BETA = 0.3


def packed(ids_2PT: torch.Tensor, lengths: list[int], mask_2PT: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """TRL's batch (all chosen, then all rejected, padded) as ours: end to end, each pair's answers side by side."""
    pairs = len(lengths) // 2
    rows = [row for pair in range(pairs) for row in (pair, pair + pairs)]
    ids = torch.cat([ids_2PT[row, : lengths[row]] for row in rows])
    mask = torch.cat([torch.cat([mask_2PT[row, 1 : lengths[row]], torch.zeros(1)]) for row in rows]).float()
    bounds = torch.tensor([0, *[lengths[row] for row in rows]]).cumsum(0).int()
    positions = torch.cat([torch.arange(lengths[row]) for row in rows])
    return ids, ids.roll(-1), mask, positions, bounds


def answer(
    model: Transformer, batch: tuple[torch.Tensor, ...], pairs: torch.Tensor, beta: float | None
) -> torch.Tensor:
    ids, targets, mask, positions, bounds = batch
    longest = int(bounds.diff().max())
    documents = torch.searchsorted(bounds, torch.arange(len(ids)), right=True) - 1
    options = {"documents_N": documents, "pairs_P3": pairs, "beta": beta}
    found: torch.Tensor = model(ids[None], positions[None], bounds, longest, targets, mask, **options)
    return found


def test_loss_and_gradients_are_trls(tmp_path: Path) -> None:
    pytest.importorskip("trl", reason="needs trl: pip install -e '.[dev]'")
    from datasets import Dataset
    from transformers import AutoTokenizer
    from trl import DPOConfig, DPOTrainer

    model, before = (make_model(seed, vocab_size=VOCABULARY).requires_grad_(True) for seed in (0, 1))
    draw = random.Random(0)
    words = ["our dog", "the weather", "my sister", "makes me happy", "that film"]
    say = lambda: " ".join(draw.choice(words) for _ in range(draw.randrange(1, 6)))
    given = Dataset.from_list([{"prompt": say(), "chosen": " " + say(), "rejected": " " + say()} for _ in range(3)])
    theirs = DPOTrainer(
        model=as_transformers(model),
        ref_model=as_transformers(before),
        args=DPOConfig(
            str(tmp_path / "out"), beta=BETA, use_cpu=True, report_to=[], bf16=False, gradient_checkpointing=False,
            per_device_train_batch_size=3, max_length=None,
        ),
        train_dataset=given,
        processing_class=AutoTokenizer.from_pretrained(write_tokenizer(tmp_path / "tokenizer")),
    )  # fmt: skip
    batch = next(iter(theirs.get_train_dataloader()))
    expected = theirs.compute_loss(theirs.model.train(), batch)
    expected.backward()

    ours = packed(batch["input_ids"], batch["attention_mask"].sum(1).tolist(), batch["completion_mask"])
    nothing = torch.zeros(3, 3)
    with torch.no_grad():
        reference = answer(before, ours, nothing, None)
    chosen, rejected = reference.unbind(1)
    pairs = torch.stack(((chosen - rejected).float(), torch.full((3,), 1 / 3), chosen.float()), 1)
    found = answer(model, ours, pairs, BETA)
    assert float(found[0].detach()) == pytest.approx(float(expected.detach()), rel=1e-5)
    figures = dict(zip(PREFERENCE_FIGURES, found[1:].tolist(), strict=True))
    logged = {name: theirs._metrics["train"][name][0] for name in PREFERENCE_FIGURES}
    assert figures == pytest.approx(logged, rel=1e-3, abs=1e-5)
    found[0].backward()  # type: ignore[no-untyped-call]
    wanted = dict(theirs.model.named_parameters())
    names = {"embedding.weight": "model.embed_tokens.weight", "norm.weight": "model.norm.weight"}
    for name, parameter in model.named_parameters():
        if name in names:
            gradient, other = parameter.grad, wanted[names[name]].grad
            assert (gradient - other).norm() <= 1e-5 * other.norm(), name
