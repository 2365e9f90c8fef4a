"""A world small enough for tests of methods: a few steps, few pictures."""

import pytest

from ldm.benchmark.images import read_benchmark_images
from ldm.benchmark.problem import Problem
from ldm.benchmark.settings import BenchmarkSettings, World

TINY = BenchmarkSettings(
    seeds=1,
    steps=20,
    head_steps=5,
    retrainings=4,
    control_retrainings=4,
    left_out_retrainings=4,
    noises=2,
    check_noises=1,
    draws=4,
    particles=4,
    fit_draws=1,
    refit_draws=1,
    refits=3,
    sampler_steps=6,
    other_steps=(2, 4),
    members=2,
    reals=3,
)


@pytest.fixture(scope="session")
def images():
    return read_benchmark_images(None)


@pytest.fixture(scope="session")
def problem(tmp_path_factory, images):
    """Networks that never saw the class 0."""
    return Problem.make(TINY, World("out", 0), tmp_path_factory.mktemp("networks"), images)
