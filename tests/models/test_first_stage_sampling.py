"""What training makes of a KL first stage: samples of the posterior, whose moments are the encoder's."""

from types import SimpleNamespace

import pytest
import torch

from ldm.diffusion.noise import TrainingDraws
from ldm.models.autoencoder import AutoencoderKL
from ldm.models.diffusion.optimisation import measure_deviation
from ldm.models.diffusion.stages import check_encoding_acts
from ldm.pipelines.laplace import observations
from tests.conftest import tiny_model

STAGE = {
    "double_z": True, "z_channels": 1, "resolution": 16, "in_channels": 1, "out_ch": 1, "ch": 32,
    "ch_mult": [1, 2], "num_res_blocks": 1, "attn_resolutions": [], "dropout": 0.0,
}  # fmt: skip
DRAWS = [TrainingDraws(3)]


@pytest.fixture(scope="module")
def first_stage():
    torch.manual_seed(0)
    return AutoencoderKL(STAGE, {"target": "torch.nn.Identity"}, embed_dim=1)


@pytest.fixture
def model(first_stage):
    return tiny_model(first_stage_config=first_stage, scale_factor=0.5).train()


@pytest.fixture(scope="module")
def batch():
    images = torch.randn(4, 16, 16, 1, generator=torch.Generator().manual_seed(1))
    return {"image": images, "class_label": torch.tensor([0, 1, 2, 3])}


def test_states_have_the_posteriors_mean_and_deviation(model, batch):
    """Over steps, (z / scale - mean) / deviation is standard normal: moments 0, 1, and 3 of the fourth power."""
    posterior = model.encode_first_stage(batch["image"].movedim(-1, 1))
    encoded = model.encoded(batch)
    z = torch.stack([model.draw_input(encoded, DRAWS, step, range(4)) for step in range(60)])  # [S, B, 1, 8, 8]
    n = ((z / 0.5 - posterior.mean) / posterior.std).detach()
    count = n.numel()
    assert abs(float(n.mean())) < 4 / count**0.5
    assert abs(float(n.square().mean()) - 1) < 4 * (2 / count) ** 0.5
    assert abs(float(n.pow(4).mean()) - 3) < 4 * (96 / count) ** 0.5
    assert torch.allclose(n[0].mean(), n[1].mean(), atol=0.5) and not torch.equal(n[0], n[1])


def test_draws_belong_to_seed_member_step_and_sample(model, batch):
    z = model.draw_input(batch, DRAWS, 5, range(4))
    assert torch.equal(z, model.draw_input(batch, DRAWS, 5, range(4)))
    second = {name: value[2:] for name, value in batch.items()}
    torch.testing.assert_close(z[2:], model.draw_input(second, DRAWS, 5, range(2, 4)))
    both = {name: torch.cat([value, value]) for name, value in batch.items()}
    members = [TrainingDraws(3), TrainingDraws(4, 1)]
    torch.testing.assert_close(model.draw_input(both, members, 5, range(4))[:4], z)
    torch.testing.assert_close(
        model.draw_input(both, members, 5, range(4))[4:], model.draw_input(batch, members[1:], 5, range(4))
    )
    assert not torch.equal(z, model.draw_input(batch, [TrainingDraws(3, purpose="validation")], 5, range(4)))


def test_encoded_batches_and_modes(model, batch):
    """A batch that was encoded before gives the same; with mode, and wherever no step is named, the mean is taken."""
    encoded = model.encoded(batch)
    assert encoded["image"].shape == encoded["latent_std"].shape == (4, 8, 8, 1)
    assert torch.equal(model.draw_input(encoded, DRAWS, 2, range(4)), model.draw_input(batch, DRAWS, 2, range(4)))
    mean = 0.5 * model.encode_first_stage(batch["image"].movedim(-1, 1)).mode()
    model.first_stage_encoding = "mode"
    torch.testing.assert_close(model.draw_input(batch, DRAWS, 2, range(4)), mean)
    torch.testing.assert_close(model.get_input(batch, "image"), mean)


def test_a_posterior_is_fitted_to_samples_as_training_sees_them(model, batch):
    items = [{name: value[place] for name, value in batch.items()} for place in range(4)]
    model.eval()
    (rows,) = observations(model, items, draws=2)
    source = TrainingDraws(0, purpose="laplace")
    one = {name: value[1:2].repeat_interleave(2, 0) for name, value in batch.items()}
    z = model.draw_input(one, [source], 1, range(2))
    t, noise, _ = source(1, range(2), z.shape[1:], model.num_timesteps)
    torch.testing.assert_close(rows.x[2:4], model.network_input(model.q_sample(z, t, noise), t)[0])
    assert not torch.equal(z[0], z[1])


def test_the_measured_scale_is_one_over_the_deviation_of_samples():
    z = 0.3 + 0.2 * torch.randn(64, 1, 8, 8, generator=torch.Generator().manual_seed(2))
    alone = SimpleNamespace(strategy=SimpleNamespace(reduce=lambda value, reduce_op: value))
    torch.testing.assert_close(measure_deviation(z, alone), z.std(correction=0))
    for value in (-1.0, 0.0, 0.3):
        with pytest.raises(ValueError, match="all black, or of one colour"):
            measure_deviation(torch.full((64, 3, 8, 8), value), alone)


def test_a_choice_without_a_posterior_is_refused(model):
    check_encoding_acts(model, "mode")
    check_encoding_acts(tiny_model(), None)
    with pytest.raises(ValueError, match="IdentityFirstStage gives no posterior"):
        check_encoding_acts(tiny_model(), "mode")
    with pytest.raises(ValueError, match="there is no first stage"):
        check_encoding_acts(torch.nn.Linear(1, 1), "sample")
    with pytest.raises(ValueError, match="must be sample or mode, got 'mean'"):
        tiny_model(first_stage_encoding="mean")
