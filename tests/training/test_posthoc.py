"""Snapshots of averages in a training: against the weights of every step, resumed, exported, and of members' heads."""

import pytest
import torch
from omegaconf import OmegaConf

from ldm import load_ensemble, load_model
from ldm.checkpoint import load_checkpoint, load_state_dict, save_checkpoint
from ldm.commands.line import run_command
from ldm.modules.power_averages import exponent_of
from ldm.training.config_keys import check_config
from ldm.training.gathering import gather_members
from ldm.training.posthoc import find_snapshots, read_averages
from ldm.training.runs import RunDirectory
from tests.conftest import tiny_model
from tests.training.conftest import write_config
from tests.training.runs import resume, run_training

EVERY_FOUR = ["lightning.callbacks.posthoc_ema.params.every_n_steps=4"]
WEIGHT = "cond_stage_model.embedding.weight"


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The run of eight steps whose weights were kept at every step."""
    folder = tmp_path_factory.mktemp("posthoc")
    return RunDirectory(run_training(write_config(folder), folder, *EVERY_FOUR, every_n_steps=1))


def test_a_snapshot_weighs_the_weights_of_all_steps(trained):
    """The average at step 8: its decays multiplied out, on the kept checkpoints."""
    files = sorted(trained.checkpoints.glob("epoch=*-step=*.ckpt"))
    steps = [load_checkpoint(file)["state_dict"][WEIGHT].double() for file in files]
    assert len(steps) == 8
    for width in (0.05, 0.1):
        exponent = exponent_of(width)
        expected = steps[0]
        for step in range(2, 9):
            keep = ((step - 1) / step) ** (exponent + 1)
            expected = keep * expected + (1 - keep) * steps[step - 1]
        found = load_state_dict(trained.path / "averages" / f"step=00000008-width={width:g}.safetensors")[WEIGHT]
        torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-7)
    assert [snapshot.step for snapshot in find_snapshots(trained)] == [4, 4, 8, 8]


@pytest.mark.slow
def test_a_resumed_training_writes_the_same_snapshots(trained, tmp_path):
    stopped = run_training(write_config(tmp_path), tmp_path, *EVERY_FOUR, max_steps=3)
    resume(stopped, max_steps=8)
    for name, value in load_state_dict(trained.path / "averages" / "step=00000008-width=0.1.safetensors").items():
        other = load_state_dict(stopped / "averages" / "step=00000008-width=0.1.safetensors")[name]
        assert torch.equal(value, other), name


def test_export_writes_the_average_of_a_width(trained, tmp_path):
    out = tmp_path / "base.safetensors"
    run_command("export", ["--run", str(trained.path), "--ema", "0.1", "--out", str(out)])
    found = load_state_dict(out)
    expected = load_state_dict(trained.path / "averages" / "step=00000008-width=0.1.safetensors")
    torch.testing.assert_close({name: found[name] for name in expected}, expected)
    assert not any(name.startswith("model_ema.") for name in found) and "betas" in found
    config = sorted(trained.configs.glob("*-project.yaml"))[0]
    model = load_model(base=config, ckpt=out, device="cpu").model
    assert torch.equal(model.state_dict()[WEIGHT], found[WEIGHT])
    kept = next(trained.checkpoints.glob("epoch=*-step=00000004.ckpt"))
    run_command("export", ["--run", str(kept), "--ema", "0.05", "--out", str(tmp_path / "middle.ckpt")])
    middle = load_state_dict(trained.path / "averages" / "step=00000004-width=0.05.safetensors")[WEIGHT]
    torch.testing.assert_close(load_state_dict(tmp_path / "middle.ckpt")[WEIGHT], middle)


def test_members_trained_together_have_averages_of_their_heads(tmp_path):
    save_checkpoint({"state_dict": tiny_model().state_dict()}, tmp_path / "trunk.ckpt")
    path = write_config(tmp_path)
    content = OmegaConf.load(path)
    content.model.params.pretrained_path = str(tmp_path / "trunk.ckpt")
    content.model.params.use_ema = False
    content.model.params.unet_config.params.dropout = 0.0  # whose masks members share
    content.data.params.train.params.split = "train"
    OmegaConf.save(content, path)
    given = {"start_from_pretrained": True, "ensemble_name": "b", "seed": 4, "max_steps": 4}
    words = ["lightning.callbacks.posthoc_ema.params.every_n_steps=2"]
    run_training(path, tmp_path, *words, **given, component="all", members=2)
    folder = gather_members(tmp_path / "logs", "b", 2, ema=0.1)
    ensemble = load_ensemble(folder, device="cpu")
    assert ensemble.ensemble.spec["ema"] == 0.1
    for number in range(2):
        (run,) = (tmp_path / "logs").glob(f"*_b{4 + number}")
        (own,) = read_averages(RunDirectory(run), 0.1).values()
        torch.testing.assert_close(ensemble.ensemble.members.overrides[WEIGHT][number], own)
    alone = run_training(path, tmp_path / "alone", *words, **given, component=0)
    (together,) = (tmp_path / "logs").glob("*_b4")
    one, other = (read_averages(RunDirectory(run), 0.1) for run in (alone, together))
    torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


def test_what_cannot_be_combined_is_refused(trained, tmp_path):
    with pytest.raises(ValueError, match=r"at most 0\.289"):
        read_averages(trained, 0.5)
    with pytest.raises(ValueError, match="no snapshots of averages up to step 3"):
        read_averages(trained, 0.1, 3)
    with pytest.raises(ValueError, match=r"lightning\.callbacks\.posthoc_ema"):
        read_averages(RunDirectory(tmp_path), 0.1)
    for callback, words in (
        ({"posthoc_em": {"params": {}}}, "did you mean 'posthoc_ema'"),
        ({"posthoc_ema": {"params": {"width": 0.1}}}, "did you mean 'widths'"),
    ):
        with pytest.raises(ValueError, match=words):
            check_config({"lightning": {"callbacks": callback}})
