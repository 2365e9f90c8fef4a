"""What the first version wrote opens, and gives the numbers that it gave (tests/fixtures/first_version)."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from ldm import Sampling, load_model
from ldm.checkpoint import load_checkpoint
from ldm.commands.sample_model import SampleModel
from ldm.commands.shared import ModelSource, Placement
from ldm.laplace import load_laplace
from ldm.settings import ClassifierGuidance, Training
from ldm.training.session import train
from ldm.util import generator
from tests.cli import call

WRITTEN = Path(__file__).parent / "fixtures" / "first_version"
BASE = "runs/2026-11-30T08-11-07_base"
COMPONENT = "runs/2026-11-30T08-11-59_base_bootstrapped0"
FLOW = "runs/2026-11-30T08-12-11_flow"
CLASSIFIER = "runs/2026-11-30T08-12-22_classifier"
ENSEMBLE = "runs/bootstrapped_digits_2"
CLASSES = ["--classes", "3", "7", "--device", "cpu"]


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A copy of what was written, in the folder that its paths are relative to."""
    shutil.copytree(WRITTEN, tmp_path / "written")
    monkeypatch.chdir(tmp_path / "written")
    return tmp_path


@pytest.fixture(scope="module")
def expected():
    return load_file(WRITTEN / "expected.safetensors")


def sample(run, sampling, ema=True):
    """Latents [2, 1, 8, 8] of classes 3 and 7 in four steps."""
    source = ModelSource(run=run, ema=ema)
    options = {"classes": (3, 7), "n_per_class": 1, "latents": True, "place": Placement("cpu")}
    SampleModel(source, "out", sampling=sampling, **options).run()
    return load_file("out/latents.safetensors")["latents"]


CONFIG = f"{CLASSIFIER}/configs/2026-11-30T08-12-22-project.yaml"
GUIDED = ClassifierGuidance(CONFIG, f"{CLASSIFIER}/checkpoints/last.ckpt", scale=100)
# {name of the expected samples: how they are made}.
SAMPLED = {
    "base": {"run": BASE, "sampling": Sampling(steps=4)},
    "component": {"run": COMPONENT, "sampling": Sampling(steps=4)},
    "flow": {"run": FLOW, "sampling": Sampling("Euler", 4), "ema": False},
    "flow_averaged": {"run": FLOW, "sampling": Sampling("Euler", 4)},
    "guided": {"run": BASE, "sampling": Sampling(steps=4, classifier=GUIDED)},
}


def assert_close(found, expected):
    atol = 3e-5 * float(expected.abs().max())
    torch.testing.assert_close(found, expected, rtol=0, atol=atol)


@pytest.mark.parametrize("name", SAMPLED)
def test_runs_give_the_same_samples(name, place, expected):
    assert_close(sample(**SAMPLED[name]), expected[f"samples/{name}"])


def test_no_two_of_these_samples_are_alike(expected):
    """So that one in place of another would be seen."""
    found = torch.stack([expected[f"samples/{name}"].flatten() for name in SAMPLED])
    apart = torch.pdist(found)
    assert apart.min() > 0.01


def test_an_ensemble_gives_the_same_members_and_information(place, expected):
    call("sample members", ["--path", ENSEMBLE, *CLASSES, "--out", "grid"])
    assert_close(load_file("grid/members_branch2.safetensors")["latents"], expected["ensemble/samples"])
    call("uncertainty classes", ["--path", ENSEMBLE, *CLASSES, "--n", "2", "--out", "unc"])
    (folder,) = place.glob("written/unc/classes_*")
    found = [json.loads((folder / f"{label}.json").read_text())["mi"] for label in (3, 7)]
    torch.testing.assert_close(torch.tensor(found), expected["ensemble/mi"], rtol=1e-3, atol=2e-7)


def test_a_posterior_gives_the_same_predictive_law(place, expected):
    posterior = load_laplace("posterior", load_model(BASE, device="cpu").model.network)
    x = torch.randn(2, 1, 8, 8, generator=generator("first version"))
    mean, variance = posterior(x, torch.tensor([10.0, 70.0]), torch.tensor([3, 7]))
    assert_close(mean.detach(), expected["posterior/mean"])
    assert_close(variance.detach(), expected["posterior/variance"])


def test_a_run_goes_on_where_it_stopped(place, expected):
    """Four more steps of the flow, whose checkpoint holds the optimiser's moments."""
    train(Training(resume=FLOW, gpus="0,", trainer={"max_steps": 44}))
    content = load_checkpoint(f"{FLOW}/checkpoints/last.ckpt")
    assert content["global_step"] == 44
    name = "model.diffusion_model.x_embedder.proj.weight"
    assert_close(content["state_dict"][name], expected["resumed/weight"])
