"""The chapters' pictures and the animated descent. Needs matplotlib and Pillow."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from matplotlib.animation import FuncAnimation, PillowWriter
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure, SubFigure
from matplotlib.patches import Rectangle
from numpy.typing import ArrayLike

from cnnkernels import functional as F
from cnnkernels.tutorial import (
    gradient_descent,
    max_pooling,
    padding,
    pattern_training,
    simple_gd,
    stride,
    worked_convolution,
)

# One colour a window; light enough for black numbers on top.
_WINDOWS = ["#a6cee3", "#fdd49e", "#b2df8a", "#dcc6e6"]
_LINE, _POINT, _MUTED = "#1f5fa8", "#d1495b", "#777777"


def save_pictures(directory: Path) -> list[Path]:
    """Save a PNG of each chapter's pictures and the descent as a GIF.

    The numbers in the pictures are computed on the backend in force.

    Args:
        directory: where the files go; made if it is not there.

    Returns:
        The files' paths.
    """
    directory.mkdir(parents=True, exist_ok=True)
    chapter1, chapter2 = directory / "chapter1.png", directory / "chapter2.png"
    _chapter1().savefig(chapter1, dpi=110)
    _chapter2().savefig(chapter2, dpi=110)
    descent = directory / "gradient_descent.gif"
    _save_descent(descent)
    return [chapter1, chapter2, descent]


def _figure(width: float, height: float) -> Figure:
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _chapter1() -> Figure:
    figure = _figure(11, 13)
    heights = [1, 1, 1.25, 1]
    rows = figure.subfigures(4, 1, squeeze=False, height_ratios=heights, hspace=0.06)[:, 0]
    _draw_worked_convolution(rows[0])
    _draw_stride(rows[1])
    _draw_padding(rows[2])
    pooling, edges = rows[3].subfigures(1, 2, squeeze=False)[0]
    _draw_pooling(pooling)
    _draw_edges(edges)
    return figure


def _draw_worked_convolution(figure: SubFigure) -> None:
    figure.suptitle("Convolution: multiply what lies on top of each other, and add", weight="bold")
    window, weight = np.array(worked_convolution.WINDOW), np.array(worked_convolution.WEIGHT)
    output = [[worked_convolution.compute()["one output"]]]
    panels = figure.subplots(1, 4)
    _draw_matrix(panels[0], window, "image", fill=_WINDOWS[0])
    _draw_matrix(panels[1], weight, "filter", fill=_WINDOWS[1])
    _draw_matrix(panels[2], window * weight, "products", fill=_WINDOWS[2])
    _draw_matrix(panels[3], output, "their sum", fill=_WINDOWS[3], cells=3)
    for panel, sign in zip(panels[1:], "×=Σ", strict=True):
        _draw_sign(panel, sign)


def _draw_stride(figure: SubFigure) -> None:
    figure.suptitle("Stride 2: the window moves two pixels at a time", weight="bold")
    values = stride.compute()
    panels = figure.subplots(1, 4)
    blocks = _blocks(2)
    _draw_matrix(panels[0], stride.IMAGE, "image and its four windows", fill=blocks)
    _draw_matrix(panels[1], stride.WEIGHT[0][0], "first filter", digits=3, cells=3)
    _draw_matrix(panels[2], values["first filter"], "its output", fill=_WINDOWS, digits=3, cells=3)
    _draw_matrix(
        panels[3], values["second filter"], "second filter's output", fill=_WINDOWS, digits=3,
        cells=3,
    )  # fmt: skip
    _draw_sign(panels[1], "∗")
    _draw_sign(panels[2], "=")


def _draw_padding(figure: SubFigure) -> None:
    figure.suptitle("Padding: zeros around the image make room for more windows", weight="bold")
    values = padding.compute()
    panels = figure.subplots(1, 4, width_ratios=[1, 0.8, 1.3, 0.8])
    image = np.array(stride.IMAGE)
    _draw_matrix(panels[0], image, "3×3 windows, stride 2,\nno padding: one fits", cells=6)
    _draw_window(panels[0], 0, 0, 3, _WINDOWS[0])
    _draw_matrix(
        panels[1], values["kernel 3, padding 0: output"], "output", fill=_WINDOWS, digits=3, cells=4
    )
    _draw_matrix(panels[2], np.pad(image, 1), "3×3 windows, stride 2,\npadding 1: four fit")
    for color, (top, left) in zip(_WINDOWS, np.ndindex(2, 2), strict=True):
        _draw_window(panels[2], 2 * top, 2 * left, 3, color)
    panels[2].add_patch(Rectangle((1, 1), 4, 4, fill=False, lw=1.5, ls="--", ec="black"))
    _draw_matrix(
        panels[3], values["kernel 3, padding 1: output"], "output", fill=_WINDOWS, digits=3, cells=4
    )
    _draw_sign(panels[1], "→")
    _draw_sign(panels[3], "→")


def _draw_pooling(figure: SubFigure) -> None:
    figure.suptitle("Max pooling: the largest of each window", weight="bold")
    panels = figure.subplots(1, 2)
    pooled = max_pooling.compute()["pooled 4×4 matrix"]
    _draw_matrix(panels[0], max_pooling.IMAGE, "2×2 windows", fill=_blocks(2))
    _draw_matrix(panels[1], pooled, "pooled", fill=_WINDOWS, cells=4)
    _draw_sign(panels[1], "→")


def _draw_edges(figure: SubFigure) -> None:
    figure.suptitle("A 5×5 Laplacian filter finds edges", weight="bold")
    row, col = np.mgrid[0:64, 0:64]
    disc = (row - 24) ** 2 + (col - 22) ** 2 < 16**2
    square = (row > 34) & (row < 58) & (col > 34) & (col < 58)
    image = torch.tensor(0.6 * disc + 1.0 * square, dtype=torch.float32).view(1, 1, 64, 64)
    laplacian = -torch.ones(1, 1, 5, 5)
    laplacian[0, 0, 2, 2] = 24.0
    edges = F.conv2d(image, laplacian, padding="same")
    panels = figure.subplots(1, 2)
    for panel, pixels, title in zip(panels, (image, edges.abs()), ("image", "edges"), strict=True):
        panel.imshow(pixels[0, 0].numpy(), cmap="gray")
        panel.set_title(title, fontsize=10)
        panel.set_axis_off()


def _chapter2() -> Figure:
    figure = _figure(11, 7)
    top, bottom = figure.subfigures(2, 1, squeeze=False, height_ratios=[0.5, 1])[:, 0]
    run = pattern_training.train_from(pattern_training.fitted_weight())

    top.suptitle("Two patterns, and what four filters learn of them", weight="bold")
    panels = top.subplots(1, 6)
    _draw_matrix(panels[0], pattern_training.PATTERN_A, "pattern A", fill=_WINDOWS[0])
    _draw_matrix(panels[1], pattern_training.PATTERN_B, "pattern B", fill=_WINDOWS[1])
    filters = run.weight[:, 0]
    limit = float(filters.abs().max())
    names = ["filter of A", "filter of B", "unused filter", "unused filter"]
    for panel, weight, name in zip(panels[2:], filters, names, strict=True):
        shown = panel.imshow(weight.numpy(), cmap="RdBu_r", vmin=-limit, vmax=limit)
        panel.set_title(name, fontsize=10)
        panel.set_xticks([])
        panel.set_yticks([])
    top.colorbar(shown, ax=list(panels[2:]), shrink=0.6, label="weight")

    losses, descent = bottom.subplots(1, 2)
    _draw_losses(losses, run.losses)
    _draw_parabola(descent)
    slow = np.array(gradient_descent.descend())
    fast = np.array(gradient_descent.descend(simple_gd.STEPS, simple_gd.LEARNING_RATE))
    descent.plot(slow[::5], slow[::5] ** 2, "o", color=_LINE, ms=5, alpha=0.6,
                 label="step 0.01, every 5th of 800")  # fmt: skip
    descent.plot(-fast, fast**2, "o", color=_POINT, ms=5, label="SimpleGD, lr 0.1 (mirrored)")
    descent.set_title("Gradient descent on y = x²", weight="bold")
    descent.legend(loc="upper center", fontsize=9)
    return figure


def _draw_losses(axes: Axes, losses: Sequence[float]) -> None:
    for start, color, name in [
        (0, _WINDOWS[0], "pattern A"), (20, _WINDOWS[1], "pattern B"),
        (40, _WINDOWS[0], None), (60, _WINDOWS[1], None),
    ]:  # fmt: skip
        axes.axvspan(start + 0.5, start + 20.5, color=color, alpha=0.5, lw=0, label=name)
    steps = np.arange(1, len(losses) + 1)
    printed = pattern_training.PRINTED_LOSSES
    axes.plot(steps, losses, color=_LINE, label="this package")
    axes.plot(steps[: len(printed)], printed, "o", color=_POINT, ms=4, label="the chapter")
    axes.set(xlabel="image", ylabel="loss", xlim=(0.5, len(losses) + 0.5))
    axes.set_title("The loss of each training step", weight="bold")
    axes.legend(fontsize=9)


def _draw_parabola(axes: Axes) -> None:
    x = np.linspace(-1.05, 1.05, 200)
    axes.plot(x, x**2, color=_MUTED, lw=1, alpha=0.7)
    axes.set(xlabel="x", ylabel="y", xlim=(-1.1, 1.1), ylim=(-0.05, 1.15))
    axes.set(xticks=[-1, 0, 1], yticks=[0, 1])


def _save_descent(path: Path) -> None:
    # A constrained layout would be solved again for every frame.
    figure = Figure(figsize=(4.8, 3.6))
    FigureCanvasAgg(figure)
    axes = figure.add_axes((0.13, 0.14, 0.84, 0.77))
    _draw_parabola(axes)
    axes.set_title("Gradient descent on y = x²", fontsize=11)
    (trail,) = axes.plot([], [], color=_POINT, lw=2, alpha=0.5)
    (point,) = axes.plot([], [], "o", color=_POINT, ms=9)
    label = axes.text(0, 0.95, "", ha="center", family="monospace", fontsize=9)
    xs = np.array(gradient_descent.descend())
    # Most of the way is covered in the first quarter of the steps; the last frame stays a while.
    frames = [*range(0, 150, 5), 150, 175, 200, 250, 300, 400, 600, *[800] * 5]

    def update(step: int) -> list[object]:
        trail.set_data(xs[: step + 1], xs[: step + 1] ** 2)
        point.set_data(xs[step : step + 1], xs[step : step + 1] ** 2)
        label.set_text(f"step {step:3d}   x = {xs[step]:.2e}")
        return [trail, point, label]

    animation = FuncAnimation(figure, update, frames=frames, blit=False)  # type: ignore[arg-type]
    animation.save(path, writer=PillowWriter(fps=12), dpi=80)


def _blocks(size: int) -> list[str]:
    """The colour of each cell of a 4×4 matrix in windows of ``size``."""
    return [_WINDOWS[2 * (row // size) + col // size] for row, col in np.ndindex(4, 4)]


def _draw_matrix(
    axes: Axes,
    matrix: ArrayLike,
    title: str,
    *,
    fill: str | Sequence[str] = "white",
    digits: int = 0,
    cells: int = 0,
) -> None:
    """Draw a matrix as a grid of numbers.

    Args:
        axes: where to.
        matrix: two-dimensional.
        title: what stands above it.
        fill: the colour of the cells, or of each cell, row by row.
        digits: after the decimal point.
        cells: the width and height of the drawing in cells, if the matrix is smaller.
    """
    numbers = np.asarray(matrix)
    rows, cols = numbers.shape
    colors = [fill] * numbers.size if isinstance(fill, str) else fill
    for (row, col), color in zip(np.ndindex(rows, cols), colors, strict=False):
        axes.add_patch(Rectangle((col, row), 1, 1, fc=color, ec="#555555", lw=0.8))
        axes.text(col + 0.5, row + 0.55, f"{numbers[row, col]:.{digits}f}", ha="center",
                  va="center", fontsize=9 if digits else 11)  # fmt: skip
    extent = max(cells, rows, cols)
    left, top = (extent - cols) / 2, (extent - rows) / 2
    axes.set(xlim=(-left - 0.05, extent - left + 0.05), ylim=(extent - top + 0.05, -top - 0.05))
    axes.set_aspect("equal")
    axes.set_title(title, fontsize=10)
    axes.set_axis_off()


def _draw_window(axes: Axes, top: int, left: int, size: int, color: str) -> None:
    # Slightly inside the grid, so that neighbouring windows can be told apart.
    axes.add_patch(
        Rectangle((left + 0.06, top + 0.06), size - 0.12, size - 0.12, fc=color, alpha=0.45)
    )
    axes.add_patch(
        Rectangle((left + 0.06, top + 0.06), size - 0.12, size - 0.12, fill=False, ec=color, lw=3)
    )


def _draw_sign(axes: Axes, sign: str) -> None:
    """Put a sign between this panel and the one on its left."""
    axes.text(-0.08, 0.5, sign, transform=axes.transAxes, ha="center", va="center", fontsize=18)
