"""Which module knows the points of a suite: how to prepare them, what they cost, what they need.

Each has `problem_of`, `why_not`, `needed_bytes` and `prepare`, with the same arguments.
"""

from types import ModuleType

from bench import calls, model_calls
from bench.rows import Point

SUITES = {"ops": calls, "model": model_calls}


def suite_of(point: Point) -> ModuleType:
    """The module of the point's suite."""
    return SUITES[point.suite]
