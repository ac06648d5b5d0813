"""How kernel tests judge: float64 is the truth, torch the measure of what rounding costs."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from conftest import runs_kernel
from torch import Tensor
from torch.nn import functional as F

from cnnkernels import functional

# The unit roundoff of each type: two roundings of a result are always allowed.
ROUNDOFF = {
    torch.float64: 2.0**-53,
    torch.float32: 2.0**-24,
    torch.bfloat16: 2.0**-8,
    torch.float16: 2.0**-11,
}
# A norm over fewer rounded numbers than this does not average roundings out: torch
# may be exact by luck. Such tensors may also err by two roundings of the sum of the
# absolute values of what was added up, which cancellation leaves behind. Zeros and
# other numbers that the type has, such as a bias over padding, are not rounded.
FEW = 64


def assert_close_to_truth(
    ours: Tensor, theirs: Tensor, truth: Tensor, magnitude: Tensor, what: str
) -> None:
    """Assert that ours is at most twice as far from float64 as torch's, in norm.

    magnitude is the truth for absolute values of all arguments. Sizes and dtypes must be torch's
    too. In float64 itself torch is the truth, and has roundings of its own: the two may differ by
    those that are allowed to each.
    """
    assert ours.shape == theirs.shape, what
    assert ours.dtype == theirs.dtype, what
    if truth.numel() == 0:
        return
    our_error = (ours.double() - truth).norm().item()
    their_error = (theirs.double() - truth).norm().item()
    roundoff = ROUNDOFF[ours.dtype]
    allowed = 2 * roundoff * truth.norm().item()
    # In 16 bits torch without oneDNN is no measure: it also rounds partial sums.
    if ours.dtype.itemsize > 2:
        allowed = max(allowed, 2 * their_error)
    rounded = (truth.to(ours.dtype).double() != truth).sum()
    if ours.dtype == torch.float64:
        allowed = max(allowed, 2 * 2 * roundoff * magnitude.norm().item())
    elif rounded < FEW:
        allowed = max(allowed, 2 * roundoff * magnitude.norm().item())
    assert our_error <= allowed, (
        f"{what}: {our_error:.3g} from float64, torch {their_error:.3g}, allowed {allowed:.3g}"
    )


def with_gradients(
    function: Callable[..., Tensor], arguments: Sequence[Tensor | None], grad_output: Tensor | None
) -> tuple[Tensor, list[Tensor]]:
    """Return the output and, for a grad_output, the gradients of all tensor arguments."""
    leaves = [
        None if a is None else a.detach().clone(memory_format=torch.preserve_format)
        for a in arguments
    ]
    for leaf in leaves:
        if leaf is not None:
            leaf.requires_grad_(grad_output is not None)
    output = function(*leaves)
    if grad_output is None:
        return output.detach(), []
    wanted = [leaf for leaf in leaves if leaf is not None]
    gradients = torch.autograd.grad(output, wanted, grad_output.to(output.dtype))
    return output.detach(), list(gradients)


@contextlib.contextmanager
def onednn(enabled: bool) -> Iterator[None]:
    """Let torch use oneDNN inside the block, or not; an outer block that forbids it prevails."""
    before = torch.backends.mkldnn.enabled
    torch.backends.mkldnn.enabled = before and enabled
    try:
        yield
    finally:
        torch.backends.mkldnn.enabled = before


def reads_only_padding(size: int, kernel: int, stride: int, padding: int, dilation: int) -> bool:
    """Whether a row of outputs lies over no element of the input."""
    rows = (size + 2 * padding - dilation * (kernel - 1) - 1) // stride + 1
    first_taps = (row * stride - padding for row in range(rows))
    return any(
        not any(0 <= first + tap * dilation < size for tap in range(kernel)) for first in first_taps
    )


def in_both_formats(tensor: Tensor) -> bool:
    """Whether the tensor is NCHW and channels_last at once, as one pixel or one channel is."""
    return all(
        tensor.dim() == 4 and tensor.is_contiguous(memory_format=memory_format)
        for memory_format in (torch.contiguous_format, torch.channels_last)
    )


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
    magnitude, magnitude_gradients = with_gradients(
        theirs, [None if a is None else a.abs() for a in double], grad_output.abs()
    )
    # The oneDNN of torch 2.13 writes past its memory in weight gradients of strided 1x1
    # convolutions, with two threads; it frees memory twice in some convolutions in 16 bits.
    pointwise = any(a is not None and a.dim() == 4 and a.shape[2:] == (1, 1) for a in arguments[1:])
    with onednn(dtype.itemsize > 2 and not pointwise):
        with_onednn = torch.backends.mkldnn.enabled and dtype != torch.float64
        torch_output, torch_gradients = with_gradients(theirs, arguments, grad_output)
    output, gradients = with_gradients(ours, arguments, grad_output)
    # Without oneDNN torch leaves what is in both formats as its kernel made it.
    if with_onednn or not in_both_formats(torch_output):
        assert output.stride() == torch_output.stride(), f"{what}: strides"
    else:
        assert in_both_formats(output), f"{what}: strides"
    assert_close_to_truth(output, torch_output, truth, magnitude, what)
    names = ["input", "weight", "bias"]
    for name, *tensors in zip(
        names, gradients, torch_gradients, truth_gradients, magnitude_gradients, strict=False
    ):
        assert_close_to_truth(*tensors, f"{what}: gradient of {name}")


def compare_conv2d(arguments: Sequence[Tensor | None], options: dict[str, Any], what: str) -> None:
    """Compare convolutions with options, and assert that native kernels ran both ways."""
    with runs_kernel("conv2d", "conv2d_backward"):
        compare(
            lambda x, w, b=None: functional.conv2d(x, w, b, **options),
            lambda x, w, b=None: F.conv2d(x, w, b, **options),
            arguments,
            what,
        )
