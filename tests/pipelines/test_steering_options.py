"""Steering as options of an ensemble and of its commands."""

import json

import pytest
import torch

from ldm import Branching, Sampling, load_ensemble
from ldm.commands.line import load_command, parse, run_command
from ldm.ensembles.members import SingleMember
from ldm.pipelines.steering import adapt_times, members_apart
from ldm.settings import Steering
from tests.ensembles import write_ensemble

LABELS, IMAGES = [0, 3], [0, 1]
LAST = Branching(step=5)


@pytest.fixture(scope="module")
def ensemble(tmp_path_factory):
    folder = write_ensemble(tmp_path_factory.mktemp("steering"), members=3)
    return load_ensemble(folder, Sampling(steps=6, scale=1.0), LAST, device="cpu")


def apart(ensemble, steering):
    """How far the members are apart at what the base member draws, each class alone."""
    made = ensemble.with_(steering=steering)
    branched = made.sample_branched(LABELS, IMAGES, (0,))
    labels = made.labels(LABELS)
    return members_apart(ensemble.denoiser(labels, ensemble.network))(branched.state, float(made.times[5])).detach()


def test_steered_samples_lie_where_the_members_agree_more(ensemble):
    plain, steered = apart(ensemble, Steering()), apart(ensemble, Steering(0.3))
    assert (steered < plain).all() and (apart(ensemble, Steering(-0.3)) > plain).all()
    assert not torch.allclose(apart(ensemble, Steering(0.3, "random")), plain)
    assert "steering" not in ensemble.describe()
    assert ensemble.with_(steering=Steering(0.3)).describe()["steering"]["strength"] == 0.3


@pytest.mark.parametrize("by", ["disagreement", "edges", "random"])
def test_an_image_does_not_depend_on_its_batch(ensemble, by):
    steered = ensemble.with_(steering=Steering(0.2, by))
    both = steered.member_latents(LABELS, IMAGES)
    alone = steered.member_latents(LABELS[1:], IMAGES[1:])
    away = (both[:, 1:] - alone).norm() / alone.norm()  # rounding, which an untrained network's slopes enlarge
    assert away < 0.02 < 10 * (both[:, :1] - alone).norm() / alone.norm()


def test_steps_lie_closer_where_the_members_disagree(ensemble):
    spread = ensemble.with_(steering=Steering(spread=1.0))
    base = SingleMember(ensemble.base_network, ensemble.network.members, 0)
    torch.testing.assert_close(spread.times, adapt_times(ensemble, base, ensemble.network, 1.0))
    assert len(spread.times) == len(ensemble.times) and not torch.equal(spread.times, ensemble.times)
    assert spread.times[0] == ensemble.times[0] and spread.times[-1] == ensemble.times[-1]
    assert (spread.times.diff() < 0).all()
    torch.testing.assert_close(ensemble.with_(steering=Steering(spread=0.0)).times, ensemble.times)


def test_the_commands_take_it(ensemble, tmp_path):
    folder = str(ensemble.ensemble.folder)
    words = ["--path", folder, "--steer", "0.2", "--steer_by", "edges", "--steer_steps", "0.5"]
    command = parse(load_command("sample members"), words, "sample members")
    assert command.sampling.steering == Steering(0.2, "edges", 0.5)
    words += ["--steps", "4", "--classes", "0", "1", "--unc_branch", "3", "--device", "cpu", "--out", str(tmp_path)]
    run_command("sample members", words)
    record = json.loads((tmp_path / "members_branch3.json").read_text())
    assert record["settings"]["steering"] == {"strength": 0.2, "by": "edges", "spread": 0.5}


def test_what_does_not_act_is_refused(ensemble, tmp_path):
    from tests.posteriors import write_model

    model = write_model(tmp_path, guidance_scale=2.0)
    for steering, message in (
        (Steering(0.1), "--steer and --steer_steps"),
        (Steering(spread=1.0), "--steer and --steer_steps"),
    ):
        with pytest.raises(ValueError, match=f"{message} ask.*this is no ensemble"):
            model.load(Sampling(steps=2, steering=steering), device="cpu")
    with pytest.raises(ValueError, match="branch at step 0"):
        ensemble.with_(steering=Steering(0.1), branching=Branching(step=0)).check()
    with pytest.raises(ValueError, match=r"steer_steps lays steps closer .* there is one"):
        ensemble.with_(steps=1, steering=Steering(spread=0.5), branching=Branching(step=0)).check()
    for strength in (None, 0.0):
        with pytest.raises(ValueError, match="not how strongly"):
            Steering(strength, by="edges")
    with pytest.raises(ValueError, match="steer_steps"):
        Steering(spread=-1.0)


def test_a_title_says_what_steers():
    assert Steering(0.1).describe() == ", steered 0.1 by disagreement"
    assert Steering(-0.2, "edges", 0.5).describe() == ", steered -0.2 by edges, steps spread 0.5"
    assert Steering(0.0).describe() == Steering().describe() == ""
