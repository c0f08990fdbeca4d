"""How numbers are judged: against float64, by the error that plain torch makes in the same type.

A kernel's largest error may be twice that of the plain torch implementation, plus 1e-6, for every output and gradient:
a bound that tightens with the type and the shape, where a fixed tolerance proves nothing for one of them.
"""

from collections.abc import Callable, Sequence

import torch

DTYPES = (torch.float32, torch.bfloat16, torch.float16)

Arguments = Sequence[torch.Tensor]
Operation = Callable[..., torch.Tensor | tuple[torch.Tensor, ...]]


def run(operation: Operation, arguments: Arguments, gradients: Arguments, wide: bool = False) -> list[torch.Tensor]:
    """Outputs, then the gradients of all floating arguments that require one; in float64 if `wide`."""
    given = [
        (a.detach().double() if wide and a.is_floating_point() else a.detach()).requires_grad_(a.requires_grad)
        for a in arguments
    ]
    outputs = operation(*given)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    wanted = [a for a in given if a.requires_grad]
    upstream = [g.double() if wide else g for g in gradients]
    found = torch.autograd.grad(outputs, wanted, upstream) if wanted else ()
    return [*(o.detach() for o in outputs), *found]


def check_errors(ours: Arguments, plain: Arguments, exact: Arguments) -> None:
    """Assert err(ours) <= 2 err(plain) + 1e-6 for each pair, every element finite."""
    for index, (o, p, e) in enumerate(zip(ours, plain, exact, strict=True)):
        assert o.shape == e.shape, index
        assert o.dtype == p.dtype, index
        if not e.numel():
            continue
        assert torch.isfinite(o).all(), f"output {index}: an element is missing or not finite"
        error, allowed = (o.double() - e).abs().max().item(), (p.double() - e).abs().max().item()
        assert error <= 2 * allowed + 1e-6, f"output {index}: error {error:.3g}, plain torch makes {allowed:.3g}"


def check(ours: Operation, plain: Operation, arguments: Arguments, gradients: Arguments) -> None:
    """Compare an operation with plain torch and with float64, outputs and all gradients."""
    check_errors(
        run(ours, arguments, gradients), run(plain, arguments, gradients), run(plain, arguments, gradients, wide=True)
    )


def strided(x: torch.Tensor, row_gap: int, column_step: int = 1) -> torch.Tensor:
    """The same values with `row_gap` unused elements (NaN) after each row, columns `column_step` apart."""
    rows, width = x.shape
    store = torch.full((rows, width * column_step + row_gap), float("nan"), dtype=x.dtype)
    view = store[:, : width * column_step : column_step]
    view.copy_(x.detach())
    return view.requires_grad_(x.requires_grad)
