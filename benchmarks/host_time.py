"""Host time of one layer on the Triton path: what Python and the launchers cost while a card would compute.

    python benchmarks/host_time.py                       this tree, and transformers' eager Llama layer beside it
    python benchmarks/host_time.py --against COMMIT      a commit and this tree in turn; the last line is the ratio

No card is needed. Triton's own launcher runs for an H100 against a `libcuda` that does nothing (null_cuda.c): kernels
are compiled, bound, looked up and handed to cuLaunchKernelEx, which counts them and returns. Tensors are one sequence
of 16 tokens in the host's memory, so small (width 64) that torch's own operators cost their dispatch and little else.

In the figure: everything the interpreter and torch do on the host for one `Block`, forward with its autograd graph, and
backward with all gradients: modules, dispatch, autograd, allocation of outputs, Triton's launch. The same for one
`LlamaDecoderLayer` of transformers (attention "sdpa", no cache), where that is installed.
Not in it: what cuLaunchKernel and cuBLAS cost inside the real driver (a few us a launch, for both alike), CUDA's
caching allocator (a host allocation instead), variable-length attention (scaled_dot_product_attention of one document
instead), the second thread that runs CUDA's backward, DeepSpeed's hooks. Torch's CPU operators compute a little, which
a card's do not.

Times are CPU time of the thread (other processes do not count, their caches do), the median of rounds, in microseconds.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
TOKENS, WIDTH, HEADS, KV_HEADS, FFN = 16, 64, 4, 2, 192


# ---------------------------------------------------------------- the null driver


def null_driver(folder: Path) -> ctypes.CDLL:
    """Build and load the null libcuda, and make Triton take it for an H100's; call before torch's first launch."""
    library = folder / "libcuda.so.1"
    subprocess.run(
        ["cc", "-O2", "-shared", "-fPIC", "-Wl,-soname,libcuda.so.1", str(HERE / "null_cuda.c"), "-o", str(library)],
        check=True,
    )
    os.environ["TRITON_LIBCUDA_PATH"] = str(folder)
    loaded = ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)
    loaded.null_cuda_launches.restype = ctypes.c_uint64
    import triton
    from triton.backends.nvidia.driver import CudaDriver

    driver = CudaDriver()
    driver.get_current_device = lambda: 0
    driver.get_current_stream = lambda device: 0
    driver.get_device_capability = lambda device=0: (9, 0)
    triton.runtime.driver.set_active(driver)
    return loaded


# ---------------------------------------------------------------- what is timed


class Timer:
    """Median thread time of a call, and the kernels that it launches."""

    def __init__(self, cuda: ctypes.CDLL, rounds: int, repeats: int) -> None:
        self.cuda, self.rounds, self.repeats = cuda, rounds, repeats

    def __call__(self, forward: Callable[[], Any], backward: Callable[[Any], Any] | None = None) -> dict[str, Any]:
        """Microseconds and launches of forward, and of backward given what forward returned."""
        times: dict[str, list[float]] = {"forward": [], "backward": []}
        for _ in range(3):
            out = forward()
            if backward is not None:
                backward(out)
        before = self.cuda.null_cuda_launches()
        out = forward()
        middle = self.cuda.null_cuda_launches()
        if backward is not None:
            backward(out)
        counts = middle - before, self.cuda.null_cuda_launches() - middle
        for _ in range(self.rounds):
            begun = time.thread_time_ns()
            outs = [forward() for _ in range(self.repeats)]
            ended = time.thread_time_ns()
            times["forward"].append((ended - begun) / self.repeats / 1e3)
            if backward is not None:
                for out in outs:
                    backward(out)
                times["backward"].append((time.thread_time_ns() - ended) / self.repeats / 1e3)
        found: dict[str, Any] = {"forward": statistics.median(times["forward"]), "launches": counts}
        if backward is not None:
            found["backward"] = statistics.median(times["backward"])
        return found


def ours(timer: Timer) -> dict[str, dict[str, Any]]:
    """One block, and each operator alone; a bare launch of Triton's beside them."""
    import torch
    from lumina.kernels import launch

    from lumina.config import load
    from lumina.model import ops
    from lumina.model.attention import Documents
    from lumina.model.transformer import Block

    launch.INTERPRETED = True  # tensors of the host are let through; nothing is interpreted
    shape = [f"hidden_size={WIDTH}", f"num_heads={HEADS}", f"num_kv_heads={KV_HEADS}"]
    config = load("nano", {}, shape)
    head = config.head_dim
    block = Block(config, 1)
    rotary = ops.Rotary.of(torch.arange(TOKENS)[None], head, config.rope_theta)
    documents = Documents(None, None, TOKENS)
    x, residual, weight = torch.randn(1, TOKENS, WIDTH), torch.randn(1, TOKENS, WIDTH), torch.ones(WIDTH)
    qkv = torch.randn(1, TOKENS, (HEADS + 2 * KV_HEADS), head)
    gate_up = torch.randn(1, TOKENS, 2 * FFN)
    given = [t.requires_grad_() for t in (x, residual, weight, qkv, gate_up)]
    q, k, _ = qkv.split((HEADS, KV_HEADS, KV_HEADS), dim=2)
    dx, dh = torch.randn_like(x), torch.randn(1, TOKENS, FFN)
    dq, dk = torch.randn(1, TOKENS, HEADS, head), torch.randn(1, TOKENS, KV_HEADS, head)
    parameters = list(block.parameters())

    def layer_backward(out: Any) -> None:
        torch.autograd.backward(out, (dx, dx))
        for t in (*parameters, *given):
            t.grad = None

    def back(*gradients: Any) -> Callable[[Any], None]:
        def run(out: Any) -> None:
            torch.autograd.backward(out, gradients if isinstance(out, tuple) else gradients[0])
            for t in given:
                t.grad = None

        return run

    found = {
        "layer": timer(lambda: block(x, residual, rotary, documents), layer_backward),
        "rms_norm": timer(lambda: ops.rms_norm(x, weight, 1e-5), back(dx)),
        "add_rms_norm": timer(lambda: ops.add_rms_norm(x, residual, weight, 1e-5), back(dx, dx)),
        "rope": timer(lambda: ops.rope(q, k, rotary), back(dq, dk)),
        "swiglu": timer(lambda: ops.swiglu(gate_up), back(dh)),
    }
    from lumina.kernels import swiglu as _  # noqa: F401  (the module, not the function of the same name)

    module = sys.modules["lumina.kernels.swiglu"]
    rows, h = gate_up.detach().view(TOKENS, -1), torch.empty(TOKENS, FFN)
    with torch.no_grad():
        run = module.forward_launch(rows, h)
        grid, options = run.grid, {**run.constants, "num_warps": run.warps}
        found["bare Triton launch"] = timer(lambda: run.kernel[grid](*run.args, **options))
    return found


def peer(timer: Timer) -> dict[str, dict[str, Any]]:
    """transformers' Llama layer of the same shape, eager."""
    try:
        import torch
        from transformers import LlamaConfig
        from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRotaryEmbedding
    except ImportError:
        return {}
    config = LlamaConfig(
        hidden_size=WIDTH, num_attention_heads=HEADS, num_key_value_heads=KV_HEADS, intermediate_size=FFN,
        attn_implementation="sdpa", use_cache=False,
    )  # fmt: skip
    layer = LlamaDecoderLayer(config, 0).train()
    x = torch.randn(1, TOKENS, WIDTH, requires_grad=True)
    dx, positions = torch.randn_like(x), torch.arange(TOKENS)[None]
    embeddings = LlamaRotaryEmbedding(config)(x, positions)
    parameters = list(layer.parameters())

    def forward() -> Any:
        out = layer(x, position_embeddings=embeddings, attention_mask=None)
        return out[0] if isinstance(out, tuple) else out

    def backward(out: Any) -> None:
        out.backward(dx)
        x.grad = None
        for parameter in parameters:
            parameter.grad = None

    return {"transformers' layer": timer(forward, backward)}


def worker(options: argparse.Namespace) -> None:
    """Measure the package that is first on the path and print a line of JSON."""
    import torch

    torch.set_num_threads(1)
    torch.set_flush_denormal(True)  # outputs that no kernel writes hold anything
    with tempfile.TemporaryDirectory() as name:
        timer = Timer(null_driver(Path(name)), options.rounds, options.repeats)
        found = ours(timer)
        if options.worker == "with peer":
            found |= peer(timer)
        print(json.dumps(found))


# ---------------------------------------------------------------- trees


def unpack(commit: str | None, folder: Path) -> None:
    """Lay `lumina` with its kernels out in a folder, as an import finds it: a commit's, or this working tree's."""
    root = HERE.parent
    if commit is None:
        for name in ("lumina", "kernels"):
            shutil.copytree(root / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    else:
        tar = subprocess.run(["git", "archive", commit, "lumina", "kernels"], cwd=root, check=True, capture_output=True)
        subprocess.run(["tar", "-x", "-C", str(folder)], input=tar.stdout, check=True)
    (folder / "kernels").rename(folder / "lumina" / "kernels")


def measure(folder: Path, options: argparse.Namespace, peer: bool) -> dict[str, dict[str, Any]]:
    """One process over a tree."""
    clean = {k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET", "LUMINA_KERNELS")}
    python = os.pathsep.join([str(folder), *filter(None, [clean.get("PYTHONPATH")])])
    words = ["--rounds", str(options.rounds), "--repeats", str(options.repeats)]
    ended = subprocess.run(
        [sys.executable, __file__, "--worker", "with peer" if peer else "alone", *words],
        env=clean | {"LUMINA_KERNELS": "triton", "PYTHONPATH": python, "OMP_NUM_THREADS": "1"},
        cwd=folder,
        capture_output=True,
        text=True,
    )
    if ended.returncode:
        raise SystemExit(f"error: the measurement failed:\n{ended.stderr}")
    found: dict[str, dict[str, Any]] = json.loads(ended.stdout.splitlines()[-1])
    return found


def merge(runs: list[dict[str, dict[str, Any]]]) -> dict[str, dict[str, Any]]:
    """The median of several runs, figure by figure."""
    merged: dict[str, dict[str, Any]] = {}
    for name, first in runs[0].items():
        merged[name] = {"launches": first["launches"]}
        for direction in ("forward", "backward"):
            if direction in first:
                merged[name][direction] = statistics.median(run[name][direction] for run in runs)
    return merged


def show(title: str, found: dict[str, dict[str, Any]]) -> None:
    """A table: microseconds and launches by direction."""
    print(f"{title:24} {'forward us':>11} {'launches':>9} {'backward us':>12} {'launches':>9}")
    for name, row in found.items():
        backward = f"{row['backward']:12.1f} {row['launches'][1]:9}" if "backward" in row else ""
        print(f"{name:24} {row['forward']:11.1f} {row['launches'][0]:9} {backward}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--against", metavar="COMMIT", help="measure this commit in turn with the working tree")
    parser.add_argument("--turns", type=int, default=5, help="processes per tree (default 5)")
    parser.add_argument("--rounds", type=int, default=30, help="timed rounds per figure and process (default 30)")
    parser.add_argument("--repeats", type=int, default=20, help="calls per round (default 20)")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        worker(options)
        return
    with tempfile.TemporaryDirectory() as name:
        trees = (
            {"this tree": None} if options.against is None else {options.against: options.against, "this tree": None}
        )
        for title, commit in trees.items():
            (Path(name) / title).mkdir()
            unpack(commit, Path(name) / title)
        runs: dict[str, list[dict[str, dict[str, Any]]]] = {title: [] for title in trees}
        for _ in range(options.turns):
            for title in trees:
                runs[title].append(measure(Path(name) / title, options, peer=title == "this tree"))
    merged = {title: merge(found) for title, found in runs.items()}
    for title, found in merged.items():
        show(title, found)
    after = merged["this tree"]["layer"]
    if options.against is None:
        print(f"a layer: {after['forward']:.0f} us forward, {after['backward']:.0f} us backward")
        return
    before = merged[options.against]["layer"]
    ratios = [before[direction] / after[direction] for direction in ("forward", "backward")]
    print(
        f"a layer: forward {before['forward']:.0f} -> {after['forward']:.0f} us ({ratios[0]:.2f} times less), "
        f"backward {before['backward']:.0f} -> {after['backward']:.0f} us ({ratios[1]:.2f} times less)"
    )


if __name__ == "__main__":
    main()
