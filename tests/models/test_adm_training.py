"""ADM's options of training: learned variance, times by their losses, input perturbation, checkpoints of the UNet."""

from __future__ import annotations

from collections import deque

import pytest
import torch

from ldm.checkpoint import load_state_dict, save_checkpoint
from ldm.diffusion.learned_variance import LearnedVariance, bound_terms
from ldm.diffusion.noise import ImageNoise, TrainingDraws
from ldm.diffusion.samplers import ancestral
from ldm.diffusion.time_importance import LossSecondMoments
from tests.conftest import tiny_config, tiny_model

HYBRID = {"learned_variance": "hybrid", "beta_schedule": "cosine"}


def wide(**params):
    """The tiny model with two output channels, its variance learned."""
    unet = tiny_config()["params"]["unet_config"]
    return tiny_model(unet_config={**unet, "params": {**unet["params"], "out_channels": 2}}, **{**HYBRID, **params})


def batch_of(model, size=3):
    noise = ImageNoise(0, tuple(range(size)))
    cond = model.get_learned_conditioning(torch.arange(size))
    return noise.initial((size, *model.latent_shape)).clamp(-1, 1), noise(0, (size, *model.latent_shape)), cond


@pytest.mark.parametrize("loss", ["hybrid", "vlb"])
def test_the_loss_is_its_parts(loss):
    model = wide(learned_variance={"loss": loss, "weight": 0.01})
    x0, eps, cond = batch_of(model)
    t = torch.tensor([0, 400, 999])
    output, v = model.apply_model(model.q_sample(x0, t, eps), t, cond).chunk(2, 1)
    bound = LearnedVariance(loss).bound(model.schedule, model.target, output, v, x0, t, eps).mean()
    expected = (output - eps).square().mean() + 0.01 * bound if loss == "hybrid" else bound
    found, parts = model.p_losses(x0, cond, t, eps)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(parts["val/loss_vlb"], bound)


@pytest.mark.parametrize("loss", ["hybrid", "vlb"])
def test_the_bound_is_that_of_the_state_the_network_saw(loss):
    """With input perturbation the prediction of x_0 goes with the perturbed x_t, not with the one of the target."""
    model = wide(learned_variance={"loss": loss, "weight": 0.01}, input_perturbation=0.5)
    x0, eps, cond = batch_of(model)
    t, seen = torch.tensor([3, 400, 900]), eps + 0.5 * ImageNoise(9, (0, 1, 2))(1, eps.shape)
    state = model.q_sample(x0, t, seen)
    output, v = model.apply_model(state, t, cond).chunk(2, 1)
    alpha, sigma = model.levels(t, x0)
    bound = 1000 * bound_terms(model.schedule, x0, (state - sigma * output) / alpha, v, t)
    _, parts = model.p_losses(x0, cond, t, eps, seen)
    torch.testing.assert_close(parts["val/loss_vlb"], bound.mean(), rtol=1e-4, atol=1e-4)  # float32, alpha near 0


def test_the_denoiser_hands_the_learned_variance_to_ancestral_sampling():
    model, noise = wide(), ImageNoise(1, (0, 1))
    x, times = noise.initial((2, *model.latent_shape)), model.sampling_times(4)
    step = next(
        ancestral(model.denoiser(torch.tensor([1, 2])), model.schedule, x, times, variance="learned_range", noise=noise)
    )
    assert step.transition.w.shape == x.shape and float(step.transition.w.detach().std()) > 0
    assert step.x0.shape == x.shape


def test_channels_and_choices_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="out_channels: 2 for 1 channels, got 1"):
        tiny_model(learned_variance="hybrid")
    with pytest.raises(ValueError, match="out_channels: 1 for 1 channels, got 2; 2 go with"):
        wide(learned_variance=None)
    flow = {"path_config": {"target": "ldm.diffusion.schedule.FlowSchedule"}, "parameterization": "velocity"}
    for option in ({"learned_variance": "hybrid"}, {"schedule_sampler": "loss-second-moment"}):
        with pytest.raises(ValueError, match="belong to a table of betas"):
            tiny_model(**flow, **option)
    with pytest.raises(ValueError, match="schedule_sampler must be one of"):
        tiny_model(schedule_sampler="importance")


def test_times_are_drawn_in_proportion_to_the_root_of_their_second_moment():
    moments = LossSecondMoments(4, history=2, uniform=0.2)
    uniform = (torch.arange(4000, dtype=torch.float64) + 0.5) / 4000
    assert torch.bincount(moments.times(uniform)).tolist() == [1000] * 4, "uniform until each time has its history"
    moments.update(torch.tensor([0, 0, 1, 1, 2, 2, 3, 3, 3]), torch.tensor([1.0, 1, 2, 2, 0, 0, 9, 3, 4]))
    size = torch.tensor([1, 2, 0, 12.5**0.5], dtype=torch.float64)  # the oldest loss of time 3 is forgotten
    expected = 0.2 / 4 + 0.8 * size / size.sum()
    torch.testing.assert_close(moments.probabilities, expected)
    drawn = torch.bincount(moments.times(uniform), minlength=4) / 4000
    torch.testing.assert_close(drawn, expected.to(drawn), rtol=0, atol=1e-3)
    values = torch.tensor([3.0, -1, 5, 2], dtype=torch.float64)
    weighted = (expected * moments.weights(torch.arange(4)) * values).sum()
    torch.testing.assert_close(weighted, values.mean(), msg="weights keep the expectation")


def test_a_batch_of_losses_is_remembered_as_if_they_came_one_by_one():
    """Against a queue for each time, some times many times in one batch; and without waiting for the device: tensors
    that hold no values (meta) raise where one is asked for."""
    moments, queues = LossSecondMoments(7, history=3), [deque(maxlen=3) for _ in range(7)]
    source = torch.Generator().manual_seed(0)
    for size in (1, 2, 13, 40, 5, 1):
        times = torch.randint(0, 1 + size % 7, (size,), generator=source)
        losses = torch.rand(size, generator=source)
        moments.update(times, losses)
        for time, loss in zip(times.tolist(), losses.tolist(), strict=True):
            queues[time].append(loss)
        for queue, row, count in zip(queues, moments.losses.tolist(), moments.counts.tolist(), strict=True):
            assert list(queue) == row[:count] and not any(row[count:])
    with pytest.raises(ValueError, match=r"a loss for each time, got times \(2,\), losses \(1,\)"):
        moments.update(torch.tensor([0, 1]), torch.ones(1))
    blind = LossSecondMoments(7, history=3).to("meta")
    times = blind.times(torch.rand(4, device="meta"))
    blind.update(times, torch.rand(4, device="meta"))
    assert blind.weights(times).is_meta


def test_training_by_loss_keeps_its_history_and_its_expected_loss():
    model = wide(timesteps=4, schedule_sampler="loss-second-moment").train()
    batch = {"image": batch_of(model, 8)[0].permute(0, 2, 3, 1), "class_label": torch.arange(8)}
    for step in range(12):
        model.shared_step(batch, TrainingDraws(0), step, range(8))
    assert int(model.time_importance.counts.min()) == 10, "every time was seen"
    uneven, draws = model.time_importance.probabilities, model.drawn_times(torch.rand(5, generator=torch.Generator()))
    assert float(uneven.max()) > 1.2 / 4 and draws.dtype == torch.int64 and model.drawn_timesteps is None
    state = model.state_dict()
    again = wide(timesteps=4, schedule_sampler="loss-second-moment")
    again.load_state_dict(state)
    torch.testing.assert_close(again.time_importance.probabilities, uneven)
    assert again.eval().drawn_timesteps == 4, "validation stays uniform"
    x0, eps, cond = batch_of(model, 4)
    t = torch.arange(4)
    plain = model.loss(model.apply_model(model.q_sample(x0, t, eps), t, cond), x0, t, eps).total
    found, _ = model.p_losses(x0, cond, t, eps)
    torch.testing.assert_close(found, (plain * (1 / (4 * uneven)).to(plain)).mean())


def test_input_perturbation_moves_the_input_and_not_the_target():
    model, draws = tiny_model(input_perturbation=0.3).train(), TrainingDraws(5)
    x0, eps, cond = batch_of(model)
    t, samples = torch.tensor([10, 500, 900]), range(3)
    seen = model.input_noise(draws, 7, samples, eps)
    torch.testing.assert_close(seen - eps, 0.3 * draws.perturbation(7, samples, x0.shape[1:]))
    assert not torch.allclose(draws.perturbation(7, samples, x0.shape[1:]), draws(7, samples, x0.shape[1:], 1000)[1])
    expected = (model.apply_model(model.q_sample(x0, t, seen), t, cond) - eps).square().mean()
    torch.testing.assert_close(model.p_losses(x0, cond, t, eps, seen)[0], expected)
    batch = {"image": x0.permute(0, 2, 3, 1), "class_label": torch.arange(3)}
    plain = tiny_model(input_perturbation=0.0).train()
    assert not torch.allclose(
        model.shared_step(batch, draws, 0, samples)[0], plain.shared_step(batch, draws, 0, samples)[0]
    )
    for each in (model.eval(), plain.eval()):
        assert each.input_noise(draws, 7, samples, eps) is eps
    torch.testing.assert_close(
        model.shared_step(batch, draws, 0, samples)[0], plain.shared_step(batch, draws, 0, samples)[0]
    )


def test_a_unet_alone_is_read_strictly(tmp_path):
    """guided-diffusion's files: the UNet's own names, whole or in half precision."""
    source = wide()
    unet = source.model.diffusion_model.state_dict()
    for name, dtype, rounding in (("whole", torch.float32, 0.0), ("half", torch.float16, 1e-3)):
        save_checkpoint({key: value.to(dtype) for key, value in unet.items()}, tmp_path / f"{name}.pt")
        model = wide(use_ema=True)
        model.init_from_ckpt(str(tmp_path / f"{name}.pt"), only_model=True, use_averaged=True)
        for key, value in model.model.diffusion_model.state_dict().items():
            torch.testing.assert_close(value, unet[key], rtol=rounding, atol=rounding)
            assert value.dtype == torch.float32
        torch.testing.assert_close(
            model.model_ema.state_dict()["diffusion_modelout2bias"], model.model.diffusion_model.out[2].bias
        )
    save_checkpoint({key: value for key, value in unet.items() if key != "out.2.bias"}, tmp_path / "short.pt")
    with pytest.raises(ValueError, match=r"missing from the file: diffusion_model\.out\.2\.bias"):
        wide().init_from_ckpt(str(tmp_path / "short.pt"), only_model=True)
    with pytest.raises(ValueError, match=r"more parts with weights: cond_stage_model\.embedding\.weight"):
        wide().init_from_ckpt(str(tmp_path / "whole.pt"))


def test_a_history_of_losses_does_not_keep_a_trunk_from_loading(tmp_path):
    model = tiny_model(schedule_sampler="loss-second-moment")
    save_checkpoint({"state_dict": model.state_dict()}, tmp_path / "trunk.ckpt")
    assert any(name.startswith("time_importance") for name in load_state_dict(tmp_path / "trunk.ckpt"))
    tiny_model().init_from_ckpt(str(tmp_path / "trunk.ckpt"))
