"""Interleaved timing and the statistics of its samples.

``torch.utils.benchmark.Timer`` is not used: it times one statement in a block of its own and sets
the number of threads anew around each block, while a ratio on a shared machine needs both sides
sampled in turn, so that a slow moment falls on both. The clock is ``time.perf_counter_ns``.
"""

from __future__ import annotations

import gc
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from time import perf_counter_ns
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from .cases import Spread

MINIMUM_SAMPLES = 7


class Timed(Protocol):
    """What is timed: a call on the i-th rotating input, within a context."""

    @property
    def call(self) -> Callable[[int], object]:
        """Does the work once, on the input of that number modulo the number of inputs."""

    @property
    def context(self) -> Callable[[], AbstractContextManager[object]]:
        """Makes the context to call in."""


@dataclass(frozen=True)
class Sampling:
    """How much is sampled.

    A sample is a run of calls of at least ``sample_seconds``. There are ``samples`` rounds, each
    with one sample of every candidate; fewer, but at least :data:`MINIMUM_SAMPLES` or ``samples``
    if that is less, when they would take more than ``budget_seconds``.
    """

    samples: int = 50
    sample_seconds: float = 5e-4
    budget_seconds: float = 4.0


def interleave(
    candidates: Sequence[Timed], sampling: Sampling, seed: int = 0
) -> NDArray[np.float64]:
    """Time the candidates in turn; returns seconds per call, of shape (rounds, candidates).

    Every candidate is warmed up while its calls per sample are calibrated. Each round visits all of
    them in a new random order, so that none always runs in the cache that another one left.
    """
    order = list(range(len(candidates)))
    shuffle = random.Random(seed).shuffle
    with _garbage_collection_paused():
        counts = [_calls_per_sample(candidate, sampling.sample_seconds) for candidate in candidates]
        begin = perf_counter_ns()
        rounds: list[list[float]] = []
        allowed = sampling.samples
        while len(rounds) < allowed:
            shuffle(order)
            seconds = [0.0] * len(candidates)
            for index in order:
                # Every sample starts at another of the rotating inputs.
                start = len(rounds) * counts[index] + 1
                seconds[index] = _seconds_per_call(candidates[index], start, counts[index])
            rounds.append(seconds)
            if (perf_counter_ns() - begin) * 1e-9 > sampling.budget_seconds:
                allowed = min(allowed, max(MINIMUM_SAMPLES, len(rounds)))
    return np.asarray(rounds)


def ratio_spread(numerator: NDArray[np.float64], denominator: NDArray[np.float64]) -> Spread:
    """Median and quartiles of the ratios of samples that were taken in the same round."""
    low, median, high = np.quantile(numerator / denominator, (0.25, 0.5, 0.75))
    return Spread(median=float(median), low=float(low), high=float(high))


def geometric_mean(values: Sequence[float]) -> float:
    """The geometric mean of positive numbers."""
    return float(np.exp(np.mean(np.log(values))))


def _calls_per_sample(candidate: Timed, sample_seconds: float) -> int:
    """The number of calls that fill a sample, found by doubling, which is the warm-up as well."""
    _seconds_per_call(candidate, 0, 1)
    count = 1
    while True:
        seconds = _seconds_per_call(candidate, 0, count)
        if seconds * count >= sample_seconds:
            return max(1, round(sample_seconds / seconds))
        count *= 2


def _seconds_per_call(candidate: Timed, start: int, count: int) -> float:
    call = candidate.call
    with candidate.context():
        begin = perf_counter_ns()
        for index in range(start, start + count):
            call(index)
        return (perf_counter_ns() - begin) * 1e-9 / count


@contextmanager
def _garbage_collection_paused() -> Iterator[None]:
    """A collection takes longer than many a call, and strikes whichever side is on."""
    enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
