"""The report: tables on the terminal and JSON."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from .cases import DISTURBING_INTERRUPTIONS, FORWARD, FORWARD_BACKWARD, Row
from .timing import geometric_mean

JSON_VERSION = 1

# Columns of text that the whole table needs.
_WIDE = 118
_LEGEND = (
    "ratio: torch's time over ours, so above 1 ours is faster; the median, and the quartiles, of "
    "interleaved samples, each side in its faster memory format (NHWC is channels_last). same: "
    "the ratio with ours in the format of torch's faster. error: ours relative to float64, in "
    "norm, the worst of outputs and gradients, and over torch's. Times are medians, for "
    "orientation. A kernel called aten is torch's own."
)

Environment = dict[str, str | int]


@dataclasses.dataclass(frozen=True)
class Summary:
    """Geometric means over the rows that share suite, batch, mode and number of threads.

    ``delegated`` counts the rows of the mean that were left to ATen, wholly or in part, and
    ``disturbed`` those that other programs interrupted.
    """

    suite: str
    batch: int | None
    mode: str
    threads: int
    rows: int
    delegated: int
    disturbed: int
    ratio: float
    same_layout_ratio: float


def summarize(rows: Iterable[Row]) -> list[Summary]:
    """A summary for each suite, batch, mode and number of threads, in order of appearance."""
    groups: dict[tuple[str, int | None, str, int], list[Row]] = {}
    for row in rows:
        groups.setdefault((row.suite, row.batch, row.mode, row.threads), []).append(row)
    return [
        Summary(
            *key,
            rows=len(group),
            delegated=sum(not row.native for row in group),
            disturbed=sum(row.disturbed for row in group),
            ratio=geometric_mean([row.ratio.median for row in group]),
            same_layout_ratio=geometric_mean([row.same_layout_ratio.median for row in group]),
        )
        for key, group in groups.items()
    ]


def print_report(console: Console, rows: Sequence[Row], environment: Environment) -> None:
    """A table for each suite and number of threads, and how to read them."""
    facts = [f"{key} {value}" for key, value in environment.items() if value != ""]
    console.print(Text(", ".join(facts)))
    for key in dict.fromkeys((row.suite, row.threads) for row in rows):
        of_table = [row for row in rows if (row.suite, row.threads) == key]
        console.print(_table(of_table, wide=console.width >= _WIDE))
    console.print(_LEGEND, highlight=False)
    disturbed = sum(row.disturbed for row in rows)
    if disturbed:
        console.print(
            f"! {disturbed} of {len(rows)} rows were interrupted by other programs more than"
            f" {DISTURBING_INTERRUPTIONS:.0f} times a second: their ratios are not to be trusted.",
            style="yellow",
            highlight=False,
        )


def write_json(path: Path, rows: Sequence[Row], environment: Environment) -> None:
    """Write the environment, the rows and their summaries to ``path``.

    Times are in seconds; a ratio is torch's time over ours; an error that is not finite is null.
    """
    report: dict[str, Any] = {
        "version": JSON_VERSION,
        "environment": environment,
        "rows": [dataclasses.asdict(row) | {"error_quotient": row.error_quotient} for row in rows],
        "summaries": [dataclasses.asdict(summary) for summary in summarize(rows)],
    }
    path.write_text(
        json.dumps(json_ready(report), indent=1, allow_nan=False) + "\n", encoding="utf-8"
    )


def _table(rows: Sequence[Row], wide: bool) -> Table:
    """The rows of a suite and their geometric means; without the times unless ``wide``."""
    first = rows[0]
    threads = "1 thread" if first.threads == 1 else f"{first.threads} threads"
    table = Table(
        title=f"{first.suite}, {threads}",
        title_justify="left",
        box=SIMPLE_HEAD,
        collapse_padding=True,
        pad_edge=False,
    )
    times = ("ours [µs]", "torch [µs]") if wide else ()
    for name in ("case", "batch", "pass", "ratio", "quartiles", "same", "error", "kernel", *times):
        left = name in ("case", "pass", "kernel", *times)
        table.add_column(name, justify="left" if left else "right", no_wrap=True)
    for row in rows:
        table.add_row(*_cells(row), *(_times(row) if wide else ()))
    table.add_section()
    for summary in summarize(rows):
        table.add_row(*_summary_cells(summary), style="bold")
    return table


def _cells(row: Row) -> list[str | Text]:
    quotient = row.error_quotient
    return [
        row.name,
        _batch(row.batch),
        _pass(row.mode),
        _ratio(row.ratio.median),
        Text(
            f"{row.ratio.low:.2f}–{row.ratio.high:.2f}" + "!" * row.disturbed,
            style="yellow" if row.disturbed else "",
        ),
        _ratio(row.same_layout_ratio.median),
        # Twice torch's own error is what the kernels are allowed at default precision.
        Text(f"{row.ours.error:.0e} = {quotient:.2g}×", style="red" if quotient > 2 else ""),
        Text(row.kernel, style="" if row.native else "yellow"),
    ]


def _times(row: Row) -> list[str]:
    return [
        f"{microseconds(row.ours.seconds)} {_short(row.ours.label)}",
        f"{microseconds(row.torch.seconds)} {_short(row.torch.label)}",
    ]


def _summary_cells(summary: Summary) -> list[str | Text]:
    return [
        "geometric mean",
        _batch(summary.batch),
        _pass(summary.mode),
        _ratio(summary.ratio),
        Text(f"{summary.disturbed}/{summary.rows} !", "yellow") if summary.disturbed else "",
        _ratio(summary.same_layout_ratio),
        "",
        f"{summary.delegated}/{summary.rows} aten" if summary.delegated else "",
    ]


def _ratio(value: float) -> Text:
    return Text(f"{value:.2f}", style="green" if value >= 1 else "red")


def _batch(batch: int | None) -> str:
    return "" if batch is None else str(batch)


def _pass(mode: str) -> str:
    short = {FORWARD: "fwd", FORWARD_BACKWARD: "fwd+bwd"}
    return " / ".join(short.get(part, _short(part)) for part in mode.split(" / "))


def _short(label: str) -> str:
    return label.replace("channels_last", "NHWC")


def microseconds(seconds: float) -> str:
    """Seconds as a number of microseconds, with no more digits than matter."""
    number = seconds * 1e6
    return f"{number:.1f}" if number < 100 else f"{number:,.0f}"


def json_ready(value: Any) -> Any:
    """``value`` with null for infinite and undefined numbers, which JSON does not have."""
    if isinstance(value, dict):
        return {key: json_ready(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [json_ready(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
