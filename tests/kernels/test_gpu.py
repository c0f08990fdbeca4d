"""The compiled kernels on a real card: the same bound on errors as in the interpreter, in a process that compiles."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
#: Every operator at two presets' widths and a ragged one, all types, on a card; one small shape elsewhere.
CHECK = """
import sys
from pathlib import Path
import torch
from tests.kernels.kernel_checks import DTYPES, every_operator

device = sys.argv[1]
torch.manual_seed(0)
types, shapes = (DTYPES, ((65, 123), (257, 768), (33, 2048))) if device == "cuda" else (DTYPES[1:2], ((9, 123),))
checked = [check() for t in types for shape in shapes for _, check in every_operator(device, t, *shape)]
assert len(checked) == 4 * len(types) * len(shapes)
print("done")
"""


def run(device: str, **environment: str) -> subprocess.CompletedProcess[str]:
    clean = {k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET", "LUMINA_KERNELS")}
    return subprocess.run(
        [sys.executable, "-c", CHECK, device],
        capture_output=True,
        text=True,
        env=clean | environment,
        cwd=ROOT,
    )


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_compiled_kernels_on_the_card() -> None:
    ended = run("cuda")
    assert ended.stdout == "done\n", ended.stderr


def test_the_check_itself_runs_in_the_interpreter() -> None:
    ended = run("cpu", LUMINA_KERNELS="interpret")
    assert ended.stdout == "done\n", ended.stderr
