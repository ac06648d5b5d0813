"""Speed and accuracy on a CUDA device, as ratios to torch taken in one process.

``python -m benchmarks.gpu`` measures, ``python -m benchmarks.gpu.report`` makes the page of
``docs/performance-gpu.md`` from the results, and ``python -m benchmarks.gpu.run`` (``make gpu``)
does all that there is to do on a GPU: build, tests, compute-sanitizer, benchmark and page. The
modules:

* :mod:`.device`: the device and its facts;
* :mod:`.rows`: the vocabulary (contender, workload, case, row);
* :mod:`.timing`: CUDA graphs between events, in rounds; :mod:`.measure`: from a case to a row, and
  the ceilings of the device;
* :mod:`.optimizer`, :mod:`.max_pool2d`, :mod:`.convolution`, :mod:`.block`, :mod:`.network`: the
  suites; :mod:`.operation`, :mod:`.precision`: what the last three share;
* :mod:`.tables`, :mod:`.goals`, :mod:`.report`: what a terminal and the page show;
* :mod:`.command`, :mod:`.run`: the command lines.
"""
