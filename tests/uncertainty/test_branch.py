"""Branching: where it happens, what is shared, and that the chain before and after is the sampler's own."""

import pytest
import torch

from ldm.diffusion.noise import ImageNoise
from ldm.diffusion.samplers import ddim, run
from ldm.ensembles.members import MemberNetwork, Members, SingleMember
from ldm.uncertainty.branch import InterleavedMembers, branch, branch_index, branch_indices
from tests.conftest import tiny_model


def test_branch_index_conventions():
    model = tiny_model()
    times = model.sampling_times(200)
    assert branch_index(times) == 199
    assert branch_index(times, default=0.0) == 0
    assert branch_index(times, step=3, default=0.5) == 3
    assert branch_index(times, at=0.5) == 100
    # The published times holds network times 996, 991, .. 1: u = 497 is the first at or below 500 (step 100 of 200).
    assert branch_index(times, time=500) == 100
    assert float(times[100]) == 497
    for wrong in ({"step": 200}, {"step": -1}, {"at": 1.0}, {"time": 1}):
        with pytest.raises(ValueError, match="not among the 200 steps"):
            branch_index(times, **wrong)
    with pytest.raises(ValueError, match="give one of"):
        branch_index(times, step=1, at=0.2)


def test_fractions_of_the_steps_are_exact():
    """Hundredths against whole-number arithmetic; 0.29 x 100 is less than 29 in floating point."""
    for steps in (50, 100, 200):
        times = torch.arange(steps, -1, -1.0)
        found = [branch_index(times, at=float(f"0.{hundredths:02d}")) for hundredths in range(100)]
        assert found == [hundredths * steps // 100 for hundredths in range(100)]


def test_several_branch_points():
    times = tiny_model().sampling_times(50)
    assert branch_indices(times, at=[0, 0.5, 0.98]) == [0, 25, 49]
    assert branch_indices(times, step=7) == [7]
    assert branch_indices(times) == [49]
    assert branch_indices(times, default=0.5) == [25]
    with pytest.raises(ValueError, match=r"are the steps \[25, 25\] of 50: name each once"):
        branch_indices(times, at=[0.5, 0.51])
    with pytest.raises(ValueError, match="not among the 50 steps"):
        branch_indices(times, step=[0, 50])


@pytest.fixture(scope="module")
def setting():
    model = tiny_model()
    weight = model.cond_stage_model.embedding.weight.detach()
    source = torch.Generator().manual_seed(5)
    members = Members({"cond_stage_model.embedding.weight": weight + torch.randn(3, *weight.shape, generator=source)})
    labels, noise = torch.tensor([2, 9]), ImageNoise(7, (0, 1))
    base = model.denoiser(labels, 2.0, SingleMember(model.network, members, 0))
    everyone = model.denoiser(labels, 2.0, MemberNetwork(model.network, members))
    x = noise.initial((2, 1, 8, 8))
    return model, members, labels, noise, base, everyone, x


@pytest.mark.parametrize("eta", [0.0, 1.0])
@pytest.mark.parametrize("at", [0, 3, 9])
def test_base_member_continues_its_own_chain(setting, eta, at):
    """Member 0 after the branch walks on as if there had been none, as long as its noise is the plain sampler's."""
    model, _, _, noise, base, everyone, x = setting
    times = model.sampling_times(10)
    result = branch(
        ddim, base, everyone, model.schedule, x, times, at, eta=eta, noise=noise, keep_before=True, keep_after=True
    )
    assert [step.index for step in [*result.before, *result.after]] == list(range(10))
    assert result.samples.shape == (3, 2, 1, 8, 8)
    plain = list(ddim(base, model.schedule, x, times, eta=eta, noise=noise))
    torch.testing.assert_close(result.state, plain[at].x, atol=1e-5, rtol=1e-5)
    # The first branched draw is shared, so member 0 agrees there at any eta; later draws are its own.
    torch.testing.assert_close(result.first.x_next[0], plain[at].x_next, atol=1e-4, rtol=1e-4)
    if eta == 0:
        torch.testing.assert_close(result.samples[0], plain[-1].x_next, atol=1e-4, rtol=1e-4)


def test_first_branched_draw_is_shared_and_later_ones_are_not(setting):
    model, members, labels, noise, base, _, x = setting
    same = Members({name: value[:1].expand(3, *value.shape[1:]) for name, value in members.overrides.items()})
    twins = model.denoiser(labels, 2.0, MemberNetwork(model.network, same))
    result = branch(
        ddim, base, twins, model.schedule, x, model.sampling_times(5), 2, eta=1.0, noise=noise, keep_after=True
    )
    torch.testing.assert_close(result.after[0].x_next[0], result.after[0].x_next[2])
    assert (result.after[1].x_next[0] - result.after[1].x_next[2]).abs().max() > 0.1


def test_only_first_stops_early(setting):
    model, _, _, noise, base, everyone, x = setting
    result = branch(ddim, base, everyone, model.schedule, x, model.sampling_times(10), 4, noise=noise, only_first=True)
    assert [step.index for step in result.after] == [4]
    assert result.first.distribution.mean.shape == (3, 2, 1, 8, 8)
    assert float(result.first.distribution.var) == 0


def test_image_does_not_depend_on_its_batch(setting):
    model, _, _, _, base, _, _ = setting
    alone = ImageNoise(7, (1,))
    labels = torch.tensor([9])
    times = model.sampling_times(5)
    pair_noise = ImageNoise(7, (0, 1))
    pair = run(ddim(base, model.schedule, pair_noise.initial((2, 1, 8, 8)), times, eta=0.7, noise=pair_noise))
    weight = base.denoiser.network
    one = model.denoiser(labels, 2.0, weight)
    single_image = run(ddim(one, model.schedule, alone.initial((1, 1, 8, 8)), times, eta=0.7, noise=alone))
    torch.testing.assert_close(single_image[0], pair[1], atol=1e-4, rtol=1e-4)


def test_interleaved_bases_walk_as_each_alone(setting):
    """Image-major batches of two members under guidance, which doubles the batch, against one walk a member."""
    model, members, labels, _, _, _, x = setting
    chosen = [2, 0]
    network = InterleavedMembers(MemberNetwork(model.network, members.select(chosen)))
    together = model.denoiser(labels.repeat_interleave(2), 2.0, network)
    final = run(ddim(together, model.schedule, x.repeat_interleave(2, 0), model.sampling_times(4))).unflatten(0, (2, 2))
    for place, member in enumerate(chosen):
        alone = model.denoiser(labels, 2.0, SingleMember(model.network, members, member))
        expected = run(ddim(alone, model.schedule, x, model.sampling_times(4)))
        # The batch rounds differently; four guided steps carry it on.
        torch.testing.assert_close(final[:, place], expected, atol=1e-4, rtol=1e-4)
