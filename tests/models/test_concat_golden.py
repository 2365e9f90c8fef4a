"""Models conditioned on pictures (inpainting, super-resolution, label maps) against the published implementation."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from ldm.diffusion.samplers import ddim, make_times
from ldm.modules.encoders.modules import SpatialRescaler
from ldm.training.config import load_config
from ldm.util import instantiate_from_config
from tests.conftest import assert_near, golden_json, golden_tensors, listed_weights

CONFIGS = Path(__file__).parents[2] / "configs" / "latent-diffusion"
SPEC = golden_json("concat_small")
KEYS = golden_json("keys_concat")["models"]
VARIANTS = ("inpainting", "super_resolution", "semantic")
RESCALERS = sorted(SPEC["rescaler"])


def golden_model(variant: str):
    """The small model of a variant, loaded strictly from a state dict with all names of a released file."""
    model = instantiate_from_config(SPEC["config"][variant])
    listings = {key.split("/")[1]: value for key, value in SPEC["weights"].items() if key.startswith(f"{variant}/")}
    weights = {f"{part}.{name}": w for part, listing in listings.items() for name, w in listed_weights(listing).items()}
    own = model.state_dict()
    assert set(weights) <= set(own)
    if variant == "inpainting":  # which holds its first stage twice
        for name in [name for name in weights if name.startswith("first_stage_model.")]:
            weights[name.replace("first_stage_model", "cond_stage_model")] = weights[name]
    tables = {name for name in own if "." not in name}
    assert own.keys() - set(weights) == tables
    model.load_state_dict({**own, **weights})
    return model.eval()


def golden_io(variant: str) -> dict[str, torch.Tensor]:
    tensors = golden_tensors("concat_small_io")
    return {name.removeprefix(f"{variant}/"): t for name, t in tensors.items() if name.startswith(f"{variant}/")}


def golden_batch(variant: str, io: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The recorded batch with channels last; the script of inpainting has them first."""
    batch = {name: io[name] for name in ("image", "masked_image", "mask", "LR_image", "segmentation") if name in io}
    return {name: value.movedim(1, -1) if variant == "inpainting" else value for name, value in batch.items()}


@pytest.mark.parametrize("variant", VARIANTS)
def test_batch_condition_output_and_loss_are_the_published_ones(variant):
    model, io = golden_model(variant), golden_io(variant)
    batch = golden_batch(variant, io)
    with torch.no_grad():
        z = model.get_input(batch, "image")
    c = model.embed_condition(batch, torch.ones(2))
    assert_near(z, io["z"])
    assert_near(c, io["c"])
    assert_near(model.apply_model(io["x_t"], io["t"], io["c"]), io["apply_model"])
    loss, _ = model.p_losses(io["z"], c, io["t"], io["p_losses/noise"])
    assert_near(loss.detach(), io["p_losses/loss"][0])
    loss.backward()
    assert_near(model.model.diffusion_model.out[2].weight.grad, io["p_losses/grad_out"])
    if variant == "semantic":
        assert_near(model.cond_stage_model.channel_mapper.weight.grad, io["p_losses/grad_channel_mapper"])
    learned = model.get_learned_conditioning(batch[model.cond_stage_key].movedim(-1, 1).float())
    assert_near(learned, io["c"][:, :3])


class Recorded:
    """Recorded noise of each step."""

    def __init__(self, noise: torch.Tensor):
        self.noise = noise

    def __call__(self, index: int, shape: tuple[int, ...]) -> torch.Tensor:
        return self.noise[index]


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("eta", [0, 1])
@torch.no_grad()
def test_five_steps_of_ddim_are_the_published_ones(variant, eta):
    model, io = golden_model(variant), golden_io(variant)
    times = make_times(model.schedule, 5, "published")
    assert (times[:-1].flip(0) - 1).tolist() == io["timesteps"].tolist()
    steps = ddim(model.denoiser(io["c"]), model.schedule, io["x_T"], times, eta=float(eta), noise=Recorded(io["noise"]))
    for number, step in enumerate(steps):
        assert_near(step.x_next, io[f"ddim_eta{eta}/x"][number + 1], 2e-4)
        assert_near(step.x0, io[f"ddim_eta{eta}/pred_x0"][number], 2e-4)
    assert_near(model.decode_first_stage(step.x_next), io[f"ddim_eta{eta}/image"], 2e-4)


@pytest.mark.parametrize("name", RESCALERS)
@torch.no_grad()
def test_rescaled_pictures_are_the_published_ones(name):
    rescaler, io = SpatialRescaler(**SPEC["rescaler"][name]), golden_io(f"rescaler/{name}")
    for part in ("weight", "bias"):
        if part in io:
            getattr(rescaler.channel_mapper, part).copy_(io[part])
    assert_near(rescaler(io["x"]), io["y"])
    assert_near(rescaler.encode(io["x"]), io["y"])


def test_a_rescaler_that_cannot_be():
    with pytest.raises(ValueError, match="method"):
        SpatialRescaler(method="lanczos")
    with pytest.raises(ValueError, match="n_stages"):
        SpatialRescaler(n_stages=-1)


@pytest.mark.parametrize("name", sorted(KEYS))
def test_released_models_have_the_published_keys_and_counts(name):
    """The config of the released file and ours build the same names and shapes."""
    spec = KEYS[name]
    config = load_config([str(CONFIGS / f"{name}.yaml")])
    config.paths = dict.fromkeys(config.paths)
    for described in (spec["config"], config.model):
        with torch.device("meta"):
            model = instantiate_from_config(described)
        state = {key: list(value.shape) for key, value in model.state_dict().items()}
        assert {key: shape for key, shape in state.items() if key.startswith("model.diffusion_model.")} == {
            f"model.diffusion_model.{key}": shape for key, shape in spec["unet_keys"]
        }
        counted = {
            "schedule buffers": sum("." not in key for key in state),
            **{part: sum(key.startswith(f"{part}.") for key in state) for part in spec["entries_by_group"]},
        }
        counted["schedule buffers"] = sum("." not in key for key in state)
        assert counted == spec["entries_by_group"]
        size = sum(p.numel() for p in model.parameters())
        assert size == spec["counts"]["parameters_total"]


def test_a_batch_without_its_mask_or_picture_is_refused():
    model, io = golden_model("inpainting"), golden_io("inpainting")
    batch = golden_batch("inpainting", io)
    with pytest.raises(ValueError, match="its mask as 'mask'"):
        model.embed_condition({name: value for name, value in batch.items() if name != "mask"}, torch.ones(2))
    with pytest.raises(ValueError, match="no picture 'masked_image'"):
        model.embed_condition({"image": batch["image"]}, torch.ones(2))
