"""The network of chapter 1: two blocks of convolution, ReLU and pooling, then three linear layers.

The weights and the image are random, so the chapter's outputs cannot be repeated, but everything
else can: shapes, counts, and that each backend gives what a float64 calculation by hand gives from
the same weights, forward and backward.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from cnnkernels import functional as F
from cnnkernels import nn
from cnnkernels.tutorial import by_hand as hand
from cnnkernels.tutorial.program import Program, Values

SEED = 0
PARAMETERS = [
    f"{layer}.{kind}"
    for layer in ("conv1", "conv2", "fc1", "fc2", "fc3")
    for kind in ("weight", "bias")
]


class Net(torch.nn.Module):
    """The chapter's classifier of 32×32 images into 10 classes."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 6, 3)
        self.conv2 = nn.Conv2d(6, 16, 3)
        self.fc1 = torch.nn.Linear(16 * 6 * 6, 120)
        self.fc2 = torch.nn.Linear(120, 84)
        self.fc3 = torch.nn.Linear(84, 10)

    def features(self, x: Tensor) -> dict[str, Tensor]:
        """What each layer hands to the next, by the layer's name, in order.

        Args:
            x: images of shape (N, 1, 32, 32).
        """
        steps = {}
        steps["conv1"] = x = self.conv1(x)
        steps["pool1"] = x = F.max_pool2d(torch.relu(x), (2, 2))
        steps["conv2"] = x = self.conv2(x)
        steps["pool2"] = x = F.max_pool2d(torch.relu(x), 2)
        steps["flatten"] = x = torch.flatten(x, 1)
        steps["fc1"] = x = torch.relu(self.fc1(x))
        steps["fc2"] = x = torch.relu(self.fc2(x))
        steps["fc3"] = self.fc3(x)
        return steps

    def forward(self, x: Tensor) -> Tensor:
        """Scores of shape (N, 10) for images of shape (N, 1, 32, 32)."""
        return self.features(x)["fc3"]

    def forward_fused(self, x: Tensor) -> Tensor:
        """The same scores; each block of convolution, ReLU and pooling is one operator."""
        x = F.conv2d_relu_max_pool2d(x, self.conv1.weight, self.conv1.bias, pool_kernel_size=2)
        x = F.conv2d_relu_max_pool2d(x, self.conv2.weight, self.conv2.bias, pool_kernel_size=2)
        x = torch.relu(self.fc1(torch.flatten(x, 1)))
        return self.fc3(torch.relu(self.fc2(x)))


def example() -> tuple[Net, Tensor, Tensor]:
    """A network, an image and a gradient of the output, random but the same on every call."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        return Net(), torch.randn(1, 1, 32, 32), torch.randn(1, 10)


def compute() -> Values:
    """Counts, shapes, output and gradients on the backend in force."""
    net, image, grad_output = example()
    parameters = list(net.parameters())
    values: dict[str, object] = {
        "parameter tensors": len(parameters),
        "size of conv1.weight": parameters[0].size(),
        "parameters in all": sum(p.numel() for p in parameters),
    }
    steps = net.features(image)
    for layer, output in steps.items():
        values[f"shape after {layer}"] = output.shape
    values["output"] = steps["fc3"]
    values["output, fused blocks"] = net.forward_fused(image)

    net.zero_grad()
    net(image).backward(grad_output)
    for name, parameter in net.named_parameters():
        values[f"gradient of {name}"] = parameter.grad
    net.zero_grad()
    net.forward_fused(image).backward(grad_output)
    values["conv1.weight, fused blocks"] = net.conv1.weight.grad
    return values


def by_hand() -> Values:
    """The same from the layers' definitions, in float64."""
    sizes = [(6, 1, 3, 3), (6,), (16, 6, 3, 3), (16,), (120, 576), (120,), (84, 120), (84,)]
    sizes += [(10, 84), (10,)]
    conv1 = hand.output_size(32, 3)
    pool1 = conv1 // 2
    conv2 = hand.output_size(pool1, 3)
    pool2 = conv2 // 2
    values: dict[str, object] = {
        "parameter tensors": len(sizes),
        "size of conv1.weight": sizes[0],
        "parameters in all": sum(int(np.prod(size)) for size in sizes),
        "shape after conv1": (1, 6, conv1, conv1),
        "shape after pool1": (1, 6, pool1, pool1),
        "shape after conv2": (1, 16, conv2, conv2),
        "shape after pool2": (1, 16, pool2, pool2),
        "shape after flatten": (1, 16 * pool2 * pool2),
        "shape after fc1": (1, 120),
        "shape after fc2": (1, 84),
        "shape after fc3": (1, 10),
    }
    output, gradients = _forward_and_backward_by_hand()
    values["output"] = [output]
    values["output, fused blocks"] = [output]
    for name in PARAMETERS:
        values[f"gradient of {name}"] = gradients[name]
    values["conv1.weight, fused blocks"] = gradients["conv1.weight"]
    return values


def _forward_and_backward_by_hand() -> tuple[hand.Array, dict[str, hand.Array]]:
    net, image, grad_output = example()
    w = {name: p.detach().numpy().astype(np.float64) for name, p in net.named_parameters()}
    x = image[0].numpy().astype(np.float64)

    conv1 = hand.conv2d(x, w["conv1.weight"], w["conv1.bias"])
    pool1 = hand.max_pool2d(hand.relu(conv1), 2, 2)
    conv2 = hand.conv2d(pool1, w["conv2.weight"], w["conv2.bias"])
    pool2 = hand.max_pool2d(hand.relu(conv2), 2, 2)
    flat = pool2.reshape(-1)
    fc1 = w["fc1.weight"] @ flat + w["fc1.bias"]
    fc2 = w["fc2.weight"] @ hand.relu(fc1) + w["fc2.bias"]
    fc3 = w["fc3.weight"] @ hand.relu(fc2) + w["fc3.bias"]

    # Backward: from the last layer to the first; ReLU lets through where its input was positive.
    grad = {"fc3.bias": grad_output[0].numpy().astype(np.float64)}
    grad["fc3.weight"] = np.outer(grad["fc3.bias"], hand.relu(fc2))
    grad["fc2.bias"] = (w["fc3.weight"].T @ grad["fc3.bias"]) * (fc2 > 0)
    grad["fc2.weight"] = np.outer(grad["fc2.bias"], hand.relu(fc1))
    grad["fc1.bias"] = (w["fc2.weight"].T @ grad["fc2.bias"]) * (fc1 > 0)
    grad["fc1.weight"] = np.outer(grad["fc1.bias"], flat)
    grad_pool2 = (w["fc1.weight"].T @ grad["fc1.bias"]).reshape(pool2.shape)
    grad_conv2 = hand.max_pool2d_backward(grad_pool2, hand.relu(conv2), 2, 2) * (conv2 > 0)
    grad_pool1, grad["conv2.weight"], grad["conv2.bias"] = hand.conv2d_backward(
        grad_conv2, pool1, w["conv2.weight"]
    )
    grad_conv1 = hand.max_pool2d_backward(grad_pool1, hand.relu(conv1), 2, 2) * (conv1 > 0)
    _, grad["conv1.weight"], grad["conv1.bias"] = hand.conv2d_backward(
        grad_conv1, x, w["conv1.weight"]
    )
    return fc3, grad


PROGRAM = Program(
    name="net",
    chapter=1,
    title="A network: shapes, forward and backward",
    explanation="Weights and image are random (seed 0). By hand is float64 from the same weights, "
    "backward pass included. The fused rows run each conv-ReLU-pool block as one operator.",
    printed={"shape after flatten": (1, 16 * 6 * 6), "shape after fc3": (1, 10)},
    by_hand=by_hand,
    compute=compute,
    # Sums of hundreds of float32 products in an order of the library's choosing.
    tolerance=1e-5,
)
