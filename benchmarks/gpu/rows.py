"""The vocabulary: what is compared on a device, and what a comparison yields."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field

from ..cases import Spread

OURS = "ours"
TORCH = "torch"

Pairs = dict[str, tuple[str, str]]


@dataclass(frozen=True)
class Contender:
    """One way of doing a case's work.

    ``call(i)`` does it once on the i-th of the rotating inputs; ``context`` is entered around the
    calls, outside of the timing. ``layout`` is the memory format of its data, "" where there is
    none to choose. ``plan`` is what ``cnnkernels.explain`` announces for one of ours: "aten" where
    it delegates, "" where a suite does not ask.
    """

    label: str
    side: str
    call: Callable[[int], object]
    layout: str = ""
    context: Callable[[], AbstractContextManager[object]] = contextlib.nullcontext
    plan: str = ""


@dataclass(frozen=True)
class Workload:
    """A case made ready.

    ``bytes_moved`` is what the formula of the suite says a call must read and write, and ``flops``
    what it must compute; 0 where a suite does not say. ``arithmetic`` names the precision whose
    matrix product is the ceiling of ``flops``. ``errors`` returns each contender's distance
    from float64, by label, ``exact`` whether our values are torch's (None: not asked), and
    ``figures`` what a suite has to tell besides, by name. ``pairs`` names the ratios of a row: from
    the median times by label to (ours, peer) by name. ``missing`` has the contenders that this
    machine does not offer, by label, with the reasons.
    """

    contenders: tuple[Contender, ...]
    rotation: int
    bytes_each: int
    bytes_moved: int = 0
    flops: int = 0
    arithmetic: str = ""
    errors: Callable[[], dict[str, float]] = dict
    exact: Callable[[], bool | None] = lambda: None
    figures: Callable[[], dict[str, float]] = dict
    pairs: Callable[[Mapping[str, float]], Pairs] = lambda medians: {}
    missing: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Case:
    """One row to be measured. ``prepare`` allocates its tensors, so it is called when due.

    ``kind`` is the class of layers that goals speak of, "" where a suite has none.
    """

    suite: str
    name: str
    batch: int | None
    dtype: str
    mode: str
    prepare: Callable[[], Workload]
    wall: bool = True
    kind: str = ""

    @property
    def title(self) -> str:
        """The case in a line."""
        batch = "" if self.batch is None else f"batch {self.batch}"
        return " ".join(
            part for part in (self.suite, self.name, batch, self.dtype, self.mode) if part
        )


@dataclass(frozen=True)
class Measured:
    """A contender's times and error.

    ``seconds`` is the device's time for a call; ``wall_seconds`` is what the program waits when it
    makes the call eagerly, many in a row (None: not measured). ``method`` tells how ``seconds`` was
    taken: "graph", or "eager" where a graph could not be captured, for the ``reason``. ``share`` is
    of the copy bandwidth, ``teraflops`` per second, and ``matmul_share`` of the rate of a matrix
    product of the same precision.
    """

    label: str
    side: str
    layout: str
    method: str
    reason: str
    seconds: Spread
    wall_seconds: float | None
    error: float | None
    share: float | None
    teraflops: float | None
    matmul_share: float | None = None
    plan: str = ""


@dataclass(frozen=True)
class Comparison:
    """The peer's time over ours, of the device and of the program that waits."""

    ours: str
    peer: str
    ratio: Spread
    wall_ratio: float | None


@dataclass(frozen=True)
class Row:
    """What was measured for a case, or the ``failure`` that prevented it.

    ``cold`` says whether the rotating copies exceed twice the second-level cache. ``native`` says,
    by the library's own counters, whether all of ours ran kernels of this package and not ATen's
    (None: there are none of ours). ``missing`` and ``figures`` are the workload's.
    """

    suite: str
    name: str
    batch: int | None
    dtype: str
    mode: str
    kind: str = ""
    rounds: int = 0
    rotation: int = 0
    cold: bool = False
    exact: bool | None = None
    native: bool | None = None
    measured: dict[str, Measured] = field(default_factory=dict)
    comparisons: dict[str, Comparison] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)
    figures: dict[str, float] = field(default_factory=dict)
    failure: str = ""
