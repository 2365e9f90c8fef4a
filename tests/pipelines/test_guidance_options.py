"""Guidance as options of pipelines and commands: members' scales, a weaker model from a run, and what is refused."""

import json

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf

from ldm import Branching, Sampling, load_ensemble, load_model
from ldm.checkpoint import save_checkpoint
from ldm.commands.line import load_command, parse, run_command
from ldm.settings import Guidance
from ldm.training.runs import RunDirectory
from tests.conftest import tiny_config, tiny_model
from tests.ensembles import write_ensemble

LABELS, IMAGES = [3, 7], [0, 1]
AT_ONCE = Branching(step=0)


def write_run(path, seed=0, **params):
    """A run directory of a tiny model, with checkpoints of the last and of the first epoch."""
    run = RunDirectory(path)
    run.checkpoints.mkdir(parents=True)
    run.write_config(OmegaConf.create({"model": tiny_config(guidance_scale=2.0, **params)}), "project")
    for name, own in (("last.ckpt", seed), ("epoch=000000.ckpt", seed + 1)):
        save_checkpoint({"state_dict": tiny_model(own, **params).state_dict()}, run.checkpoints / name)
    return path


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """(run directory of a model, run directory of a weaker one, folder of an ensemble)."""
    folder = tmp_path_factory.mktemp("guidance")
    weaker = write_run(folder / "2026-01-01T00-00-01_weaker", 5)
    return write_run(folder / "2026-01-01T00-00-00_model"), weaker, write_ensemble(folder, members=2)


@pytest.fixture(scope="module")
def model(runs):
    return load_model(runs[0], Sampling(steps=3), device="cpu")


def test_away_from_an_earlier_checkpoint_is_the_formula(runs, model):
    """eps = eps_weaker + s (eps - eps_weaker), both under the class, by the denoisers of the two models."""
    given = model.with_(guidance=Guidance(guide=str(runs[0]), epoch=0), scale=2.5)
    earlier = load_model(runs[0], Sampling(steps=3, scale=1.0), epoch=0, device="cpu")
    labels, x = torch.tensor(LABELS), given.initial(given.noise(IMAGES))
    better, weaker = (one.denoiser(labels)(x, 500.0).eps for one in (model.with_(scale=1.0), earlier))
    torch.testing.assert_close(given.denoiser(labels)(x, 500.0).eps, weaker + 2.5 * (better - weaker))
    assert given.describe()["guidance"]["guide"]["checkpoint"] == "epoch=000000.ckpt"
    assert given.with_(steps=2).guide is given.guide  # no file is read again
    assert "guidance" not in model.describe()


def test_members_with_scales_of_their_own_are_members_sampled_alone(runs):
    ensemble = load_ensemble(runs[2], Sampling(steps=3), AT_ONCE, device="cpu")
    own = ensemble.with_(guidance=Guidance(member_scales=(1.0, 3.0))).member_latents(LABELS, IMAGES)
    for member, scale in enumerate((1.0, 3.0)):
        same = ensemble.with_(scale=scale).member_latents(LABELS, IMAGES)
        torch.testing.assert_close(own[member], same[member], rtol=1e-4, atol=1e-5)
    assert not torch.allclose(own[0], ensemble.with_(scale=3.0).member_latents(LABELS, IMAGES)[0], atol=1e-3)


def test_the_member_that_samples_up_to_the_branch_has_its_own_scale(runs):
    """Two base members, whose images come in turn."""
    ensemble = load_ensemble(runs[2], Sampling(steps=3), Branching(step=2, base="all"), device="cpu")
    both = ensemble.with_(guidance=Guidance(member_scales=(2.0, 3.0)))
    found = both.member_latents(LABELS, IMAGES)
    one = both.with_(base=1).member_latents(LABELS, IMAGES)
    torch.testing.assert_close(found[:, :, 1], one[:, :, 0], rtol=1e-4, atol=1e-5)


def test_a_weaker_model_of_other_levels_guides_members(runs, tmp_path):
    """Members share one weaker model, a flow; each member is what it is alone, and batches do not matter."""
    flow = {"schedule_config": {"target": "ldm.diffusion.schedule.FlowSchedule"}, "parameterization": "velocity"}
    guide = str(write_run(tmp_path / "2026-01-01T00-00-02_flow", **flow))
    given = Guidance(guide=guide, interval=(0.1, 20.0), rescale=0.5)
    ensemble = load_ensemble(runs[2], Sampling(steps=3, scale=2.0, guidance=given), AT_ONCE, device="cpu")
    together = ensemble.member_latents(LABELS, IMAGES)
    alone = ensemble.member_latents(LABELS[1:], IMAGES[1:])
    # Two untrained networks led apart by a factor of two: float32 rounding grows with the steps.
    torch.testing.assert_close(together[:, 1:], alone, rtol=2e-3, atol=5e-4)
    assert bool(together.isfinite().all())
    plain = ensemble.with_(guidance=Guidance()).member_latents(LABELS, IMAGES)
    assert not torch.allclose(together, plain, atol=1e-3)


def test_the_commands_take_guidance(runs, tmp_path):
    words = ["--run", str(runs[0]), "--n", "2", "--steps", "3", "--scale", "2", "--device", "cpu"]
    words += ["--guide", str(runs[1]), "--guidance_interval", "0.1", "30", "--guidance_rescale", "0.7"]
    run_command("sample model", [*words, "--out", str(tmp_path / "images")])
    found = json.loads((tmp_path / "images" / "record.json").read_text())["settings"]["guidance"]
    assert found["rescale"] == 0.7 and found["guide"]["checkpoint"] == "last.ckpt"
    with np.load(tmp_path / "images" / "samples.npz") as content:
        assert len(content["arr_0"]) == 2
    for name in ("sample members", "uncertainty classes", "uncertainty pixels", "rollout"):
        command = parse(load_command(name), ["--path", str(runs[2]), "--member_scales", "1", "3"], name)
        assert command.sampling.guidance.member_scales == (1.0, 3.0)


@pytest.mark.parametrize(
    ("sampling", "words"),
    [
        ({"guidance": Guidance(interval=(0.1, 1.0)), "scale": 1.0}, "--guidance_interval acts on guidance"),
        ({"guidance": Guidance(rescale=0.5), "scale": 1.0}, "--guidance_rescale acts on guidance"),
        ({"guidance": Guidance(member_scales=(2.0, 3.0))}, "this is no ensemble"),
    ],
)
def test_options_that_would_not_act_are_refused(model, sampling, words):
    with pytest.raises(ValueError, match=words):
        model.with_(**sampling).check()


def test_values_that_do_not_fit_are_refused(runs, model, tmp_path):
    ensemble = load_ensemble(runs[2], Sampling(steps=3), AT_ONCE, device="cpu")
    with pytest.raises(ValueError, match="got 3, there are 2 members"):
        ensemble.with_(guidance=Guidance(member_scales=(1.0, 2.0, 3.0))).check()
    other = write_run(tmp_path / "2026-01-01T00-00-03_other", image_size=16)
    with pytest.raises(ValueError, match=r"other images: its states of shape is \(1, 16, 16\)"):
        model.with_(guidance=Guidance(guide=str(other))).check()
    for wrong, words in (
        (lambda: Guidance(interval=(2.0, 1.0)), "0 <= LOW < HIGH"),
        (lambda: Guidance(rescale=1.5), "guidance_rescale must be"),
        (lambda: Guidance(epoch=3), "give --guide"),
        (lambda: Sampling(scale=2.0, guidance=Guidance(member_scales=(1.0,))), "leave out --scale"),
    ):
        with pytest.raises(ValueError, match=words):
            wrong()
