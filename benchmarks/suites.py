"""The suites by name."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from . import block, conv2d, max_pool2d, optimizer, training_step
from .cases import Case, Options

SUITES: dict[str, Callable[[Options], list[Case]]] = {
    "conv2d": conv2d.cases,
    "max_pool2d": max_pool2d.cases,
    "block": block.cases,
    "optimizer": optimizer.cases,
    "training_step": training_step.cases,
}


def all_cases(suites: Sequence[str], options: Options) -> list[Case]:
    """The cases of the named suites, in the order of :data:`SUITES`."""
    return [case for name, cases in SUITES.items() if name in suites for case in cases(options)]
