"""Chapter 2's training: a filter bank learns to tell two patterns apart.

The network is one 4×4 convolution with four filters; a 4×4 image gives four numbers, the scores of
four classes. It sees 20 images of pattern A (class 0), then 20 of pattern B (class 1), twice, one
at a time. Image i of a pattern is the pattern times i, so the first is all zeros: every score is
zero, and the loss is log 4 = 1.3862943649 whatever the weights.

The chapter's weights are random and not printed, but its losses give away what matters of them.
On pattern A, filter k counts only by the sum S_k of its weights under the pattern's ones, and the
loss depends only on the three differences S_k − S_0. A least-squares fit of these three to the
chapter's first fourteen losses leaves an error of at most 4e-7: three numbers reproduce the losses
of all twenty images of pattern A, and the accuracies before and after.

The first loss is the same for every seed. The final accuracy is not: of the seeds 0 to 199, four
in five end at 100%, the others at 0%.

What cannot be reproduced: the chapter lists three more losses of zero, where its program comes to
the zeros of pattern B and so to log 4 again (it also announces 200 images, and makes 40).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cnnkernels import nn, optim
from cnnkernels.tutorial.program import Program, Values

PATTERN_A = [
    [0.0, 1.0, 0.0, 1.0],
    [0.0, 1.0, 0.0, 1.0],
    [0.0, 1.0, 0.0, 1.0],
    [0.0, 1.0, 0.0, 1.0],
]
PATTERN_B = [
    [1.0, 1.0, 1.0, 1.0],
    [0.0, 1.0, 0.0, 1.0],
    [0.0, 1.0, 0.0, 1.0],
    [1.0, 1.0, 1.0, 1.0],
]
PATTERNS = [(PATTERN_A, 0), (PATTERN_B, 1)]
# Every image is (pattern, factor, class).
IMAGES = [(pattern, factor, label) for pattern, label in PATTERNS for factor in range(20)]
TEST_FACTOR = 999999999
EPOCHS, LEARNING_RATE, MOMENTUM = 2, 0.001, 0.9
SEEDS = range(5)

PRINTED_LOSSES = [
    1.3862943649291992,
    1.893149733543396,
    2.4831488132476807,
    3.0793371200561523,
    3.550563335418701,
    3.7199602127075195,
    3.3844733238220215,
    2.374782085418701,
    0.8799697160720825,
    0.09877146035432816,
    0.006193255074322224,
    0.00034528967808000743,
    1.8000440832111053e-05,
    8.344646857949556e-07,
    *[0.0] * 6,
]
# S_k of each filter under pattern A, fitted to the losses above with S_0 = 0.
FITTED_SUMS = [0.0, 0.34650945, 0.56288763, 0.90437701]


class Run(NamedTuple):
    """A training: accuracy before and after, in per cent, the losses, and the final weights."""

    before: float
    losses: list[float]
    after: float
    weight: Tensor


class PatternNet(torch.nn.Module):
    """Scores of shape (1, 4) for one image of shape (1, 1, 4, 4)."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_channels=1, out_channels=4, kernel_size=4, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """The four filters' sums."""
        return self.conv(x).view(1, 4)


def fitted_weight() -> Tensor:
    """A filter bank of shape (4, 1, 4, 4) that gives the chapter's losses.

    Each sum is spread evenly over the eight weights under pattern A.
    """
    sums = torch.tensor(FITTED_SUMS).view(4, 1, 1, 1)
    return sums / 8 * torch.tensor(PATTERN_A)


def random_weight(seed: int) -> Tensor:
    """What torch draws for the filter bank after ``torch.manual_seed(seed)``."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return PatternNet().conv.weight.detach().clone()


def sgd(parameters: Iterable[Tensor]) -> torch.optim.Optimizer:
    """The chapter's optimizer, on these kernels."""
    return optim.SGD(parameters, lr=LEARNING_RATE, momentum=MOMENTUM)


def train(net: torch.nn.Module, optimizer: torch.optim.Optimizer) -> list[float]:
    """Train for two epochs, one image at a time, in order.

    Args:
        net: takes an image of shape (1, 1, 4, 4) and returns scores of shape (1, 4).
        optimizer: of the parameters of ``net``.

    Returns:
        The loss of every image before its step; 40 an epoch.
    """
    criterion = torch.nn.CrossEntropyLoss()
    losses = []
    for pattern, factor, label in IMAGES * EPOCHS:
        image = factor * torch.tensor(pattern).view(1, 1, 4, 4)
        optimizer.zero_grad()
        loss = criterion(net(image), torch.tensor([label]))
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def accuracy(net: torch.nn.Module) -> float:
    """Per cent of the chapter's test (pattern A, times 999999999) put in the right class."""
    image = TEST_FACTOR * torch.tensor(PATTERN_A).view(1, 1, 4, 4)
    return 100.0 * (net(image).argmax().item() == 0)


def train_from(weight: Tensor) -> Run:
    """Train a network that starts with ``weight`` of shape (4, 1, 4, 4)."""
    net = PatternNet()
    with torch.no_grad():
        net.conv.weight.copy_(weight)
    before = accuracy(net)
    losses = train(net, sgd(net.parameters()))
    return Run(before, losses, accuracy(net), net.conv.weight.detach())


def compute() -> Values:
    """The chapter's run, and the runs of five seeds, on the backend in force."""
    return _values(train_from)


def by_hand() -> Values:
    """The same in float64."""
    return _values(train_by_hand)


def train_by_hand(weight: Tensor) -> Run:
    """:func:`train_from` without torch: scores, softmax, gradient and momentum written out."""
    w: NDArray[np.float64] = weight.numpy().astype(np.float64).reshape(4, 16)
    velocity = np.zeros_like(w)
    test_image = TEST_FACTOR * np.array(PATTERN_A).reshape(16)

    before = 100.0 * (np.argmax(w @ test_image) == 0)
    losses = []
    for pattern, factor, label in IMAGES * EPOCHS:
        image = factor * np.array(pattern).reshape(16)
        scores = w @ image
        # Cross-entropy: the log of the sum of exponentials, less the right class's score.
        powers = np.exp(scores - scores.max())
        losses.append(float(scores.max() + np.log(powers.sum()) - scores[label]))
        grad_scores = powers / powers.sum()
        grad_scores[label] -= 1.0
        velocity = MOMENTUM * velocity + np.outer(grad_scores, image)
        w = w - LEARNING_RATE * velocity
    after = 100.0 * (np.argmax(w @ test_image) == 0)
    return Run(before, losses, after, torch.from_numpy(w).view(4, 1, 4, 4))


def _values(run: Callable[[Tensor], Run]) -> Values:
    printed_run = run(fitted_weight())
    values: dict[str, object] = {"accuracy before, %": printed_run.before}
    for i in range(14):
        values[f"loss {i + 1}"] = printed_run.losses[i]
    values["losses 15 to 20"] = printed_run.losses[14:20]
    values["accuracy after, %"] = printed_run.after
    runs = [run(random_weight(seed)) for seed in SEEDS]
    values["first loss, seeds 0 to 4"] = [seed_run.losses[0] for seed_run in runs]
    values["accuracy after, seeds 0 to 4, %"] = [seed_run.after for seed_run in runs]
    values["losses of seed 0"] = runs[0].losses
    return values


def _printed() -> Values:
    printed: dict[str, object] = {"accuracy before, %": 0.0}
    for i in range(14):
        printed[f"loss {i + 1}"] = PRINTED_LOSSES[i]
    printed["losses 15 to 20"] = PRINTED_LOSSES[14:]
    printed["accuracy after, %"] = 100.0
    printed["first loss, seeds 0 to 4"] = [PRINTED_LOSSES[0]] * len(SEEDS)
    return printed


PROGRAM = Program(
    name="pattern-training",
    chapter=2,
    title="Training on two patterns",
    explanation="40 images, 2 epochs, batch 1, SGD with momentum from cnnkernels.optim. The first "
    "image is zeros, so the first loss is log 4 under any weights. The chapter does not print the "
    "weights that it starts from; three numbers fitted to its losses stand in for them and bring "
    "back the losses of all 20 images of pattern A.",
    printed=_printed(),
    by_hand=by_hand,
    compute=compute,
    # A loss is the difference of two numbers of the size of the scores, so its error is absolute.
    scale=1.0,
    # Scores of up to 100 in two epochs of random weights.
    tolerances={"losses of seed 0": 100 * 2.0**-22},
)
