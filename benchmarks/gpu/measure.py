"""From a case to a row, and how fast the device copies."""

from __future__ import annotations

import numpy as np
import torch

from ..cases import Spread
from ..native import kernel_calls
from ..timing import ratio_spread
from .device import Device
from .rows import OURS, Case, Comparison, Contender, Measured, Row
from .timing import Sampling, device_rounds, device_sampler, event_seconds, wall_rounds

_COPY_BYTES = 2**30
_COPY_SAMPLES = 15


def copy_bandwidth(device: Device) -> float:
    """Bytes read and written a second by ``copy_`` of a large buffer; the median of samples.

    0 in the dry run, where there is no such figure.
    """
    if not device.is_cuda:
        return 0.0
    size = min(_COPY_BYTES, device.memory_bytes // 16)
    source = torch.ones(size // 4, device=device.kind)
    target = torch.empty_like(source)

    def copy() -> None:
        for _ in range(2):
            target.copy_(source)

    copy()
    seconds = float(np.median([event_seconds(copy) for _ in range(_COPY_SAMPLES)])) / 2
    return 2 * size / seconds


def measure(
    case: Case, device: Device, sampling: Sampling, *, bandwidth: float, seed: int = 0
) -> Row:
    """Measure a case. ``bandwidth`` is the copy bandwidth that shares refer to; 0 gives none."""
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
    measured = {}
    for index, contender in enumerate(contenders):
        seconds = _spread(times[:, index])
        rate = bandwidth * seconds.median
        measured[contender.label] = Measured(
            label=contender.label,
            side=contender.side,
            layout=contender.layout,
            method=samplers[index].method,
            reason=samplers[index].reason,
            seconds=seconds,
            wall_seconds=None if wall is None else wall[index],
            error=errors.get(contender.label),
            share=workload.bytes_moved / rate if workload.bytes_moved and rate else None,
            teraflops=workload.flops / seconds.median * 1e-12 if workload.flops else None,
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
        rounds=len(times),
        rotation=workload.rotation,
        cold=workload.rotation * workload.bytes_each >= 2 * device.cache_bytes,
        exact=workload.exact(),
        native=all(native) if native else None,
        measured=measured,
        comparisons={name: comparison(*pair) for name, pair in workload.pairs(medians).items()},
    )


def failed(case: Case, reason: str) -> Row:
    """The row of a case that could not be measured."""
    return Row(case.suite, case.name, case.batch, case.dtype, case.mode, failure=reason)


def _runs_kernel(contender: Contender) -> bool:
    before = kernel_calls()
    with contender.context():
        contender.call(0)
    return any(count > before.get(name, 0) for name, count in kernel_calls().items())


def _spread(samples: np.ndarray) -> Spread:
    low, median, high = np.quantile(samples, (0.25, 0.5, 0.75))
    return Spread(median=float(median), low=float(low), high=float(high))
