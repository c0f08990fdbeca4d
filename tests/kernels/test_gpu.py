"""The compiled kernels on a real card: the same bound on errors as in the interpreter, in a process that compiles."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

#: Every operator at two presets' widths and a ragged one, all types, on a card; one small shape elsewhere.
CHECK = """
import sys
import torch
from kernel_checks import DTYPES, check, check_errors
from lumina import kernels
from lumina.kernels import reference as plain

device = sys.argv[1]
torch.manual_seed(0)


def normal(dtype, *size):
    return torch.randn(size, device=device).to(dtype).requires_grad_()


types, shapes = (DTYPES, ((65, 123), (257, 768), (33, 2048))) if device == "cuda" else (DTYPES[1:2], ((9, 123),))
for dtype in types:
    for rows, width in shapes:
        x, residual, weight, dy = (normal(dtype, *s) for s in ((rows, width), (rows, width), (width,), (rows, width)))
        norm = lambda k: lambda x, r, w: k.add_rms_norm(x, r, w, 1e-5)
        check(norm(kernels), norm(plain), [x, residual, weight], [dy.detach(), dy.detach()])
        check(kernels.swiglu, plain.swiglu, [normal(dtype, rows, 2 * width)], [dy.detach()])
        logits, targets = 3 * x.detach(), torch.randint(0, width, (rows,), device=device)
        weights, found = torch.rand(rows, device=device), []
        for k, given in ((kernels, logits.clone()), (plain, logits.clone()), (plain, logits.double())):
            found.append((k.cross_entropy_(given, targets, weights), given))
        check_errors(*found)
    qkv, angles = normal(dtype, 2, 7, 8, 64), torch.rand(50, 32, device=device)
    positions = torch.randint(0, 50, (2, 7), device=device)
    rotate = lambda k: lambda x, c, s: k.rope(x[:, :, :4], x[:, :, 4:6], c, s, positions)
    gradients = [torch.randn(2, 7, n, 64, device=device).to(dtype) for n in (4, 2)]
    check(rotate(kernels), rotate(plain), [qkv, angles.cos(), angles.sin()], gradients)
print("done")
"""


def run(device: str, **environment: str) -> subprocess.CompletedProcess[str]:
    clean = {k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET", "LUMINA_KERNELS")}
    return subprocess.run(
        [sys.executable, "-c", CHECK, device],
        capture_output=True,
        text=True,
        env=clean | {"PYTHONPATH": str(Path(__file__).parent)} | environment,
    )


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_compiled_kernels_on_the_card() -> None:
    ended = run("cuda")
    assert ended.stdout == "done\n", ended.stderr


def test_the_check_itself_runs_in_the_interpreter() -> None:
    ended = run("cpu", LUMINA_KERNELS="interpret")
    assert ended.stdout == "done\n", ended.stderr
