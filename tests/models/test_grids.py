"""Time grids: any number of steps, and the published ones."""

from __future__ import annotations

import pytest
import torch

from ldm.models.diffusion.path import EDMPath, FlowPath, LinearVPPath, VPPath, beta_schedule
from ldm.models.diffusion.sampler.grids import default_spacing, edm_grid, make_grid, respaced_grid, vp_grid
from tests.conftest import golden_json, golden_tensors

VP = VPPath(beta_schedule("linear", 1000, 0.0015, 0.0195))


def test_trailing_takes_exactly_any_number_of_steps():
    for steps in range(1, 1001):
        grid = vp_grid(VP, steps, "trailing")
        assert len(grid) == steps + 1 and grid[0] == 1000 and grid[-1] == 0
        assert bool((grid.diff() < 0).all())


def test_default_takes_exactly_any_number_of_steps():
    assert all(len(make_grid(VP, steps)) == steps + 1 for steps in range(1, 1001))
    assert default_spacing(200, 1000) == "published" and default_spacing(30, 1000) == "trailing"


@pytest.mark.parametrize("steps", [10, 20, 30, 50, 100, 200, 250, 500])
def test_published_times(steps):
    golden = golden_tensors("schedules")
    grid = vp_grid(VP, steps, "published")
    assert torch.equal(VP.time_to_net(grid[:-1]).flip(0).long(), golden[f"ddim_uniform/{steps}/timesteps"])
    assert grid[-1] == 1
    quadratic = golden.get(f"ddim_quad/{steps}/timesteps")
    if quadratic is not None:
        ours = VP.time_to_net(vp_grid(VP, steps, "quad")[:-1]).flip(0).long()
        assert torch.equal(ours, quadratic.unique())


def test_published_times_never_leave_the_table():
    """The published grid reads entry 1000 of a table of 1000 for 599 numbers of steps."""
    for steps in range(1, 1001):
        grid = vp_grid(VP, steps, "published")
        assert len(grid) > min(steps, 999) and grid[0] <= 1000 and grid[-1] == 1 and bool((grid.diff() < 0).all())


@pytest.mark.parametrize("case", ["20", "ddim20"])
def test_respacing_is_the_published_one(case):
    golden, betas = golden_tensors("es"), golden_tensors("es")["schedule/betas_linear_1000"]
    path = VPPath(betas)
    grid = make_grid(path, case)
    assert torch.equal((grid[:-1] - 1).flip(0).long(), golden[f"schedule/{case}/timestep_map"])
    abar = (path.alpha(grid) ** 2).flip(0)
    torch.testing.assert_close(abar[1:], golden[f"schedule/{case}/alphas_cumprod"], rtol=1e-12, atol=0)
    torch.testing.assert_close(1 - abar[1:] / abar[:-1], golden[f"schedule/{case}/betas"], rtol=1e-11, atol=0)


def test_respacing_by_sections():
    grid = respaced_grid(VP, "10,10,5")
    times = (grid[:-1] - 1).flip(0).long().tolist()
    assert len(times) == 25 and times[:2] == [0, 37] and times[9:11] == [333, 334] and times[-1] == 999
    with pytest.raises(ValueError, match="cannot keep 600"):
        respaced_grid(VP, "600,1")
    with pytest.raises(ValueError, match="no whole stride"):
        respaced_grid(VP, "ddim999")


def test_respacing_rounds_as_the_published_sum_does():
    """guided-diffusion adds the stride up; where a product lies half-way (499.5 at 21 steps) the two differ by one."""
    for count in range(2, 1001):
        place, expected = 0.0, []
        for _ in range(count):
            expected.append(round(place))
            place += 999 / (count - 1)
        assert (respaced_grid(VP, str(count))[:-1] - 1).flip(0).long().tolist() == expected, count


def test_edm_grids_are_the_published_ones():
    golden = golden_tensors("edm")
    for case, path, rho in (("edm18", EDMPath(), 7), ("edm18_range", EDMPath(0.01, 20), 5)):
        grid = edm_grid(path, 18, rho)
        torch.testing.assert_close(grid[:-1], golden[f"{case}/sigma_grid_raw"], rtol=1e-13, atol=0)
        assert grid[-1] == 0
    assert golden_json("edm")["samplers"]["edm18"]["nfe"] == 35


def test_grids_of_other_paths():
    assert make_grid(FlowPath(), 4).tolist() == [1, 0.75, 0.5, 0.25, 0]
    assert make_grid(LinearVPPath(), 1).tolist() == [1, 0]
    assert make_grid(EDMPath(), 1).tolist() == pytest.approx([80, 0])
    with pytest.raises(ValueError, match="takes a number of steps"):
        make_grid(FlowPath(), 4, "published")


@pytest.mark.parametrize("steps", [0, 1001, 2.5])
def test_bad_numbers_of_steps_are_refused(steps):
    with pytest.raises(ValueError, match="whole number from 1 to 1000"):
        make_grid(VP, steps)
    with pytest.raises(ValueError, match="spacing must be one of"):
        make_grid(VP, 5, "leading")
