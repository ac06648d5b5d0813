"""``python -m cnnkernels tutorial``."""

from __future__ import annotations

import argparse
import importlib.util
import io
import sys
from pathlib import Path

from rich.console import Console

from cnnkernels import is_native_available
from cnnkernels.tutorial import (
    convolution_4x4,
    gradient,
    gradient_descent,
    linear,
    loss,
    max_pooling,
    net,
    padding,
    pattern_training,
    simple_gd,
    stride,
    worked_convolution,
)
from cnnkernels.tutorial.program import Program, run_program
from cnnkernels.tutorial.report import print_rows

#: The programs in the chapters' order.
PROGRAMS: tuple[Program, ...] = (
    gradient.PROGRAM,
    net.PROGRAM,
    max_pooling.PROGRAM,
    worked_convolution.PROGRAM,
    convolution_4x4.PROGRAM,
    stride.PROGRAM,
    padding.PROGRAM,
    linear.PROGRAM,
    loss.PROGRAM,
    pattern_training.PROGRAM,
    gradient_descent.PROGRAM,
    simple_gd.PROGRAM,
)

# Wide enough for the tables where the output is a file and has no width of its own.
_FILE_WIDTH = 120


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the tutorial's options to ``parser``."""
    parser.add_argument(
        "--only",
        metavar="NAME",
        action="append",
        choices=[program.name for program in PROGRAMS],
        help="run this program only; may be repeated (%(choices)s)",
    )
    parser.add_argument(
        "--out",
        metavar="DIR",
        type=Path,
        help="save the chapters' pictures and the animation there (needs matplotlib and Pillow)",
    )


def run(args: argparse.Namespace) -> int:
    """Run the programs and print their tables.

    Returns:
        0 if every row agrees; 1 if one does not, or if pictures are wanted and cannot be drawn.
    """
    missing = [name for name in ("matplotlib", "PIL") if importlib.util.find_spec(name) is None]
    if args.out is not None and missing:
        print(
            "--out draws pictures with matplotlib and Pillow, which are not installed: "
            "run pip install 'cnnkernels[examples]'",
            file=sys.stderr,
        )
        return 1

    if isinstance(sys.stdout, io.TextIOWrapper):
        # A stream that cannot write × or ✓ gets a question mark instead of an error.
        sys.stdout.reconfigure(errors="replace")
    console = Console()
    if not console.is_terminal:
        console.width = _FILE_WIDTH
    console.print(
        "[bold]The tutorial on these kernels.[/] Each number in four ways: as the chapter prints "
        "it (— where it prints none), by hand in float64, by the fallback in PyTorch, and by the "
        "kernels. The last column is the largest relative difference from the value by hand."
    )
    if not is_native_available():
        console.print(
            "The compiled library is not there, so the kernel column is empty; "
            "[bold]python -m cnnkernels info[/] says why."
        )

    rows = []
    for program in PROGRAMS:
        if args.only is None or program.name in args.only:
            program_rows = run_program(program)
            print_rows(console, program, program_rows)
            rows += program_rows

    if args.out is not None:
        from cnnkernels.tutorial.pictures import save_pictures

        console.print()
        for path in save_pictures(args.out):
            console.print(f"saved {path}", soft_wrap=True, highlight=False)

    agreeing = sum(row.agrees for row in rows)
    console.print(f"\n[bold]{agreeing} of {len(rows)} rows agree.[/]")
    return 0 if agreeing == len(rows) else 1
