"""Weighted sources: exact counts of every conversation over an epoch, and an account that adds up."""

from __future__ import annotations

import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lumina.config import UserError
from lumina.data import GlobalOrder, Loader, PackedDataset
from lumina.data.account import Account
from lumina.data.preparing import preparation, splits
from lumina.data.preparing.mixing import LEFT_OUT, repeats
from lumina.data.preparing.splits import prepare_splits
from tests.data.helpers import TOKENIZER, Settings, Source, chat, supervised_targets, write_jsonl

weights = st.sampled_from([0.0, 0.25, 0.5, 1.0, 1.3, 2.0, 3.0])


def taken(dataset: PackedDataset) -> Counter[str]:
    """How often an epoch takes each record's first chunk, by place."""
    chunks = [chunk for sample in range(dataset.num_samples) for chunk in dataset.chunks_of(sample)]
    return Counter(f"{chunk.source}:{chunk.line}" for chunk in chunks if not chunk.context)


@settings(max_examples=25)
@given(st.lists(st.tuples(st.integers(1, 12), weights), min_size=1, max_size=3), st.booleans())
def test_each_conversation_is_taken_as_often_as_its_weight_says(files: list[tuple[int, float]], packing: bool) -> None:
    with tempfile.TemporaryDirectory() as folder:
        sources = []
        for number, (count, weight) in enumerate(files):
            path = write_jsonl(Path(folder) / f"{number}.jsonl", [chat(f"q {i}", f"a {i}") for i in range(count)])
            sources.append(Source(str(path), weight))
        config = Settings(data=tuple(sources), packing=packing, seq_length=32)
        expected = [int(w) * count + round((w - int(w)) * count) for count, w in files]
        if sum(expected) == 0:
            with pytest.raises(UserError, match="weight"):
                prepare_splits(config, TOKENIZER)
            return
        dataset, _ = prepare_splits(config, TOKENIZER)
        counts = taken(dataset)
        for source, (count, weight), times in zip(sources, files, expected, strict=True):
            own = [counts[f"{source.path}:{line}"] for line in range(1, count + 1)]
            assert sum(own) == times
            assert set(own) <= {int(weight), int(weight) + 1}
        account = Account.from_dict(dataset.account)
        account.check()
        assert account.messages == 2 * sum(count for count, _ in files)
        left_out = sum(1 for source, (count, _) in zip(sources, files, strict=True) for line in range(1, count + 1)
                       if counts[f"{source.path}:{line}"] == 0)  # fmt: skip
        assert sum(account.messages_dropped.values()) == 2 * left_out
        assert account.epoch_tokens == dataset.num_tokens
        assert account.fill <= 1
        # An epoch of the order takes exactly these.
        order = GlobalOrder(dataset.num_samples, 3, seed=1, fingerprint=dataset.fingerprint)
        steps = order.steps_per_epoch
        loader = Loader(dataset, order, rank=0, world=1, micro_batch_size=3, start_step=0, stop_step=steps)
        supervised = np.concatenate([b.targets_T[b.weights_T > 0] for data in loader for b in data.micro_batches])
        assert Counter(supervised.tolist()) == supervised_targets(dataset)


def test_the_realised_shares_are_reported(tmp_path: Path) -> None:
    one = write_jsonl(tmp_path / "one.jsonl", [chat("q", "a")] * 30)
    two = write_jsonl(tmp_path / "two.jsonl", [chat("q", "a")] * 10)
    config = Settings(train_data=(str(one),), data=(Source(str(two), 3.0),))
    dataset, _ = prepare_splits(config, TOKENIZER)
    assert dataset.account["notes"] == [
        f"{one}: weight 1, 60 supervised tokens an epoch, 50.00%",
        f"{two}: weight 3, 60 supervised tokens an epoch, 50.00%",
    ]
    assert dataset.num_supervised == 120
    other, _ = prepare_splits(Settings(train_data=(str(one),), data=(Source(str(two), 2.0),)), TOKENIZER)
    assert other.fingerprint != dataset.fingerprint


def test_chunks_of_one_record_go_together() -> None:
    line = np.repeat(np.arange(100), 3)
    times = repeats(np.zeros(300, int), np.zeros(300, int), line, [0.5]).reshape(100, 3)
    assert (times == times[:, :1]).all()
    assert times[:, 0].sum() == 50


def test_a_source_of_weight_0_is_in_neither_split_and_keeps_no_duplicates_out(tmp_path: Path) -> None:
    lines = [chat(f"question {i}", f"answer {i}") for i in range(60)]
    off = str(write_jsonl(tmp_path / "off.jsonl", [*lines, *(chat(f"other {i}", f"more {i}") for i in range(60))]))
    on = str(write_jsonl(tmp_path / "on.jsonl", lines))
    sources = (Source(off, 0.0), Source(on, 1.0))
    train, held_out = prepare_splits(Settings(data=sources, eval_fraction=0.2, dedup="exact"), TOKENIZER)
    assert held_out is not None
    assert {place.split(":")[0] for dataset in (train, held_out) for place in taken(dataset)} == {on}
    assert sum(taken(train).values()) + sum(taken(held_out).values()) == 60
    assert 6 <= sum(taken(held_out).values()) <= 24
    assert train.account["messages_dropped"][LEFT_OUT] == 240
    for dataset in (train, held_out):
        Account.from_dict(dataset.account).check()


def test_a_file_given_twice_is_refused(tmp_path: Path) -> None:
    path = str(write_jsonl(tmp_path / "one.jsonl", [chat("q", "a")]))
    with pytest.raises(UserError, match="given twice"):
        prepare_splits(Settings(train_data=(path,), data=(Source(path, 2.0),)), TOKENIZER)


@pytest.mark.parametrize("how", [{}, {"dedup": "exact"}])
def test_a_sources_format_is_what_every_record_has_to_be(tmp_path: Path, how: dict[str, str]) -> None:
    """A record with the keys of two formats is read as the one given; one without its key is a counted fault, and so is
    one of two formats where none is given."""
    both = {**chat("q", "an answer in messages"), "text": "plain words"}
    path = str(write_jsonl(tmp_path / "in.jsonl", [both, chat("q", "a"), {"text": "more words"}]))
    supervised = {}
    for name in (None, "text", "messages"):
        dataset, _ = prepare_splits(Settings(data=(Source(path, format=name),), **how), TOKENIZER)
        Account.from_dict(dataset.account).check()
        faults = {reason: fault["lines"] for reason, fault in dataset.account["faults"].items()}
        supervised[name] = dataset.num_supervised, faults
    ids = lambda text: len(TOKENIZER.encode(text)) + 1
    answers, texts = ids("an answer in messages") + ids("a"), ids("plain words") + ids("more words")
    assert supervised == {
        None: (ids("a") + ids("more words"), {"field not used: text": 1}),
        "text": (texts, {"another format than the one given": 1}),
        "messages": (answers, {"another format than the one given": 1}),
    }


@pytest.mark.parametrize("version", preparation.EARLIER_FORMATS)
@pytest.mark.parametrize("how", [{}, {"eval_fraction": 0.3}, {"dedup": "exact"}])
def test_a_run_goes_on_with_the_data_that_an_earlier_version_read(
    tmp_path: Path, how: dict[str, Any], version: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Read anew, the records may be others, in another order: what was trained on is taken from its cache, and only by
    the run that was trained on it."""
    path = write_jsonl(tmp_path / "d.jsonl", [{**chat("q", f"a {i}"), "id": str(i)} for i in range(40)])
    config = Settings(train_data=(str(path),), **how)
    with monkeypatch.context() as patch:
        patch.setattr(preparation, "FORMAT_VERSION", version)
        patch.setattr(splits, "DECISIONS_VERSION", splits.EARLIER_DECISIONS[version])
        before = prepare_splits(config, TOKENIZER)
    now = prepare_splits(config, TOKENIZER)
    assert now[0].fingerprint != before[0].fingerprint
    again = prepare_splits(config, TOKENIZER, resumed=before[0].fingerprint)
    assert [split and split.fingerprint for split in again] == [split and split.fingerprint for split in before]
    other = prepare_splits(config, TOKENIZER, resumed="of something else")
    assert [split and split.fingerprint for split in other] == [split and split.fingerprint for split in now]
