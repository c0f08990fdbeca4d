"""Files of preference pairs -> a memory-mapped data set of (chosen, rejected) documents, and batches of whole pairs.

    {"prompt": "…" or [messages], "chosen": "…" or [messages], "rejected": "…" or [messages]}      one a line, as TRL's

A pair is one sample: laws 1 and 2 hold for pairs as they do for packed conversations, with pairs in the place of
supervised tokens. Both answers are rendered by the one template after the same prompt; supervised is what comes
after the prompt. A pair of which a side is longer than `seq_length` is dropped and counted: a truncated answer is
another one.

    CACHE/FINGERPRINT/    ids.npy int32[T], mask.npy uint8[T], offsets.npy int64[2P+1], meta.json

Shapes: P pairs, T tokens, D documents (two a pair, the chosen one first).
"""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import orjson
from numpy.typing import NDArray

from lumina.chat import ChatTokenizer
from lumina.config import UserError
from lumina.data.account import FIRST_LINES, MOST_FIELDS, AccountError, field_details, field_sums
from lumina.data.cache.files import Contents
from lumina.data.converting.columns import Columns, check_columns, described, renamed
from lumina.data.loading.dataset import Batch, join
from lumina.data.loading.order import PADDING
from lumina.data.loading.part import WHOLE, Part
from lumina.data.preference.pair import Pair, from_pair
from lumina.data.preparing.building import PrepareSettings
from lumina.data.preparing.preparation import cache_lock, make_root
from lumina.data.reading.items import read_items
from lumina.data.reading.layout import detect
from lumina.data.reading.paths import check_inputs
from lumina.data.records.fault import BLANK, Fault
from lumina.data.records.fields import FieldTally
from lumina.files import atomic_folder, write_json

FORMAT_VERSION = 3
EARLIER_FORMATS = (2, 1)  # 2: version 0.2.0, without tools and reasoning; 1: 0.1.0, which read fewer shapes of pairs
TOO_LONG = "longer than the window"  # as every version has stored it; shown as "longer than seq_length"
NOTHING = "nothing to learn from"
_AT_ONCE = 512  # pairs rendered together


class PairDataset:
    """A finished cache folder. `reference_P2` is set before training: under the reference model, log-probability of the
    chosen minus that of the rejected answer, and that of the chosen one (lumina.train.objectives.dpo)."""

    def __init__(self, folder: Path, meta: dict[str, Any]) -> None:
        self.folder, self.account = folder, meta["account"]
        self.fingerprint: str = meta["fingerprint"]
        self._pad_id = int(meta["pad_id"])
        self._ids_T, self._mask_T = (np.load(folder / f"{name}.npy", mmap_mode="r") for name in ("ids", "mask"))
        self._offsets: NDArray[np.int64] = np.load(folder / "offsets.npy")
        self.tokens_per_sample: NDArray[np.int32] = np.diff(self._offsets[::2]).astype(np.int32)
        # What a step's loss is divided by is its number of pairs (law 2). Without a supervised token one teaches
        # nothing; it is skipped now, but a cache of an earlier version may hold such.
        self.supervised_per_sample = _teaches(self._mask_T, self._offsets).astype(np.int32)
        self.reference_P2: NDArray[np.float32] = np.zeros((self.num_samples, 2), dtype=np.float32)

    @property
    def num_samples(self) -> int:
        return len(self.tokens_per_sample)

    def account_lines(self) -> list[str]:
        return account_lines(self.account)

    def supervised_share(self, indices: NDArray[np.int64]) -> NDArray[np.float64]:
        """The share of each pair's tokens that is supervised."""
        bounds = zip(self._offsets[2 * indices].tolist(), self._offsets[2 * indices + 2].tolist(), strict=True)
        return np.array([self._mask_T[start:stop].mean() for start, stop in bounds])

    def batch(self, indices: Sequence[int] | NDArray[np.int64], part: Part = WHOLE) -> Batch:
        """The pairs `indices` in that order; index -1 is a padding pair of weight 0, two documents of one token."""
        index_P = np.asarray(indices, dtype=np.int64)
        if index_P.size == 0:
            raise ValueError("a batch needs at least one sample index")
        if index_P.min() < PADDING or index_P.max() >= self.num_samples:
            raise IndexError(f"sample indices must lie in [-1, {self.num_samples})")
        ids, masks = [], []
        for pair in index_P.tolist():
            for document in (2 * pair, 2 * pair + 1):
                if pair == PADDING:
                    ids.append(np.array([self._pad_id], dtype=np.int32))
                    masks.append(np.zeros(1, dtype=np.uint8))
                else:
                    start, stop = self._offsets[document], self._offsets[document + 1]
                    ids.append(self._ids_T[start:stop])
                    masks.append(self._mask_T[start:stop])
        real_P = index_P != PADDING
        batch = join(ids, masks, part)
        weight_P = np.where(real_P, self.supervised_per_sample[index_P], 0)
        margin_P, chosen_P = np.where(real_P[:, None], self.reference_P2[index_P], 0).T
        batch.pairs_P3 = np.stack([margin_P, weight_P, chosen_P], 1).astype(np.float32)
        return batch


def _teaches(mask_T: NDArray[np.uint8], offsets: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Which pairs have a target on either side: bool[P]. A document's first token has nothing to be predicted from."""
    targets_D = np.add.reduceat(mask_T, offsets[:-1], dtype=np.int64) - mask_T[offsets[:-1]]
    return (targets_D[::2] + targets_D[1::2]) > 0


def prepare_pairs(
    paths: Sequence[str | os.PathLike[str]],
    config: PrepareSettings,
    tokenizer: ChatTokenizer,
    wait_seconds: float = math.inf,
    earlier: bool = False,
) -> PairDataset:
    """The data set of these files, from the cache when nothing has changed. `earlier` as in `prepare`.

    Raises:
        UserError: a file is missing or empty, or none of them holds a pair that can be used.
    """
    files = check_inputs(paths)
    tokenizer.check_trainable()
    root = make_root(config, files)
    contents = Contents(files, root / "sources.json")
    inputs = [contents.digests, config.seq_length]
    current = tokenizer.fingerprint, tokenizer.template_version
    mapped = [dict(config.columns)] if config.columns else []
    for version in (*(EARLIER_FORMATS if earlier else ()), FORMAT_VERSION):
        names = current if version == FORMAT_VERSION else tokenizer.earlier
        fingerprint = hashlib.sha256(orjson.dumps(["pairs", version, *inputs, *names, *mapped])).hexdigest()
        final = root / f"pairs-{fingerprint[:32]}"
        found = _open(final, fingerprint)
        if found is not None:
            return found
    with cache_lock(root / f"{final.name}.lock", final, wait_seconds):
        found = _open(final, fingerprint)
        if found is None:
            try:
                with atomic_folder(final, replace=True) as scratch:  # one that is there already is damaged
                    _build(files, scratch, fingerprint, config, tokenizer)
                    contents.check_all()
            except OSError as error:
                raise UserError(f"cannot make the cache {final}: {error.strerror or error}") from error
            found = _open(final, fingerprint)
    assert found is not None
    return found


def _open(folder: Path, fingerprint: str) -> PairDataset | None:
    try:
        meta = orjson.loads((folder / "meta.json").read_bytes())
        whole = all((folder / name).stat().st_size == size for name, size in meta["sizes"].items())
        return PairDataset(folder, meta) if whole and meta["fingerprint"] == fingerprint else None
    except (OSError, orjson.JSONDecodeError, KeyError, TypeError, ValueError):
        return None


# --- Building -------------------------------------------------------------------------------------


def _build(
    files: list[Path], folder: Path, fingerprint: str, config: PrepareSettings, tokenizer: ChatTokenizer
) -> None:
    seq_length, columns = config.seq_length, config.columns
    account: dict[str, Any] = {"lines": 0, "blank_lines": 0, "pairs": 0, "skipped": {}, "window": seq_length}
    if columns:
        account["columns"] = described(columns)
    ids, masks, lengths = [], [], []
    block: list[tuple[Pair, str]] = []

    def flush() -> None:
        for (_, place), sides in zip(block, _rendered(tokenizer, [pair for pair, _ in block]), strict=True):
            reason = sides if isinstance(sides, str) else _unusable(sides, seq_length)
            if reason is not None:
                _skip(account, reason, place)
                continue
            assert not isinstance(sides, str)
            account["pairs"] += 1
            for side_ids, side_mask in sides:
                ids.append(side_ids)
                masks.append(side_mask)
                lengths.append(len(side_ids))
        block.clear()

    tally = FieldTally()
    for place, tally.line, record in _records(files, columns):
        account["lines"] += 1
        pair = record if record is BLANK else from_pair(renamed(record, columns, tally), tally)
        tally.end_record(used=isinstance(pair, Pair))
        if pair is BLANK:
            account["blank_lines"] += 1
        elif isinstance(pair, Fault):
            _skip(account, pair.reason, place, pair.example())
        else:
            assert isinstance(pair, Pair)
            block.append((pair, place))
        if len(block) == _AT_ONCE:
            flush()
    flush()
    account["fields"], account["left_out"] = tally.totals(), dict(tally.dropped)
    account["unknown_fields"] = {name: f"{line}: {value}" for name, (line, value) in tally.examples.items()}
    skipped = sum(entry["count"] for entry in account["skipped"].values())
    if account["lines"] != account["blank_lines"] + account["pairs"] + skipped:
        raise AccountError("lines do not add up")
    if not account["pairs"]:
        why = "\n  ".join(account_lines(account))
        raise UserError(
            f"no preference pair in {', '.join(map(str, files))}", f"{why}\n  process-oasst --pairs makes them."
        )
    offsets = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])
    arrays: dict[str, np.ndarray[Any, Any]] = {"ids": np.concatenate(ids), "mask": np.concatenate(masks)}
    for name, value in {**arrays, "offsets": offsets}.items():
        with (folder / f"{name}.npy").open("wb") as file:
            np.save(file, value)
    sizes = {path.name: path.stat().st_size for path in folder.iterdir()}
    pad = tokenizer.pad_id
    write_json(folder / "meta.json", {"fingerprint": fingerprint, "pad_id": pad, "account": account, "sizes": sizes})


def _records(files: list[Path], columns: Columns) -> Iterator[tuple[str, int, Any]]:
    """(place, number in its file, record)."""
    for path in files:
        layout = detect(str(path))._replace(flat=False)
        if columns:
            check_columns(str(path), layout, columns)
        for item in read_items(str(path), layout):
            yield f"{path.name}:{item.number}", item.number, item.record


def _skip(account: dict[str, Any], reason: str, place: str, example: str = "") -> None:
    entry = account["skipped"].setdefault(reason, {"count": 0, "first": [], "example": example})
    entry["count"] += 1
    if len(entry["first"]) < FIRST_LINES:
        entry["first"].append(place)


Side = tuple[NDArray[np.int32], NDArray[np.uint8]]


def _rendered(tokenizer: ChatTokenizer, pairs: list[Pair]) -> Iterator[tuple[Side, Side] | str]:
    """Ids and mask of both sides of each pair, or why the template does not take it."""
    if not pairs:
        return
    rendered, refused = tokenizer.render_valid([side for pair in pairs for side in pair])
    bounds = rendered.message_offsets[rendered.conversation_offsets]
    taken = iter(zip(bounds[:-1].tolist(), bounds[1:].tolist(), strict=True))
    for number in range(len(pairs)):
        sides = []
        for side in (2 * number, 2 * number + 1):
            if side not in refused:
                start, stop = next(taken)
                sides.append((rendered.ids[start:stop], rendered.mask[start:stop]))
        if len(sides) == 2:
            yield sides[0], sides[1]
        else:
            yield next(refused[side] for side in (2 * number, 2 * number + 1) if side in refused)


def _unusable(sides: tuple[Side, Side], seq_length: int) -> str | None:
    if any(len(ids) > seq_length for ids, _ in sides):
        return TOO_LONG
    return None if all(mask[1:].any() for _, mask in sides) else NOTHING


def account_lines(account: dict[str, Any]) -> list[str]:
    """Law 4's account as lines of text."""
    lines = [f"{account['lines']:,} lines: {account['pairs']:,} preference pairs, {account['blank_lines']:,} blank"]
    for reason, entry in sorted(account["skipped"].items()):
        shown = f"longer than seq_length, {account['window']} tokens" if reason == TOO_LONG else reason
        example = f": {entry['example']}" if entry.get("example") else ""
        lines.append(f"skipped, {shown}: {entry['count']:,} ({', '.join(entry['first'])}){example}")
    lines += [f"left out, {reason}: {count:,}" for reason, count in sorted(account.get("left_out", {}).items())]
    if account.get("columns"):
        lines.append(f"columns: {account['columns']}")
    lines.append(f"fields: {field_sums(account.get('fields', {}))}")
    unknown = sorted(account.get("unknown_fields", {}).items())[:MOST_FIELDS]
    lines += field_details(account.get("fields", {}))
    return [*lines, *(f"  unknown field {name}: {example}" for name, example in unknown)]
