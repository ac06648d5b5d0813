"""What a program of the tutorial is, and how its numbers are compared."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from cnnkernels import is_native_available, use_backend

#: Anything that numpy turns into an array of numbers: a float, a list, a shape, a tensor.
Value = Any
Values = Mapping[str, Value]
#: Counts and sizes stay integers; everything else is float64.
Array = NDArray[Any]


@dataclass(frozen=True)
class Program:
    """One program of the tutorial.

    Attributes:
        name: what ``--only`` takes.
        chapter: 1 or 2.
        title: heading of the program's table.
        explanation: what the program shows, in a few sentences.
        printed: the values that the chapter prints, by quantity; a quantity that the chapter
            does not print is left out.
        by_hand: computes every quantity without torch, in float64, by explicit sums.
        compute: computes the same quantities with the package, on the backend in force.
        tolerance: the largest relative difference that counts as agreement. The default is
            eight units in the last place of float32.
        tolerances: the quantities that have a tolerance of their own.
        scale: what differences are relative to; by default the largest value of the row.
    """

    name: str
    chapter: int
    title: str
    explanation: str
    by_hand: Callable[[], Values]
    compute: Callable[[], Values]
    printed: Values = field(default_factory=dict)
    tolerance: float = 8 * 2.0**-23
    tolerances: Mapping[str, float] = field(default_factory=dict)
    scale: float | None = None


@dataclass(frozen=True)
class Row:
    """One quantity, computed in up to four ways.

    Attributes:
        quantity: the quantity's name.
        chapter: the chapter's value, or None where it prints none.
        by_hand: the float64 value by hand.
        fallback: the value of the ``"torch"`` backend.
        kernel: the value of the ``"native"`` backend, or None without the compiled library.
        difference: the largest difference from ``by_hand``, relative to the largest value (or to
            the program's scale); NaN if a value is NaN and infinite if shapes differ.
        agrees: whether the difference is within the quantity's tolerance.
    """

    quantity: str
    chapter: Array | None
    by_hand: Array
    fallback: Array
    kernel: Array | None
    difference: float
    agrees: bool


def run_program(program: Program) -> list[Row]:
    """Run ``program`` by hand and on every available backend.

    Returns:
        One row a quantity, in the order of ``program.by_hand``.

    Raises:
        KeyError: a backend did not compute one of the quantities.
    """
    by_hand = program.by_hand()
    with use_backend("torch"):
        fallback = program.compute()
    kernel: Values | None = None
    if is_native_available():
        with use_backend("native"):
            kernel = program.compute()

    rows = []
    for quantity, exact in by_hand.items():
        reference = _to_array(exact)
        printed = _to_array(program.printed[quantity]) if quantity in program.printed else None
        torchs = _to_array(fallback[quantity])
        natives = None if kernel is None else _to_array(kernel[quantity])
        scale = program.scale or float(np.abs(reference).max()) or 1.0
        # np.max passes NaN on, which compares as disagreement.
        difference = float(
            np.max(
                [
                    _difference(value, reference) / scale
                    for value in (printed, torchs, natives)
                    if value is not None
                ]
            )
        )
        agrees = difference <= program.tolerances.get(quantity, program.tolerance)
        rows.append(Row(quantity, printed, reference, torchs, natives, difference, agrees))
    return rows


def _to_array(value: Value) -> Array:
    if isinstance(value, torch.Tensor):
        value = value.detach().cpu()
    array = np.asarray(value)
    return array.astype(np.int64 if array.dtype.kind in "iu" else np.float64)


def _difference(value: Array, reference: Array) -> float:
    if value.shape != reference.shape:
        return float("inf")
    return float(np.abs(value - reference).max())
