"""The memory of results: kept when it is freed, used again, bounded, and like any other."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
import threading
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

import cnnkernels
from cnnkernels import _native, functional

pytestmark = pytest.mark.skipif(_native.library is None, reason="torch's memory is used")

MEBIBYTE = 1 << 20


@pytest.fixture(autouse=True)
def empty() -> Iterator[None]:
    cnnkernels.empty_cache()
    yield
    cnnkernels.empty_cache()


def result(channels: int = 64, pixels: int = 64) -> Tensor:
    """A convolution's result of ``channels`` * ``pixels``**2 floats: 1 MiB by default."""
    return functional.conv2d(torch.ones(1, 1, pixels, pixels), torch.ones(channels, 1, 1, 1))


def test_freed_memory_is_used_again() -> None:
    first = result()
    address = first.data_ptr()
    del first
    second = result()
    assert second.data_ptr() == address
    third = result()
    assert third.data_ptr() != address
    torch.testing.assert_close(second, torch.ones_like(second), rtol=0, atol=0)
    torch.testing.assert_close(third, torch.ones_like(third), rtol=0, atol=0)


def test_memory_in_use_is_not_given_away() -> None:
    view = result()[:, 3]
    others = [result() for _ in range(3)]
    for other in others:
        other.fill_(7)
    torch.testing.assert_close(view, torch.ones_like(view), rtol=0, atol=0)


def test_gradients_and_pooling_use_it_too() -> None:
    x = torch.randn(4, 16, 64, 64, requires_grad=True)
    weight = torch.randn(16, 16, 3, 3, requires_grad=True)

    def step() -> set[int]:
        x.grad = weight.grad = None
        y = functional.conv2d(x, weight, padding=1)
        pooled = functional.max_pool2d(y, 3, 1, 1)
        pooled.sum().backward()
        assert x.grad is not None
        return {y.data_ptr(), pooled.data_ptr(), x.grad.data_ptr()}

    assert len(step() & step()) >= 2


def test_release_and_bound() -> None:
    """A process of its own, whose memory nothing else uses: what is kept, and given back."""
    program = f"""
import resource, torch, cnnkernels
from cnnkernels import functional as F

def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize() / {MEBIBYTE}

x, w = torch.ones(1, 1, 1024, 1024), torch.ones(16, 1, 1, 1)
F.conv2d(x, w[:1])
before = resident()
results = [F.conv2d(x, w) for _ in range(3)]  # 64 MiB each
assert resident() > before + 180, (resident(), before)
del results
kept = resident() - before
cnnkernels.empty_cache()
print(round(kept), round(resident() - before))
"""
    if not os.path.exists("/proc/self/statm"):
        pytest.skip("there is no /proc to read the resident memory from")

    def kept_and_left(variable: str | None) -> tuple[int, int]:
        environment = {**os.environ, "CNNKERNELS_CACHE_MIB": variable or ""}
        done = subprocess.run(
            [sys.executable, "-c", program],
            capture_output=True,
            text=True,
            env=environment,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        kept, left = map(int, done.stdout.split())
        return kept, left

    kept, left = kept_and_left(None)
    assert 180 < kept < 205
    assert left < 20
    kept, left = kept_and_left("130")  # two of the three
    assert 115 < kept < 140
    assert left < 20
    kept, left = kept_and_left("0")
    assert kept < 20
    assert left < 20


def test_results_are_like_any_tensor() -> None:
    made = result()
    assert copy.deepcopy(made).equal(made)
    resized = result()
    resized.resize_(3, 1024, 1024)
    assert resized.numel() == 3 * MEBIBYTE
    shared = result()
    shared.share_memory_()
    assert shared.is_shared()
    assert shared.equal(made)
    made.untyped_storage().resize_(0)
    assert made.untyped_storage().nbytes() == 0
    assert result().data_ptr() % 64 == 0


def test_memory_that_runs_out_is_taken_from_what_is_kept() -> None:
    resource = pytest.importorskip("resource")
    if not os.path.exists("/proc/self/statm"):
        pytest.skip("there is no /proc to read the size of the process from")
    assert resource is not None
    program = f"""
import resource, torch
from cnnkernels import functional as F

torch.set_num_threads(1)
x = torch.ones(1, 1, 1024, 1024)
weights = [torch.ones(n, 1, 1, 1) for n in (16, 48)]
results = [F.conv2d(x, weights[0]) for _ in range(4)]  # 64 MiB each
del results
with open("/proc/self/statm") as file:
    used = int(file.read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + 100 * {MEBIBYTE}, resource.RLIM_INFINITY))
large = F.conv2d(x, weights[1])  # 192 MiB
assert bool((large == 1).all())
try:
    F.conv2d(x, torch.ones(400, 1, 1, 1))
except RuntimeError as error:
    assert "memory" in str(error), error
else:
    raise SystemExit("there was memory after all")
"""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("value", ["512MB", "-1", "nan"])
def test_a_bound_that_is_no_number_is_told(value: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", "import cnnkernels; print(cnnkernels.show_config())"],
        capture_output=True,
        text=True,
        env={**os.environ, "CNNKERNELS_CACHE_MIB": value},
        check=True,
    )
    assert f"CNNKERNELS_CACHE_MIB is '{value}'" in done.stderr
    assert "up to 512 MiB" in done.stdout


def test_threads_share_it() -> None:
    failures: list[int] = []

    def work(value: int) -> None:
        for i in range(60):
            made = result(64 + 8 * (i % 5)).mul_(value)
            if not bool((made == value).all()):
                failures.append(value)

    threads = [threading.Thread(target=work, args=(value,)) for value in range(2, 6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the system has no fork")
def test_a_forked_process_can_use_it() -> None:
    program = """
import os, torch
from cnnkernels import functional as F
torch.set_num_threads(1)
x, w = torch.ones(1, 1, 64, 64), torch.ones(64, 1, 1, 1)
kept = F.conv2d(x, w)
del kept
child = os.fork()
if child == 0:
    ok = all(bool((F.conv2d(x, w) == 1).all()) for _ in range(3))
    os._exit(0 if ok else 1)
raise SystemExit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""
    done = subprocess.run([sys.executable, "-c", program], timeout=60, check=False)
    assert done.returncode == 0


def test_a_profile_of_memory_sees_every_result() -> None:
    result()
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        result()
    operator = [event for event in profile.key_averages() if "cnnkernels::conv2d" in event.key]
    assert len(operator) == 1
    assert operator[0].cpu_memory_usage == MEBIBYTE
