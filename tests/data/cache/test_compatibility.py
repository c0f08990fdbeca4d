"""The cache's format: a run goes on with what an earlier version made, and what is made now has the same contents.

`of_0_1/` holds a file of ten lines and the caches that commit 93dd0ad made of it (truncated, a third held out,
duplicates removed).
"""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from lumina.chat import Tokenizer
from lumina.data import prepare_splits
from tests.data.helpers import Settings

TOKENIZER = Tokenizer.load("im-roles-1")  # what version 0.1.0 had
KEPT = Path(__file__).parent / "of_0_1"
SETTINGS = Settings(
    train_data=("data.jsonl",),
    seq_length=48,
    overlong="truncate",
    cache_dir="cache",
    eval_fraction=0.3,
    dedup="exact",
)
TRAIN = "6748f3774f0e1243cac81f40e6a22859a5a3c258c9eb4cad30916fbf187f4ade"
EVAL = "2d3474974d0bcf05865bcf57bd77c5ee5e0428ad2aa6fa62ef496483a29b64ca"


def files(folder: Path) -> dict[str, Path]:
    return {str(path.relative_to(folder)): path for path in folder.rglob("*") if path.suffix in (".json", ".arrow")}


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copy(KEPT / "data.jsonl", tmp_path)
    monkeypatch.chdir(tmp_path)


def test_a_run_goes_on_with_a_cache_of_before(tmp_path: Path) -> None:
    shutil.copytree(KEPT, "cache")
    kept = {name: path.stat().st_ino for name, path in files(tmp_path / "cache").items()}
    train, evaluation = prepare_splits(SETTINGS, TOKENIZER, resumed=TRAIN)
    assert evaluation is not None
    assert (train.fingerprint, evaluation.fingerprint) == (TRAIN, EVAL)
    now = {name: path.stat().st_ino for name, path in files(tmp_path / "cache").items()}
    assert {name: now[name] for name in kept} == kept, "nothing was made again"
    made = {path.name for path in (tmp_path / "cache").iterdir() if path.is_dir()}
    assert made == {path.name for path in KEPT.iterdir() if path.is_dir()}, "nothing was decided anew"
    assert "messages       18 = 3 supervised + 3 masked + 12 dropped" in evaluation.account_lines()
    assert "  dropped tokens: past seq_length (overlong: truncate): 6" in evaluation.account_lines()
    assert evaluation.seq_length == 48
    assert TOKENIZER.decode(train.chunks_of(0)[0].ids.tolist()).startswith("<|im_start|><|user|>question")


def test_what_is_made_now_holds_the_same_chunks(tmp_path: Path) -> None:
    """But for those without a supervised token."""
    shutil.copytree(KEPT, "cache")
    before, now = (prepare_splits(SETTINGS, TOKENIZER, resumed=resumed) for resumed in (TRAIN, None))
    for old, new in zip(before, now, strict=True):
        assert old is not None
        assert new is not None
        assert new.fingerprint != old.fingerprint
        held = [
            {
                (*map(bytes, (chunk.ids, chunk.mask)), chunk.line)
                for n in range(one.num_samples)
                for chunk in one.chunks_of(n)
            }
            for one in (old, new)
        ]
        assert held[1] == {chunk for chunk in held[0] if any(chunk[1])}
