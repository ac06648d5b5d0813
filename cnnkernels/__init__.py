"""Hand-written C++ kernels for small convolutional networks, as PyTorch operators.

The package holds the three things that a small CNN spends its life in: ``conv2d``, ``max_pool2d``
(and the two joined by a ReLU, as one operator) and the gradient-descent step.

>>> import torch, cnnkernels
>>> model = torch.nn.Sequential(
...     torch.nn.Conv2d(1, 6, 5), torch.nn.ReLU(), torch.nn.MaxPool2d(2)
... )
>>> model = cnnkernels.replace_modules(model)
>>> model(torch.zeros(1, 1, 28, 28)).shape
torch.Size([1, 6, 12, 12])

Where the compiled library cannot be loaded the same operators run in pure PyTorch;
:func:`show_config` says which of the two is at work and why.
"""

from __future__ import annotations

from cnnkernels import _registration as _registration
from cnnkernels import autograd, functional, nn, optim
from cnnkernels._backend import get_backend, use_backend
from cnnkernels._config import Plan, empty_cache, explain, show_config
from cnnkernels._native import is_native_available
from cnnkernels.convert import patch, replace_modules

__version__ = "0.1.0"

__all__ = [
    "Plan",
    "__version__",
    "autograd",
    "empty_cache",
    "explain",
    "functional",
    "get_backend",
    "is_native_available",
    "nn",
    "optim",
    "patch",
    "replace_modules",
    "show_config",
    "use_backend",
]
