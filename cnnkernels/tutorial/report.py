"""The tutorial's tables on a terminal."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from cnnkernels.tutorial.program import Array, Program, Row

# Arrays of up to this many numbers are shown whole, of up to this many characters on one line.
_SHOWN_WHOLE = 4
_ONE_LINE = 12
_NORM = "norm"


def print_rows(console: Console, program: Program, rows: list[Row]) -> None:
    """Print a program's heading, explanation and table."""
    console.print()
    console.rule(f"[bold]Chapter {program.chapter}: {escape(program.title)}[/]", align="left")
    console.print(escape(program.explanation))
    table = Table()
    table.add_column("quantity")
    for heading in ("chapter", "by hand", "fallback", "kernel"):
        table.add_column(heading, justify="right")
    table.add_column("agree", no_wrap=True)
    for row in rows:
        by_hand = format_value(row.by_hand)
        count = f" ({row.by_hand.size} numbers)" if by_hand.startswith(_NORM) else ""
        table.add_row(
            escape(row.quantity + count),
            *(
                escape(text)
                for text in (
                    "—" if row.chapter is None else format_value(row.chapter, _as_printed),
                    by_hand,
                    format_value(row.fallback),
                    "not built" if row.kernel is None else format_value(row.kernel),
                )
            ),
            _mark(row),
        )
    console.print(table)


def _as_printed(number: Any) -> str:
    # No more digits than the chapters print.
    return f"{number:.11g}"


def _as_float32(number: Any) -> str:
    # Adding zero turns -0 into 0.
    return str(np.float32(number) + 0).removesuffix(".0")


def format_value(value: Array, format_number: Callable[[Any], str] = _as_float32) -> str:
    """The numbers as text, by default to float32's precision.

    Of many numbers it is their Euclidean norm, and of equal ones the number and how many.
    """
    texts = [format_number(number) for number in value.flat]
    if value.ndim == 0:
        return texts[0]
    if value.dtype.kind == "i":
        return "[" + ", ".join(texts) + "]"
    if len(texts) > 1 and len(set(texts)) == 1:
        return f"{texts[0]} (×{len(texts)})"
    if len(texts) > _SHOWN_WHOLE:
        return f"{_NORM} {format_number(np.linalg.norm(value))}"
    separator = ", " if sum(map(len, texts)) < _ONE_LINE else ",\n"
    return "[" + separator.join(texts) + "]"


def _mark(row: Row) -> str:
    amount = "exact" if row.difference == 0 else f"{row.difference:.0e}"
    return f"[green]✓[/] {amount}" if row.agrees else f"[bold red]✗ {amount}[/]"
