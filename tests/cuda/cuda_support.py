"""What the tests of the CUDA kernels share; they are skipped where there is no GPU for them."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator

import pytest
import torch

from cnnkernels import _native


def _absent() -> str:
    """Why the CUDA kernels cannot run here; empty if they can."""
    if not torch.cuda.is_available():
        return "torch sees no CUDA device"
    if _native.library is None:
        return f"there is no library: {_native.reason}"
    if not _native.library.config().get("cuda"):
        return "the library was built without CUDA kernels"
    return ""


REASON = _absent()
if REASON and os.environ.get("CNNKERNELS_CUDA") == "require":
    raise RuntimeError(f"CNNKERNELS_CUDA=require, but {REASON}")
needs_cuda = pytest.mark.skipif(bool(REASON), reason=REASON or "the CUDA kernels can run")

# About half a second: longer than any test needs to call what must not wait for it.
_LONG_SLEEP = 10**9


@contextlib.contextmanager
def synchronisation_forbidden() -> Iterator[None]:
    """Makes torch raise where it waits for the device."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def assert_returns_at_once(work: Callable[[], object]) -> None:
    """Assert that work does not wait for what the current stream does before it.

    It is called twice beforehand, so that all memory that it needs is in torch's allocator: a new
    allocation waits for the device.
    """
    for _ in range(2):
        work()
    torch.cuda.synchronize()
    torch.cuda._sleep(_LONG_SLEEP)
    slept = torch.cuda.Event()
    slept.record()
    with synchronisation_forbidden():
        work()
        returned_first = not slept.query()
    torch.cuda.synchronize()
    assert returned_first, "the call waited for the device"


@contextlib.contextmanager
def busy_side_stream() -> Iterator[torch.cuda.Stream]:
    """A current stream other than the default one, busy for a while.

    What is launched into another stream by mistake runs before what it depends on.
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(_LONG_SLEEP // 10)
        yield stream
    torch.cuda.current_stream().wait_stream(stream)
