"""Times whose noise levels are spaced by name, on every schedule; the published grids are in test_kdiffusion.py."""

import math

import pytest
import torch

from ldm.diffusion.levels import LEVEL_SPACINGS
from ldm.diffusion.schedule import EDMSchedule, FlowSchedule, LinearVPSchedule, VESchedule, VPSchedule, make_betas
from ldm.diffusion.times import make_times

VP = VPSchedule(make_betas("linear", 1000, 0.00085, 0.012))
SCHEDULES = {
    "table": VP,
    "cosine": VPSchedule(make_betas("cosine", 1000)),
    "vp": LinearVPSchedule(),
    "edm": EDMSchedule(),
    "ve": VESchedule(),
    "flow": FlowSchedule(),
}


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("spacing", LEVEL_SPACINGS)
def test_times_lead_from_the_noisy_end_to_data(name, spacing):
    schedule = SCHEDULES[name]
    for steps in (1, 2, 7, 50):
        times = make_times(schedule, steps, spacing)
        fewer = spacing == "vp" and name in ("table", "cosine")  # levels that the table does not have
        assert len(times) == steps + 1 or (fewer and len(times) <= steps)
        assert bool((times.diff() < 0).all()) and (name not in ("table", "cosine") or times[-2] >= 1)
        assert times[0] == schedule.end if spacing != "vp" else len(times) >= 2
        assert (times[-1] == 0) == (spacing != "logsnr")


def test_levels_are_spaced_as_they_are_named():
    for schedule in (VP, FlowSchedule()):
        levels = schedule.ratio(make_times(schedule, 9, "karras", rho=5, sigma_min=0.05, sigma_max=10)[:-1])
        gaps = (levels ** (1 / 5)).diff()
        torch.testing.assert_close(gaps, gaps[:1].expand(8), rtol=1e-9, atol=0)
        assert float(levels[0]) == pytest.approx(10) and float(levels[-1]) == pytest.approx(0.05)
        lambdas = -schedule.ratio(make_times(schedule, 8, "logsnr", sigma_min=0.05, sigma_max=10)).log()
        torch.testing.assert_close(lambdas.diff(), torch.full((8,), math.log(200) / 8, dtype=torch.float64))
    assert torch.equal(make_times(EDMSchedule(), 18), make_times(EDMSchedule(), 18, "karras"))


def test_published_levels_are_rounded_and_fit():
    """Stable Diffusion's 0.0292 and 14.6146, of which the latter lies beyond the table by rounding."""
    times = make_times(VP, 25, "karras", sigma_min=0.0292, sigma_max=14.6146)
    assert float(times[0]) == pytest.approx(1000, abs=0.01) and 1 <= float(times[-2]) < 1.1


def test_bayesdiffs_even_times():
    uniform, quadratic = (make_times(VP, 4, f"time_{name}") for name in ("uniform", "quadratic"))
    torch.testing.assert_close(uniform, torch.tensor([1000, 750.25, 500.5, 250.75, 1.0], dtype=torch.float64))
    gaps = quadratic.sqrt().diff()
    torch.testing.assert_close(gaps, gaps[:1].expand(4))
    assert (float(quadratic[0]), float(quadratic[-1])) == pytest.approx((1000, 1))


@pytest.mark.parametrize(
    ("schedule", "spacing", "levels", "words"),
    [
        (VP, "trailing", {"rho": 5.0}, "rho belong to the spacings"),
        (VP, "auto", {"sigma_min": 0.1}, "sigma_min belong to the spacings"),
        (VP, "exponential", {"rho": 5.0}, "rho belongs to the spacings karras and polyexponential"),
        (VP, "vp", {"sigma_min": 0.1}, "spacing vp has levels of its own"),
        (VP, "karras", {"rho": 0.0}, "rho must be above 0"),
        (VP, "karras", {"sigma_max": 20.0}, "must lie in the levels 0.0291"),
        (VP, "karras", {"sigma_min": 1e-3}, "must lie in the levels 0.0291"),
        (EDMSchedule(), "auto", {"sigma_min": 90.0}, "expected 0 < sigma_min < sigma_max, got 90 and 80"),
        (FlowSchedule(), "published", {}, "karras"),
    ],
)
def test_levels_that_do_not_fit(schedule, spacing, levels, words):
    with pytest.raises(ValueError, match=words):
        make_times(schedule, 5, spacing, **levels)
    with pytest.raises(ValueError, match="takes a number of steps, got the respacing"):
        make_times(schedule, "ddim5", "karras")
