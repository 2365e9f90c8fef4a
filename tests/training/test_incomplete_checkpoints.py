"""A checkpoint that lacks a part of a training is named by --resume, and stays as it is."""

import shutil

import pytest
import torch

from ldm import load_model
from ldm.checkpoint import load_checkpoint, save_checkpoint, sha256
from tests.training.conftest import write_config
from tests.training.runs import resume, run_training

OUT = "model_ema.diffusion_modelout2weight"


def leave_out(*names):
    def change(content):
        for name in [key for key in content["state_dict"] if key.startswith(names)]:
            del content["state_dict"][name]

    return change


def in_bytes(content):
    for name in [key for key in content["state_dict"] if key.startswith("model.diffusion_model.out.")]:
        content["state_dict"][name] = content["state_dict"][name].to(torch.int8)


def set_optimiser(content):
    content["optimizer_states"] = [{"state": {0: "x"}, "param_groups": []}]


CHANGES = {
    "optimiser": (set_optimiser, "lacks optimizer_states, or they are damaged"),
    "no optimiser": (lambda content: content.update(optimizer_states=[]), "states of 0 optimisers and 0 schedules"),
    "a schedule": (lambda content: content.update(lr_schedulers=[{}]), "states of 1 optimisers and 1 schedules"),
    "step": (lambda content: content.update(global_step="abc"), "lacks global_step"),
    "negative": (lambda content: content.update(global_step=-5), "lacks global_step"),
    "epoch": (lambda content: content.update(epoch="x"), "lacks epoch"),
    "loops": (lambda content: content.update(loops={}), "lacks loops, or"),
    "table": (leave_out("cond_stage_model"), r"missing from the file: cond_stage_model\.embedding\.weight"),
    "averages": (leave_out("model_ema"), "missing from the file: model_ema.decay"),
    "betas": (leave_out("betas"), "missing from the file: betas"),
    "bytes": (in_bytes, "quantised tensors"),
}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    return run_training(write_config(folder), folder, "lightning.trainer.max_steps=2")


def damaged(run, folder, change):
    copy = shutil.copytree(run, folder / run.name)
    last = copy / "checkpoints" / "last.ckpt"
    content = load_checkpoint(last)
    change(content)
    last.unlink()
    save_checkpoint(content, last)
    return copy, last


@pytest.mark.parametrize("name", CHANGES)
def test_an_incomplete_checkpoint_is_named_and_kept(name, run, tmp_path):
    change, said = CHANGES[name]
    copy, last = damaged(run, tmp_path, change)
    before = sha256(last)
    with pytest.raises(ValueError, match=said):
        resume(copy, max_steps=4)
    assert sha256(last) == before


def test_a_whole_one_goes_on(run, tmp_path):
    copy, last = damaged(run, tmp_path, lambda content: None)
    resume(copy, max_steps=4)
    assert load_checkpoint(last)["global_step"] == 4


def test_averages_of_some_weights_are_no_averages(run, tmp_path):
    copy, _ = damaged(run, tmp_path, leave_out(OUT))
    with pytest.raises(ValueError, match=r"averages .* lacks those of diffusion_model\.out\.2\.weight"):
        load_model(copy, device="cpu")
    assert load_model(copy, device="cpu", ema=False)
