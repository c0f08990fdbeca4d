"""Are the numbers right? Every kernel and the attention against float64, offloaded inputs, and the card's own two
ceilings."""

from __future__ import annotations

import itertools
import os
import sys

from day import ROOT, Day, timed


def main(day: Day) -> None:
    if day.rehearse:
        os.environ["LUMINA_KERNELS"] = "interpret"
    sys.path.insert(0, str(ROOT / "tests/kernels"))
    import kernel_checks
    import torch

    torch.manual_seed(0)
    device = "cpu" if day.rehearse else "cuda"
    if not day.rehearse:
        day.attempt("ceilings", lambda: ceilings(day))
    # Attention first: it is one kernel a type, the operators are some eighty compilations.
    for dtype in (torch.float32,) if day.rehearse else (torch.bfloat16, torch.float16, torch.float32):
        for size in (16,) if day.rehearse else (64, 128):
            case = f"attention {str(dtype)[6:]} head size {size}"
            day.attempt(case, lambda case=case, dtype=dtype, size=size: attention(day, case, device, dtype, size))
    for dtype in kernel_checks.DTYPES[1:2] if day.rehearse else kernel_checks.DTYPES:
        for rows, width in ((9, 123),) if day.rehearse else ((65, 123), (257, 768), (33, 2048), (17, 8192)):
            for name, check in kernel_checks.every_operator(device, dtype, rows, width):
                kernel_case(day, f"{name} {str(dtype)[6:]} {rows}x{width}", check)
    os.environ.pop("LUMINA_KERNELS", None)
    offloading(day, device)


def offloading(day: Day, device: str) -> None:
    """Recomputed layers' inputs on the host: the bits of kept ones, and few inputs on the card."""
    sys.path.insert(0, str(ROOT / "tests/model/memory"))
    import offload_checks

    for late in (None,) if day.rehearse else ("computation", "copies"):
        case = "offloaded inputs" + (f", late {late}" if late else "")
        kernel_case(day, case, lambda late=late: offload_checks.check_bits(device, late))
    if day.rehearse:
        day.skip("offloaded inputs on the card", "a CPU keeps them where they are")
        return
    held = day.attempt("offloaded inputs on the card", offload_checks.most_held)
    if held is not None:
        ok = held[0] <= offload_checks.FORWARD and held[1] <= offload_checks.BACKWARD
        day.check("offloaded inputs on the card", ok, forward=held[0], backward=held[1])


def kernel_case(day: Day, case: str, check) -> None:
    """A check that raises AssertionError is a wrong number; anything else is a failure of its own."""
    try:
        check()
        day.check(case, True)
    except AssertionError as error:
        day.check(case, False, error=str(error))
    except Exception as error:
        day.check(case, False, error=f"{type(error).__name__}: {error}"[:300])


def ceilings(day: Day) -> None:
    """What the card reaches at most: a large copy, bytes read and written, and a large product of random numbers."""
    import torch
    from lumina.kernels.timing import copy_time, device_seconds

    size = 4 * 2**30
    day.record("copy of 4 GiB in all", gb_per_s=size / copy_time(size, "cuda", 10).seconds / 1e9)
    edge = 8192

    def make():
        a, b = (torch.randn(edge, edge, device="cuda", dtype=torch.bfloat16) for _ in range(2))
        return lambda: a @ b

    product = device_seconds(make, 6 * edge * edge, "cuda", 10)
    day.record("bf16 product 8192^3", tflop_per_s=2 * edge**3 / product.seconds / 1e12, timed=product.how)


def plain(q_SHd, k_SKd, v_SKd):
    """Causal attention of one document, written out: in the inputs' type, softmax in float32 or wider."""
    import torch

    group = q_SHd.shape[1] // k_SKd.shape[1]
    q, k, v = q_SHd.transpose(0, 1), *(x.repeat_interleave(group, 1).transpose(0, 1) for x in (k_SKd, v_SKd))
    scores = q @ k.transpose(1, 2) / q.shape[-1] ** 0.5
    hidden = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).triu(1)
    wide = torch.promote_types(scores.dtype, torch.float32)
    return (scores.masked_fill(hidden, float("-inf")).to(wide).softmax(-1).to(q.dtype) @ v).transpose(0, 1)


def attention(day: Day, case: str, device: str, dtype, size: int) -> None:
    """Forward and gradients over ragged documents, 8 heads over 2, by the house's bound: twice plain torch's error."""
    import kernel_checks
    import torch

    from lumina.model.attention import Documents
    from lumina.model.attention import attention as ours

    lengths = (5, 17, 1, 10) if day.rehearse else (1, 700, 129, 3, 1215)
    heads, kv = (4, 2) if day.rehearse else (8, 2)
    edges = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    total = sum(lengths)
    given = [torch.randn(total, n, size, device=device).to(dtype).requires_grad_() for n in (heads, kv, kv)]
    gradient = torch.randn(total, heads, size, device=device).to(dtype)
    ids = torch.zeros(1, total, dtype=torch.int64, device=device)
    documents = Documents.of(ids, edges.to(device), max(lengths), tuple(edges.tolist()))

    def lumina(*qkv):
        return ours(*(x[None] for x in qkv), documents)[0]

    def by_document(*qkv):
        bounds = edges.tolist()
        parts = [plain(*(x[a:b] for x in qkv)) for a, b in itertools.pairwise(bounds)]
        return torch.cat(parts)

    exact = kernel_checks.run(by_document, given, [gradient], wide=True)
    found = {}
    for name, function in (("error", lumina), ("plain_error", by_document)):
        outputs = kernel_checks.run(function, given, [gradient])
        found[name] = [float((o.double() - e).abs().max()) for o, e in zip(outputs, exact, strict=True)]
    ok = all(a <= 2 * b + 1e-5 for a, b in zip(found["error"], found["plain_error"], strict=True))
    for name, errors in found.items():
        found[name] = " ".join(f"{error:.2e}" for error in errors)
    seconds = timed(lambda: kernel_checks.run(lumina, given, [gradient]))
    day.check(case, ok, order="out dq dk dv", **found, ms=seconds * 1e3)
