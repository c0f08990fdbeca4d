"""Deliberately broken kernels, each of which a test must catch:  python -m tests.kernels.mutations [WORD ...]

A mutant is a copy of kernels/ with one replacement, imported in place of the real one by a forked process that runs the
few tests named beside it. A mutant that passes them is a hole in the tests; so is a run of the unbroken kernels that
fails. Exit status 0 when every mutant is caught. Words select mutants by name.
"""

import contextlib
import gc
import io
import os
import shutil
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).parent
KERNELS = HERE.parents[1] / "kernels"


@dataclass(frozen=True)
class Mutation:
    """Replace `old`, which occurs once (or more, if `every`), by `new` in kernels/`file`; `tests` must then fail."""

    name: str
    file: str
    old: str
    new: str
    tests: str
    every: bool = False


NORM, ROPE, SWIGLU, ENTROPY, LAUNCH, PLANS = (
    f"test_{name}.py" for name in ("rms_norm", "rope", "swiglu", "cross_entropy", "launch", "plans")
)
# One shape of the tests that go over many: a mutant's death must not take long.
NORM_FILE = "rms_norm_kernels.py"
NORM_NUMBERS = f"{NORM}::test_add_norm_and_its_gradients[7-123-dtype1]"
NORM_ROWS = f"{NORM}::test_add_norm_and_its_gradients[513-256-dtype1]"
ROPE_NUMBERS = f"{ROPE}::test_rotation_and_its_gradient[65-4-4-48-dtype1]"
SWIGLU_NUMBERS = f"{SWIGLU}::test_product_and_its_gradient[33-1408-dtype1]"
ENTROPY_NUMBERS = f"{ENTROPY}::test_losses_and_gradients[7-123-dtype1]"

MUTATIONS = (
    # --- a mask dropped
    Mutation("norm: rows not masked", NORM_FILE, "(row_R < rows)[:, None]", "(row_R < rows + 1)[:, None]",
             f"{LAUNCH}::test_norm_writes_nothing_outside", every=True),
    Mutation("norm: columns not masked", NORM_FILE, "inside_W = col_W < width", "inside_W = col_W < width + 1",
             f"{LAUNCH}::test_norm_writes_nothing_outside", every=True),
    Mutation("rope: tokens not masked", "rope.py", "there_T = token_T < tokens", "there_T = token_T < tokens + 1",
             f"{LAUNCH}::test_rope_writes_nothing_outside"),
    Mutation("rope: heads not masked", "rope.py", "tl.where(head < heads, half, 0)", "half",
             f"{LAUNCH}::test_rope_writes_nothing_outside"),
    Mutation("rope: positions not bounded", "rope.py", "(position_T < table)", "(position_T <= table)",
             f"{ROPE}::test_position_outside_the_table_is_nan_and_the_rest_is_not"),
    Mutation("swiglu: columns not masked", "swiglu.py", "(col_F < width)", "(col_F < width + 1)",
             f"{LAUNCH}::test_swiglu_writes_nothing_outside", every=True),
    Mutation("cross entropy: padding counts as logit 0", "cross_entropy.py",
             'mask=here_KV < width, other=float("-inf")', "mask=here_KV < width, other=0.0", ENTROPY_NUMBERS),
    # --- a wrong constant or formula
    Mutation("norm: eps doubled", NORM_FILE, "/ width + eps)", "/ width + 2 * eps)",
             f"{NORM}::test_drawn_shapes_strides_and_eps", every=True),
    Mutation("norm: mean over the padded width", NORM_FILE, "tl.sum(x_RW * x_RW, axis=1) / width",
             "tl.sum(x_RW * x_RW, axis=1) / COLS", NORM_NUMBERS),
    Mutation("norm backward: no mean term", NORM_FILE, "- n_RW * mean_R[:, None]", "- 0.0 * n_RW * mean_R[:, None]",
             NORM_NUMBERS),
    Mutation("norm backward: residual's gradient lost", NORM_FILE, "dx_RW += tl.load(", "dx_RW += 0.0 * tl.load(",
             NORM_NUMBERS),
    Mutation("norm backward: sums in the input's type", NORM_FILE, "partial_RW += dy32_RW * n_RW",
             "partial_RW = (partial_RW + dy32_RW * n_RW).to(dx_ptr.dtype.element_ty).to(tl.float32)", NORM_NUMBERS),
    Mutation("norm backward: last partial lost", NORM_FILE, "(partial_R < partials)", "(partial_R < partials - 1)",
             NORM_ROWS),
    Mutation("norm backward: the same row again where none is prefetched", NORM_FILE,
             "if not PREFETCH:\n            next_x_RW = tl.load(x_ptr + next_R[:, None]",
             "if not PREFETCH:\n            next_x_RW = tl.load(x_ptr + row_R[:, None]",
             f"{NORM}::test_norm_and_its_gradients[19-5504-dtype0]"),
    Mutation("norm backward: partials added by atomics", NORM_FILE,
             "tl.store(partial_ptr + program * width + col_W, tl.sum(partial_RW, axis=0), mask=inside_W)",
             "tl.atomic_add(partial_ptr + program * width + col_W, tl.sum(partial_RW, axis=0), mask=inside_W)",
             f"{NORM}::test_no_float_atomics_anywhere", every=True),
    Mutation("rope: turns the wrong way", "rope.py", "low_TD * cos_TD - high_TD", "low_TD * cos_TD + high_TD",
             ROPE_NUMBERS),
    Mutation("rope backward: turns on", "rope.py", "sin_TD = -sin_TD", "sin_TD = sin_TD + 0.0",
             ROPE_NUMBERS),
    Mutation("rope: place in the batch for the position", "rope.py", "angle_TD = position_T[:, None]",
             "angle_TD = (token_T % table)[:, None]", f"{ROPE}::test_drawn_shapes_and_packed_positions"),
    Mutation("swiglu backward: wrong derivative", "swiglu.py", "(1.0 - sigmoid_RF)", "sigmoid_RF",
             SWIGLU_NUMBERS),
    Mutation("cross entropy: running sum not rescaled", "cross_entropy.py", "total_V * tl.exp(most_V - higher_V)",
             "total_V", f"{ENTROPY}::test_rising_and_falling_rows"),
    Mutation("cross entropy: weights ignored", "cross_entropy.py", "dx_KV = weight * (", "dx_KV = 1.0 * (",
             ENTROPY_NUMBERS),
    Mutation("cross entropy: target's gradient lost", "cross_entropy.py", "tl.where(here_KV == target, 1.0, 0.0)",
             "0.0", ENTROPY_NUMBERS),
    # --- an unwritten tail
    Mutation("norm forward: last rows unwritten", NORM_FILE, "cdiv(rows, tile.rows),)",
             "max(1, rows // tile.rows),)", NORM_ROWS),
    Mutation("swiglu: last rows unwritten", "swiglu.py", "cdiv(rows, tile.rows) * blocks",
             "max(1, rows // tile.rows) * blocks", SWIGLU_NUMBERS, every=True),
    Mutation("rope: last tokens unwritten", "rope.py", "cdiv(batch * sequence, tile.rows)",
             "max(1, batch * sequence // tile.rows)", ROPE_NUMBERS),
    Mutation("cross entropy: first columns keep their logits", "cross_entropy.py", "for back in range(0, steps):",
             "for back in range(0, steps - 1):", ENTROPY_NUMBERS),
    Mutation("cross entropy: ignored rows keep their logits", "cross_entropy.py",
             "tl.store(row_ptr + here_KV, zero_KV, mask=here_KV < width)",
             "tl.store(row_ptr + here_KV, zero_KV, mask=here_KV < 0)",
             f"{ENTROPY}::test_strided_logits_leave_their_neighbours_alone"),
    # --- a 32-bit offset
    Mutation("norm forward: 32-bit rows", NORM_FILE, "row_R = tl.program_id(0).to(tl.int64)",
             "row_R = tl.program_id(0)", f"{LAUNCH}::test_norm_reads_and_writes_past_two_to_the_31"),
    Mutation("norm backward: 32-bit rows", NORM_FILE,
             "program = tl.program_id(0).to(tl.int64)\n    step = tl.num_programs(0).to(tl.int64)",
             "program = tl.program_id(0)\n    step = tl.num_programs(0)",
             f"{LAUNCH}::test_norm_reads_and_writes_past_two_to_the_31"),
    Mutation("rope: 32-bit tokens", "rope.py", "tl.program_id(0).to(tl.int64) * TOKENS", "tl.program_id(0) * TOKENS",
             f"{LAUNCH}::test_rope_reads_and_writes_past_two_to_the_31"),
    Mutation("rope: 32-bit heads", "rope.py", "head.to(tl.int64)", "head",
             f"{LAUNCH}::test_rope_reads_and_writes_past_two_to_the_31", every=True),
    Mutation("swiglu: 32-bit rows", "swiglu.py", "(program // blocks).to(tl.int64)", "(program // blocks)",
             f"{LAUNCH}::test_swiglu_reads_and_writes_past_two_to_the_31", every=True),
    Mutation("cross entropy: 32-bit rows", "cross_entropy.py", "tl.program_id(0).to(tl.int64)", "tl.program_id(0)",
             f"{LAUNCH}::test_cross_entropy_reads_and_writes_past_two_to_the_31"),
    # --- around the kernels
    Mutation("strides of columns ignored", "launch.py", "if x.stride(-1) != 1 and width != 1:", "if False:",
             f"{SWIGLU}::test_drawn_shapes_and_strides"),
    Mutation("in-place writes not counted", "launch.py", "args[:mutated])", "args[:0])",
             "test_operators.py::test_in_place_operators_count_versions"),
    Mutation("logits written without the dispatcher not counted", "cross_entropy.py", "launch.count_writes(logits)",
             "pass", f"{PLANS}::test_in_place_without_the_dispatcher_counts_versions"),
    Mutation("heads turned without the dispatcher not counted", "rope.py", "launch.count_writes(q, k)", "pass",
             f"{PLANS}::test_in_place_without_the_dispatcher_counts_versions"),
    Mutation("a mode that listens is not asked", "plans.py", "and torch._C._len_torch_dispatch_stack() == 0", "",
             f"{PLANS}::test_without_the_dispatcher_the_same_bits"),
    Mutation("tensors of other kinds taken for plain ones", "plans.py", "if type(tensor) not in _PLAIN", "if False",
             f"{PLANS}::test_who_must_see_an_operator_does"),
    Mutation("more per thread than registers hold", "launch.py", "(4096, 16) if backward", "(16384, 64) if backward",
             f"{LAUNCH}::test_norm_tiles"),
    Mutation("more programs than the bytes allow", NORM_FILE, "ROWS_PER_PROGRAM = 32", "ROWS_PER_PROGRAM = 2",
             f"{NORM}::test_backward_programs"),
)  # fmt: skip


def mutate(mutation: Mutation | None, folder: Path) -> None:
    """Put a package `lumina` with the (mutated) kernels into `folder`."""
    package = folder / "lumina" / "kernels"
    shutil.copytree(KERNELS, package, ignore=shutil.ignore_patterns("__pycache__"))
    (folder / "lumina" / "__init__.py").touch()
    if mutation is None:
        return
    source = (package / mutation.file).read_text()
    found = source.count(mutation.old)
    if found == 0 or (found > 1 and not mutation.every):
        raise SystemExit(f"error: {mutation.name}: its text occurs {found} times in kernels/{mutation.file}")
    (package / mutation.file).write_text(source.replace(mutation.old, mutation.new))


def passes(mutation: Mutation | None, tests: list[str]) -> bool:
    """Whether the tests pass with this mutant, in a forked process (a crash is a failure)."""
    import pytest

    with tempfile.TemporaryDirectory() as name:
        mutate(mutation, Path(name))
        child = os.fork()
        if child == 0:
            status = 99
            try:
                sys.path.insert(0, name)
                with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
                    options = ["-x", "-q", "-p", "no:cacheprovider", "-p", "no:faulthandler", "--no-header"]
                    status = int(pytest.main([*options, *(str(HERE / test) for test in tests)]))
                    import lumina.kernels

                    assert lumina.kernels.__file__.startswith(name)
            finally:
                os._exit(status)
        _, ended = os.waitpid(child, 0)
    code = os.waitstatus_to_exitcode(ended)
    if code > 1:
        raise SystemExit(
            f"error: {mutation.name if mutation else 'no mutation'}: pytest could not run {tests} ({code})"
        )
    return code == 0


def main(words: list[str]) -> int:
    """Run the mutants whose names contain a word (all without words); returns the exit status."""
    os.environ |= {"TRITON_INTERPRET": "1", "LUMINA_MUTANT": "1", "OMP_NUM_THREADS": "1"}
    os.environ["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"
    sys.dont_write_bytecode = True
    # What every child needs and no mutant changes is imported once, before the forks.
    import hypothesis  # noqa: F401
    import torch._inductor  # noqa: F401
    import triton.language  # noqa: F401

    gc.freeze()  # a child's collections then leave all of that alone
    chosen = [m for m in MUTATIONS if not words or any(word in m.name for word in words)]
    missed = []
    if not passes(None, sorted({m.tests for m in chosen})):
        print("the unbroken kernels fail the tests that are to catch mutants")
        return 1
    for mutation in chosen:
        start = time.perf_counter()
        caught = not passes(mutation, [mutation.tests])
        missed += [] if caught else [mutation.name]
        outcome = "caught" if caught else "MISSED"
        print(f"{outcome}  {mutation.name}  ({mutation.tests}, {time.perf_counter() - start:.1f} s)", flush=True)
    print(f"{len(chosen) - len(missed)} of {len(chosen)} mutants caught")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
