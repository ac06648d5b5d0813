"""How far results are from float64."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

_INPUTS = 3

Results = tuple[Tensor, ...]


def relative_error(results: Sequence[Tensor], reference: Sequence[Tensor]) -> float:
    """The worst of ``||y - y64|| / ||y64||`` over pairs of tensors; 0 for equal tensors.

    Raises ValueError when the tensors do not pair up in number and shape.
    """
    if [r.shape for r in results] != [r.shape for r in reference]:
        raise ValueError(
            f"results of shapes {[tuple(r.shape) for r in results]} cannot be compared with a "
            f"reference of shapes {[tuple(r.shape) for r in reference]}"
        )
    return max(_relative_error(ours, exact) for ours, exact in zip(results, reference, strict=True))


def accuracy_inputs(rotation: int) -> int:
    """How many of a workload's rotating inputs the error is the median of.

    Where two entries of a pooling window differ by no more than rounding, float32 may pick another
    winner than float64, and a gradient moves to a neighbour, for torch as for any float32 program.
    In small layers this befalls few inputs, and the median leaves it out; in large ones, which have
    few rotating inputs, it befalls all, on both sides, and one input is enough.
    """
    return _INPUTS if rotation >= _INPUTS else 1


def median_error(results: Callable[[int], Results], references: Sequence[Results]) -> float:
    """The median of :func:`relative_error` over the inputs that there are references for."""
    return statistics.median(
        relative_error(results(index), reference) for index, reference in enumerate(references)
    )


def _relative_error(result: Tensor, reference: Tensor) -> float:
    difference = torch.linalg.vector_norm(result.detach().double() - reference.detach())
    if difference == 0:
        return 0.0
    return float(difference / torch.linalg.vector_norm(reference.detach()))
