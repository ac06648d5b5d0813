"""The programs of a two-chapter CNN tutorial, on these kernels.

Each program is a module that a beginner can read from top to bottom; it computes its numbers with
the package and again by hand. ``python -m cnnkernels tutorial`` runs them in order and prints the
results side by side.
"""

from __future__ import annotations

from cnnkernels.tutorial.command import PROGRAMS, add_arguments, run
from cnnkernels.tutorial.program import Program, Row, run_program

__all__ = ["PROGRAMS", "Program", "Row", "add_arguments", "run", "run_program"]
