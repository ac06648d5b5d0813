"""``python -m benchmarks.gpu.report RESULTS... > docs/performance-gpu.md``: the page of a run."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from . import block, convolution, network
from .device import CUDA
from .results import Results, merge, read_results
from .tables import SUITES, Table, markdown, tables_of

_INTRODUCTION = """\
# Speed on a GPU

Made by `make gpu`, which builds on a machine with an NVIDIA GPU, runs the tests and
compute-sanitizer there, measures, and writes this page. [The benchmark's
page](../benchmarks/README.md#on-a-gpu) says how it measures.
"""
_NOT_MEASURED = """\
## {suite}

This suite has not been measured.
"""
_DRY = """\
**A dry run on a CPU: no figure below means anything.**
"""
_LEGEND = """\
## How to read it

* A **ratio** is torch's time over ours within a round, so above 1 ours is faster: the median over
  rounds, and the quartiles. A row that loses stays. A row marked ATen ran on torch's kernels on
  both sides.
* **device µs** is the device's time for a call, by events around a CUDA graph of calls; with a
  star, around eager calls. **wall µs** is what an eager program waits for a call, Python included;
  where no format is named it is in NCHW.
* **foreach** is torch's default on a GPU, **fused** is `fused=True`. For pooling, **ratio** has
  each side in its faster memory format, and **same** has ours in the format of torch's faster one
  (NHWC is channels_last). Forward writes what the backward pass needs; backward is timed alone.
* **of copy** is the share of the bandwidth of a device-to-device copy in the same run, by the bytes
  that must move: for the optimizer parameter, gradient and updated parameter, and a momentum buffer
  twice; for pooling input, output and a byte of argmax an output, or the same of their gradients.
* **error** is ours relative to float64, in norm, and over torch's (that of `fused=True`).
* Rotating copies of the inputs exceed twice the second-level cache, but for layers so small that
  hundreds of copies do not.
"""
_CONVOLUTIONS = {convolution.SUITE, block.SUITE, network.SUITE}
_CONVOLUTION_LEGEND = """\
Of convolutions, blocks and networks:

* **NCHW** and **NHWC** have both sides in that format. torch's convolutions run with
  `cudnn.benchmark=True`. **cuDNN alone** is cuDNN's time for the convolution in NHWC, without a
  bias, over ours from NCHW with one. **Inductor** has what torch.compile makes of torch's block.
* **plan** is what `cnnkernels.explain` announces in NCHW and in NHWC, for a backward pass the
  gradient of the input and that of the weight; `aten` is torch's own kernel. There **forced** has
  the ratios of the package's kernels, which are not what a user gets.
* **of matmul** is the share of the rate of `torch.mm` in the same precision and run, by the
  operations of a direct convolution. fp32 is float32 proper, TF32 what torch allows convolutions by
  default. **of copy** counts input, weight and output once, backward those and their gradients as
  far as a pass reads or writes them.
* **error** is by the first images of a batch, as many as float64 takes milliseconds for; that of a
  network is of its logits for four images, in training after three steps, and **logits apart** is
  how far they are from torch's.
"""


def page(results: Results, steps: Sequence[Mapping[str, Any]] = ()) -> str:
    """The page of a run: its facts, what the other steps of the run found, and all tables."""
    environment = results.environment
    parts = [_INTRODUCTION]
    if environment["device"] != CUDA:
        parts.append(_DRY)
    parts.append(markdown(_facts(results)))
    if steps:
        parts.append(markdown(_steps(steps)))
    measured = {row.suite for row in results.rows}
    parts.append(_LEGEND)
    if measured & _CONVOLUTIONS:
        parts.append(_CONVOLUTION_LEGEND)
    parts.extend(markdown(table) for table in tables_of(results.rows))
    parts.extend(_NOT_MEASURED.format(suite=suite) for suite in SUITES if suite not in measured)
    parts.extend(_notes(results))
    return "\n".join(parts)


def _facts(results: Results) -> Table:
    names = {
        "date": "date",
        "gpu": "GPU",
        "capability": "compute capability",
        "multiprocessors": "multiprocessors",
        "memory_mib": "memory [MiB]",
        "l2_mib": "second-level cache [MiB]",
        "driver": "driver",
        "cuda": "CUDA of torch",
        "cudnn": "cuDNN",
        "torch": "torch",
        "python": "Python",
        "cpu": "CPU",
        "kernels": "CUDA kernels",
    }
    facts = results.environment
    rows = [[title, str(facts[name])] for name, title in names.items() if facts.get(name)]
    if results.copy_bytes_per_second:
        rows.append(["copy bandwidth", f"{results.copy_bytes_per_second * 1e-12:.2f} TB/s"])
    for precision, rate in results.matmul_flops_per_second.items():
        rows.append([f"matrix product in {precision}", f"{rate * 1e-12:.0f} TFLOP/s"])
    return Table("The machine", ("", ""), 2, rows)


def _steps(steps: Sequence[Mapping[str, Any]]) -> Table:
    return Table(
        "The run",
        ("step", "outcome", "seconds", "last line"),
        2,
        [
            [
                str(step["name"]),
                str(step["outcome"]),
                f"{step['seconds']:.0f}",
                str(step["summary"]).replace("|", "\\|"),
            ]
            for step in steps
        ],
    )


def _notes(results: Results) -> list[str]:
    """What a reader of the tables must know besides."""
    eager = {
        f"* {row.suite}, {row.name}, {row.dtype} {row.mode}: {side.label}: {side.reason}"
        for row in results.rows
        for side in row.measured.values()
        if side.reason
    }
    notes = []
    if eager:
        notes.append("## Not captured into a graph\n\n" + "\n".join(sorted(eager)) + "\n")
    missing = {f"* {name}: {why}" for row in results.rows for name, why in row.missing.items()}
    if missing:
        notes.append("## Not available\n\n" + "\n".join(sorted(missing)) + "\n")
    if results.left_out:
        cases = "\n".join(f"* {title}" for title in results.left_out)
        notes.append(f"## Left out for time\n\n{cases}\n")
    return notes


def main() -> int:
    """Print the page of the results in one or several files."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu.report", description=__doc__)
    parser.add_argument("results", nargs="+", type=Path, metavar="RESULTS", help="JSON files")
    parser.add_argument(
        "--steps", type=Path, metavar="FILE", help="the summary that make gpu writes"
    )
    args = parser.parse_args()
    steps = []
    if args.steps is not None:
        steps = json.loads(args.steps.read_text(encoding="utf-8"))["steps"]
    print(page(merge([read_results(file) for file in args.results]), steps), end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())
