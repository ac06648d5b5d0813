"""The command line of the benchmark on a device."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from time import monotonic

from rich.console import Console

from . import block, convolution, max_pool2d, network, optimizer
from .device import CPU, CUDA, Device, describe_device, open_device
from .measure import Ceilings, failed, measure, measure_ceilings
from .options import DRY_RUN, QUICK, Options
from .results import Results, write_results
from .rows import Case, Row
from .tables import print_table, tables_of
from .timing import Sampling

SUITES: dict[str, Callable[[Options, Device], list[Case]]] = {
    optimizer.SUITE: optimizer.cases,
    max_pool2d.SUITE: max_pool2d.cases,
    convolution.SUITE: convolution.cases,
    block.SUITE: block.cases,
    network.SUITE: network.cases,
}

# Columns of the report where no terminal tells its own, as in a file.
_FILE_WIDTH = 320
_QUICK_SAMPLING = Sampling(rounds=11, budget_seconds=0.2)
# The search of cuDNN takes longer than any number of samples.
_SEARCHED_SAMPLING = Sampling(rounds=9, budget_seconds=0.1, sample_seconds=5e-4)
_SEARCHED_SUITES = (convolution.SUITE, block.SUITE, network.SUITE)
_DRY_SAMPLING = Sampling(
    rounds=2, least_rounds=1, budget_seconds=0.0, wall_rounds=1, wall_seconds=0.0
)
LEGEND = (
    "A ratio is torch's time over ours, so above 1 ours is faster: the median over rounds of the "
    "device's time, and the quartiles. foreach is torch's default on a GPU. ratio: each side in "
    "its faster memory format (NHWC is channels_last). same: ours in the format of torch's faster. "
    "of copy: the share of the copy bandwidth, by the bytes that must move. of matmul: the share "
    "of the rate of a matrix product in the same precision. error: ours relative to float64, in "
    "norm, and over torch's (fused=True's). wall: what an eager program waits for a call, Python "
    "included. A time with a star was not taken from a CUDA graph. plan: the algorithms in NCHW "
    "and in NHWC; aten is torch's own, and then forced has the ratios of our kernels."
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the benchmark's options to a parser."""
    add = parser.add_argument
    add("--out", type=Path, required=True, metavar="FILE", help="write the rows to FILE, as JSON")
    add(
        "--suite",
        nargs="+",
        choices=list(SUITES),
        default=list(SUITES),
        metavar="NAME",
        help=f"of {', '.join(SUITES)} (default: all)",
    )
    add("--quick", action="store_true", help="a few rows of each suite, with few samples")
    add(
        "--full",
        action="store_true",
        help="all convolutions and blocks in all passes and precisions: many minutes",
    )
    add(
        "--seconds",
        type=float,
        metavar="N",
        help="begin no case after so many seconds; the report names those left out",
    )
    add(
        "--device",
        choices=[CUDA, CPU],
        default=CUDA,
        help="cpu is a dry run: tiny sizes, no events, no graphs, and no meaningful figure",
    )
    add(
        "--batch",
        nargs="+",
        type=int,
        metavar="N",
        help="of the pooling layers (default: 1 and 64 for the tutorial's, else 1 and 8)",
    )
    add("--seed", type=int, default=0, metavar="N", help="seed of the random data (default: 0)")


def run(args: argparse.Namespace) -> int:
    """Compare these kernels with torch's on a CUDA device; returns the exit status.

    The status is 1 when a case failed, and when there is no such device: then nothing is measured.
    """
    begin = monotonic()
    args.out.parent.mkdir(parents=True, exist_ok=True)
    try:
        device = open_device(args.device)
    except RuntimeError as error:
        print(f"Nothing to measure: {error}.", file=sys.stderr)
        return 1
    console = Console()
    if not console.is_terminal:
        console = Console(width=_FILE_WIDTH)
    options = replace(
        QUICK if args.quick else Options(),
        full=args.full,
        seed=args.seed,
        batches=_batches(args.batch),
    )
    if not device.is_cuda:
        options = replace(DRY_RUN, seed=args.seed)
    with device.current():
        results = _measure_all(args, options, device, begin)
    write_results(args.out, results)
    if not device.is_cuda:
        console.print("A dry run on the CPU: no figure below means anything.", style="yellow")
    facts = [f"{key} {value}" for key, value in results.environment.items() if value != ""]
    console.print(", ".join(facts), highlight=False)
    for table in tables_of(results.rows):
        print_table(console, table)
    console.print(LEGEND, highlight=False)
    if results.left_out:
        console.print(f"Left out for time: {'; '.join(results.left_out)}.", highlight=False)
    failures = sum(bool(row.failure) for row in results.rows)
    console.print(
        f"{len(results.rows) - failures} rows measured, {failures} failed, "
        f"{len(results.left_out)} left out for time",
        highlight=False,
    )
    return 1 if failures else 0


def _measure_all(
    args: argparse.Namespace, options: Options, device: Device, begin: float
) -> Results:
    """Measure the cases of the chosen suites for as long as the time allows.

    The file is written after every case, so that a run that is cut off leaves what it has.
    """
    ceilings = measure_ceilings(device)
    device.free()
    results = Results(describe_device(device), ceilings.copy, dict(ceilings.matmul), [], [])
    cases = [case for name in args.suite for case in SUITES[name](options, device)]
    for case in cases:
        if args.seconds is not None and monotonic() - begin > args.seconds:
            results.left_out.append(case.title)
            continue
        started = monotonic()
        row = _measure(case, device, _sampling(args, case), ceilings, args.seed)
        results.rows.append(row)
        write_results(args.out, results)
        outcome = row.failure or "measured"
        print(f"{case.title}: {outcome} in {monotonic() - started:.1f} s", file=sys.stderr)
    return results


def _measure(case: Case, device: Device, sampling: Sampling, ceilings: Ceilings, seed: int) -> Row:
    """A row, of the failure if there is one: the other cases are worth as much as before."""
    try:
        try:
            return measure(case, device, sampling, ceilings=ceilings, seed=seed)
        finally:
            device.free()
    except Exception as error:  # whatever torch, CUDA and the kernels raise
        return failed(case, f"{type(error).__name__}: {str(error).partition(chr(10))[0]}")


def _sampling(args: argparse.Namespace, case: Case) -> Sampling:
    if args.device == CPU:
        return _DRY_SAMPLING
    if case.suite in _SEARCHED_SUITES:
        return _SEARCHED_SAMPLING
    return _QUICK_SAMPLING if args.quick else Sampling()


def _batches(asked: Sequence[int] | None) -> tuple[int, ...] | None:
    return None if asked is None else tuple(asked)
