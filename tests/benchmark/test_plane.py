"""Oracle 0: its closed forms against draws, and what the two kinds know."""

import pytest
import torch

from ldm.benchmark.plane import (
    PRIOR,
    TIME,
    aleatoric_trace,
    draw_class,
    epistemic_variance,
    measure_divergence,
    measure_plane,
    spread_of,
)
from ldm.diffusion.affine import CosineSchedule
from ldm.experiments.toy import GaussianDenoiser
from ldm.uncertainty.aleatoric import data_covariance
from ldm.util import generator


def test_epistemic_variance_is_that_of_many_draws():
    own = draw_class(5, 0, 0)
    z = torch.tensor([[0.0, 0.0], [1.0, -2.0]], dtype=torch.float64)
    drawn = spread_of(own.belief.draw(200_000, generator("many")), z)
    torch.testing.assert_close(epistemic_variance(own.belief, z), drawn, rtol=0.03, atol=0)


def test_aleatoric_trace_is_that_of_the_exact_denoiser():
    denoiser = GaussianDenoiser(
        CosineSchedule(), torch.zeros(2, 1, 1, dtype=torch.float64), torch.full((2, 1, 1), 0.3, dtype=torch.float64)
    )
    state = torch.randn(1, 2, 1, 1, generator=generator("state"), dtype=torch.float64)
    found = data_covariance(denoiser, CosineSchedule(), state, TIME)
    assert float(found.diagonal(dim1=1, dim2=2).sum()) == pytest.approx(aleatoric_trace(0.3))


def test_divergence_in_the_plane_is_the_fitted_models_closed_form():
    classes = [draw_class(50, 1, 2), draw_class(5, 1, 3)]
    z = torch.randn(2, 2, generator=generator("z"), dtype=torch.float64)
    exact = [aleatoric_trace(own.fitted_var) for own in classes]
    torch.testing.assert_close(measure_divergence(classes, z, 0), torch.tensor(exact, dtype=torch.float64))


def test_fewer_points_of_a_class_are_the_first_of_the_same():
    few, many = draw_class(5, 0, 3), draw_class(50, 0, 3)
    torch.testing.assert_close(many.points[:5], few.points)
    assert few.var == many.var
    assert PRIOR.posterior(few.points).kappa == few.belief.kappa


def test_the_two_kinds_follow_their_own_truth():
    rows = {row["method"]: row for row in measure_plane(seeds=4, repeats=2)}
    aleatoric = rows["divergence (posterior covariance)"]
    for name in ("exact posterior, 5 draws", "5 bootstraps, anchored"):
        assert rows[name]["few-point AUROC"] > 0.85
        assert rows[name]["ranks, epistemic truth"] > 0.7 > aleatoric["ranks, epistemic truth"]
        assert rows[name]["ranks, Cov(x0 | x)"] < aleatoric["ranks, Cov(x0 | x)"]
    assert aleatoric["few-point AUROC"] < 0.65
