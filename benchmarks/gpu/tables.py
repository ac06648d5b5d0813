"""Tables of rows, for a terminal and for a Markdown page."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table as RichTable

from ..cases import Spread
from ..operators import LAYOUTS
from ..report import microseconds
from . import convolution, max_pool2d, optimizer
from .goals import Verdict, verdicts
from .rows import OURS, Measured, Row
from .timing import EAGER

NOTHING = "–"


@dataclass(frozen=True)
class Table:
    """A title, the heads of the columns and the cells below them; ``left`` columns are of text."""

    title: str
    heads: tuple[str, ...]
    left: int
    rows: list[list[str]]


def tables_of(rows: Sequence[Row]) -> list[Table]:
    """The tables of all suites that have rows, the goals first."""
    tables = []
    judged = verdicts(rows)
    if judged:
        tables.append(goal_table(judged))
    for suite, make in _SUITES.items():
        of_suite = [row for row in rows if row.suite == suite]
        for mode in dict.fromkeys(row.mode for row in of_suite):
            tables.append(make(mode, [row for row in of_suite if row.mode == mode]))
    return tables


def print_table(console: Console, table: Table) -> None:
    """Print a table; ratios below 1 stay in it."""
    rich = RichTable(
        title=table.title, title_justify="left", box=SIMPLE_HEAD, collapse_padding=True,
        pad_edge=False,
    )  # fmt: skip
    for index, head in enumerate(table.heads):
        rich.add_column(head, justify="left" if index < table.left else "right", no_wrap=True)
    for row in table.rows:
        rich.add_row(*row)
    console.print(rich)


def markdown(table: Table, level: int = 2) -> str:
    """A table as Markdown, under its title."""
    rules = ["---" if index < table.left else "---:" for index in range(len(table.heads))]
    lines = [table.heads, rules, *table.rows]
    body = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    return f"{'#' * level} {table.title}\n\n{body}\n"


def goal_table(judged: Sequence[Verdict]) -> Table:
    """The goals, and whether the rows reach them."""
    return Table(
        "Goals",
        ("goal", "at least", "verdict", "rows", "geometric mean", "least", "of"),
        1,
        [
            [
                verdict.goal.text,
                f"{verdict.goal.bound:g}",
                "reached" if verdict.holds else "missed",
                f"{verdict.reached} of {verdict.rows}",
                f"{verdict.mean:.2f}",
                f"{verdict.worst:.2f}",
                verdict.worst_row,
            ]
            for verdict in judged
        ],
    )


def _optimizer_table(mode: str, rows: Sequence[Row]) -> Table:
    def cells(row: Row) -> list[str]:
        ours, foreach, fused = (
            row.measured[label] for label in (OURS, optimizer.FOREACH, optimizer.FUSED)
        )
        return [
            row.name,
            row.dtype,
            *_ratio(row, "foreach"),
            *_ratio(row, "fused"),
            _percent(ours.share),
            _error(ours, fused),
            " / ".join(_time(side) for side in (ours, foreach, fused)),
            " / ".join(_wall(side) for side in (ours, foreach, fused)),
        ]

    heads = (
        "parameters in tensors", "dtype", "foreach", "quartiles", "fused", "quartiles",
        "of copy", "error", "device µs, ours / foreach / fused", "wall µs, the same",
    )  # fmt: skip
    return _table(f"optimizer: {mode}", heads, 2, rows, cells)


def _pool_table(mode: str, rows: Sequence[Row]) -> Table:
    def cells(row: Row) -> list[str]:
        ratio, same = row.comparisons[max_pool2d.RATIO], row.comparisons[max_pool2d.SAME]
        ours, in_same, peer = (row.measured[label] for label in (ratio.ours, same.ours, ratio.peer))
        return [
            row.name,
            str(row.batch),
            row.dtype,
            *_ratio(row, max_pool2d.RATIO),
            *_ratio(row, max_pool2d.SAME),
            _percent(in_same.share),
            {True: "equal", False: "differ", None: NOTHING}[row.exact],
            _error(in_same, peer),
            f"{_time(ours)} {_short(ours.layout)} / {_time(peer)} {_short(peer.layout)}",
            f"{_wall(ours)} / {_wall(peer)}",
        ]

    heads = (
        "layer", "batch", "dtype", "ratio", "quartiles", "same", "quartiles", "of copy",
        "values", "error", "device µs, ours / torch", "wall µs, the same",
    )  # fmt: skip
    return _table(f"max_pool2d: {mode}", heads, 1, rows, cells)


def _convolution_table(mode: str, rows: Sequence[Row]) -> Table:
    labels = [
        (f"{precision} {layout}", f"{precision} {_short(layout)}")
        for precision in convolution.PRECISIONS
        for layout in LAYOUTS
    ]

    def cells(row: Row) -> list[str]:
        return [row.name, *(_rate(row.measured[label]) for label, _ in labels)]

    heads = ("layer", *(f"{short} TFLOP/s (µs)" for _, short in labels))
    batches = " and ".join(dict.fromkeys(str(row.batch) for row in rows))
    return _table(f"convolution by torch alone: {mode}, batch {batches}", heads, 1, rows, cells)


_SUITES: dict[str, Callable[[str, Sequence[Row]], Table]] = {
    optimizer.SUITE: _optimizer_table,
    max_pool2d.SUITE: _pool_table,
    convolution.SUITE: _convolution_table,
}


def _table(
    title: str,
    heads: tuple[str, ...],
    left: int,
    rows: Sequence[Row],
    cells: Callable[[Row], list[str]],
) -> Table:
    def of(row: Row) -> list[str]:
        if not row.failure:
            name, *others = cells(row)
            return [f"{name} (ATen)" if row.native is False else name, *others]
        batch = [] if row.batch is None else [f"batch {row.batch}"]
        what = ", ".join([row.name, *batch, *([row.dtype] if row.dtype else [])])
        return [what, f"failed: {row.failure}"] + [""] * (len(heads) - 2)

    return Table(title, heads, left, [of(row) for row in rows])


def _ratio(row: Row, name: str) -> tuple[str, str]:
    ratio = row.comparisons[name].ratio
    return f"{ratio.median:.2f}", _quartiles(ratio)


def _quartiles(spread: Spread) -> str:
    return f"{spread.low:.2f}–{spread.high:.2f}"


def _percent(share: float | None) -> str:
    return NOTHING if share is None else f"{share:.0%}"


def _error(ours: Measured, peer: Measured) -> str:
    if ours.error is None:
        return NOTHING
    if ours.error == 0:
        return "0"
    if peer.error is None:
        return f"{ours.error:.0e}"
    quotient = ours.error / peer.error if peer.error else float("inf")
    return f"{ours.error:.0e} = {quotient:.2g}×"


def _time(side: Measured) -> str:
    """Microseconds of the device; with a star where they were not taken from a graph."""
    return microseconds(side.seconds.median) + ("*" if side.method == EAGER else "")


def _wall(side: Measured) -> str:
    return NOTHING if side.wall_seconds is None else microseconds(side.wall_seconds)


def _rate(side: Measured) -> str:
    rate = NOTHING if side.teraflops is None else f"{side.teraflops:.3g}"
    return f"{rate} ({_time(side)})"


def _short(layout: str) -> str:
    return layout.replace("channels_last", "NHWC")
