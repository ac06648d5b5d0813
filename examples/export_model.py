"""Save a model that runs on these kernels, and load it again: torch.export and TorchScript.

    python examples/export_model.py --out models

A program that loads the files has to import cnnkernels first, for the operators; it does not need
the model's Python code. Without the compiled library the same files run on the fallback.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn

import cnnkernels


def make_model() -> nn.Module:
    """A small classifier of 28×28 images, its first three layers fused into one operator."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 8, 3),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(8 * 13 * 13, 10),
    )
    return cnnkernels.replace_modules(model.eval())


def main(arguments: Sequence[str] | None = None) -> None:
    """Save the model in both forms, load both, and print how far their outputs are from its own."""
    parser = argparse.ArgumentParser(description="Save and load a model that runs on the kernels.")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR")
    directory: Path = parser.parse_args(arguments).out
    directory.mkdir(parents=True, exist_ok=True)

    model, images = make_model(), torch.rand(2, 1, 28, 28)
    expected = model(images)

    # torch.export is PyTorch's current way; "batch" may be any number of images.
    shapes = ({0: torch.export.Dim("batch")},)
    exported = torch.export.export(model, (images,), dynamic_shapes=shapes)
    torch.export.save(exported, directory / "model.pt2")
    loaded = torch.export.load(directory / "model.pt2").module()
    print("torch.export, largest difference:", (loaded(images) - expected).abs().max().item())

    # TorchScript is deprecated, but still what many C++ programs load.
    torch.jit.script(model).save(directory / "model.pt")
    scripted = torch.jit.load(directory / "model.pt")
    print("TorchScript, largest difference:", (scripted(images) - expected).abs().max().item())


if __name__ == "__main__":
    main()
