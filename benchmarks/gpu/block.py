"""The ``block`` suite: convolution, ReLU and max pooling as one operator.

Against eager torch, for which cuDNN chooses by measuring, in both memory formats; and against what
torch.compile makes of the three (Inductor), where it works. *Forward* runs under
``torch.no_grad()``; *forward+backward* computes the gradients that training asks for.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
import torch.nn.functional as F

from ..block import BLOCKS as CPU_BLOCKS
from ..block import Block, functions_of
from ..cases import FORWARD, FORWARD_BACKWARD
from ..operators import LAYOUTS
from .device import Device
from .operation import (
    BIAS,
    INPUT,
    NCHW,
    WEIGHT,
    Function,
    Operation,
    Tensors,
    Variant,
    format_pairs,
    operation_workload,
    results_of,
    settings,
)
from .options import Options
from .precision import FP16, FP32, PRECISIONS, Precision
from .rows import OURS, TORCH, Case, Pairs, Workload

SUITE = "block"
INDUCTOR = "Inductor"
"""The contender, and the ratio to it. Both read NCHW: what it does with formats is its choice."""

BLOCKS = (
    *CPU_BLOCKS,
    Block("lenet5_block1", (1, 32, 32), 6, 5, 1, 0, 2, 2, 0, input_gradient=False),
    Block("vgg_first", (3, 224, 224), 64, 3, 1, 1, 2, 2, 0, input_gradient=False),
    Block("c32_k64_56x56", (32, 56, 56), 64, 3, 1, 1, 2, 2, 0, input_gradient=True),
    Block("c64_k128_28x28", (64, 28, 28), 128, 3, 1, 1, 2, 2, 0, input_gradient=True),
    Block("c128_k128_28x28", (128, 28, 28), 128, 3, 1, 1, 3, 2, 1, input_gradient=True),
)
_SMALL = ("ch1_", "lenet5_")


def cases(options: Options, device: Device) -> list[Case]:
    """A case for each block, precision and mode."""
    precisions = tuple(PRECISIONS) if options.full else (FP16, FP32)
    return [
        Case(
            suite=SUITE,
            name=block.name,
            batch=batch,
            dtype=precision,
            mode=mode,
            prepare=functools.partial(
                _workload,
                _shrunk(block, options.shrink),
                batch,
                mode,
                PRECISIONS[precision],
                device,
                options,
            ),
        )
        for precision in precisions
        for mode in (FORWARD, FORWARD_BACKWARD)
        for block in BLOCKS[: options.layers]
        for batch in [options.small_batch if block.name.startswith(_SMALL) else options.batch]
    ]


def _shrunk(block: Block, shrink: int) -> Block:
    channels, height, width = block.input_size
    least = block.kernel_size + block.stride * block.pool_kernel_size
    return replace(
        block,
        input_size=(
            max(1, channels // shrink),
            max(least, height // shrink),
            max(least, width // shrink),
        ),
        out_channels=max(1, block.out_channels // shrink),
    )


def compiled(function: Function, tensors: Tensors, operation: Operation) -> Function:
    """What torch.compile makes of a function, compiled for these tensors and run on them once."""
    # No guards of the last block, and no limit to how many there are.
    torch._dynamo.reset()
    result: Function = torch.compile(function, fullgraph=True, dynamic=False)
    results_of(operation, result, tensors, settings(operation.precision))
    return result


def _workload(
    block: Block, batch: int, mode: str, precision: Precision, device: Device, options: Options
) -> Workload:
    ours, torchs = functions_of(block)
    input_size = torch.Size((batch, *block.input_size))
    weight_size = torch.Size(
        (block.out_channels, block.input_size[0], block.kernel_size, block.kernel_size)
    )
    x, weight, bias = (
        torch.empty(size, device="meta") for size in (input_size, weight_size, weight_size[:1])
    )
    between = F.conv2d(x, weight, bias, block.stride, block.padding)
    flops = 2 * between.numel() * weight_size[1:].numel()
    wanted = (INPUT, WEIGHT, BIAS) if block.input_gradient else (WEIGHT, BIAS)
    operation = Operation(
        input_size=input_size,
        weight_size=weight_size,
        output_size=torchs(x, weight, bias).shape,
        precision=precision,
        gradients=() if mode == FORWARD else wanted,
        with_forward=True,
        flops=flops,
    )
    missing: dict[str, str] = {}

    def variants(tensors: Mapping[str, Tensors]) -> Sequence[Variant]:
        context = settings(precision)
        found = [Variant(f"{TORCH} {layout}", TORCH, layout, torchs, context) for layout in LAYOUTS]
        for layout in LAYOUTS:
            with context():
                plan = str(tensors[layout].explain(ours)["algorithm"])
            found.append(Variant(f"{OURS} {layout}", OURS, layout, ours, context, plan))
        if not options.inductor:
            missing[INDUCTOR] = "not asked for"
            return found
        try:
            by_inductor = compiled(torchs, tensors[NCHW], operation)
        except Exception as error:  # whatever torch.compile and the compilers behind it raise
            reason = str(error).strip().partition("\n")[0]
            missing[INDUCTOR] = f"{type(error).__name__}: {reason}"
        else:
            found.append(Variant(INDUCTOR, INDUCTOR, NCHW, by_inductor, context))
        return found

    return operation_workload(
        operation,
        torchs,
        variants,
        device,
        options.seed,
        pairs=lambda medians: _pairs(medians),
        # A backward pass visits the winners alone: what it must compute depends on the values.
        flops=flops if mode == FORWARD else 0,
        missing=missing,
    )


def _pairs(medians: Mapping[str, float]) -> Pairs:
    labels = {(side, layout): f"{side} {layout}" for side in (OURS, TORCH) for layout in LAYOUTS}
    pairs = format_pairs(labels, medians)
    if INDUCTOR in medians:
        pairs[INDUCTOR] = (labels[OURS, NCHW], INDUCTOR)
    return pairs
