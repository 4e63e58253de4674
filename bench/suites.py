"""Which module knows the points of a suite: how to prepare them, what they cost, what they need.

Each has `problem_of`, `why_not`, `needed_bytes` and `prepare`, with the same arguments. Modules of
UNITS have `units(max_len, dtype)`, what a sweep runs of them (see `bench.units`).
"""

from types import ModuleType

from bench import calls, model_calls, probe_suite
from bench.rows import Point

SUITES = {"ops": calls, "model": model_calls}
UNITS = {"probe": probe_suite}


def suite_of(point: Point) -> ModuleType:
    """The module of the point's suite."""
    return SUITES[point.suite]
