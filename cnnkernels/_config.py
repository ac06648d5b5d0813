"""What is installed, what runs, and why."""

from __future__ import annotations

import platform
from collections.abc import Callable
from typing import Any, cast

import torch

from cnnkernels import _backend, _native, fallback


def _rows() -> list[tuple[str, str]]:
    import cnnkernels

    info = _native.build_info
    rows = [
        ("cnnkernels", cnnkernels.__version__),
        ("backend", _backend.get_backend()),
        ("library", f"not loaded: {_native.reason}" if _native.reason else "loaded"),
        ("torch", f"{torch.__version__}{_built(info, 'torch_version')}"),
        ("python", f"{platform.python_version()}{_built(info, 'python_version')}"),
        ("compiler", info.get("compiler", "none")),
    ]
    if _native.library is not None:
        config = _native.library.config()
        available = ", ".join(config["isas"])
        rows.append(("instruction set", f"{config['isa']} (available: {available})"))
        rows.append(("cuda", _cuda(info.get("cuda", {}))))
        rows.append(("kept memory", f"up to {config['kept_mib']:g} MiB of freed results"))
        rows.extend(("", note) for note in config["notes"])
    rows.append(("threads", str(torch.get_num_threads())))
    return rows


def _cuda(info: dict[str, str]) -> str:
    if "architectures" not in info:
        return f"no kernels: {info.get('reason', 'the library was built without them')}"
    built_for = info["architectures"].replace(";", ", ")
    # A device's name would make it this process's: a fork could not use it any more.
    devices = torch.cuda.device_count()
    return f"kernels for {built_for} (CUDA {info['release']}); devices: {devices}"


def _built(info: dict[str, Any], key: str) -> str:
    return f" (built with {info[key]})" if key in info else ""


def show_config() -> str:
    """What the package runs on, as text: versions, backend, instruction set, threads.

    It tells the versions of torch and Python that run and those that the library was built with,
    the compiler, the architectures that it has CUDA kernels for, and the reason if it has none or
    did not load.
    """
    rows = _rows()
    width = max(len(name) for name, _ in rows) + 2
    return "\n".join(f"{name + ':' if name else '':<{width}}{text}" for name, text in rows)


def empty_cache() -> None:
    """Free the memory that is kept for the next call: that of results, and workspaces.

    Large results of the kernels take the memory of results that have been freed, since pages that
    a process touches for the first time cost more than the arithmetic of a small layer. Results
    in use and kept are together never more than results once were in use and 16 MiB, and at most
    ``CNNKERNELS_CACHE_MIB`` MiB (512 by default) are kept. Does nothing without the compiled
    library.
    """
    if _native.library is not None:
        _native.library.empty_cache()


class Plan(dict[str, Any]):
    """How an operator runs on given arguments; prints as one line an entry.

    Keys: ``operator``; ``algorithm``, the kernel's or ``"aten"`` where torch computes it. With
    ``"aten"`` comes the ``reason``, with a kernel what it makes of the problem: ``isa`` (the
    instruction set), ``vector_lanes``, ``threads``, for convolutions ``flops`` (floating-point
    operations of the call) and ``workspace_bytes``, with ``"amx"`` the ``parts`` (bfloat16 numbers
    of which an element is the sum), for ``conv2d`` and ``conv2d_relu`` the algorithms of the
    ``input_gradient`` and the ``weight_gradient``, and how the work is cut. On CUDA ``isa`` is
    ``"cuda"``, and every pass of a convolution has a plan of its own: what else there is to say of
    a gradient (``tile``, ``products``, ``parts``, ``workspace_bytes``, or the ``reason`` why it is
    torch's) stands under keys that begin with its name, such as ``weight_gradient_parts``.
    """

    def __str__(self) -> str:
        width = max(map(len, self)) + 2
        return "\n".join(f"{key + ':':<{width}}{value}" for key, value in self.items())


class _Explainer:
    """Operators that note the plan of each call, and then run it in PyTorch."""

    def __init__(self, library: Any | None) -> None:
        self.library = library
        self.plans: list[Plan] = []

    def __getattr__(self, name: str) -> Callable[..., Any]:
        operator = getattr(fallback, name)

        def explained(*args: Any) -> Any:
            self.plans.append(self._plan(name, args))
            return operator(*args)

        return explained

    def _plan(self, operator: str, args: tuple[Any, ...]) -> Plan:
        if self.library is None:
            why = _native.reason or "the backend in use is 'torch'"
            return Plan(operator=operator, algorithm="aten", reason=why)
        explain_operator = getattr(
            self.library, f"explain_{operator.removesuffix('_with_indices')}"
        )
        return Plan(operator=operator, **explain_operator(*args))


def explain(target: Callable[..., Any], *args: Any, **kwargs: Any) -> Plan:
    """The plan for one operator call: which algorithm runs it, on what, and why.

    Args:
        target: a function of :mod:`cnnkernels.functional`, or anything else that calls exactly one
            of them once, such as a module of :mod:`cnnkernels.nn`.
        *args: what to call it with. It is called, without gradients.
        **kwargs: likewise.

    Returns:
        A :class:`Plan`.

    Raises:
        ValueError: target calls no operator of this package, or several.

    >>> plan = explain(functional.max_pool2d, torch.zeros(1, 8, 32, 32), 2)
    >>> plan["operator"]
    'max_pool2d'
    """
    explainer = _Explainer(_backend.native_library())
    with _backend.using(cast(_backend.Operators, explainer)), torch.no_grad():
        target(*args, **kwargs)
    if len(explainer.plans) != 1:
        raise ValueError(
            f"target must run one operator of cnnkernels, but it ran {len(explainer.plans)}: pass "
            "cnnkernels.functional.conv2d, for example, not torch's own"
        )
    return explainer.plans[0]
