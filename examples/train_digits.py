"""Train a small CNN on real images, with these kernels and with plain torch.

The images are scikit-learn's bundled handwritten digits (1797 images of 8×8 pixels). The same
network starts twice from the same weights and sees the same batches in the same order: once as
plain torch, once with its convolutions, pools and optimizer replaced. Epochs of the two alternate,
so that the times can be compared.

    pip install 'cnnkernels[examples]'
    python examples/train_digits.py
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from torch import Tensor, nn

import cnnkernels

try:
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split
except ImportError as error:
    raise SystemExit(
        f"{error.name} is not installed: run pip install 'cnnkernels[examples]'"
    ) from error

LEARNING_RATE, MOMENTUM, WEIGHT_DECAY = 0.05, 0.9, 1e-4
TEST_SHARE = 0.2


@dataclass
class Data:
    """Images of shape (N, 1, 8, 8) between 0 and 1, and their classes of shape (N,)."""

    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor


@dataclass
class Run:
    """One training: the model, its optimizer, and what each epoch gave."""

    name: str
    model: nn.Module
    optimizer: torch.optim.Optimizer
    seconds: list[float] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    accuracies: list[float] = field(default_factory=list)


def load_data(seed: int) -> Data:
    """The digits, a fifth of each class held out for the test."""
    digits = load_digits()
    train, test, train_labels, test_labels = train_test_split(
        digits.images / 16.0,
        digits.target,
        test_size=TEST_SHARE,
        stratify=digits.target,
        random_state=seed,
    )
    return Data(
        torch.tensor(train, dtype=torch.float32).unsqueeze(1),
        torch.tensor(train_labels),
        torch.tensor(test, dtype=torch.float32).unsqueeze(1),
        torch.tensor(test_labels),
    )


def make_model() -> nn.Sequential:
    """The tutorial's kind of network: blocks of convolution, ReLU and pooling, then linear."""
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(16, 32, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(32 * 2 * 2, 64),
        nn.ReLU(),
        nn.Linear(64, 10),
    )


def make_runs(seed: int) -> tuple[Run, Run]:
    """A run with these kernels and one with plain torch, from the same weights."""
    torch.manual_seed(seed)
    plain = make_model()
    ours = cnnkernels.replace_modules(copy.deepcopy(plain), fuse=True)

    def run(
        name: str, model: nn.Module, optimizer_class: Callable[..., torch.optim.Optimizer]
    ) -> Run:
        optimizer = optimizer_class(
            model.parameters(), lr=LEARNING_RATE, momentum=MOMENTUM, weight_decay=WEIGHT_DECAY
        )
        return Run(name, model, optimizer)

    return run("cnnkernels", ours, cnnkernels.optim.SGD), run("torch", plain, torch.optim.SGD)


def train_epoch(run: Run, batches: Sequence[Tensor], data: Data) -> None:
    """Train on every batch of row numbers; add the epoch's time and mean loss to ``run``."""
    run.model.train()
    total = 0.0
    start = time.perf_counter()
    for rows in batches:
        run.optimizer.zero_grad()
        scores = run.model(data.train_images[rows])
        loss = nn.functional.cross_entropy(scores, data.train_labels[rows])
        loss.backward()
        run.optimizer.step()
        total += loss.item() * len(rows)
    run.seconds.append(time.perf_counter() - start)
    run.losses.append(total / len(data.train_labels))


@torch.no_grad()
def test(run: Run, data: Data) -> None:
    """Add the share of test images that are classified correctly to ``run``."""
    run.model.eval()
    correct = run.model(data.test_images).argmax(dim=1) == data.test_labels
    run.accuracies.append(correct.float().mean().item())


def train(
    runs: Sequence[Run],
    data: Data,
    epochs: int,
    batch_size: int,
    seed: int,
    after_epoch: Callable[[], None] = lambda: None,
) -> None:
    """Train all runs, an epoch of each in turn, on the same batches in the same order."""
    order = torch.Generator().manual_seed(seed)
    for epoch in range(epochs):
        batches = torch.randperm(len(data.train_labels), generator=order).split(batch_size)
        # Whoever goes first finds the images cold, so the runs take turns at it.
        for run in runs if epoch % 2 == 0 else reversed(runs):
            train_epoch(run, batches, data)
            test(run, data)
        after_epoch()


def median_speedup(ours: Run, plain: Run) -> float:
    """The median of torch's time over ours, epoch by epoch; the first epoch warms up."""
    pairs = list(zip(plain.seconds, ours.seconds, strict=True))
    return statistics.median(theirs / mine for theirs, mine in pairs[1:] or pairs)


def save_learning_curve(runs: Sequence[Run], path: Path) -> None:
    """Draw the training loss and the test accuracy of every epoch."""
    figure = Figure(figsize=(9, 3.8), layout="constrained")
    loss_axes, accuracy_axes = figure.subplots(1, 2)
    for run, style in zip(runs, ("-", "--"), strict=True):
        epochs = range(1, len(run.losses) + 1)
        loss_axes.plot(epochs, run.losses, style, label=run.name, lw=2)
        accuracy_axes.plot(epochs, [100 * a for a in run.accuracies], style, label=run.name, lw=2)
    loss_axes.set(xlabel="epoch", ylabel="training loss", yscale="log")
    accuracy_axes.set(xlabel="epoch", ylabel="test accuracy, %")
    accuracy_axes.axhline(97, color="gray", lw=1, ls=":")
    for axes in (loss_axes, accuracy_axes):
        axes.legend()
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(alpha=0.3)
    figure.suptitle("Handwritten digits, 8×8: the same training on both")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def print_results(console: Console, runs: Sequence[Run], speedup: float) -> None:
    """Print accuracy, loss and time of an epoch for every run."""
    table = Table("", title="after the last epoch", title_justify="left")
    for heading in ("test accuracy", "training loss", "median time of an epoch"):
        table.add_column(heading, justify="right")
    for run in runs:
        table.add_row(
            run.name,
            f"{run.accuracies[-1]:.2%}",
            f"{run.losses[-1]:.5f}",
            f"{1e3 * statistics.median(run.seconds):.0f} ms",
        )
    console.print(table)
    console.print(
        f"An epoch takes plain torch [bold]{speedup:.2f} times[/] as long (median ratio)."
    )


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The options of the command line."""
    parser = argparse.ArgumentParser(description="Train a CNN on 8×8 images of digits.")
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("digits.png"),
        metavar="FILE",
        help="where the learning curve goes (default: %(default)s)",
    )
    options = parser.parse_args(arguments)
    for name in ("epochs", "batch_size"):
        if getattr(options, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1")
    return options


def main(arguments: Sequence[str] | None = None) -> None:
    """Train both networks, print how they did, and draw the learning curve."""
    options = parse_arguments(arguments)
    console = Console()
    data = load_data(options.seed)
    ours, plain = make_runs(options.seed)
    console.print(
        f"{len(data.train_labels)} images to learn from, {len(data.test_labels)} held out; "
        f"the {cnnkernels.get_backend()} backend of cnnkernels beside plain torch."
    )
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, TimeElapsedColumn(), console=console) as progress:
        task = progress.add_task("epochs", total=options.epochs)

        def show_epoch() -> None:
            description = f"test accuracy {ours.accuracies[-1]:.1%}"
            progress.update(task, advance=1, description=description)

        train((ours, plain), data, options.epochs, options.batch_size, options.seed, show_epoch)
    print_results(console, (ours, plain), median_speedup(ours, plain))
    save_learning_curve((ours, plain), options.out)
    console.print(f"learning curve: {options.out}", soft_wrap=True, highlight=False)


if __name__ == "__main__":
    main()
