"""Sequence parallelism, tiles and offloading broken on purpose; a test must catch each.

    python -m tests.model.parallel.mutations [WORD ...]

A mutant is a copy of the tree with one replacement, in which the tests named beside it are run. One that passes them is
a hole in the tests; so is a run of the unbroken tree that fails. Exit status 0 when every mutant is caught. Words
select mutants by name.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from tests.runs import clean_environment

ROOT = Path(__file__).parents[3]
COPIED = ("lumina", "kernels", "tests", "ds_configs")
FILES = ("pyproject.toml", "setup.py")

MODEL = "tests/model/parallel/test_sequence.py"
LOADER = "tests/data/loading/test_loader.py"
TENSORS = "tests/data/loading/test_tensors.py"
TILES = "tests/model/memory/test_tiles.py"
HEADS = "tests/model/memory/test_head_groups.py"
OFFLOAD = "tests/model/memory/test_offload.py"
RUN = "tests/runs/test_sequence.py::test_two_ranks_that_share_rows"


@dataclass(frozen=True)
class Mutation:
    """Replace `old`, which occurs once, by `new` in lumina/`file`; `tests` must then fail."""

    name: str
    file: str
    old: str
    new: str
    tests: str = MODEL


_SEQUENCE, _TENSORS, _PAIRS = "model/parallel/sequence.py", "data/loading/tensors.py", "model/preference.py"
_ROWS, _PART = "data/loading/dataset.py", "data/loading/part.py"
_TILES, _OFFLOAD, _GROUPS = "model/memory/tiles.py", "model/memory/offload.py", "model/memory/head_groups.py"
MUTATIONS = (
    # --- the exchange
    Mutation("heads dealt out in turn", _SEQUENCE, "_repeated(x, size).reshape(length, size, -1, width)",
             "_repeated(x, size).reshape(length, -1, size, width).transpose(1, 2)"),
    Mutation("heads put back in another order", _SEQUENCE, "parts_PTnd.transpose(0, 1).reshape(",
             "parts_PTnd.reshape("),
    Mutation("tokens interleaved", _SEQUENCE, "parts_PTnd, 2)).flatten(0, 1)",
             "parts_PTnd, 2)).transpose(0, 1).flatten(0, 1)"),
    Mutation("key/value heads repeated in turn", _SEQUENCE, "x_1TKd.repeat_interleave(times, 2)",
             "x_1TKd.repeat(1, 1, times, 1)"),
    Mutation("keys and values swapped", _SEQUENCE, "(q_1THd, k_1TKd, v_1TKd)))", "(q_1THd, v_1TKd, k_1TKd)))"),
    Mutation("gradients not sent back", _SEQUENCE, "_all_to_all(grads[0], ctx.sequence)", "grads[0]"),
    # --- attention
    Mutation("documents' mask ignored", "model/attention.py", "docs=replace(docs, sequence=None)", "docs=None"),
    Mutation("scale, window and cap ignored", "model/attention.py", ", scoring=scoring), q_BSHd", "), q_BSHd"),
    # --- the parts of a row
    Mutation("positions from the part's beginning", _ROWS, "ranges(first_D, first_D + lengths_D)",
             "ranges(0 * first_D, lengths_D)", TENSORS),
    Mutation("targets of the first part", _TENSORS, "batch.targets_T[where_N]", "batch.targets_T[where_N - start]"),
    Mutation("parts begin a token early", _ROWS, "np.maximum(start - bounds[:-1], 0)",
             "np.maximum(start - 1 - bounds[:-1], 0)", TENSORS),
    Mutation("a part's last token is not learned", _ROWS, "stop + 1 - bounds[:-1]", "stop - bounds[:-1]", TENSORS),
    Mutation("padding for whole tiles of the row alone", _PART, "round_up(-(-tokens // self.count))",
             "round_up(tokens) // self.count"),
    Mutation("pairs counted on every rank", _TENSORS, "if part.first else 0.0", "if part.count else 0.0"),
    # --- pairs
    Mutation("an answer's log-probability of one part", _PAIRS, "sequence.sum(found_P2)", "found_P2"),
    Mutation("a pair's loss on every rank", _PAIRS, "sequence is not None and not sequence.first", "False"),
    # --- a run
    Mutation("samples counted on every rank", "data/loading/loader.py", "if not self.part.first:", "if False:", LOADER),
    Mutation("loss divided by the groups", "train/step.py", "run.ranks.world / max(", "run.ranks.data_world / max(",
             RUN),
    Mutation("samples dealt out to ranks", "train/loop.py", "rank=run.ranks.data_rank", "rank=run.ranks.rank", RUN),
    Mutation("whole rows in evaluation", "train/evaluate.py", "read_rows(dataset, share, ranks.part)",
             "dataset.batch(share)", RUN),
    # --- tiles of tokens
    Mutation("tiles overlap by a token", _TILES, "min(start + tile, tokens)", "min(start + tile + 1, tokens)", TILES),
    Mutation("a tile's last token left out", _TILES, "min(start + tile, tokens)", "min(start + tile - 1, tokens)",
             TILES),
    Mutation("the last tile twice", _TILES, "range(0, tokens, tile))",
             "[*range(0, tokens, tile), (tokens - 1) // tile * tile])", TILES),
    Mutation("the last tile skipped", _TILES, "range(0, tokens, tile))", "range(0, tokens - tile, tile))", TILES),
    Mutation("weight gradient of the first tile alone", _TILES, "total.add_(gradient)", "pass", TILES),
    Mutation("weight gradients added up in bfloat16", _TILES, "torch.promote_types(g.dtype, torch.float32)", "g.dtype",
             TILES),
    Mutation("the residual's gradient lost", _TILES, "ddelta_TD[part][None], dtotal_TD[part][None]",
             "ddelta_TD[part][None], 0 * dtotal_TD[part][None]", TILES),
    Mutation("what is recomputed is computed again", _TILES, "        if recomputing:", "        if False:", TILES),
    # --- groups of heads
    Mutation("queries of the first group for all", _GROUPS, "slice(number * count, (number + 1) * count)",
             "slice(0, count)", HEADS),
    Mutation("keys of the first group for all", _GROUPS, "first = queries + number * count", "first = queries", HEADS),
    Mutation("values where keys are", _GROUPS, "slice(first + keys, first + keys + count))",
             "slice(first, first + count))", HEADS),
    Mutation("attention's result for queries", _GROUPS, "projected = heads.project(heads.queries(number))",
             "projected = o_BShd.clone()", HEADS),
    Mutation("queries projected for the group before", _GROUPS, "heads.project(heads.queries(number))",
             "heads.project(heads.queries(max(number - 1, 0)))", HEADS),
    Mutation("the gradient of the first group's result", _GROUPS, "grads[0][:, :, heads.queries(number)]",
             "grads[0][:, :, heads.queries(0)]", HEADS),
    Mutation("values' gradient lost", _GROUPS, "strict=True):\n            slot.copy_(gradient)",
             "strict=True):\n            slot.copy_(gradient * (slot is not v_BShd))", HEADS),
    Mutation("norms' gradient of the last group alone", _GROUPS, "total.add_(gradient)", "total.copy_(gradient)",
             HEADS),
    Mutation("operands kept", _GROUPS, "            kept.tensor, kept.layout = None, _Layout(name,",
             "            kept.layout = _Layout(name,", HEADS),
    Mutation("the exchange's result for this rank's tokens", _GROUPS, "else self.sequence.to_tokens(o_BShd)",
             "else self.sequence.to_tokens(o_BShd).flip(1)"),
    # --- recomputed layers
    Mutation("what is a sum already is not told", "model/memory/recompute.py", "summed=not first", "summed=False",
             "tests/model/test_recompute.py"),
    # --- inputs on the host
    Mutation("a buffer given up while it is used", _OFFLOAD, "        self._begin(copy.view(), tensor, tensor)\n",
             "        self._begin(copy.view(), tensor, tensor)\n        self._free.append(copy.buffer)\n", OFFLOAD),
    Mutation("the copy before this one", _OFFLOAD, "        if copy.found is None:\n",
             "        copy = (copy.before and copy.before()) or copy\n        if copy.found is None:\n", OFFLOAD),
    Mutation("the input is kept beside its copy", _OFFLOAD, "self.shape, self.device = ",
             "self.kept, self.shape, self.device = tensor, ", OFFLOAD),
)  # fmt: skip


def mutated(mutation: Mutation, source: str) -> str:
    """The file's text with the replacement made. Raises ValueError where its text is not there once."""
    if (found := source.count(mutation.old)) != 1:
        raise ValueError(f"{mutation.name}: its text occurs {found} times in lumina/{mutation.file}")
    return source.replace(mutation.old, mutation.new)


def passes(folder: Path, tests: list[str]) -> bool:
    """Whether the tests pass in the tree there."""
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", "-m", "not long", *tests]
    environment = clean_environment() | {"PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    if done.returncode > 1:
        raise SystemExit(f"error: pytest could not run {tests} ({done.returncode}):\n{done.stdout[-3000:]}")
    return done.returncode == 0


def main(words: list[str]) -> int:
    """Run the mutants whose names contain a word (all without words); returns the exit status."""
    chosen = [m for m in MUTATIONS if not words or any(word in m.name for word in words)]
    missed = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for one in COPIED:
            shutil.copytree(ROOT / one, folder / one, ignore=shutil.ignore_patterns("__pycache__"))
        for one in FILES:
            shutil.copy(ROOT / one, folder)
        if not passes(folder, sorted({m.tests for m in chosen})):
            print("the unbroken tree fails the tests that are to catch mutants")
            return 1
        for mutation in chosen:
            path = folder / "lumina" / mutation.file
            source = path.read_text()
            path.write_text(mutated(mutation, source))
            caught = not passes(folder, [mutation.tests])
            path.write_text(source)
            missed += [] if caught else [mutation.name]
            print(f"{'caught' if caught else 'MISSED'}  {mutation.name}", flush=True)
    print(f"{len(chosen) - len(missed)} of {len(chosen)} mutants caught")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
