"""``python -m benchmarks``: the benchmark from a checkout."""

from __future__ import annotations

import argparse
import sys

from . import add_arguments, run


def main() -> int:
    """Parse the command line and run the benchmark; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=run.__doc__)
    add_arguments(parser)
    return run(parser.parse_args())


if __name__ == "__main__":
    sys.exit(main())
