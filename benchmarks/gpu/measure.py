"""From a case to a row, and how fast the device copies and multiplies."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np
import torch

from ..cases import Spread
from ..native import kernel_calls
from ..timing import ratio_spread
from .device import Device
from .precision import PRECISIONS, Precision
from .rows import OURS, Case, Comparison, Contender, Measured, Row
from .timing import Sampling, device_rounds, device_sampler, event_seconds, wall_rounds

_COPY_BYTES = 2**30
_CEILING_SAMPLES = 15
# Of the matrices: so large that the product is the tensor cores' speed, and takes milliseconds.
_MATMUL_SIDE = 8192


@dataclass(frozen=True)
class Ceilings:
    """What the device can do, measured by torch: 0 or nothing in the dry run.

    ``copy`` is bytes read and written a second, ``matmul`` operations a second by precision.
    """

    copy: float = 0.0
    matmul: Mapping[str, float] = field(default_factory=dict)


def measure_ceilings(device: Device) -> Ceilings:
    """The copy bandwidth, and the rate of a matrix product in every precision."""
    if not device.is_cuda:
        return Ceilings()
    matmul = {precision.name: _matmul_rate(precision, device) for precision in PRECISIONS.values()}
    return Ceilings(_copy_bandwidth(device), matmul)


def _copy_bandwidth(device: Device) -> float:
    """Bytes read and written a second by ``copy_`` of a large buffer."""
    size = min(_COPY_BYTES, device.memory_bytes // 16)
    source = torch.ones(size // 4, device=device.kind)
    target = torch.empty_like(source)

    def copy() -> None:
        for _ in range(2):
            target.copy_(source)

    return 2 * 2 * size / _median_seconds(copy)


def _matmul_rate(precision: Precision, device: Device) -> float:
    """Operations a second of the product of two large matrices."""
    left, right = (
        torch.randn(_MATMUL_SIDE, _MATMUL_SIDE, device=device.kind, dtype=precision.dtype)
        for _ in range(2)
    )
    product = torch.empty_like(left)
    switches = torch.backends.cuda.matmul
    before = switches.allow_tf32
    switches.allow_tf32 = precision.allow_tf32
    try:
        seconds = _median_seconds(lambda: torch.mm(left, right, out=product))
    finally:
        switches.allow_tf32 = before
    return 2 * _MATMUL_SIDE**3 / seconds


def _median_seconds(work: Callable[[], object]) -> float:
    work()
    return float(np.median([event_seconds(work) for _ in range(_CEILING_SAMPLES)]))


def measure(
    case: Case, device: Device, sampling: Sampling, *, ceilings: Ceilings, seed: int = 0
) -> Row:
    """Measure a case; shares refer to the ceilings."""
    workload = case.prepare()
    contenders = workload.contenders
    samplers = [
        device_sampler(contender, workload.rotation, device, sampling.sample_seconds)
        for contender in contenders
    ]
    times = device_rounds(samplers, sampling, seed)
    wall: list[float] | None = None
    if case.wall:
        by_contender = wall_rounds(contenders, workload.rotation, device, sampling, seed)
        wall = [float(median) for median in np.median(by_contender, axis=0)]
    native = [_runs_kernel(c) for c in contenders if c.side == OURS]
    errors = workload.errors()
    matmul_rate = ceilings.matmul.get(workload.arithmetic, 0.0)
    measured = {}
    for index, contender in enumerate(contenders):
        seconds = _spread(times[:, index])
        rate = workload.flops / seconds.median
        measured[contender.label] = Measured(
            label=contender.label,
            side=contender.side,
            layout=contender.layout,
            method=samplers[index].method,
            reason=samplers[index].reason,
            seconds=seconds,
            wall_seconds=None if wall is None else wall[index],
            error=errors.get(contender.label),
            share=_share(workload.bytes_moved / seconds.median, ceilings.copy),
            teraflops=rate * 1e-12 if rate else None,
            matmul_share=_share(rate, matmul_rate),
            plan=contender.plan,
        )
    places = {contender.label: index for index, contender in enumerate(contenders)}

    def comparison(ours: str, peer: str) -> Comparison:
        return Comparison(
            ours,
            peer,
            ratio_spread(times[:, places[peer]], times[:, places[ours]]),
            None if wall is None else wall[places[peer]] / wall[places[ours]],
        )

    medians = {label: result.seconds.median for label, result in measured.items()}
    return Row(
        suite=case.suite,
        name=case.name,
        batch=case.batch,
        dtype=case.dtype,
        mode=case.mode,
        kind=case.kind,
        rounds=len(times),
        rotation=workload.rotation,
        cold=workload.rotation * workload.bytes_each >= 2 * device.cache_bytes,
        exact=workload.exact(),
        native=all(native) if native else None,
        measured=measured,
        comparisons={name: comparison(*pair) for name, pair in workload.pairs(medians).items()},
        missing=workload.missing,
        figures=workload.figures(),
    )


def failed(case: Case, reason: str) -> Row:
    """The row of a case that could not be measured."""
    return Row(case.suite, case.name, case.batch, case.dtype, case.mode, case.kind, failure=reason)


def _share(rate: float, ceiling: float) -> float | None:
    return rate / ceiling if rate and ceiling else None


def _runs_kernel(contender: Contender) -> bool:
    before = kernel_calls()
    with contender.context():
        contender.call(0)
    return any(count > before.get(name, 0) for name, count in kernel_calls().items())


def _spread(samples: np.ndarray) -> Spread:
    low, median, high = np.quantile(samples, (0.25, 0.5, 0.75))
    return Spread(median=float(median), low=float(low), high=float(high))
