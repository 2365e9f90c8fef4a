"""Dormand and Prince's method: as many evaluations between two times of the times as a tolerance asks."""

from __future__ import annotations

from torch import Tensor

from ldm.diffusion.denoiser import Denoiser
from ldm.diffusion.ode.runge_kutta import coordinates, field_at, find_time, straight_step, two_stage
from ldm.diffusion.ode.tableau import TABLEAUX, Integrator, Slope
from ldm.diffusion.schedule import Schedule
from ldm.diffusion.transition import Steps, following, intervals


def field_slope(denoiser: Denoiser, schedule: Schedule) -> Slope:
    """d y / d tau of the deterministic flow in the schedule's own variables (`coordinates`)."""

    def slope(y: Tensor, tau: float) -> tuple[Tensor, None]:
        u = find_time(schedule, tau)
        return field_at(denoiser, schedule, coordinates(schedule, u)[0].to(y) * y, u), None

    return slope


def dopri5(
    denoiser: Denoiser,
    schedule: Schedule,
    x: Tensor,
    times: Tensor,
    *,
    rtol: float = 1e-5,
    atol: float = 1e-5,
    start: int = 0,
) -> Steps:
    """Order 5(4) with adaptive steps (Dormand and Prince 1980), reported once for each interval between times.

    A list of two times gives the solver its freedom; every further time is one to report at. Step sizes follow the
    first member and the worst image of the batch, so an image depends on its neighbours within the tolerance. The
    reported x_0 and eps are those of the straight line that leads where the interval ended.

    Only a flow's network knows clean data: on other schedules the last step, to sigma = 0, is the midpoint method's.

    Args:
        x: state [..., B, C, H, W] at `times[start]`.
        rtol, atol: tolerance of a step, in the variables in which lines are straight.
    """
    integrator = Integrator(field_slope(denoiser, schedule), TABLEAUX["dopri5"], rtol, atol)
    for index, u, s in intervals(times, start):
        if schedule.field == "eps" and schedule.sigma(s) == 0:
            step = two_stage(denoiser, schedule, index, x, u, s, 0.5)
        else:
            (scale, tau), (_, end) = coordinates(schedule, u), coordinates(schedule, s)
            y = x / scale.to(x)
            after, _ = integrator.across(y, float(tau), float(end))
            step = straight_step(schedule, index, x, (after - y) / float(end - tau), u, s)
        sent = yield step
        if sent is not None:
            integrator.forget()
        x = following(step, sent)
