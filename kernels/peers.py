"""The benchmark on a GPU: our kernels beside torch eager, torch.compile and Liger (where installed).

Each side gets the same inputs and is timed by `timing.py`: the device's time, by graph replay, over sets of inputs that
together pass the L2 twice over. The bandwidth is told as a fraction of a plain copy measured the same way.
"""

from __future__ import annotations

import functools
import platform
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import triton

from .benchmark import BENCHMARKS, Case, Function
from .timing import Step, Timed, copy_time, device_seconds


@dataclass(frozen=True)
class Measurement:
    """One side of one case: its time, None where it has none and `note` says why; the bytes that our kernels move; and
    the seconds of a copy of as many."""

    case: Case
    side: str
    timed: Timed | None
    bytes: int
    copy: float
    note: str = ""

    def fields(self) -> dict[str, str | int | float | None]:
        """Flat, for CSV and the printed table: median microseconds, GB/s of the bytes our kernels move, the fraction of
        a copy's, and how it was timed."""
        timed = self.timed
        notes = [self.note] if timed is None else [timed.how, *([] if timed.past_cache else ["in L2"])]
        return {
            "shape": self.case.shape.name,
            "op": self.case.op,
            "direction": self.case.direction,
            "dtype": str(self.case.dtype).removeprefix("torch."),
            "rows": self.case.rows,
            "width": self.case.width,
            "side": self.side,
            "us": None if timed is None else round(timed.seconds * 1e6, 2),
            "spread": None if timed is None else round(timed.spread, 3),
            "GB/s": None if timed is None else round(self.bytes / timed.seconds / 1e9, 1),
            "of_copy": None if timed is None else round(self.copy / timed.seconds, 3),
            "timed": ", ".join(notes),
        }


def liger(op: str) -> Function | None:
    """Liger's function with our arguments; None where it has none or is not installed."""
    get = BENCHMARKS[op].liger
    try:
        return None if get is None else get()
    except ImportError:
        return None


def step_of(function: Function, case: Case, device: str) -> Step:
    """The timed step of one side on fresh inputs: its forward without a graph, or the backward of one made before."""
    arguments = BENCHMARKS[case.op].arguments(case, device)
    if case.direction != "backward":

        def forward() -> Any:
            with torch.no_grad():
                return function(*arguments)

        return forward
    wanted = [a for a in arguments if isinstance(a, torch.Tensor) and a.requires_grad]
    outputs = function(*arguments)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    gradients = [torch.randn_like(output) for output in outputs]
    return lambda: torch.autograd.grad(outputs, wanted, gradients, retain_graph=True)


def compiled(function: Function, backend: str = "inductor") -> Function:
    """torch.compile of this function for the one shape that it is given next.

    torch compiles a function for eight shapes and then runs it eagerly without a word: what was compiled before is
    forgotten here, and `really_compiled` tells afterwards.
    """
    import torch._dynamo.utils
    import torch._functorch.config as functorch

    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    functorch.donated_buffer = False  # a backward pass is timed many times over one graph
    return torch.compile(function, dynamic=False, fullgraph=True, backend=backend)


def really_compiled() -> bool:
    """Whether the function that `compiled` gave last has run as one graph, without a part left to eager torch."""
    from torch._dynamo.utils import counters

    return bool(counters["stats"]["unique_graphs"] == 1 and not counters["graph_break"])


def sides_of(case: Case, device: str) -> dict[str, Callable[[], Function]]:
    """How to get each side's function, ours first. Made only when its turn comes: compiling forgets what was compiled
    before."""
    of_op = BENCHMARKS[case.op]
    sides: dict[str, Callable[[], Function]] = {"lumina": lambda: of_op.ours, "eager": lambda: of_op.eager}
    if device.startswith("cuda"):
        sides["compile"] = lambda: compiled(of_op.eager)
        peer = liger(case.op)
        if peer is not None:
            sides["liger"] = lambda: peer
    return sides


def measure(case: Case, device: str, repeats: int = 50) -> list[Measurement]:
    """Time every side of a case; ours first, a copy of as many bytes as our kernels move last, in the same run. A side
    that fails has no figures and says why."""
    moved = case.bytes(case.launches(device))
    copy = copy_time(moved, device, repeats)
    found = []
    for side, get in sides_of(case, device).items():
        try:
            function = get()
            timed = device_seconds(functools.partial(step_of, function, case, device), moved, device, repeats)
        except Exception as error:  # another library's: the other sides are still worth measuring
            if side in ("lumina", "eager"):
                raise
            found.append(Measurement(case, side, None, moved, copy.seconds, f"failed: {type(error).__name__}"))
            continue
        if side == "compile" and not really_compiled():
            found.append(Measurement(case, side, None, moved, copy.seconds, "not compiled"))
        else:
            found.append(Measurement(case, side, timed, moved, copy.seconds))
    return [*found, Measurement(case, "copy", copy, moved, copy.seconds)]


def environment() -> dict[str, str]:
    """What the figures were made on: device, driver and package versions."""
    found = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "machine": f"{platform.system()} {platform.machine()}",
    }
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        found["gpu"] = f"{properties.name}, {properties.multi_processor_count} multiprocessors"
        found["memory"] = f"{properties.total_memory / 2**30:.0f} GiB"
        found["cuda"] = str(torch.version.cuda)
    return found
