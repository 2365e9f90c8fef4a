"""Averages of a width chosen afterwards: EDM2's published numbers, integrals by quadrature, and a tracked average."""

import pytest
import torch
from scipy.integrate import quad

from ldm.modules.power_averages import (
    GREATEST_WIDTH,
    PowerAverages,
    Profile,
    combine_profiles,
    decay_at,
    exponent_of,
    width_of,
)
from tests.conftest import golden_tensors

GOLDEN = {"rtol": 1e-9, "atol": 1e-12}


@pytest.fixture(scope="module")
def golden():
    return {name: value for name, value in golden_tensors("lossweights_io").items() if name.startswith("phema/")}


def test_widths_and_exponents_are_the_published_ones(golden):
    found = torch.tensor([exponent_of(float(width)) for width in golden["phema/std"]], dtype=torch.float64)
    torch.testing.assert_close(found, golden["phema/std_to_exp"], **GOLDEN)
    found = torch.tensor([width_of(float(exponent)) for exponent in golden["phema/exp"]], dtype=torch.float64)
    torch.testing.assert_close(found, golden["phema/exp_to_std"], **GOLDEN)
    assert exponent_of(GREATEST_WIDTH) == pytest.approx(0, abs=1e-6)


def test_a_width_is_the_standard_deviation_of_its_profile():
    exponent = exponent_of(0.1)
    moments = [quad(lambda t, k=k: t**k * (exponent + 1) * t**exponent, 0, 1)[0] for k in (0, 1, 2)]
    assert moments[0] == pytest.approx(1) and (moments[2] - moments[1] ** 2) ** 0.5 == pytest.approx(0.1)


def test_decays_are_the_published_ones(golden):
    for row, width in zip(golden["phema/beta_delta128"], (0.05, 0.1, 0.2), strict=True):
        found = [decay_at(float(time), exponent_of(width), 128) for time in golden["phema/t_next"]]
        torch.testing.assert_close(torch.tensor(found, dtype=torch.float64), row, **GOLDEN)


def test_products_of_profiles_are_their_integrals():
    one, other = Profile(3.0, 4.0), Profile(5.0, 7.0)

    def density(profile, t):
        return (profile.exponent + 1) * t**profile.exponent / profile.time ** (profile.exponent + 1)

    expected = quad(lambda t: density(one, t) * density(other, t), 0, 3.0)[0]
    assert one.product(other) == pytest.approx(expected) == other.product(one)


@pytest.mark.parametrize("case", ["A", "B"])
def test_combinations_are_the_published_ones(golden, case):
    def profiles(kind):
        pairs = zip(golden[f"phema/{case}/{kind}_time"], golden[f"phema/{case}/{kind}_std"], strict=True)
        return [Profile(float(time), exponent_of(float(width))) for time, width in pairs]

    snapshots = profiles("in")
    for column, target in enumerate(profiles("out")):
        expected = golden[f"phema/{case}/X"][:, column]
        found = combine_profiles(snapshots, target)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-9 * float(expected.abs().max()))
    target = Profile(snapshots[3].time, snapshots[3].exponent)
    torch.testing.assert_close(combine_profiles(snapshots, target), torch.eye(len(snapshots)).double()[3], atol=1e-9,
                               rtol=0)  # fmt: skip


def test_a_run_of_averages_and_the_one_combined_of_its_snapshots(golden):
    """256 steps, snapshots of the widths 0.05 and 0.1 after every 32; 0.15 at the end is near its tracked average."""
    averages, tracked = PowerAverages((0.05, 0.1)), PowerAverages((0.15,))
    snapshots, profiles = [], []
    for step, parameters in enumerate(golden["phema/run/params"], 1):
        averages.update({"w": parameters})
        tracked.update({"w": parameters})
        if step % 32 == 0:
            for width in (0.05, 0.1):
                snapshots.append(averages.averages[width]["w"].clone())
                profiles.append(Profile(step, exponent_of(width)))
    torch.testing.assert_close(torch.stack(snapshots), golden["phema/run/snapshots"], **GOLDEN)
    torch.testing.assert_close(tracked.averages[0.15]["w"], golden["phema/run/tracked"], **GOLDEN)
    weights = combine_profiles(profiles, Profile(256, exponent_of(0.15)))
    found = weights @ torch.stack(snapshots)
    torch.testing.assert_close(found, golden["phema/run/reconstructed"], rtol=1e-8, atol=1e-10)
    torch.testing.assert_close(found, tracked.averages[0.15]["w"], rtol=0, atol=0.02)


def test_averages_continue_from_their_state():
    values = torch.randn(6, 3, generator=torch.Generator().manual_seed(0))
    whole, first, second = (PowerAverages((0.1,)) for _ in range(3))
    for step, value in enumerate(values):
        whole.update({"w": value})
        if step == 3:
            second.load_state_dict(first.state_dict())
        (first if step < 3 else second).update({"w": value})
    assert torch.equal(second.averages[0.1]["w"], whole.averages[0.1]["w"]) and second.time == 6
    with pytest.raises(ValueError, match=r"the widths \[0.1\], expected \[0.2\]"):
        PowerAverages((0.2,)).load_state_dict(whole.state_dict())


@pytest.mark.parametrize("width", [0.0, -0.1, 0.3])
def test_widths_that_no_profile_has_are_refused(width):
    with pytest.raises(ValueError, match=r"at most 0\.289"):
        exponent_of(width)
