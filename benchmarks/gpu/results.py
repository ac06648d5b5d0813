"""Results in a JSON file, and back."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from ..cases import Spread
from ..report import json_ready
from .rows import Comparison, Measured, Row

JSON_VERSION = 2


@dataclass(frozen=True)
class Results:
    """The rows of a run, the facts they depend on, and the cases that its time did not reach."""

    environment: dict[str, str | int]
    copy_bytes_per_second: float
    matmul_flops_per_second: dict[str, float]
    rows: list[Row]
    left_out: list[str]


def write_results(path: Path, results: Results) -> None:
    """Write results; a number that is not finite becomes null."""
    document = json_ready({"version": JSON_VERSION, **dataclasses.asdict(results)})
    path.write_text(json.dumps(document, indent=1, allow_nan=False) + "\n", encoding="utf-8")


def read_results(path: Path) -> Results:
    """Read what :func:`write_results` wrote.

    Raises ValueError when the file is of another version.
    """
    document = json.loads(path.read_text(encoding="utf-8"))
    version = document.pop("version", None)
    if version != JSON_VERSION:
        raise ValueError(f"{path.name} is of version {version}, not of {JSON_VERSION}")
    rows = [_row(row) for row in document.pop("rows")]
    return Results(**document, rows=rows)


def merge(several: Sequence[Results]) -> Results:
    """The results of several runs on one machine as one; facts are the first's."""
    rates: dict[str, list[float]] = {}
    for results in several:
        for precision, rate in results.matmul_flops_per_second.items():
            rates.setdefault(precision, []).append(rate)
    return Results(
        several[0].environment,
        fmean(results.copy_bytes_per_second for results in several),
        {precision: fmean(of_runs) for precision, of_runs in rates.items()},
        [row for results in several for row in results.rows],
        [title for results in several for title in results.left_out],
    )


def _row(document: dict[str, Any]) -> Row:
    measured = {
        label: Measured(**{**side, "seconds": Spread(**side["seconds"])})
        for label, side in document.pop("measured").items()
    }
    comparisons = {
        name: Comparison(**{**comparison, "ratio": Spread(**comparison["ratio"])})
        for name, comparison in document.pop("comparisons").items()
    }
    return Row(**document, measured=measured, comparisons=comparisons)
