"""What the kernels are to reach on an H100, and whether measured rows do."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from ..cases import FORWARD
from ..timing import geometric_mean
from . import block, convolution, max_pool2d, optimizer
from .operation import CHANNELS_LAST, NCHW, SAME
from .precision import FP16, FP32
from .rows import OURS, Row

_MILLION = 1_000_000


@dataclass(frozen=True)
class Goal:
    """A bound on a figure of some rows."""

    text: str
    bound: float
    chosen: Callable[[Row], bool]
    figure: Callable[[Row], float | None]


@dataclass(frozen=True)
class Verdict:
    """How the rows of a goal do. ``worst`` is the least figure and ``worst_row`` has it."""

    goal: Goal
    rows: int
    reached: int
    mean: float
    worst: float
    worst_row: str

    @property
    def holds(self) -> bool:
        """Whether every row reaches the bound."""
        return self.reached == self.rows


def _optimizer_of(parameters: int) -> Callable[[Row], bool]:
    names = {optimizer.case_name(parameters, tensors) for tensors in optimizer.TENSORS}
    return lambda row: row.suite == optimizer.SUITE and row.name in names


def _with_momentum(chosen: Callable[[Row], bool]) -> Callable[[Row], bool]:
    """Without it torch's default is one pass over the same bytes: nothing is twice as fast."""
    return lambda row: chosen(row) and row.mode.endswith(optimizer.MOMENTUM_RULE)


def _pooling(mode: str) -> Callable[[Row], bool]:
    return lambda row: row.suite == max_pool2d.SUITE and row.mode == mode


def _convolution(*modes: str, kinds: tuple[str, ...] = convolution.KINDS) -> Callable[[Row], bool]:
    return lambda row: row.suite == convolution.SUITE and row.mode in modes and row.kind in kinds


def _of_dtype(dtype: str, chosen: Callable[[Row], bool]) -> Callable[[Row], bool]:
    return lambda row: row.dtype == dtype and chosen(row)


def _block(row: Row) -> bool:
    return row.suite == block.SUITE


def _block_beside_inductor(row: Row) -> bool:
    """Where there is no Inductor, nothing is missed."""
    return _block(row) and block.INDUCTOR not in row.missing


def _ratio(name: str) -> Callable[[Row], float | None]:
    def figure(row: Row) -> float | None:
        comparison = row.comparisons.get(name)
        return None if comparison is None else comparison.ratio.median

    return figure


def _least_of_formats(row: Row) -> float | None:
    figures = [_ratio(layout)(row) for layout in (NCHW, CHANNELS_LAST)]
    found = [figure for figure in figures if figure is not None]
    return min(found, default=None)


def _share(row: Row) -> float | None:
    ours = row.measured.get(OURS)
    return None if ours is None else ours.share


GOALS = (
    Goal("optimizer, 25M: share of copy bandwidth", 0.85, _optimizer_of(25 * _MILLION), _share),
    Goal(
        "optimizer with momentum, 25M: against torch's default (foreach)",
        2.0,
        _with_momentum(_optimizer_of(25 * _MILLION)),
        _ratio("foreach"),
    ),
    Goal("optimizer, 25M: against fused=True", 1.0, _optimizer_of(25 * _MILLION), _ratio("fused")),
    Goal("optimizer, 1M: against fused=True", 1.5, _optimizer_of(_MILLION), _ratio("fused")),
    Goal(
        "pooling, forward: in the format of torch's faster",
        1.3,
        _pooling(FORWARD),
        _ratio(SAME),
    ),
    Goal(
        "pooling, backward: in the format of torch's faster",
        1.8,
        _pooling(max_pool2d.BACKWARD),
        _ratio(SAME),
    ),
    Goal(
        "first layers, forward: in both formats",
        1.2,
        _convolution(FORWARD, kinds=(convolution.FIRST,)),
        _least_of_formats,
    ),
    Goal(
        "depthwise, forward: in both formats",
        1.2,
        _convolution(FORWARD, kinds=(convolution.DEPTHWISE,)),
        _least_of_formats,
    ),
    Goal(
        "fp16, up to 128 channels, forward with bias: NCHW",
        1.3,
        _of_dtype(FP16, _convolution(FORWARD, kinds=(convolution.NARROW,))),
        _ratio(NCHW),
    ),
    Goal(
        "fp16, up to 128 channels, forward with bias from NCHW: against cuDNN's kernel in NHWC",
        0.8,
        _of_dtype(FP16, _convolution(FORWARD, kinds=(convolution.NARROW,))),
        _ratio(convolution.CUDNN_ALONE),
    ),
    Goal(
        "strict fp32, forward: in the format of torch's faster",
        1.3,
        _of_dtype(FP32, _convolution(FORWARD)),
        _ratio(SAME),
    ),
    Goal(
        "convolution, backward and each gradient: NCHW",
        1.0,
        _convolution(convolution.BACKWARD, convolution.INPUT_GRADIENT, convolution.WEIGHT_GRADIENT),
        _ratio(NCHW),
    ),
    Goal("block: in the format of torch's faster", 1.5, _block, _ratio(SAME)),
    Goal("block: against Inductor", 1.1, _block_beside_inductor, _ratio(block.INDUCTOR)),
)
"""Device time, in one run: ratios are torch's time over ours."""


def verdicts(rows: Iterable[Row]) -> list[Verdict]:
    """A verdict for each goal that has rows."""
    rows = list(rows)
    found = []
    for goal in GOALS:
        figures = [(goal.figure(row), row) for row in rows if goal.chosen(row)]
        measured = [(figure, row) for figure, row in figures if figure is not None]
        if not measured:
            continue
        worst, row = min(measured, key=lambda pair: pair[0])
        found.append(
            Verdict(
                goal=goal,
                rows=len(figures),  # one that failed has reached nothing
                reached=sum(figure >= goal.bound for figure, _ in measured),
                mean=geometric_mean([figure for figure, _ in measured]),
                worst=worst,
                worst_row=", ".join(
                    part for part in (row.name, _batch(row.batch), row.dtype, row.mode) if part
                ),
            )
        )
    return found


def _batch(batch: int | None) -> str:
    return "" if batch is None else f"batch {batch}"
