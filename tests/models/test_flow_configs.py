"""The flow configs build, their twins differ in the process alone, and the overlay makes a flow of a latent model."""

from pathlib import Path

import pytest

from ldm.diffusion.schedule import FlowSchedule, VPSchedule
from ldm.pipelines import build_model
from ldm.training.config import load_config

FOLDER = Path(__file__).parents[2] / "configs" / "flow-matching"
NAMES = ["digits", "mnist", "fashion-mnist", "kmnist", "cifar10"]
TWIN, ON_TOP = (str(FOLDER / f"{name}.yaml") for name in ("diffusion-twin", "on-top"))


@pytest.mark.parametrize("name", NAMES)
def test_a_flow_and_its_twin_share_everything_but_the_process(name):
    file = str(FOLDER / f"{name}.yaml")
    flow, twin = (load_config(files) for files in ([file], [file, TWIN]))
    assert flow["data"] == twin["data"]
    for key in ("unet_config", "cond_stage_config", "first_stage_config", "scheduler_config", "guidance_scale"):
        assert flow["model"]["params"].get(key) == twin["model"]["params"].get(key)
    if name == "cifar10":  # 65 million parameters
        return
    flow, twin = build_model(flow), build_model(twin)
    assert isinstance(flow.schedule, FlowSchedule) and flow.target.name == "velocity" and flow.num_timesteps is None
    assert isinstance(twin.schedule, VPSchedule) and twin.target.name == "eps" and twin.num_timesteps == 1000
    assert flow.label_dropout == twin.label_dropout > 0


def test_the_overlay_makes_a_flow_of_a_latent_model():
    base = FOLDER.parent / "latent-diffusion" / "digits-vq.yaml"
    model = build_model(load_config([str(base), ON_TOP]))
    assert isinstance(model.schedule, FlowSchedule) and model.first_stage_model.embed_dim
    assert len(model.sampling_times(10)) == 11
