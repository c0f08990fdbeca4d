"""torch.compile on the Triton path: no graph break in a training step, and no silent return to eager code.

On fake CUDA tensors, which need no card: a subprocess registers a device guard that does nothing where this build of
torch has none. What is compiled is also run, on the CPU in Triton's interpreter, and gives what eager code gives.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("lumina.model")
from lumina.config import ModelConfig
from lumina.model import Transformer, ops

SHAPE = {"hidden_size": 32, "num_heads": 4, "num_kv_heads": 2, "seq_length": 64, "vocab_size": 61, "num_layers": 4}

GUARD = """
#include <c10/core/impl/DeviceGuardImplInterface.h>
namespace c10::impl { C10_REGISTER_GUARD_IMPL(CUDA, NoOpDeviceGuardImpl<DeviceType::CUDA>); }
"""

#: Prints the graphs and breaks of a whole training step's forward pass, and the graphs of compiled blocks over twelve
#: batches that differ in tokens, documents and supervised positions.
FAKE = """
import ctypes, json, sys
import torch
if not torch.version.cuda:
    ctypes.CDLL(sys.argv[1])
from torch._dynamo.testing import CompileCounter
from torch._subclasses.fake_tensor import FakeTensorMode
from lumina.config import ModelConfig
from lumina.model import Transformer, attention, loss

loss._memory[torch.device("cuda:0")] = 80 * 2**30  # a fake card has no properties to ask for
torch.cuda.is_available, torch.cuda.get_device_capability = lambda: True, lambda device=None: (9, 0)
attention.bind()
assert attention._varlen_kernel(torch.bfloat16) is not None
torch.cuda.is_available = lambda: False
torch._dynamo.config.fail_on_recompile_limit_hit = True

def batch(n):
    make = lambda *size, dtype=torch.int64: torch.empty(*size, dtype=dtype, device="cuda:0")
    ids, bounds = make(1, 8 * n), make(n, dtype=torch.int32)
    wanted = make(64 * n), make(64 * n, dtype=torch.float32)
    host = {"supervised_N": make(64 * n), "bounds": tuple(range(n))}
    return (ids, torch.empty_like(ids), bounds, 8 + n, *wanted), host

with FakeTensorMode():
    with torch.device("cuda:0"):
        torch.set_default_dtype(torch.bfloat16)
        model = Transformer(ModelConfig(**json.loads(sys.argv[2])))
        torch.set_default_dtype(torch.float32)
    positional, named = batch(3)
    whole = torch._dynamo.explain(model)(*positional, **named)
    torch._dynamo.reset()
    counter = CompileCounter()
    model.compile_blocks(backend=counter, fullgraph=True)
    for n in range(2, 14):
        positional, named = batch(n)
        model(*positional, **named)
    print(whole.graph_count, whole.graph_break_count, counter.frame_count)
"""


def test_a_training_step_on_cuda_is_one_graph(tmp_path: Path) -> None:
    guard = tmp_path / "guard.so"
    if not torch.version.cuda:
        compiler = shutil.which("c++")
        if compiler is None:
            pytest.skip("no C++ compiler here to register a device guard for fake CUDA tensors")
        folder = Path(torch.__file__).parent
        words = ["-std=c++20", "-shared", "-fPIC", f"-I{folder}/include", f"-L{folder}/lib", "-xc++", "-", "-lc10"]
        subprocess.run([compiler, *words, "-o", str(guard)], input=GUARD, text=True, check=True)
    clean = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    ended = subprocess.run(
        [sys.executable, "-c", FAKE, str(guard), json.dumps(SHAPE)],
        capture_output=True,
        text=True,
        env=clean | {"LUMINA_KERNELS": "triton"},
    )
    assert ended.returncode == 0, ended.stderr
    graphs, breaks, of_blocks = map(int, ended.stdout.split())
    assert (graphs, breaks) == (1, 0)
    # The first block, without a residual, and one graph for all the others; none for another length.
    assert of_blocks == 2


@pytest.fixture
def interpreted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ops, "_chosen", "interpret")
    torch._dynamo.reset()


def step(model: Transformer, length: int) -> list[torch.Tensor]:
    """The loss and every gradient of one training step."""
    draw = torch.Generator().manual_seed(length)
    ids, targets = torch.randint(0, 61, (2, 1, length), generator=draw)
    model.zero_grad()
    loss = model(ids, torch.arange(length)[None], None, None, targets, torch.full((1, length), 1 / length))
    loss.backward()
    return [loss.detach(), *(p.grad.to_dense() for p in model.parameters())]


@pytest.mark.long
@pytest.mark.usefixtures("interpreted")
def test_compiled_blocks_train_as_eager_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch._dynamo.config, "fail_on_recompile_limit_hit", True)
    torch.use_deterministic_algorithms(False)  # poisoned memory would be traced into the graphs
    torch.manual_seed(0)
    eager = Transformer(ModelConfig(**SHAPE))
    compiled = Transformer(eager.config)
    compiled.load_state_dict(eager.state_dict())
    assert not compiled.compiled
    compiled.compile_blocks(backend="aot_eager", fullgraph=True)
    assert compiled.compiled
    for length in (5, 9, 12):
        for a, b in zip(step(compiled, length), step(eager, length), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
