"""Preference pairs from files to batches, against the template applied to each side by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lumina.chat import Conversation, Message, open_tokenizer, render
from lumina.config import UserError
from lumina.data import GlobalOrder, Loader, PairDataset, prepare_pairs
from tests.data.helpers import TOKENIZER, Settings, write_jsonl
from tests.small_tokenizer import CHATML, write_tokenizer


def turn(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def pair(number: int, length: int = 3) -> dict[str, Any]:
    prompt = [turn("user", f"question {number}"), turn("assistant", "an earlier answer"), turn("user", "go on")]
    return {
        "prompt": prompt,
        "chosen": [turn("assistant", f"good {number} " * length)],
        "rejected": [turn("assistant", f"bad {number}")],
    }


def prepared(tmp_path: Path, records: list[Any], **settings: Any) -> PairDataset:
    path = write_jsonl(tmp_path / "pairs.jsonl", records)
    return prepare_pairs([path], Settings(cache_dir=str(tmp_path / "cache"), **settings), TOKENIZER)


def test_both_sides_are_the_template_and_only_the_answer_is_supervised(tmp_path: Path) -> None:
    plain = {"prompt": "a question", "chosen": "yes", "rejected": "no"}
    dataset = prepared(tmp_path, [pair(1), plain, pair(2)])
    assert dataset.num_samples == 3
    batch = dataset.batch([0, 1])
    documents = [batch.ids_T[a:b] for a, b in zip(batch.cu_seqlens_D[:-1], batch.cu_seqlens_D[1:], strict=True)]
    assert len(documents) == 4
    for document, text in zip(documents[:2], ("good 1 " * 3, "bad 1"), strict=True):
        messages = [Message(m["role"], m["content"], False) for m in pair(1)["prompt"]] + [Message("assistant", text)]
        expected = render(TOKENIZER, Conversation(messages))
        assert document.tolist() == expected.ids.tolist()
    answers = [TOKENIZER.encode(text) for text in ("good 1 " * 3, "bad 1", "yes", "no")]
    supervised = [token for answer in answers for token in [*answer, TOKENIZER.stop_id]]
    assert batch.targets_T[batch.weights_T == 1].tolist() == supervised
    assert batch.pairs_P3 is not None
    assert batch.pairs_P3.tolist() == [[0.0, 1.0, 0.0], [0.0, 1.0, 0.0]]
    assert dataset.tokens_per_sample[0] == len(documents[0]) + len(documents[1])


def test_account(tmp_path: Path) -> None:
    """Law 4: every line is a pair, blank, or skipped for a counted reason."""
    records = [
        pair(1),
        b"",
        b"{not json",
        {"messages": [turn("user", "hello"), turn("assistant", "hi")]},
        pair(2, length=100),
        pair(3) | {"rejected": pair(3)["chosen"]},
        pair(4) | {"chosen": [turn("user", "hm")]},
        pair(5) | {"chosen": []},
        pair(6) | {"prompt": 3},
        pair(7) | {"chosen": " "},
        pair(8),
    ]
    dataset = prepared(tmp_path, records)
    account = dataset.account
    assert (account["lines"], account["blank_lines"], account["pairs"]) == (11, 1, 2)
    counts = {reason: entry["count"] for reason, entry in account["skipped"].items()}
    assert sum(counts.values()) == 8
    assert counts["longer than the window"] == counts["chosen and rejected are the same"] == counts["broken JSON"] == 1
    assert account["skipped"]["longer than the window"]["first"] == ["pairs.jsonl:5"]
    assert "skipped, longer than seq_length, 64 tokens: 1 (pairs.jsonl:5)" in dataset.account_lines()
    with pytest.raises(UserError, match="no preference pair in"):
        prepared(tmp_path, records[1:7])


def test_padding_and_references(tmp_path: Path) -> None:
    dataset = prepared(tmp_path, [pair(n) for n in range(3)])
    dataset.reference_P2 = np.array([[1.5, -9.0], [-2.0, -8.0], [0.25, -7.0]], dtype=np.float32)
    batch = dataset.batch([2, -1, 0])
    assert batch.pairs_P3 is not None
    assert batch.pairs_P3.tolist() == [[0.25, 1.0, -7.0], [0.0, 0.0, 0.0], [1.5, 1.0, -9.0]]
    assert len(batch.cu_seqlens_D) == 7
    assert batch.weights_T[batch.cu_seqlens_D[2] : batch.cu_seqlens_D[4]].tolist() == [0.0, 0.0]
    assert float(batch.torch().units) == 2.0
    with pytest.raises(IndexError):
        dataset.batch([3])


def test_pairs_of_a_step_do_not_depend_on_world_size_or_micro_batch(tmp_path: Path) -> None:
    """Law 1, and the count that law 2 divides by."""
    dataset = prepared(tmp_path, [pair(n) for n in range(11)])
    order = GlobalOrder(dataset.num_samples, 4, 1234, dataset.fingerprint)
    dataset.reference_P2 = np.arange(22, dtype=np.float32).reshape(11, 2) / 2  # so that a pair can be told by it
    steps = 2 * order.steps_per_epoch
    for world, micro in [(1, 1), (2, 1), (2, 2), (3, 2)]:
        ranks = [
            Loader(dataset, order, rank=rank, world=world, micro_batch_size=micro, start_step=0, stop_step=steps)
            for rank in range(world)
        ]
        for step, shares in enumerate(zip(*ranks, strict=True)):
            found = [p for share in shares for b in share.micro_batches for p, real, _ in b.pairs_P3.tolist() if real]
            assert sorted(found) == sorted(order.indices(step).tolist())
            assert {share.supervised_tokens for share in shares} == {float(len(found))}


def test_cache(tmp_path: Path) -> None:
    records = [pair(1), pair(2)]
    first = prepared(tmp_path, records)
    made = (first.folder / "ids.npy").stat().st_mtime_ns
    assert prepared(tmp_path, records).folder == first.folder
    assert (first.folder / "ids.npy").stat().st_mtime_ns == made
    assert prepared(tmp_path, records, seq_length=48).fingerprint != first.fingerprint
    (first.folder / "mask.npy").write_bytes(b"cut short")
    again = prepared(tmp_path, records)
    assert again.batch([0]).weights_T.sum() > 0


def test_an_imported_models_template(tmp_path: Path) -> None:
    """What its template does not take is counted, and the pairs after that one stay in step."""
    tokenizer = open_tokenizer(write_tokenizer(tmp_path / "tokenizer", CHATML.replace("'system', ", "")))
    strange = {"prompt": [turn("system", "x"), turn("user", "y")], "chosen": "a", "rejected": "b"}
    records = [{"prompt": "hello", "chosen": "how", "rejected": "today"}, strange, pair(1)]
    path = write_jsonl(tmp_path / "pairs.jsonl", records)
    dataset = prepare_pairs([path], Settings(seq_length=200, cache_dir=str(tmp_path / "cache")), tokenizer)
    batch = dataset.batch([0])
    supervised = batch.targets_T[batch.weights_T == 1].tolist()
    assert supervised == [*tokenizer.encode("how"), 2, *tokenizer.encode("today"), 2]
    assert dataset.num_samples == 2
    (reason,) = dataset.account["skipped"]
    assert "bad role" in reason
    after, last = dataset.batch([1]), [*tokenizer.encode("bad 1"), 2]
    assert after.targets_T[after.weights_T == 1].tolist()[-len(last) :] == last


def test_a_pair_without_a_supervised_token_weighs_nothing(tmp_path: Path) -> None:
    """A cache of an earlier version may hold one; what is skipped now is made here."""
    made = prepared(tmp_path, [pair(number) for number in range(3)])
    offsets, mask = np.load(made.folder / "offsets.npy"), np.load(made.folder / "mask.npy")
    mask[offsets[2] : offsets[4]] = 0
    mask[offsets[2]] = 1  # a first token is no target
    mask[offsets[4] : offsets[5]] = 0  # the rejected side has one
    np.save(made.folder / "mask.npy", mask)
    found = prepared(tmp_path, [pair(number) for number in range(3)])
    assert found.fingerprint == made.fingerprint
    assert found.supervised_per_sample.tolist() == [1, 0, 1]
    batch = found.batch([1, 0, 2, -1])
    assert batch.pairs_P3 is not None
    assert batch.pairs_P3[:, 1].tolist() == [0, 1, 1, 0]
    assert float(found.batch([1]).torch().units) == 0  # of a step: no update


def test_what_is_left_out_and_what_is_not_known_stands_in_the_account(tmp_path: Path) -> None:
    asked = [turn("system", ""), turn("user", "hello")]
    records = [pair(1), pair(2) | {"prompt": asked, "unheard_of": "x"}, pair(3) | {"history": "words"}]
    lines = prepared(tmp_path, records).account_lines()
    assert "left out, empty system message: 1" in lines
    assert "  unknown field unheard_of: 2: 'x'" in lines
    (skipped,) = (line for line in lines if line.startswith("skipped"))
    assert skipped.startswith("skipped, wrong type: 1 (pairs.jsonl:3): `history` is a string")
