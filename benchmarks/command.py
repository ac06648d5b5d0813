"""The command line of the benchmark."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import Progress

import cnnkernels

from .cases import FORWARD, FORWARD_BACKWARD, Case, Options, Row
from .environment import describe_environment
from .layers import CONV2D_FILES
from .measure import measure
from .picture import write_png
from .report import print_report, write_json
from .suites import SUITES, all_cases
from .timing import Sampling

# Columns of the report where no terminal tells its own, as in a file.
_FILE_WIDTH = 140
_SAMPLES = 50
_QUICK_SAMPLES = 15
_QUICK_SAMPLE_SECONDS = 2e-4
_QUICK_BUDGET_SECONDS = 0.5
_DTYPES = {
    "float32": torch.float32,
    "float64": torch.float64,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the benchmark's options to a parser."""
    add = parser.add_argument
    add("--quick", action="store_true", help="the tutorial's rows, in one to two minutes")
    add(
        "--suite",
        nargs="+",
        choices=list(SUITES),
        default=list(SUITES),
        metavar="NAME",
        help=f"of {', '.join(SUITES)} (default: all)",
    )
    add(
        "--shapes",
        nargs="+",
        choices=CONV2D_FILES,
        default=["tutorial"],
        metavar="NAME",
        help=f"layers of the conv2d suite, of {', '.join(CONV2D_FILES)} (default: tutorial)",
    )
    add(
        "--batch",
        nargs="+",
        type=_positive,
        metavar="N",
        help="batch sizes (default: 1 and 64 for the tutorial's rows, 1 and 8 for networks)",
    )
    add(
        "--threads",
        nargs="+",
        type=_positive,
        metavar="N",
        help="numbers of threads to measure with (default: torch's)",
    )
    add(
        "--samples",
        type=_positive,
        metavar="N",
        help=f"samples of each row (default: {_SAMPLES}, or {_QUICK_SAMPLES} when quick)",
    )
    add("--seed", type=int, default=0, metavar="N", help="seed of the random data (default: 0)")
    add(
        "--dtype",
        choices=list(_DTYPES),
        default="float32",
        help="of the conv2d suite's tensors (default: float32)",
    )
    add(
        "--precision",
        choices=["highest", "high", "medium"],
        default=None,
        help="torch's float32 matmul precision, for both sides (default: torch's)",
    )
    add("--forward-only", action="store_true", help="leave out the forward+backward rows")
    add("--json", type=Path, metavar="FILE", help="write the rows, unrounded, to FILE")
    add("--png", type=Path, metavar="FILE", help="draw the ratios to FILE (needs matplotlib)")


def run(args: argparse.Namespace) -> int:
    """Compare the speed and accuracy of these kernels with torch's; returns the exit status.

    The status is 1, and nothing is measured, when the native kernels are not in use.
    """
    if cnnkernels.get_backend() != "native":
        reason = (
            "CNNKERNELS_BACKEND chooses torch"
            if cnnkernels.is_native_available()
            else "the compiled library is not available (python -m cnnkernels info tells why)"
        )
        print(f"Nothing to measure: {reason}, so both sides would be torch.", file=sys.stderr)
        return 1
    options = Options(
        batches=None if args.batch is None else tuple(args.batch),
        modes=(FORWARD,) if args.forward_only else (FORWARD, FORWARD_BACKWARD),
        shapes=tuple(args.shapes),
        quick=args.quick,
        seed=args.seed,
        dtype=_DTYPES[args.dtype],
    )
    if args.precision is not None:
        torch.set_float32_matmul_precision(args.precision)
    environment = describe_environment()
    environment["dtype"] = args.dtype
    environment["float32_precision"] = torch.get_float32_matmul_precision()
    rows = measure_all(
        all_cases(args.suite, options),
        _sampling(args),
        threads=args.threads or [torch.get_num_threads()],
        seed=args.seed,
    )
    console = Console()
    print_report(console if console.is_terminal else Console(width=_FILE_WIDTH), rows, environment)
    if args.json is not None:
        write_json(args.json, rows, environment)
    if args.png is not None:
        write_png(args.png, rows, environment)
    return 0


def measure_all(
    cases: Sequence[Case], sampling: Sampling, *, threads: Sequence[int], seed: int
) -> list[Row]:
    """Measure every case with every number of threads, which is set back afterwards."""
    rows = []
    before = torch.get_num_threads()
    console = Console(stderr=True)
    # No thread of the progress bar's own: it would wake up in the middle of samples.
    with Progress(console=console, auto_refresh=False, transient=True) as progress:
        task = progress.add_task("", total=len(cases) * len(threads))
        try:
            for count in threads:
                for case in cases:
                    progress.update(task, description=f"{case.suite} {case.name}", refresh=True)
                    rows.append(measure(case, sampling, threads=count, seed=seed))
                    progress.advance(task)
        finally:
            torch.set_num_threads(before)
    return rows


def _sampling(args: argparse.Namespace) -> Sampling:
    if args.quick:
        return Sampling(
            samples=args.samples or _QUICK_SAMPLES,
            sample_seconds=_QUICK_SAMPLE_SECONDS,
            budget_seconds=_QUICK_BUDGET_SECONDS,
        )
    return Sampling(samples=args.samples or _SAMPLES)


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected a positive integer, got {text}")
    return value
