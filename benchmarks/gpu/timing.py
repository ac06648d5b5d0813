"""Timing of a device's work, in rounds, and of a program that waits for it.

**Device time.** A sample is a batch of calls between two CUDA events, about a millisecond long, so
that the events' resolution of half a microsecond does not matter. The batch is captured into a CUDA
graph beforehand, for every contender alike, and replayed: eager calls of small work would be timed
at the speed at which Python makes them, and a launch from a graph costs all the same. What remains
in the time is the gap that the device itself leaves between two kernels. A contender that cannot be
captured is timed by the same events around eager calls, and says so.

Outputs are kept until the same input's turn comes again, so that they rotate as the inputs do.

**Wall time.** Many eager calls in a row and a wait for the device at the end, by
``time.perf_counter``: what the user of an eager program feels, host and device together.

Each round takes one sample of every contender in a new random order; ratios are taken within
rounds. On the CPU, as a dry run, a sample is a batch of eager calls by ``time.perf_counter``.
"""

from __future__ import annotations

import contextlib
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from time import perf_counter

import numpy as np
import torch
from numpy.typing import NDArray

from .device import Device
from .rows import Contender

GRAPH = "graph"
EAGER = "eager"

_MOST_CALLS = 1024


@dataclass(frozen=True)
class Sampling:
    """How much is sampled.

    There are ``rounds``, each with one sample of at least ``sample_seconds`` of every contender,
    but no more than fit ``budget_seconds`` once ``least_rounds`` are done.
    """

    rounds: int = 25
    least_rounds: int = 7
    sample_seconds: float = 1e-3
    budget_seconds: float = 0.5
    wall_rounds: int = 5
    wall_seconds: float = 2e-3


@dataclass(frozen=True)
class Sampler:
    """A contender made ready: ``sample`` returns the seconds of a call, the mean over a batch."""

    sample: Callable[[], float]
    method: str
    reason: str = ""


def device_sampler(
    contender: Contender, rotation: int, device: Device, sample_seconds: float
) -> Sampler:
    """Warm a contender up and make its samples ready."""
    with contender.context():
        for index in range(min(rotation, 3)):
            contender.call(index)
        device.synchronize()
        if not device.is_cuda:
            return Sampler(lambda: _host_seconds(contender, device, rotation), EAGER)
        try:
            return _graph_sampler(contender, rotation, sample_seconds)
        except RuntimeError as error:
            device.synchronize()
            reason = str(error).partition("\n")[0]
            return Sampler(_eager_sample(contender, rotation, sample_seconds), EAGER, reason)


def device_rounds(
    samplers: Sequence[Sampler], sampling: Sampling, seed: int = 0
) -> NDArray[np.float64]:
    """Sample in turn; returns the seconds of a call, of shape (rounds, contenders)."""
    return _interleave(
        [sampler.sample for sampler in samplers],
        sampling.rounds,
        sampling.least_rounds,
        sampling.budget_seconds,
        seed,
    )


def wall_rounds(
    contenders: Sequence[Contender],
    rotation: int,
    device: Device,
    sampling: Sampling,
    seed: int = 0,
) -> NDArray[np.float64]:
    """The wall time of an eager call of each contender, of shape (rounds, contenders)."""

    def sampler(contender: Contender) -> Callable[[], float]:
        once = _host_seconds(contender, device, rotation)
        # Whole turns of the inputs, as many as fill a sample.
        turns = max(1, round(sampling.wall_seconds / (once * rotation)))
        return lambda: _host_seconds(contender, device, turns * rotation)

    return _interleave(
        [sampler(contender) for contender in contenders],
        sampling.wall_rounds,
        sampling.wall_rounds,
        sampling.budget_seconds,
        seed,
    )


def event_seconds(work: Callable[[], object]) -> float:
    """The device's time for ``work`` on the current stream, by events."""
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    work()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) * 1e-3


def _interleave(
    samples: Sequence[Callable[[], float]],
    rounds: int,
    least: int,
    budget_seconds: float,
    seed: int,
) -> NDArray[np.float64]:
    order = list(range(len(samples)))
    shuffle = random.Random(seed).shuffle
    begin = perf_counter()
    times: list[list[float]] = []
    while len(times) < rounds:
        shuffle(order)
        seconds = [0.0] * len(samples)
        for index in order:
            seconds[index] = samples[index]()
        times.append(seconds)
        if len(times) >= least and perf_counter() - begin > budget_seconds:
            break
    return np.asarray(times)


def _graph_sampler(contender: Contender, rotation: int, sample_seconds: float) -> Sampler:
    """Capture whole turns of the inputs, as many as fill a sample."""
    graph = _capture(contender, rotation, rotation)
    graph.replay()
    seconds = event_seconds(graph.replay)
    turns = min(round(sample_seconds / seconds), _MOST_CALLS // rotation)
    if turns > 1:
        # Between two replays the device waits longer than between two kernels of a graph.
        graph = _capture(contender, rotation, turns * rotation)
        graph.replay()
        seconds = event_seconds(graph.replay)
    calls = max(1, turns) * rotation
    replays = max(1, round(sample_seconds / seconds))

    def replay() -> None:
        for _ in range(replays):
            graph.replay()

    return Sampler(lambda: event_seconds(replay) / (replays * calls), GRAPH)


def _capture(contender: Contender, rotation: int, calls: int) -> torch.cuda.CUDAGraph:
    """A graph of so many calls; ``torch.cuda.graph`` would empty the allocator's cache first."""
    graph = torch.cuda.CUDAGraph()
    kept: list[object] = [None] * rotation
    torch.cuda.synchronize()
    graph.capture_begin()
    try:
        for index in range(calls):
            kept[index % rotation] = contender.call(index)
    except RuntimeError:
        with contextlib.suppress(RuntimeError):  # it would hide what went wrong
            graph.capture_end()
        raise
    graph.capture_end()
    return graph


def _eager_sample(
    contender: Contender, rotation: int, sample_seconds: float
) -> Callable[[], float]:
    def calls(count: int) -> Callable[[], None]:
        kept: list[object] = [None] * rotation

        def run() -> None:
            for index in range(count):
                kept[index % rotation] = contender.call(index)

        return run

    once = event_seconds(calls(rotation)) / rotation
    count = rotation * max(1, round(sample_seconds / (once * rotation)))

    def sample() -> float:
        with contender.context():
            return event_seconds(calls(count)) / count

    return sample


def _host_seconds(contender: Contender, device: Device, count: int) -> float:
    """The time of an eager call, the mean of so many and one wait for the device."""
    with contender.context():
        device.synchronize()
        begin = perf_counter()
        for index in range(count):
            contender.call(index)
        device.synchronize()
        return (perf_counter() - begin) / count
