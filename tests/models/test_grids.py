"""Time grids: any number of steps, and the published ones."""

from __future__ import annotations

import pytest
import torch

from ldm.diffusion.schedule import EDMSchedule, FlowSchedule, LinearVPSchedule, VPSchedule, make_betas
from ldm.diffusion.times import default_spacing, edm_times, make_times, respaced_times, vp_times
from tests.conftest import golden_json, golden_tensors

VP = VPSchedule(make_betas("linear", 1000, 0.0015, 0.0195))


def test_trailing_takes_exactly_any_number_of_steps():
    for steps in range(1, 1001):
        times = vp_times(VP, steps, "trailing")
        assert len(times) == steps + 1 and times[0] == 1000 and times[-1] == 0
        assert bool((times.diff() < 0).all())


def test_default_takes_exactly_any_number_of_steps():
    assert all(len(make_times(VP, steps)) == steps + 1 for steps in range(1, 1001))
    assert default_spacing(200, 1000) == "published" and default_spacing(30, 1000) == "trailing"


@pytest.mark.parametrize("steps", [10, 20, 30, 50, 100, 200, 250, 500])
def test_published_times(steps):
    golden = golden_tensors("schedules")
    times = vp_times(VP, steps, "published")
    assert torch.equal(VP.time_to_net(times[:-1]).flip(0).long(), golden[f"ddim_uniform/{steps}/timesteps"])
    assert times[-1] == 1
    quadratic = golden.get(f"ddim_quad/{steps}/timesteps")
    if quadratic is not None:
        ours = VP.time_to_net(vp_times(VP, steps, "quad")[:-1]).flip(0).long()
        assert torch.equal(ours, quadratic.unique())


@pytest.mark.parametrize("steps", [1, 2, 7, 30, 50, 999, 1000])
def test_leading_times_are_those_of_diffusers(steps):
    """np.arange(0, S) * (T // S), and with an offset one entry more, never beyond the table."""
    kept = [place * (1000 // steps) for place in range(steps)]
    times = vp_times(VP, steps, "leading")
    assert VP.time_to_net(times[:-1]).flip(0).tolist() == kept and times[-1] == 0
    for spacing, last in (("leading_offset", 1), ("leading_offset_clean", 0)):
        times = vp_times(VP, steps, spacing)
        assert VP.time_to_net(times[:-1]).flip(0).tolist() == sorted({min(one + 1, 999) for one in kept})
        assert times[-1] == last


@pytest.mark.parametrize("steps", [1, 7, 999, 1000])
@pytest.mark.parametrize("spacing", ["leading", "trailing"])
def test_times_that_end_at_the_first_entry(spacing, steps):
    """A step that would go from the first entry to itself is none."""
    clean, kept = vp_times(VP, steps, spacing), vp_times(VP, steps, f"{spacing}_first")
    assert kept[-1] == 1 and set(kept.tolist()) == {1.0, *clean[:-1].tolist()}


def test_published_times_never_leave_the_table():
    """The published times reads entry 1000 of a table of 1000 for 599 numbers of steps."""
    for steps in range(1, 1001):
        times = vp_times(VP, steps, "published")
        assert len(times) > min(steps, 999) and times[0] <= 1000 and times[-1] == 1 and bool((times.diff() < 0).all())


@pytest.mark.parametrize("case", ["20", "ddim20"])
def test_respacing_is_the_published_one(case):
    golden, betas = golden_tensors("es"), golden_tensors("es")["schedule/betas_linear_1000"]
    schedule = VPSchedule(betas)
    times = make_times(schedule, case)
    assert torch.equal((times[:-1] - 1).flip(0).long(), golden[f"schedule/{case}/timestep_map"])
    abar = (schedule.alpha(times) ** 2).flip(0)
    torch.testing.assert_close(abar[1:], golden[f"schedule/{case}/alphas_cumprod"], rtol=1e-12, atol=0)
    torch.testing.assert_close(1 - abar[1:] / abar[:-1], golden[f"schedule/{case}/betas"], rtol=1e-11, atol=0)


def test_respacing_by_sections():
    times = respaced_times(VP, "10,10,5")
    each_time = (times[:-1] - 1).flip(0).long().tolist()
    assert len(each_time) == 25 and each_time[:2] == [0, 37] and each_time[9:11] == [333, 334] and each_time[-1] == 999
    with pytest.raises(ValueError, match="cannot keep 600"):
        respaced_times(VP, "600,1")
    with pytest.raises(ValueError, match="no whole stride"):
        respaced_times(VP, "ddim999")


def test_respacing_rounds_as_the_published_sum_does():
    """guided-diffusion adds the stride up; where a product lies half-way (499.5 at 21 steps) the two differ by one."""
    for count in range(2, 1001):
        place, expected = 0.0, []
        for _ in range(count):
            expected.append(round(place))
            place += 999 / (count - 1)
        assert (respaced_times(VP, str(count))[:-1] - 1).flip(0).long().tolist() == expected, count


def test_edm_grids_are_the_published_ones():
    golden = golden_tensors("edm")
    for case, schedule, rho in (("edm18", EDMSchedule(), 7), ("edm18_range", EDMSchedule(0.01, 20), 5)):
        times = edm_times(schedule, 18, rho)
        torch.testing.assert_close(times[:-1], golden[f"{case}/sigma_grid_raw"], rtol=1e-13, atol=0)
        assert times[-1] == 0
    assert golden_json("edm")["samplers"]["edm18"]["nfe"] == 35


def test_grids_of_other_paths():
    assert make_times(FlowSchedule(), 4).tolist() == [1, 0.75, 0.5, 0.25, 0]
    assert make_times(LinearVPSchedule(), 1).tolist() == [1, 0]
    assert make_times(EDMSchedule(), 1).tolist() == pytest.approx([80, 0])
    with pytest.raises(ValueError, match="takes a number of steps"):
        make_times(FlowSchedule(), 4, "published")


@pytest.mark.parametrize("steps", [0, 1001, 2.5])
def test_bad_numbers_of_steps_are_refused(steps):
    with pytest.raises(ValueError, match="whole number from 1 to 1000"):
        make_times(VP, steps)
    with pytest.raises(ValueError, match="spacing must be one of"):
        make_times(VP, 5, "linspace")
