"""Tables of rows, for a terminal and for a Markdown page."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table as RichTable

from ..cases import FORWARD, Spread
from ..operators import LAYOUTS
from ..report import microseconds
from . import block, convolution, max_pool2d, network, optimizer
from .goals import Verdict, verdicts
from .operation import RATIO, SAME
from .rows import OURS, TORCH, Measured, Row
from .timing import EAGER

NOTHING = "–"
# Of the reason why there is no peer; the notes below the tables have it whole.
_MOST_CHARACTERS = 60


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
        ratio, same = row.comparisons[RATIO], row.comparisons[SAME]
        ours, in_same, peer = (row.measured[label] for label in (ratio.ours, same.ours, ratio.peer))
        return [
            row.name,
            str(row.batch),
            row.dtype,
            *_ratio(row, RATIO),
            *_ratio(row, SAME),
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
    forward = mode == FORWARD

    def cells(row: Row) -> list[str]:
        return [
            row.name,
            row.dtype,
            str(row.batch),
            *_in_both_formats(row),
            *([_ratio(row, convolution.CUDNN_ALONE)[0]] if forward else []),
            _each(row, OURS, lambda side: side.plan),
            _forced(row),
            _error_beside_torchs(row),
            _each(row, OURS, lambda side: _percent(side.matmul_share)),
            _each(row, OURS, lambda side: _percent(side.share)),
            *_all_times(row),
        ]

    heads = (
        "layer", "precision", "batch", *_FORMAT_HEADS, *(["cuDNN alone"] if forward else []),
        "plan", "forced", "error", "of matmul", "of copy", *_TIME_HEADS,
    )  # fmt: skip
    return _table(f"convolution: {mode}", heads, 2, rows, cells)


def _block_table(mode: str, rows: Sequence[Row]) -> Table:
    def cells(row: Row) -> list[str]:
        return [
            row.name,
            row.dtype,
            str(row.batch),
            *_in_both_formats(row),
            *_ratio_or_reason(row, block.INDUCTOR),
            _each(row, OURS, lambda side: side.plan),
            _error_beside_torchs(row),
            _each(row, OURS, lambda side: _percent(side.matmul_share)),
            _each(row, OURS, lambda side: _percent(side.share)),
            *_all_times(row),
            _time(row.measured[block.INDUCTOR]) if block.INDUCTOR in row.measured else NOTHING,
        ]

    heads = (
        "block", "precision", "batch", *_FORMAT_HEADS, "Inductor", "quartiles", "plan", "error",
        "of matmul", "of copy", *_TIME_HEADS, "Inductor's µs",
    )  # fmt: skip
    return _table(f"block: {mode}", heads, 2, rows, cells)


def _network_table(mode: str, rows: Sequence[Row]) -> Table:
    def loss(row: Row, side: str) -> str:
        return _each(row, side, lambda one: f"{row.figures[f'{network.LOSS} {one.label}']:.6g}")

    def cells(row: Row) -> list[str]:
        apart = (
            f"{row.figures[f'{network.APART} {side.layout}']:.0e}" for side in _of_side(row, OURS)
        )
        return [
            row.name,
            row.dtype,
            str(row.batch),
            *_in_both_formats(row),
            " / ".join(apart),
            _error_beside_torchs(row),
            loss(row, OURS),
            loss(row, TORCH),
            *_all_times(row),
        ]

    heads = (
        "network", "precision", "batch", *_FORMAT_HEADS, "logits apart", "error", "our loss",
        "torch's loss", *_TIME_HEADS,
    )  # fmt: skip
    return _table(f"network: {mode}", heads, 2, rows, cells)


_FORMAT_HEADS = tuple(
    head for layout in LAYOUTS for head in (layout.replace("channels_last", "NHWC"), "quartiles")
)
_TIME_HEADS = ("our µs, NCHW / NHWC", "torch's µs, the same", "wall µs, ours / torch's")


def _in_both_formats(row: Row) -> list[str]:
    return [cell for layout in LAYOUTS for cell in _ratio(row, layout)]


def _ratio_or_reason(row: Row, name: str) -> tuple[str, str]:
    if name in row.missing:
        return f"not available: {row.missing[name]}"[:_MOST_CHARACTERS].replace("|", "\\|"), NOTHING
    return _ratio(row, name)


def _of_side(row: Row, side: str) -> list[Measured]:
    """A side's contenders, by format."""
    return [one for layout in LAYOUTS if (one := row.measured.get(f"{side} {layout}"))]


def _each(row: Row, side: str, cell: Callable[[Measured], str]) -> str:
    """A cell for each format, as one where they are equal."""
    return " / ".join(dict.fromkeys(cell(one) for one in _of_side(row, side)))


def _forced(row: Row) -> str:
    """The ratios of the kernels that a plan would not choose."""
    names = [f"{convolution.NATIVE} {layout}" for layout in LAYOUTS]
    if not any(name in row.comparisons for name in names):
        return NOTHING
    return " / ".join(_ratio(row, name)[0] for name in names)


def _error_beside_torchs(row: Row) -> str:
    """In NCHW."""
    return _error(_of_side(row, OURS)[0], _of_side(row, TORCH)[0])


def _all_times(row: Row) -> tuple[str, str, str]:
    ours, torchs = (" / ".join(_time(one) for one in _of_side(row, side)) for side in (OURS, TORCH))
    walls = " / ".join(_wall(_of_side(row, side)[0]) for side in (OURS, TORCH))
    return ours, torchs, walls


_SUITES: dict[str, Callable[[str, Sequence[Row]], Table]] = {
    optimizer.SUITE: _optimizer_table,
    max_pool2d.SUITE: _pool_table,
    convolution.SUITE: _convolution_table,
    block.SUITE: _block_table,
    network.SUITE: _network_table,
}
SUITES = tuple(_SUITES)
"""The suites that have tables, in the order of these."""


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
    if name not in row.comparisons:
        return NOTHING, NOTHING
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


def _short(layout: str) -> str:
    return layout.replace("channels_last", "NHWC")
