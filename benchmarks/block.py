"""The ``block`` suite: convolution, ReLU and max pooling as one operator."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

import cnnkernels.functional

from .cases import FORWARD, Case, Options, Workload
from .layers import batches_for, is_tutorial
from .operators import Operator, operator_workload


@dataclass(frozen=True)
class Block:
    """A block. ``input_gradient`` is False where the input is the image, as in training."""

    name: str
    input_size: tuple[int, int, int]
    out_channels: int
    kernel_size: int
    stride: int
    padding: int
    pool_kernel_size: int
    pool_stride: int
    pool_padding: int
    input_gradient: bool


BLOCKS = (
    Block("ch1_net_block1", (1, 32, 32), 6, 3, 1, 0, 2, 2, 0, input_gradient=False),
    Block("ch1_net_block2", (6, 15, 15), 16, 3, 1, 0, 2, 2, 0, input_gradient=True),
    # The last convolution of VGG's first stage, which a pool follows.
    Block("vgg_block1", (64, 224, 224), 64, 3, 1, 1, 2, 2, 0, input_gradient=True),
    Block("resnet_stem", (3, 224, 224), 64, 7, 2, 3, 3, 2, 1, input_gradient=False),
)


def cases(options: Options) -> list[Case]:
    """A case for each block, batch and mode; of the tutorial's Net alone when quick."""
    return [
        Case(
            suite="block",
            name=block.name,
            batch=batch,
            mode=mode,
            gradients=() if mode == FORWARD else _gradients(block),
            prepare=functools.partial(_workload, block, batch, mode, options.seed),
        )
        for block in BLOCKS
        if is_tutorial(block.name) or not options.quick
        for batch in batches_for(block.name, options.batches)
        for mode in options.modes
    ]


def _gradients(block: Block) -> tuple[str, ...]:
    return ("input", "weight", "bias") if block.input_gradient else ("weight", "bias")


def functions_of(block: Block) -> tuple[Callable[..., Tensor], Callable[..., Tensor]]:
    """Ours and torch's, of an input, a weight and a bias."""
    stride, padding = block.stride, block.padding
    pool = (block.pool_kernel_size, block.pool_stride, block.pool_padding)

    def ours(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return cnnkernels.functional.conv2d_relu_max_pool2d(
            x,
            weight,
            bias,
            stride,
            padding,
            pool_kernel_size=pool[0],
            pool_stride=pool[1],
            pool_padding=pool[2],
        )

    def torchs(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return F.max_pool2d(F.relu(F.conv2d(x, weight, bias, stride, padding)), *pool)

    return ours, torchs


def _workload(block: Block, batch: int, mode: str, seed: int) -> Workload:
    ours, peer = functions_of(block)
    channels = block.input_size[0]
    return operator_workload(
        Operator(ours, peer, "conv2d_relu_max_pool2d", "conv2d_relu_max_pool2d_backward"),
        (batch, *block.input_size),
        [
            (block.out_channels, channels, block.kernel_size, block.kernel_size),
            (block.out_channels,),
        ],
        mode=mode,
        input_gradient=block.input_gradient,
        seed=seed,
    )
