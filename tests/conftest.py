"""What all tests share: seeds, the backends, and a check that the kernels really ran."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

import pytest
import torch

import cnnkernels
from cnnkernels import _native

BACKENDS = ["native", "torch"] if cnnkernels.is_native_available() else ["torch"]


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """Runs the test once on each backend that is available here."""
    with cnnkernels.use_backend(request.param):
        yield request.param


@contextlib.contextmanager
def runs_kernel(*operators: str) -> Iterator[None]:
    """Asserts that the native kernels of these operators run in the block.

    Without the compiled library, and on the torch backend, there is nothing to assert.
    """
    if _native.library is None or cnnkernels.get_backend() != "native":
        yield
        return
    before = dict(_native.library.kernel_calls())
    yield
    after = _native.library.kernel_calls()
    for operator in operators:
        assert after[operator] > before.get(operator, 0), f"no native {operator} kernel ran"


ISAS = _native.library.config()["isas"] if _native.library is not None else ["baseline"]


def set_tier(name: str) -> None:
    """Runs all kernels that follow on this instruction-set tier, if there are any."""
    if _native.library is not None:
        _native.library.set_isa(name)


@pytest.fixture(params=ISAS)
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Runs the test once on each instruction-set tier of this machine."""
    chosen = "baseline" if _native.library is None else _native.library.config()["isa"]
    set_tier(request.param)
    yield request.param
    set_tier(chosen)


@pytest.fixture
def poisoned() -> Iterator[None]:
    """Fills new tensors and the kernels' workspaces with NaN, so that a gap is seen.

    ``CNNKERNELS_TEST_POISON=0`` leaves them as they are, for tools that watch memory themselves.
    """
    if os.environ.get("CNNKERNELS_TEST_POISON") == "0":
        yield
        return
    deterministic = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    if _native.library is not None:
        _native.library.poison_workspaces(True)
    yield
    torch.use_deterministic_algorithms(deterministic)
    if _native.library is not None:
        _native.library.poison_workspaces(False)
