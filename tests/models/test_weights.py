"""Every part of a model has weights: what files of other programs hold is taken, or named, and never left at random."""

import io
import zipfile

import numpy as np
import pytest
import torch

from ldm.checkpoint import load_checkpoint, load_state_dict, save_checkpoint, save_state_dict, save_tensors
from ldm.commands.export import Export
from ldm.data.base import check_class_names
from ldm.pipelines.building import build_model, check_heads, load_weights
from tests.conftest import tiny_config, tiny_model

UNET = "model.diffusion_model."


@pytest.fixture(scope="module")
def model():
    """A model with averages that are not its weights."""
    model = tiny_model(use_ema=True)
    with torch.no_grad():
        for parameter in model.model.parameters():
            parameter.add_(0.01)
    return model


@pytest.fixture(scope="module")
def state(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


@pytest.fixture
def loaded(tmp_path):
    """A function: the state dict of a model of a config with parameters, opened with a file of this content."""

    def load(content, ema=True, **params):
        save_checkpoint(content, tmp_path / "x.ckpt", overwrite=True)
        config = {"model": tiny_config(**params)}
        model = build_model(config)
        load_weights(model, tmp_path / "x.ckpt", ema, config=config)
        return model.state_dict()

    return load


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    for name, value in found.items():
        assert torch.equal(value, expected[name]), name


def renamed(state, change):
    return {change(name): value for name, value in state.items()}


# {how a file names or wraps what it holds: the file of a state dict}.
WRAPPED = {
    "parallel": lambda state: {"state_dict": renamed(state, lambda name: f"module.{name}")},
    "compiled": lambda state: {"state_dict": renamed(state, lambda name: f"_orig_mod.{name}")},
    "compiled network": lambda state: renamed(state, lambda name: name.replace(UNET, f"{UNET}_orig_mod.")),
    "both": lambda state: renamed(state, lambda name: f"module._orig_mod.{name}"),
    "half": lambda state: {name: one.half() if one.is_floating_point() else one for name, one in state.items()},
    "training": lambda state: {"model": state, "opt": {"state": {}, "param_groups": []}, "step": 3, "args": None},
    "named": lambda state: {"model_state_dict": state, "epoch": 1},
}


@pytest.mark.parametrize("name", WRAPPED)
def test_one_prefix_and_known_entries_are_taken(name, state, loaded):
    expected = loaded(state)
    found = loaded(WRAPPED[name](state))
    if name == "half":
        torch.testing.assert_close(found, expected, atol=1e-3, rtol=1e-2)
        return
    assert_same(found, expected)


def test_averages_alone_are_the_weights(state, loaded):
    alone = {name: value for name, value in state.items() if not name.startswith("model.")}
    assert_same(loaded(alone), loaded(state))


def test_of_weights_and_averages_the_asked_for_are_taken(state, loaded):
    raw = {name: value for name, value in state.items() if not name.startswith("model_ema.")}
    averages = {**raw, f"{UNET}out.2.bias": raw[f"{UNET}out.2.bias"] + 1}
    both = {"model": raw, "ema": averages, "opt": {}}
    assert_same(loaded(both), loaded(averages))
    assert_same(loaded(both, ema=False), loaded(raw))


@pytest.mark.parametrize("prefix", ["", "module.", "net.", UNET, "module.denoiser.model."])
def test_a_network_alone_leaves_no_part_at_its_random_start(prefix, state, loaded):
    network = {f"{prefix}{name.removeprefix(UNET)}": one for name, one in state.items() if name.startswith(UNET)}
    with pytest.raises(ValueError, match=r"the network alone.* more parts .*: cond_stage_model\.embedding\.weight"):
        loaded(network)
    with pytest.raises(ValueError, match=r"cond_stage_model\.embedding\.weight"):
        loaded({"model": network, "ema": network, "opt": {"state": {}}})


def test_a_part_that_is_missing_is_named_in_a_handful_of_keys(state, loaded):
    without = {name: value for name, value in state.items() if "cond_stage_model" not in name}
    with pytest.raises(ValueError, match=r"missing from the file: cond_stage_model\.embedding\.weight"):
        loaded(without)
    other = renamed(state, lambda name: f"x{name}")
    with pytest.raises(ValueError, match=r"and [0-9]+ more") as told:
        loaded(other)
    assert len(str(told.value)) < 1500


def test_ignored_keys_may_be_in_any_file_that_is_opened_and_cost_no_part_its_weights(state, loaded):
    extra = {**state, "ddim_sigmas": torch.zeros(3), "ddim_alphas": torch.zeros(3)}
    with pytest.raises(ValueError, match="unknown to the model: ddim_alphas, ddim_sigmas"):
        loaded(extra)
    assert_same(loaded(extra, ignore_keys=["ddim_"]), loaded(state))
    # Those of a training that began with another table of classes: its own checkpoint has one, which is read.
    assert_same(loaded(state, ignore_keys=["cond_stage_model."]), loaded(state))


@pytest.mark.parametrize("params", [{"beta_schedule": "cosine"}, {"linear_end": 0.0205}, {"timesteps": 500}])
def test_a_file_of_another_noise_schedule_is_refused(params, state, loaded):
    with pytest.raises(ValueError, match=r"was trained with .*noise (schedule|levels).* set timesteps, beta_schedule"):
        loaded(state, **params)


def test_a_file_of_another_scale_is_refused(state, loaded):
    scaled = {**state, "scale_factor": torch.tensor(0.25)}
    with pytest.raises(ValueError, match=r"scale_factor 0\.25, and .* says 1: set model\.params\.scale_factor=0\.25"):
        loaded(scaled)
    assert loaded(scaled, scale_by_std=True)["scale_factor"] == 0.25
    assert "scale_factor" not in loaded(scaled, scale_factor=0.25)
    with pytest.raises(ValueError, match=r"the config says 0\.5"):
        loaded(scaled, scale_by_std=True, scale_factor=0.5)


def zipped(**members):
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as archive:
        for name, text in members.items():
            archive.writestr(name, text)
    return content.getvalue()


def saved(*values):
    content = io.BytesIO()
    torch.save(*values, content)
    return content.getvalue()


NO_CHECKPOINTS = {
    "empty": (b"", "empty"),
    "page": (b"<!DOCTYPE html><html>Quota exceeded</html>", "an HTML page"),
    "late page": (b"\n  <HTML lang='en'>", "an HTML page"),
    "server": (b"<?xml version='1.0'?><Error>AccessDenied</Error>", "an XML page"),
    "lfs": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 123\n", "a pointer of Git LFS"),
    "json": (b'{"error": "not found"}', "a text of JSON"),
    "text": ("Zugriff verweigert: für Übungen\n".encode() * 40, "a text, which begins: Zugriff"),
    "cut off": (saved({"w": torch.zeros(1000)})[:900], "cut off or damaged"),
    "zip": (zipped(**{"model.ckpt": "x", "readme": "y"}), "a zip archive of 2 files"),
    "script": (zipped(**{"m/constants.pkl": "x", "m/data.pkl": "y"}), "a TorchScript archive"),
    "gzip": (b"\x1f\x8b\x08rest", "packed by gzip"),
    "picture": (b"\x89PNG\r\n\x1a\nrest", "a PNG picture"),
    "keras": (b"\x89HDF\r\n\x1a\nrest", "an HDF5 file"),
    "numpy": (b"\x93NUMPYrest", "an array of NumPy"),
    "tar": (b"a" + bytes(256) + b"ustar" + bytes(200), "a tar archive"),
    "safetensors": ((10**6).to_bytes(8, "little") + b'{"w": ', "cut off: 14 bytes"),
}


@pytest.mark.parametrize("suffix", [".ckpt", ".safetensors", ".pkl"])
@pytest.mark.parametrize("name", NO_CHECKPOINTS)
def test_a_file_that_is_no_checkpoint_is_called_what_it_is(name, suffix, tmp_path):
    content, said = NO_CHECKPOINTS[name]
    (tmp_path / f"x{suffix}").write_bytes(content)
    with pytest.raises(ValueError, match=f"x{suffix} is no checkpoint: it is {said}"):
        load_checkpoint(tmp_path / f"x{suffix}")


@pytest.mark.parametrize("content", [[1, 2], torch.zeros(2), None, {"state_dict": [1]}, {"epoch": 3, "model": {}}])
def test_a_file_that_holds_something_else_says_what(content, tmp_path):
    (tmp_path / "x.ckpt").write_bytes(saved(content))
    with pytest.raises(ValueError, match=r"is not a state dict"):
        load_state_dict(tmp_path / "x.ckpt")


def test_the_content_decides_and_not_the_suffix(tmp_path):
    tensors = {"w": torch.arange(3.0)}
    save_tensors(tensors, tmp_path / "a.ckpt")
    save_checkpoint(tensors, tmp_path / "b.safetensors")
    for name in ("a.ckpt", "b.safetensors"):
        assert torch.equal(load_state_dict(tmp_path / name)["w"], tensors["w"])


def test_weights_are_written_as_the_suffix_says(tmp_path):
    weights = {"w": torch.arange(3.0)}
    weights["tied"] = weights["w"]
    for suffix, start in ((".safetensors", b"{"), (".ckpt", b"PK"), (".pt", b"PK"), (".pth", b"PK")):
        save_state_dict(weights, tmp_path / f"t{suffix}")
        head = (tmp_path / f"t{suffix}").read_bytes()[:10]
        assert head[8:9] == start or head.startswith(start)
        assert torch.equal(load_state_dict(tmp_path / f"t{suffix}")["tied"], weights["w"])
    for name in ("t.json", "t", "t.npz", "t.yaml", "t.SAFETENSORS"):
        with pytest.raises(ValueError, match=r"weights go to a file that ends in \.ckpt or"):
            Export("nothing", str(tmp_path / name)).run()
    assert not (tmp_path / "t.json").exists()


def test_heads_that_a_member_lacks_are_named():
    state = {"table.weight": 0, "out.weight": 0, "out.bias": 0}
    check_heads({"out.weight": 0, "out.bias": 0}, ["out.*"], state, "x")
    with pytest.raises(ValueError, match=r"x lacks heads of the member that it holds: out\.bias"):
        check_heads({"out.weight": 0}, ["out.*"], state, "x")


def test_a_label_is_one_class_in_two_data_sets():
    check_class_names(["ant", "bee", "cat"], ["ant", "bee"])
    check_class_names(["ant"], np.zeros(2))
    check_class_names(["ant", "bee"], ["0", "1"])  # numbers are no names
    with pytest.raises(ValueError, match=r"label 1 is the class 'bee' in the data set train and 'cat' in validation"):
        check_class_names(["ant", "bee", "cat"], ["ant", "cat"])
