"""Dormand and Prince's method: as many evaluations between two times of the grid as a tolerance asks."""

from __future__ import annotations

from torch import Tensor

from ldm.models.diffusion.denoiser import Denoiser
from ldm.models.diffusion.path import Path
from ldm.models.diffusion.sampler.runge_kutta import coordinates, field_at, straight_step, time_of, two_stage
from ldm.models.diffusion.sampler.solvers import Steps, following, intervals
from ldm.models.diffusion.sampler.tableau import TABLEAUX, Integrator, Slope


def field_slope(denoiser: Denoiser, path: Path) -> Slope:
    """d y / d tau of the deterministic flow in the path's own variables (`coordinates`)."""

    def slope(y: Tensor, tau: float) -> tuple[Tensor, None]:
        u = time_of(path, tau)
        return field_at(denoiser, path, coordinates(path, u)[0].to(y) * y, u), None

    return slope


def dopri5(
    denoiser: Denoiser,
    path: Path,
    x: Tensor,
    grid: Tensor,
    *,
    rtol: float = 1e-5,
    atol: float = 1e-5,
    start: int = 0,
) -> Steps:
    """Order 5(4) with adaptive steps (Dormand and Prince 1980), reported once for each interval of the grid.

    A grid of two times gives the solver its freedom; every further time is one to report at. Step sizes follow the
    first member and the worst image of the batch, so an image depends on its neighbours within the tolerance. The
    reported x_0 and eps are those of the straight line that leads where the interval ended.

    Only a flow's network knows clean data: on other paths the last step, to sigma = 0, is the midpoint method's.

    Args:
        x: state [..., B, C, H, W] at `grid[start]`.
        rtol, atol: tolerance of a step, in the variables in which lines are straight.
    """
    integrator = Integrator(field_slope(denoiser, path), TABLEAUX["dopri5"], rtol, atol)
    for index, u, s in intervals(grid, start):
        if path.field == "eps" and path.sigma(s) == 0:
            step = two_stage(denoiser, path, index, x, u, s, 0.5)
        else:
            (scale, tau), (_, end) = coordinates(path, u), coordinates(path, s)
            y = x / scale.to(x)
            after, _ = integrator.across(y, float(tau), float(end))
            step = straight_step(path, index, x, (after - y) / float(end - tau), u, s)
        sent = yield step
        if sent is not None:
            integrator.forget()
        x = following(step, sent)
