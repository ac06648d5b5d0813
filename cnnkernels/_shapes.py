"""The arithmetic of window sizes that the pure-PyTorch operators and the autograd rules share."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

# An int for both directions, or (vertical, horizontal).
Size2 = int | tuple[int, ...] | list[int]


def pair(value: Size2) -> tuple[int, int]:
    """An int or a sequence of one or two ints, as torch broadcasts ``int[2]`` arguments."""
    if isinstance(value, (int, torch.SymInt)):
        return value, value
    return (value[0], value[-1])


def stride_or_kernel(stride: Size2 | None, kernel_size: Size2) -> tuple[int, int]:
    """A pool's stride: None and an empty sequence stand for the kernel size."""
    if stride is None or (not isinstance(stride, int) and len(stride) == 0):
        return pair(kernel_size)
    return pair(stride)


def conv2d_output_size(
    input_size: Sequence[int],
    weight_size: Sequence[int],
    stride: Size2,
    padding: Size2,
    dilation: Size2,
) -> list[int]:
    """The size of conv2d's output for a batched or an unbatched input."""
    spatial = [
        (size + 2 * p - d * (k - 1) - 1) // s + 1
        for size, k, s, p, d in zip(
            input_size[-2:],
            weight_size[-2:],
            pair(stride),
            pair(padding),
            pair(dilation),
            strict=True,
        )
    ]
    return [*input_size[:-3], weight_size[0], *spatial]


def resolve_padding(
    input: Tensor,
    weight: Tensor,
    stride: Size2,
    padding: Size2 | str,
    dilation: Size2,
) -> tuple[Tensor, tuple[int, int]]:
    """Turns ``"same"`` and ``"valid"`` into numbers of zeros that both sides share.

    An odd total of ``"same"`` puts the extra zero on the right and below, as torch does; that one
    is added to the returned input.
    """
    if not isinstance(padding, str):
        return input, pair(padding)
    if padding == "valid":
        return input, (0, 0)
    if padding != "same":
        raise RuntimeError(f"padding must be 'same' or 'valid', got {padding!r}")
    if pair(stride) != (1, 1):
        raise RuntimeError("padding='same' is not supported for strided convolutions")
    (dh, dw), (kh, kw) = pair(dilation), weight.shape[-2:]
    totals = dh * (kh - 1), dw * (kw - 1)
    if totals[0] % 2 or totals[1] % 2:
        input = F.pad(input, (0, totals[1] % 2, 0, totals[0] % 2))
    return input, (totals[0] // 2, totals[1] // 2)
