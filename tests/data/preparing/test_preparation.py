"""Preparing: every answer supervised once, every line accounted for, the cache reused and never half a cache."""

from __future__ import annotations

import errno
import itertools
import re
import shutil
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lumina.chat import Conversation, Message, render
from lumina.config import UserError
from lumina.data import PackedDataset, prepare
from lumina.data.account import DROPPED_UNSUPERVISED, Account
from lumina.data.preparing import preparation
from lumina.data.preparing.pool import worker_bytes
from lumina.data.preparing.worker import ConversationBlock, Task, refusal, rendered
from tests.data.helpers import TOKENIZER, Settings, chat, expected_targets, supervised_targets, write_jsonl

words = st.text(st.sampled_from("ab é漢\n"), min_size=1, max_size=120).filter(lambda text: not text.isspace())
turns = st.fixed_dictionaries(
    {"role": st.sampled_from(["user", "prompter", "human", "assistant", "ai", "bot", "system"]), "content": words}
)
records = st.lists(
    st.fixed_dictionaries({"messages": st.lists(turns, min_size=1, max_size=8)}).filter(
        lambda record: any(m["role"] in ("assistant", "ai", "bot") for m in record["messages"])
    ),
    min_size=1,
    max_size=6,
)


def prepared(folder: Path, lines: list[Any], **changes: Any) -> PackedDataset:
    path = write_jsonl(folder / "in.jsonl", lines)
    return prepare([path], Settings(**changes), TOKENIZER)


@settings(max_examples=60)
@given(records, st.sampled_from([16, 17, 40, 500]), st.booleans())
def test_every_answer_is_supervised_exactly_once(lines: list[dict[str, Any]], seq_length: int, packing: bool) -> None:
    with tempfile.TemporaryDirectory() as folder:
        dataset = prepared(Path(folder), lines, seq_length=seq_length, packing=packing)
        expected = expected_targets(lines)
        assert supervised_targets(dataset) == expected
        assert dataset.num_supervised == expected.total()
        account = Account.from_dict(dataset.account)
        account.check()
        assert account.messages == sum(len(line["messages"]) for line in lines)
        assert account.tokens_supervised == expected.total()
        assert account.tokens_dropped.keys() <= {DROPPED_UNSUPERVISED}
        assert dataset.tokens_per_sample.max() <= seq_length
        assert dataset.supervised_per_sample.min() > 0
        dropped = sum(account.tokens_dropped.values())
        assert dataset.num_tokens == account.tokens - dropped + account.tokens_repeated


@settings(max_examples=40)
@given(records, st.sampled_from([16, 40, 500]), st.sampled_from(["truncate", "drop"]))
def test_truncate_and_drop_against_a_slow_reference(lines: list[dict[str, Any]], seq_length: int, policy: str) -> None:
    """What must remain, conversation by conversation, and where each message must be counted."""
    aliases = {"prompter": "user", "human": "user", "ai": "assistant", "bot": "assistant"}
    kept: list[tuple[list[int], list[int]]] = []
    trained = masked = dropped = 0
    for line in lines:
        messages = [Message(aliases.get(m["role"], m["role"]), m["content"]) for m in line["messages"]]
        full = render(TOKENIZER, Conversation(messages))
        keep = len(full.ids) if len(full.ids) <= seq_length else seq_length if policy == "truncate" else 0
        keep = keep if full.mask[:keep].any() else 0  # what teaches nothing is dropped
        if keep:
            kept.append((full.ids[:keep].tolist(), full.mask[:keep].tolist()))
        for message, start, stop in zip(messages, full.message_offsets[:-1], full.message_offsets[1:], strict=True):
            supervised_left = int(full.mask[start : min(stop, keep)].sum()) if start < keep else 0
            trained += supervised_left > 0
            masked += message.role != "assistant" and start < keep
            dropped += (supervised_left == 0) if message.role == "assistant" else start >= keep
    with tempfile.TemporaryDirectory() as folder:
        if not any(sum(mask) for _, mask in kept):
            with pytest.raises(UserError, match="nothing is left to train on"):
                prepared(Path(folder), lines, seq_length=seq_length, overlong=policy)
            return
        dataset = prepared(Path(folder), lines, seq_length=seq_length, overlong=policy, packing=False)
        chunks = [(p.ids.tolist(), p.mask.tolist()) for s in range(dataset.num_samples) for p in dataset.chunks_of(s)]
        assert sorted(chunks) == sorted(kept)
        account = Account.from_dict(dataset.account)
        account.check()
        counted = (account.messages_supervised, account.messages_masked, sum(account.messages_dropped.values()))
        assert counted == (trained, masked, dropped)


def test_no_sample_is_without_a_supervised_token(tmp_path: Path) -> None:
    """A question of 30,000 numbered lines of a log with one sentence for an answer, and eight short conversations."""
    log = "\n".join(f"{i} GET /index.html 200" for i in range(30_000))
    lines = [chat(log, "The log holds requests for one page."), *(chat(f"q {i}", f"a {i}") for i in range(8))]
    for packing in (True, False):
        dataset = prepared(tmp_path, lines, seq_length=128, packing=packing)
        assert dataset.supervised_per_sample.min() > 0
        account = Account.from_dict(dataset.account)
        account.check()
        assert (account.messages_supervised, account.messages_masked, account.messages_dropped) == (9, 9, {})
        assert account.tokens_dropped == {
            DROPPED_UNSUPERVISED: account.tokens - dataset.num_tokens + account.tokens_repeated
        }
        assert (account.samples, account.chunks) == ((2 if packing else 9), 9)
        assert account.answers_with_question_cut == 1


@pytest.mark.parametrize("share", [0.0, 0.25])
def test_answers_without_their_question_are_said(tmp_path: Path, share: float) -> None:
    """A system message, a question with a text longer than the context, and an answer as long."""
    lines = [
        {
            "messages": [
                {"role": "system", "content": "be kind"},
                {"role": "user", "content": f"{i} " + "word " * 200},
                {"role": "assistant", "content": "answer " * 200},
            ]
        }
        for i in range(20)
    ]
    dataset = prepared(tmp_path, lines, overlong_context=share)
    assert supervised_targets(dataset) == expected_targets(lines)
    said = [line for line in dataset.account_lines() if "warning" in line]
    if share:
        assert (dataset.account["answers_without_question"], said) == (0, [])
        question = TOKENIZER.encode("word " * 200)[-1]
        for chunk in (chunk for sample in range(dataset.num_samples) for chunk in dataset.chunks_of(sample)):
            assert TOKENIZER.decode(chunk.ids.tolist()).startswith("<|im_start|><|system|>be kind<|im_end|>")
            assert question in chunk.ids
    else:
        assert "20 of 20 answers begin without their question" in said[0]


def test_batches_never_cross_documents(tmp_path: Path) -> None:
    dataset = prepared(tmp_path, [chat("hello there", f"answer {i}") for i in range(9)])
    batch = dataset.batch([0, -1, 1])
    bounds = batch.cu_seqlens_D.tolist()
    assert bounds[0] == 0
    assert bounds[-1] == len(batch.ids_T)
    for first, last in itertools.pairwise(bounds):
        assert batch.positions_T[first:last].tolist() == list(range(last - first))
        assert batch.targets_T[first : last - 1].tolist() == batch.ids_T[first + 1 : last].tolist()
        assert batch.weights_T[last - 1] == 0
    assert batch.max_seqlen == max(np.diff(bounds))
    padding = bounds.index(next(b for b, e in itertools.pairwise(bounds) if e - b == 1))
    assert batch.ids_T[bounds[padding]] == TOKENIZER.pad_id
    assert batch.weights_T.sum() == dataset.supervised_per_sample[[0, 1]].sum()
    with pytest.raises(IndexError):
        dataset.batch([dataset.num_samples])
    with pytest.raises(IndexError):
        dataset.batch([-2])


BAD_LINES: list[tuple[Any, str, int]] = [
    (b'{"messages": [', "broken JSON", 0),
    (b'{"messages": [{"role": "user", "content": NaN}]}', "wrong type", 1),
    (b'{"messages": "\xff"}', "broken JSON", 0),
    (b"[1]", "wrong type", 0),
    ({"messages": {"role": "user"}}, "wrong type", 0),
    ({"messages": [{"role": "user", "content": 7}]}, "wrong type", 1),
    ({"messages": [{"role": None, "content": "x"}]}, "wrong type", 1),
    ({"messages": []}, "empty", 0),
    ({"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": " \n"}]}, "empty", 2),
    ({"messages": [{"role": "wizard", "content": "q"}, {"role": "assistant", "content": "a"}]}, "unknown role", 2),
    ({"messages": [{"role": "user", "content": "q"}]}, "no assistant turn", 1),
    ({"unrelated": 1}, "unknown format", 0),
]


def test_bad_lines_are_skipped_and_counted_with_their_line_numbers(tmp_path: Path) -> None:
    lines: list[Any] = []
    for bad, _, _ in BAD_LINES:
        lines += [chat("q", "a"), b"", bad]
    account = Account.from_dict(prepared(tmp_path, lines).account)
    account.check()
    assert (account.lines, account.blank_lines, account.conversations) == (3 * len(BAD_LINES),) + (len(BAD_LINES),) * 2
    path = tmp_path / "in.jsonl"
    for reason in {reason for _, reason, _ in BAD_LINES}:
        where = [3 * (i + 1) for i, (_, its_reason, _) in enumerate(BAD_LINES) if its_reason == reason]
        assert account.faults[reason].lines == len(where)
        assert account.faults[reason].first == [f"{path}:{line}" for line in where[:5]]
        assert account.faults[reason].messages == sum(n for _, its_reason, n in BAD_LINES if its_reason == reason)
    assert account.messages == 2 * len(BAD_LINES) + sum(n for _, _, n in BAD_LINES)
    report = "\n".join(account.report())
    assert f"bad: unknown role: 1 ({path}:30)" in report


def test_line_numbers_hold_across_tasks_workers_and_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lumina.data.preparing.preparation.MIN_TASK_BYTES", 1000)
    monkeypatch.setattr("lumina.data.preparing.preparation.MAX_TASK_BYTES", 1000)
    monkeypatch.setattr("lumina.data.preparing.pool.BYTES_PER_WORKER", 1)
    lines: list[Any] = [chat("question " * (i % 7), f"answer {i}") for i in range(1, 200)]
    lines[150] = lines[20] = b"broken"
    first = write_jsonl(tmp_path / "one.jsonl", lines)
    second = write_jsonl(tmp_path / "two.jsonl", [b"{", *lines[100:120]])
    second.write_bytes(second.read_bytes().rstrip(b"\n").replace(b"\n", b"\r\n"))  # no last line end, Windows ends
    alone = prepare([first, second], Settings(cache_dir=str(tmp_path / "a")), TOKENIZER, workers=1)
    several = prepare([first, second], Settings(cache_dir=str(tmp_path / "b")), TOKENIZER, workers=3)
    assert len(alone.meta["shards"]) > 5
    assert alone.account["faults"]["broken JSON"]["first"] == [f"{first}:21", f"{first}:151", f"{second}:1"]
    # Empty questions at i % 7 == 0 are bad lines too.
    empty = [i for i in range(1, 200) if i % 7 == 0 and i - 1 not in (20, 150)]
    assert alone.account["faults"]["empty"]["first"] == [f"{first}:{i}" for i in empty[:5]]
    assert {p.name: p.read_bytes() for p in alone.folder.iterdir()} == {
        p.name: p.read_bytes() for p in several.folder.iterdir()
    }
    texts = {
        (chunk.source, chunk.line): TOKENIZER.decode(chunk.ids)
        for sample in range(alone.num_samples)
        for chunk in alone.chunks_of(sample)
    }
    assert "answer 131" in texts[(str(first), 131)]
    assert "answer 104" in texts[(str(second), 5)]


def test_a_second_start_reuses_the_cache_without_reading_the_input(tmp_path: Path) -> None:
    dataset = prepared(tmp_path, [chat("q", "a")])
    before = {path: path.stat().st_mtime_ns for path in dataset.folder.iterdir()}
    monkey = pytest.MonkeyPatch()
    with monkey.context() as patch:
        patch.setattr("lumina.data.cache.files.file_sha256", lambda path: pytest.fail("the input was read again"))
        again = prepare([tmp_path / "in.jsonl"], Settings(), TOKENIZER)
    assert again.fingerprint == dataset.fingerprint
    assert {path: path.stat().st_mtime_ns for path in again.folder.iterdir()} == before


def test_the_fingerprint_follows_contents_and_settings(tmp_path: Path) -> None:
    base = prepared(tmp_path, [chat("q", "a")])
    prints = {
        base.fingerprint,
        prepared(tmp_path, [chat("q", "b")]).fingerprint,
        prepared(tmp_path, [chat("q", "a")], seq_length=32).fingerprint,
        prepared(tmp_path, [chat("q", "a")], packing=False).fingerprint,
        prepared(tmp_path, [chat("q", "a")], overlong="drop").fingerprint,
        prepared(tmp_path, [chat("q", "a")], overlong_context=0.0).fingerprint,
    }
    assert len(prints) == 6
    moved = shutil.copy(write_jsonl(tmp_path / "in.jsonl", [chat("q", "a")]), tmp_path / "moved.jsonl")
    assert prepare([moved], Settings(), TOKENIZER).fingerprint == base.fingerprint


def test_a_damaged_cache_is_made_again(tmp_path: Path) -> None:
    dataset = prepared(tmp_path, [chat("q", "a")])
    whole = (dataset.folder / "plan.arrow").read_bytes()
    (dataset.folder / "plan.arrow").write_bytes(whole[:-9])
    assert (prepared(tmp_path, [chat("q", "a")]).folder / "plan.arrow").read_bytes() == whole
    (dataset.folder / "meta.json").write_bytes(b"{")
    assert (prepared(tmp_path, [chat("q", "a")]).folder / "plan.arrow").read_bytes() == whole


def test_finished_tasks_are_kept_over_an_interruption(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from lumina.data.preparing import pool

    monkeypatch.setattr("lumina.data.preparing.preparation.MIN_TASK_BYTES", 500)
    monkeypatch.setattr("lumina.data.preparing.preparation.MAX_TASK_BYTES", 500)
    path = write_jsonl(tmp_path / "in.jsonl", [chat("question", f"answer {i}") for i in range(60)])
    undisturbed = prepare([path], Settings(cache_dir=str(tmp_path / "a")), TOKENIZER)
    real, done = pool.run_task, []

    def three_then_die(tokenizer: Any, task: Any) -> dict[str, Any]:
        if len(done) == 3:
            raise KeyboardInterrupt
        done.append(task.out)
        return real(tokenizer, task)

    with monkeypatch.context() as patch:
        patch.setattr(pool, "run_task", three_then_die)
        with pytest.raises(KeyboardInterrupt):
            prepare([path], Settings(cache_dir=str(tmp_path / "b")), TOKENIZER)
    # Finished tasks of other ranges, as another version may leave them, are not taken for these.
    (other,) = (tmp_path / "b").glob("*.partial")
    report = other / "pieces-00001.json"
    report.write_bytes(report.read_bytes().replace(b"500,", b"400,"))
    done.remove(str(other / "pieces-00001.arrow"))
    ran: list[str] = []
    monkeypatch.setattr(pool, "run_task", lambda tokenizer, task: ran.append(task.out) or real(tokenizer, task))
    resumed = prepare([path], Settings(cache_dir=str(tmp_path / "b")), TOKENIZER)
    assert not set(ran) & set(done)
    assert str(other / "pieces-00001.arrow") in ran
    assert {p.name: p.read_bytes() for p in undisturbed.folder.iterdir()} == {
        p.name: p.read_bytes() for p in resumed.folder.iterdir()
    }


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda folder: folder / "missing.jsonl", "does not exist"),
        (lambda folder: folder, "is a folder"),
        (lambda folder: write_jsonl(folder / "empty.jsonl", []), "is empty"),
        (lambda folder: write_jsonl(folder / "bad.jsonl", [b"no", b"", b"{}"]), "all 2 lines are bad"),
        (lambda folder: write_jsonl(folder / "blank.jsonl", [b"", b" "]), "Every line is blank"),
    ],
)
def test_unusable_inputs_are_the_users_error(tmp_path: Path, make: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        prepare([make(tmp_path)], Settings(cache_dir=str(tmp_path / "cache")), TOKENIZER)


def test_no_files_and_too_small_a_seq_length(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no data files"):
        prepare([], Settings(), TOKENIZER)
    with pytest.raises(UserError, match="at least 16"):
        prepared(tmp_path, [chat("q", "a")], seq_length=8)


def test_another_process_preparing_is_waited_for_within_a_bound(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    import fcntl

    dataset = prepared(tmp_path, [chat("q", "a")])
    lock = dataset.folder.parent / f"{dataset.folder.name}.lock"
    shutil.rmtree(dataset.folder)
    with open(lock, "w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        with pytest.raises(UserError, match="another process"):
            prepare([tmp_path / "in.jsonl"], Settings(), TOKENIZER, wait_seconds=0.3)
    assert caplog.text.count("waiting for another process that prepares") == 1


def test_another_process_may_take_as_long_as_it_lives(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """One node's rank prepares, those of the others wait for it: by a clock that goes on by an hour at each look."""
    import fcntl

    dataset = prepared(tmp_path, [chat("q", "a")])
    lock = dataset.folder.parent / f"{dataset.folder.name}.lock"
    shutil.rmtree(dataset.folder)
    hours = itertools.count()
    with open(lock, "w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)

        def sleep(seconds: float) -> None:
            if next(hours) > 10:
                fcntl.flock(held, fcntl.LOCK_UN)

        monkeypatch.setattr(preparation, "time", SimpleNamespace(monotonic=lambda: 3600.0 * next(hours), sleep=sleep))
        assert prepare([tmp_path / "in.jsonl"], Settings(), TOKENIZER).fingerprint == dataset.fingerprint
    assert next(hours) > 10
    assert f"waiting for another process that prepares {dataset.folder}\n" in caplog.text


def test_a_cache_that_cannot_be_written_is_the_users_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_jsonl(tmp_path / "in.jsonl", [chat("q", "a")])
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(UserError, match="cannot make the cache folder"):
        prepare([path], Settings(cache_dir=str(tmp_path / "file" / "cache")), TOKENIZER)

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("lumina.data.preparing.building.write_plan", full)
    with pytest.raises(UserError, match="No space left on device"):
        prepare([path], Settings(), TOKENIZER)


def test_time_in_which_a_worker_does_not_run_is_none_of_a_blocks() -> None:
    """It may be stopped (Ctrl-Z, a batch system), or wait for a disk."""

    class Waits:
        def render_valid(self, conversations: Any) -> Any:
            time.sleep(1.5)
            return TOKENIZER.render_valid(conversations)

    TOKENIZER.warm_up()
    block = ConversationBlock([Conversation([Message("user", "a"), Message("assistant", "b")])], [7])
    tokenizer: Any = Waits()
    assert rendered(tokenizer, block, Account(), seconds=1.0)[1] == [7]


@pytest.mark.parametrize(
    ("end", "says"),
    [
        ("sys.exit(9)", "died (exit code 9)"),
        ("os.kill(os.getpid(), 11)", "died (SIGSEGV)"),
        ("os.kill(os.getpid(), 9)", "died (SIGKILL); out of memory?"),
    ],
)
def test_a_dead_worker_is_an_error_not_a_hang(
    end: str, says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import subprocess
    import sys

    from lumina.data.preparing import pool

    def stillborn(*_: object) -> subprocess.Popen[bytes]:
        code = f"import os, sys; sys.stdin.readline(); {end}"
        return subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE)

    monkeypatch.setattr(pool, "_start", stillborn)
    monkeypatch.setattr("lumina.data.preparing.preparation.MIN_TASK_BYTES", 100)
    monkeypatch.setattr("lumina.data.preparing.preparation.MAX_TASK_BYTES", 100)
    monkeypatch.setattr(pool, "BYTES_PER_WORKER", 1)
    path = write_jsonl(tmp_path / "in.jsonl", [chat("question", f"answer {i}") for i in range(20)])
    with pytest.raises(UserError, match=re.escape(says) + "$"):
        prepare([path], Settings(), TOKENIZER, workers=2)


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (
            OSError(errno.ENOSPC, "Error writing bytes to file. Detail: [errno 28] No space left on device"),
            "cannot prepare in.jsonl: cache/f.partial: No space left on device\n  Free some space",
        ),
        (
            PermissionError(errno.EACCES, "Permission denied", "in.jsonl"),
            "cannot prepare in.jsonl: Permission denied\n  Change its permissions",
        ),
        (UserError("wrong", "do this"), "cannot prepare in.jsonl: wrong\n  do this"),
        (MemoryError(), "cannot prepare in.jsonl: a part of it takes more than 4 GiB of memory\n  A record of it"),
    ],
)
def test_what_keeps_a_task_from_being_done_is_told_with_its_remedy(
    error: OSError | UserError | MemoryError, says: str
) -> None:
    task = Task("chunks", "in.jsonl", ("jsonl", "", True, ""), 0, 1, "cache/f.partial/pieces-00000.arrow", 8, "split")
    assert str(refusal(task, error, 4 << 30)).startswith(says)


def test_what_is_kept_of_a_whole_file_is_told_where_memory_does_not_suffice() -> None:
    near = Task("near signatures", "in.jsonl", ("jsonl", "", True, ""), 0, 1, "cache/f.partial/0", 8, "split")
    assert "`--dedup near`" in str(refusal(near, MemoryError(), 4 << 30))


@pytest.mark.parametrize(
    ("machine", "workers", "each"), [(2, 1, 4), (8, 2, 8), (64, 16, 16), (64, 2, 32), (1024, 8, 128)]
)
def test_a_workers_memory_is_its_share_of_a_large_machines(
    machine: int, workers: int, each: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("os.sysconf", {"SC_PHYS_PAGES": machine << 18, "SC_PAGE_SIZE": 4096}.__getitem__)
    assert worker_bytes(workers) == each << 30


@pytest.mark.long  # a record of 48 MB
def test_a_record_that_would_take_more_memory_than_a_worker_has_is_a_fault(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Counted like any other, and the records beside it are prepared."""
    monkeypatch.setattr("lumina.data.preparing.pool.worker_bytes", lambda _: 400 << 20)
    monkeypatch.setattr("lumina.data.preparing.preparation.MIN_TASK_BYTES", 1 << 20)
    monkeypatch.setattr("lumina.data.preparing.preparation.MAX_TASK_BYTES", 1 << 20)
    monkeypatch.setattr("lumina.data.preparing.pool.BYTES_PER_WORKER", 1)
    small = [chat("question", f"answer {i} " * 100) for i in range(1000)]
    path = write_jsonl(tmp_path / "in.jsonl", [*small, chat("question", "w\u00f6rter und mehr " * 3_000_000)])
    account = prepare([path], Settings(), TOKENIZER, workers=2).account
    assert (account["conversations"], account["bad_lines"]) == (1000, 1)
    assert account["faults"]["takes too much memory"]["lines"] == 1
