"""A classifier of noisy images: its loss at true noise levels, its files, a training of it."""

from __future__ import annotations

import math

import pytest
import torch
from omegaconf import OmegaConf

from ldm.checkpoint import load_state_dict, save_checkpoint
from ldm.diffusion.noise import TrainingDraws
from ldm.diffusion.schedule import FlowSchedule, VPSchedule, make_betas
from ldm.models.diffusion.classifier import NoisyClassifier
from ldm.settings import Training
from ldm.training.session import train

ENCODER = {
    "target": "ldm.modules.diffusionmodules.openaimodel.EncoderUNetModel",
    "params": {
        "image_size": 8,
        "in_channels": 1,
        "model_channels": 32,
        "out_channels": 10,
        "num_res_blocks": 1,
        "attention_resolutions": [2],
        "channel_mult": [1, 1],
        "num_head_channels": 32,
        "use_scale_shift_norm": True,
        "pool": "attention",
    },
}


def classifier(**params):
    return NoisyClassifier(ENCODER, beta_schedule="cosine", **params).eval()


def batch(size=6):
    source = torch.Generator().manual_seed(0)
    return {"image": torch.randn(size, 8, 8, 1, generator=source), "class_label": torch.arange(size)}


def test_the_loss_is_the_cross_entropy_of_noisy_images():
    model, given, draws = classifier(), batch(), TrainingDraws(3)
    t, noise, _ = draws(5, range(6), (1, 8, 8), 1000)
    schedule = VPSchedule(make_betas("cosine", 1000))
    x = schedule.noised(given["image"].movedim(-1, 1), noise, t.double() + 1)
    logits = model.classifier(x, t)
    expected = -torch.log_softmax(logits, 1)[torch.arange(6), given["class_label"]].mean()
    loss, parts = model(given, draws, 5, range(6))
    torch.testing.assert_close(loss, expected)
    assert float(parts["val/acc@1"]) == float((logits.argmax(1) == given["class_label"]).float().mean())
    assert float(parts["val/acc@5"]) >= float(parts["val/acc@1"])
    inputs, time = classifier(noised=False).noisy(given, draws, 5, range(6))
    assert torch.equal(inputs, given["image"].movedim(-1, 1)) and not bool(time.any())


@pytest.mark.parametrize(
    "name, time", [("EDMSchedule", math.log(0.002) / 4), ("VESchedule", math.log(0.02 / 2)), ("FlowSchedule", 0.0)]
)
def test_clean_images_have_a_time_that_the_network_can_be_told(name, time):
    """EDM and SMLD tell their networks ln(sigma / c): clean images go as those of sigma_min."""
    model = classifier(noised=False, path_config={"target": f"ldm.diffusion.schedule.{name}"})
    inputs, times = model.noisy(batch(), TrainingDraws(3), 5, range(6))
    assert torch.equal(inputs, batch()["image"].movedim(-1, 1))
    torch.testing.assert_close(times, torch.full((6,), time))
    loss, _ = model(batch(), TrainingDraws(3), 5, range(6))
    assert bool(loss.isfinite())


def test_it_has_no_part_of_a_diffusion_model_but_the_noising():
    """The 12 buffers of the table are its own, as checkpoints have them; target, channels and averages are not."""
    model = classifier()
    absent = ("target", "channels", "parameterization", "v_posterior", "original_elbo_weight", "time_importance")
    assert not [name for name in absent if hasattr(model, name)]
    assert sum(not name.startswith("classifier.") for name in model.state_dict()) == 12


def test_it_knows_the_path_it_was_trained_on():
    model = classifier()
    assert model.knows(VPSchedule(make_betas("cosine", 1000)))
    assert not model.knows(VPSchedule(make_betas("linear", 1000)))
    assert not model.knows(VPSchedule(make_betas("cosine", 1000), unit_time=True))
    flow = classifier(path_config={"target": "ldm.diffusion.schedule.FlowSchedule"})
    assert (
        flow.knows(FlowSchedule())
        and not flow.knows(FlowSchedule(reversed_time=True))
        and not model.knows(FlowSchedule())
    )


def test_published_files_hold_the_network_alone(tmp_path):
    source, model = classifier(), classifier()
    weights = source.classifier.state_dict()
    save_checkpoint({name: value.half() for name, value in weights.items()}, tmp_path / "bare.pt")
    save_checkpoint({"state_dict": source.state_dict()}, tmp_path / "run.ckpt")
    for name, rounding in (("bare.pt", 1e-3), ("run.ckpt", 0.0)):
        model.init_from_ckpt(str(tmp_path / name))
        for key, value in model.classifier.state_dict().items():
            torch.testing.assert_close(value, weights[key], rtol=rounding, atol=rounding)
    save_checkpoint({name: value for name, value in weights.items() if name != "out.0.bias"}, tmp_path / "short.pt")
    with pytest.raises(ValueError, match=r"missing from the file: out\.0\.bias"):
        model.init_from_ckpt(str(tmp_path / "short.pt"))


def test_it_trains(tmp_path):
    data = {"target": "ldm.data.digits.Digits", "params": {"split": "train"}}
    params = {"classifier_config": ENCODER, "beta_schedule": "cosine"}
    config = {
        "model": {
            "target": "ldm.models.diffusion.classifier.NoisyClassifier",
            "base_learning_rate": 1e-3,
            "params": params,
        },
        "data": {"target": "main.DataModuleFromConfig", "params": {"batch_size": 16, "num_workers": 0, "train": data}},
        "lightning": {"callbacks": {"image_logger": {"params": {"batch_frequency": 2}}}},
    }
    OmegaConf.save(OmegaConf.create(config), tmp_path / "classifier.yaml")
    quiet = {"max_steps": 3, "enable_progress_bar": False, "log_every_n_steps": 1}
    base = (f"{tmp_path}/classifier.yaml",)
    run = train(Training(base, gpus="0,", scale_lr=False, logdir=f"{tmp_path}/logs", trainer=quiet))
    state = load_state_dict(run / "checkpoints" / "last.ckpt")
    assert {name.split(".")[0] for name in state if name.startswith("classifier")} == {"classifier"}
    classifier().init_from_ckpt(str(run / "checkpoints" / "last.ckpt"))
    assert list(run.glob("images/train/noised_*.png")) and "train/acc@1" in (run / "csv" / "metrics.csv").read_text()
