"""How numbers are judged: against float64, by the error that plain torch makes in the same type.

A kernel's largest error may be twice that of the plain torch implementation, plus 1e-6, for every output and gradient:
a bound that tightens with the type and the shape, where a fixed tolerance proves nothing for one of them.
"""

from collections.abc import Callable, Iterator, Sequence

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


def every_operator(device: str, dtype: torch.dtype, rows: int, width: int) -> Iterator[tuple[str, Callable[[], None]]]:
    """(name, check) of each operator, forward and backward, on random inputs; a check raises AssertionError."""
    from lumina.kernels import reference as plain

    from lumina import kernels

    def normal(*size: int) -> torch.Tensor:
        return torch.randn(size, device=device).to(dtype).requires_grad_()

    x, residual, dy = (normal(rows, width) for _ in range(3))
    weight, gradient = normal(width), dy.detach()

    def norm(side):
        return lambda x, r, w: side.add_rms_norm(x, r, w, 1e-5)

    yield "add_rms_norm", lambda: check(norm(kernels), norm(plain), [x, residual, weight], [gradient, gradient])
    yield "swiglu", lambda: check(kernels.swiglu, plain.swiglu, [normal(rows, 2 * width)], [gradient])

    def cross_entropy() -> None:
        logits, targets = 3 * x.detach(), torch.randint(0, width, (rows,), device=device)
        weights, found = torch.rand(rows, device=device), []
        for side, given in ((kernels, logits.clone()), (plain, logits.clone()), (plain, logits.double())):
            found.append((side.cross_entropy_(given, targets, weights), given))
        check_errors(*found)

    yield "cross_entropy", cross_entropy
    qkv, angles = normal(2, 7, 8, 64), torch.rand(50, 32, device=device)
    positions = torch.randint(0, 50, (2, 7), device=device)

    def rotate(side):
        return lambda x, c, s: side.rope(x[:, :, :4], x[:, :, 4:6], c, s, positions)

    gradients = [torch.randn(2, 7, n, 64, device=device).to(dtype) for n in (4, 2)]
    yield "rope", lambda: check(rotate(kernels), rotate(plain), [qkv, angles.cos(), angles.sin()], gradients)
