"""How kernel tests judge: float64 is the truth, torch the measure of what rounding costs."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

# An output of a low-precision type is rounded once; two results that differ by
# less than this many units of its last place are equally good.
EPSILONS = {
    torch.float64: 2.0**-53,
    torch.float32: 2.0**-24,
    torch.bfloat16: 2.0**-8,
    torch.float16: 2.0**-11,
}


def error(value: Tensor, truth: Tensor) -> float:
    """Return the distance from the truth in norm, relative to the truth's norm."""
    difference = (value.double() - truth).norm().item()
    return difference / max(truth.norm().item(), 1e-300)


def assert_close_to_truth(ours: Tensor, theirs: Tensor, truth: Tensor, what: str) -> None:
    """Assert that ours is at most twice as far from float64 as torch's.

    Sizes, dtypes and strides must be torch's too. Where torch is exact by luck (a sum of one
    product, say), one rounding of the result's type is allowed.
    """
    assert ours.shape == theirs.shape, what
    assert ours.dtype == theirs.dtype, what
    if truth.numel() == 0:
        return
    ours_error, theirs_error = error(ours, truth), error(theirs, truth)
    allowed = max(2 * theirs_error, EPSILONS[ours.dtype])
    assert ours_error <= allowed, (
        f"{what}: {ours_error:.3g} from float64, torch {theirs_error:.3g}"
    )


def with_gradients(
    function: Callable[..., Tensor], arguments: Sequence[Tensor | None], grad_output: Tensor | None
) -> tuple[Tensor, list[Tensor]]:
    """Return the output and, for a grad_output, the gradients of all tensor arguments."""
    leaves = [None if a is None else a.detach().clone(memory_format=torch.preserve_format) for a in arguments]
    for leaf in leaves:
        if leaf is not None:
            leaf.requires_grad_(grad_output is not None)
    output = function(*leaves)
    if grad_output is None:
        return output.detach(), []
    wanted = [leaf for leaf in leaves if leaf is not None]
    gradients = torch.autograd.grad(output, wanted, grad_output.to(output.dtype))
    return output.detach(), list(gradients)


def compare(
    ours: Callable[..., Tensor],
    theirs: Callable[..., Tensor],
    arguments: Sequence[Tensor | None],
    what: str,
) -> None:
    """Compare values, formats and all gradients of two functions, with float64 as the judge."""
    double = [None if a is None else a.double() for a in arguments]
    shape = theirs(*double).shape
    generator = torch.Generator().manual_seed(1)
    dtype = next(a.dtype for a in arguments if a is not None)
    # Gradients are rounded to the type first, so that all three get the same.
    grad_output = torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype).double()
    truth, truth_gradients = with_gradients(theirs, double, grad_output)
    torch_output, torch_gradients = with_gradients(theirs, arguments, grad_output)
    output, gradients = with_gradients(ours, arguments, grad_output)
    assert output.stride() == torch_output.stride(), f"{what}: strides"
    assert_close_to_truth(output, torch_output, truth, what)
    names = ["input", "weight", "bias"]
    for name, mine, torchs, true in zip(
        names, gradients, torch_gradients, truth_gradients, strict=False
    ):
        assert_close_to_truth(mine, torchs, true, f"{what}: gradient of {name}")
