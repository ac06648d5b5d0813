"""Speed and accuracy of cnnkernels beside torch, as ratios taken in one process.

Installed as ``cnnkernels.benchmarks``; ``python -m cnnkernels bench`` and, in a checkout,
``python -m benchmarks`` run it. The modules:

* :mod:`.cases`: the vocabulary (case, candidate, workload, row);
* :mod:`.conv2d`, :mod:`.max_pool2d`, :mod:`.block`, :mod:`.optimizer`, :mod:`.training_step`: the
  suites, each a function from options to cases; :mod:`.layers` reads their shapes;
* :mod:`.timing`, :mod:`.accuracy`, :mod:`.measure`: from a case to a row of the report;
* :mod:`.report`, :mod:`.picture`, :mod:`.environment`: tables, JSON and PNG;
* :mod:`.command`: the command line.
"""

from __future__ import annotations

from .command import add_arguments, run

__all__ = ["add_arguments", "run"]
