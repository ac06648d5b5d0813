"""From a case to a row: time the candidates, find each side's fastest, judge its error."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from resource import RUSAGE_SELF, getrusage
from time import perf_counter

import numpy as np
import torch
from numpy.typing import NDArray

from .accuracy import accuracy_inputs, median_error
from .cases import OURS, TORCH, Candidate, Case, Row, Side, Workload
from .native import kernel_calls
from .timing import Sampling, interleave, ratio_spread


def measure(case: Case, sampling: Sampling, *, threads: int, seed: int = 0) -> Row:
    """Measure a case with ``threads`` threads, which stay set.

    Raises RuntimeError when a native plan was announced but the kernels were not reached.
    """
    torch.set_num_threads(threads)
    workload = case.prepare()
    end_count = _count_interruptions()
    times = interleave(workload.candidates, sampling, seed)
    interruptions = end_count()
    medians = np.median(times, axis=0)
    candidates = workload.candidates
    ours = _fastest(candidates, medians, OURS)
    peer = _fastest(candidates, medians, TORCH)
    same = _fastest(candidates, medians, OURS, layout=candidates[peer].layout)
    kernel, native = _kernel(workload, [candidates[ours], candidates[same]])
    references = [workload.reference(index) for index in range(accuracy_inputs(workload.inputs))]

    def side(index: int) -> Side:
        candidate = candidates[index]
        with candidate.context():
            error = median_error(candidate.results, references)
        return Side(candidate.label, candidate.layout, float(medians[index]), error)

    return Row(
        suite=case.suite,
        name=case.name,
        batch=case.batch,
        mode=case.mode,
        threads=threads,
        gradients=case.gradients,
        samples=len(times),
        ratio=ratio_spread(times[:, peer], times[:, ours]),
        same_layout_ratio=ratio_spread(times[:, peer], times[:, same]),
        ours=side(ours),
        torch=side(peer),
        kernel=kernel,
        native=native,
        interruptions=interruptions,
        seconds={
            which: {
                candidate.label: float(median)
                for candidate, median in zip(candidates, medians, strict=True)
                if candidate.side == which
            }
            for which in (OURS, TORCH)
        },
    )


def _count_interruptions() -> Callable[[], float]:
    """Starts to count how often other programs take a core away; the result tells, per second."""
    switches = getrusage(RUSAGE_SELF).ru_nivcsw
    begin = perf_counter()

    def count() -> float:
        return (getrusage(RUSAGE_SELF).ru_nivcsw - switches) / (perf_counter() - begin)

    return count


def _fastest(
    candidates: Sequence[Candidate],
    medians: NDArray[np.float64],
    side: str,
    layout: str | None = None,
) -> int:
    """The index of a side's fastest candidate, of those in ``layout`` if there are any."""
    indices = [index for index, candidate in enumerate(candidates) if candidate.side == side]
    matching = [index for index in indices if candidates[index].layout == layout]
    return min(matching or indices, key=lambda index: float(medians[index]))


def _kernel(workload: Workload, reported: Sequence[Candidate]) -> tuple[str, bool]:
    """The kernel that serves the first reported candidate, and whether all are native throughout.

    The label and kernel of another one are appended where it is delegated otherwise.
    """
    found = {candidate.label: _kernel_of(candidate, workload.kernels) for candidate in reported}
    (_, (kernel, native)), *others = found.items()
    delegated = [(label, name) for label, (name, is_native) in others if not is_native]
    notes = [f"{label}: {name}" for label, name in delegated if name != kernel]
    return "; ".join([kernel, *notes]), native and not delegated


def _kernel_of(candidate: Candidate, kernels: Sequence[str]) -> tuple[str, bool]:
    """The algorithm of a candidate, by the evidence of the call counters."""
    before = kernel_calls()
    with candidate.context():
        candidate.call(0)
    after = kernel_calls()
    missing = [name for name in kernels if after.get(name, 0) == before.get(name, 0)]
    if not missing:
        return candidate.plan or "native", True
    if kernels[0] in missing and candidate.plan not in ("", "aten"):
        raise RuntimeError(
            f"the plan for {candidate.label} is {candidate.plan!r}, but {kernels[0]} ran no kernel"
        )
    if len(missing) == len(kernels):
        return "aten", False
    return "aten: " + ", ".join(missing), False
