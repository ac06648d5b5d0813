"""``python -m cnnkernels``: what is installed, the tutorial, the benchmarks."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from types import ModuleType

from cnnkernels import show_config

# Packages with add_arguments(parser) and run(args) -> exit status.
_COMMANDS = {
    "tutorial": ("cnnkernels.tutorial", "runs the tutorial's programs on the kernels"),
    "bench": ("cnnkernels.benchmarks", "measures the kernels against torch"),
}


def _info(args: argparse.Namespace) -> int:
    print(show_config())
    return 0


def _import(package: str) -> ModuleType:
    if find_spec(package) is None:
        # A checkout that is not installed has the benchmarks beside this package.
        package = package.removeprefix("cnnkernels.")
    return importlib.import_module(package)


def _parser(argv: Sequence[str]) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m cnnkernels",
        description="Hand-written C++ kernels for small convolutional networks.",
    )
    commands = parser.add_subparsers(dest="command", required=True)
    info = commands.add_parser("info", help="shows versions, backend, instruction set, threads")
    info.set_defaults(run=_info)
    for name, (package, summary) in _COMMANDS.items():
        command = commands.add_parser(name, help=summary, description=summary)
        # Only the command that runs is imported, since each needs packages of its own.
        if argv[:1] == [name]:
            module = _import(package)
            module.add_arguments(command)
            command.set_defaults(run=module.run)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command that argv (by default the command line) names; returns its exit status."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    args = _parser(arguments).parse_args(arguments)
    return args.run(args)


if __name__ == "__main__":
    sys.exit(main())
