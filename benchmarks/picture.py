"""The report as a picture: a bar for each row's ratio."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path

from .cases import Row
from .report import Environment

_ROW_INCHES = 0.18
_WIDTH_INCHES = 9.0
_DOTS_PER_INCH = 100
# Few colours and grey letters: with a palette the file is a fraction of the size.
_PALETTE = 64
# Room on the right for the annotations, of the width of what is drawn.
_ANNOTATION_SHARE = 0.3
_FASTER = "#2f7d5b"
_SLOWER = "#b5402f"
_DELEGATED = "#9a9a9a"


def write_png(path: Path, rows: Sequence[Row], environment: Environment) -> None:
    """Draw the rows, from top to bottom, with their quartiles and errors, and save them as PNG.

    Bars start at 1: green to the right, where ours is faster, red to the left, and grey where the
    row was left to ATen.
    """
    # Imported here: drawing is optional, and so is matplotlib.
    from matplotlib.figure import Figure
    from PIL import Image

    height = 1.4 + _ROW_INCHES * len(rows)
    figure = Figure(figsize=(_WIDTH_INCHES, height), layout="constrained")
    axes = figure.add_subplot()
    positions = range(len(rows))
    ratios = [row.ratio.median for row in rows]
    whiskers = [
        [row.ratio.median - row.ratio.low for row in rows],
        [row.ratio.high - row.ratio.median for row in rows],
    ]
    axes.barh(
        positions,
        [ratio - 1 for ratio in ratios],
        left=1,
        color=[_colour(row) for row in rows],
        xerr=whiskers,
        error_kw={"elinewidth": 0.8, "capsize": 1.5},
    )
    for position, row in zip(positions, rows, strict=True):
        axes.annotate(
            f"{row.ratio.median:.2f}×   error {row.error_quotient:.2g}×",
            (max(row.ratio.high, 1.0), position),
            xytext=(5, 0),
            textcoords="offset points",
            va="center",
            fontsize=7,
        )
    axes.axvline(1.0, color="black", linewidth=0.8)
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter("{x:g}×")
    left = min(0.5, *(row.ratio.low for row in rows)) * 0.9
    right = max(2.0, *(row.ratio.high for row in rows))
    axes.set_xlim(left, right * (right / left) ** _ANNOTATION_SHARE)
    axes.set_yticks(positions, [_label(row) for row in rows], fontsize=7)
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.set_xlabel(
        "torch's time over ours, with quartiles\nerror: ours over torch's, each against float64",
        fontsize=8,
    )
    isa = f", {environment['isa']}" if environment["isa"] else ""
    axes.set_title(
        f"cnnkernels beside torch {environment['torch']}, {environment['cpu']}{isa}", fontsize=9
    )
    drawing = io.BytesIO()
    figure.savefig(drawing, format="png", dpi=_DOTS_PER_INCH)
    with Image.open(drawing) as image:
        image.convert("RGB").quantize(_PALETTE).save(path, format="png", optimize=True)


def _colour(row: Row) -> str:
    if not row.native:
        return _DELEGATED
    return _FASTER if row.ratio.median >= 1 else _SLOWER


def _label(row: Row) -> str:
    batch = "" if row.batch is None else f", batch {row.batch}"
    threads = "1 thread" if row.threads == 1 else f"{row.threads} threads"
    return f"{row.suite}: {row.name}, {row.mode}{batch}, {threads}"
