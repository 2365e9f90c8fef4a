"""Methods of uncertainty side by side, against networks that were trained again (docs/benchmark.md)."""

from ldm.benchmark.method import Scored, UncertaintyMethod
from ldm.benchmark.problem import Problem
from ldm.benchmark.settings import BenchmarkSettings, World

__all__ = ["BenchmarkSettings", "Problem", "Scored", "UncertaintyMethod", "World"]
