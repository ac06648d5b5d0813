"""The vocabulary of the benchmark: what is compared, and what a comparison yields."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from torch import Tensor

FORWARD = "forward"
FORWARD_BACKWARD = "forward+backward"
STEP = "step"

DISTURBING_INTERRUPTIONS = 10.0

OURS = "ours"
TORCH = "torch"


@dataclass(frozen=True)
class Options:
    """What the user asked for, as far as a suite needs to know it.

    ``batches`` is None for each suite's own default; ``shapes`` names the layer files of the
    ``conv2d`` suite, whose tensors are of ``dtype``; ``quick`` keeps to the tutorial's rows.
    """

    batches: tuple[int, ...] | None = None
    modes: tuple[str, ...] = (FORWARD, FORWARD_BACKWARD)
    shapes: tuple[str, ...] = ("tutorial",)
    quick: bool = False
    dtype: torch.dtype = torch.float32
    seed: int = 0


@dataclass(frozen=True)
class Candidate:
    """One way of doing a case's work, by one side.

    ``call(i)`` does the work once on the i-th of several rotating inputs; it is what is timed.
    ``results(i)`` does it once and returns the outputs and gradients to be compared with float64.
    ``context`` is entered around the calls, outside of the timing.
    ``layout`` is the memory format of the data and ``variant`` tells apart candidates that share
    it, as torch's default and fused SGD do. ``plan`` is the algorithm that
    ``cnnkernels.explain`` announces for one of ours: "aten" when it delegates, "" where there is
    no single operator to ask about.
    """

    side: str
    layout: str
    call: Callable[[int], object]
    results: Callable[[int], tuple[Tensor, ...]]
    variant: str = ""
    plan: str = ""
    context: Callable[[], AbstractContextManager[object]] = contextlib.nullcontext

    @property
    def label(self) -> str:
        """The layout and the variant, whichever there are."""
        return " ".join(part for part in (self.layout, self.variant) if part)


@dataclass(frozen=True)
class Workload:
    """A case made ready: its candidates, and the float64 results that judge them.

    ``reference(i)`` returns what ``Candidate.results(i)`` returns, in float64, for
    ``i < inputs``. ``kernels`` names the entry points (keys of :func:`.native.kernel_calls`) that
    a native run of the case passes through.
    """

    candidates: tuple[Candidate, ...]
    reference: Callable[[int], tuple[Tensor, ...]]
    inputs: int
    kernels: tuple[str, ...]


@dataclass(frozen=True)
class Case:
    """One row to be measured. ``prepare`` allocates its tensors, so it is called when due."""

    suite: str
    name: str
    batch: int | None
    mode: str
    gradients: tuple[str, ...]
    prepare: Callable[[], Workload]


@dataclass(frozen=True)
class Spread:
    """A median and the interquartile range around it."""

    median: float
    low: float
    high: float


@dataclass(frozen=True)
class Side:
    """One side of a row: the candidate it is represented by, its time and its error.

    ``seconds`` is the median time of a call; ``error`` is relative to float64, in norm, the worst
    of the outputs and gradients.
    """

    label: str
    layout: str
    seconds: float
    error: float


@dataclass(frozen=True)
class Row:
    """What was measured for a case with a number of threads.

    ``ratio`` is torch's time over ours, each side in its fastest candidate: above 1, ours is
    faster. ``same_layout_ratio`` is the same with ours in the memory format of torch's fastest.
    ``kernel`` is the native algorithm, or names what was left to ATen, in which case ``native`` is
    False; both speak of the two candidates of ours that the ratios use. ``interruptions`` is how
    often a second other programs took a core away while the row was sampled. ``seconds`` holds the
    median of every candidate, by side and label.
    """

    suite: str
    name: str
    batch: int | None
    mode: str
    threads: int
    gradients: tuple[str, ...]
    samples: int
    ratio: Spread
    same_layout_ratio: Spread
    ours: Side
    torch: Side
    kernel: str
    native: bool
    interruptions: float
    seconds: dict[str, dict[str, float]]

    @property
    def disturbed(self) -> bool:
        """Whether other programs took so much of the time that the ratio is noise.

        An interruption lasts milliseconds, and a thread that waits for an interrupted one as long.
        """
        return self.interruptions > DISTURBING_INTERRUPTIONS

    @property
    def error_quotient(self) -> float:
        """Our error over torch's: 1 when both are exact, infinite when only torch is."""
        if self.torch.error == 0.0:
            return 1.0 if self.ours.error == 0.0 else float("inf")
        return self.ours.error / self.torch.error
