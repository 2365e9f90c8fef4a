"""Ensembles of low-rank, anchored members trained by row, as a user makes them: train, resume, gather, sample."""

import pytest
import torch
from omegaconf import OmegaConf

from ldm.checkpoint import load_checkpoint, load_state_dict, save_checkpoint
from ldm.diffusion.noise import ImageNoise
from ldm.diffusion.samplers import ddim, run
from ldm.ensembles.members import MemberNetwork, SingleMember
from ldm.ensembles.storage import read_ensemble
from ldm.pipelines import build_model, load_ensemble
from ldm.settings import Sampling
from ldm.training.gathering import gather_members
from tests.conftest import tiny_config, tiny_model
from tests.training.runs import assert_same_end, losses, resume, run_training

FACTORS = ["cond_stage_model.lora_A", "cond_stage_model.lora_B"]
LOW_RANK = ["model.params.cond_stage_config.params.lora=true", "model.params.cond_stage_config.params.rank=4"]
HEADS = "model.params.heads."
KINDS = {
    "lora": [*LOW_RANK, f"{HEADS}names=[lora]"],
    "anchored": [*LOW_RANK, f"{HEADS}names=[lora,output]", f"{HEADS}init=anchored", f"{HEADS}row_rates=equal"],
    "rows": [f"{HEADS}init=anchored", f"{HEADS}anchor=2.0", f"{HEADS}row_rates=equal"],
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with a trunk that knows no low-rank factors, and a config of components on it."""
    folder = tmp_path_factory.mktemp("heads")
    save_checkpoint({"state_dict": tiny_model().state_dict()}, folder / "trunk.ckpt")
    digits = {"target": "ldm.data.digits.Digits", "params": {"split": "test"}}
    data = {"batch_size": 8, "num_workers": 0, "train": digits}
    trainer = {"max_steps": 4, "enable_progress_bar": False, "log_every_n_steps": 1}
    config = {
        "model": tiny_config(pretrained_path=str(folder / "trunk.ckpt"), guidance_scale=3.0),
        "data": {"target": "main.DataModuleFromConfig", "params": data},
        "uncertainty": {"branch_at": 0.0, "steps": 3, "n": 2},
        "lightning": {"trainer": trainer, "callbacks": {"image_logger": {"params": {"disabled": True}}}},
    }
    config["model"]["base_learning_rate"] = 1e-2
    OmegaConf.save(OmegaConf.create(config), folder / "tiny.yaml")
    return folder


def train_member(folder, kind, component=0, logs="logs", **options):
    given = {"start_from_pretrained": True, "scale_lr": False, "ensemble_name": kind, "logdir": f"{folder}/{logs}"}
    given |= {"seed": component, "component": component}
    return run_training(folder / "tiny.yaml", folder, *KINDS[kind], **given, **options)


@pytest.mark.parametrize("kind", ["anchored", "rows"])
def test_anchors_and_rules_resume_exactly(folder, kind):
    whole = train_member(folder, kind, logs="whole")
    part = train_member(folder, kind, max_steps=2, logs="part")
    kept = load_checkpoint(part / "checkpoints" / "last.ckpt")
    assert not any("anchor" in name for name in kept["state_dict"])
    counts = [state["step"] for state in kept["optimizer_states"][0]["state"].values() if state["step"].ndim]
    assert [tuple(count.shape) for count in counts] == [(11,)] and 0 < int(counts[0].max()) <= 2
    resume(part, max_steps=4)
    assert losses(part) == losses(whole)
    assert_same_end(part, whole)


@pytest.mark.slow
def test_a_low_rank_ensemble_from_training_to_the_table(folder):
    runs = [train_member(folder, "lora", member) for member in range(2)]
    path = gather_members(f"{folder}/logs", "lora", 2)
    ensemble = read_ensemble(path)
    assert sorted(ensemble.members.overrides) == FACTORS, "a member is its factors alone"
    assert ensemble.spec["initialisation"] == {"how": "perturbed", "noise": 0.5, "anchor": None}
    assert ensemble.spec["row_rates"] == "none"
    for name in FACTORS:
        saved = [load_checkpoint(one / "checkpoints" / "last.ckpt")["state_dict"][name] for one in runs]
        assert torch.equal(ensemble.members.overrides[name], torch.stack(saved))
    assert torch.equal(ensemble.members.overrides[FACTORS[0]][:, :, 10], torch.zeros(2, 4)), "the null class is shared"

    model = build_model(ensemble.spec["config"]).eval()
    model.init_from_ckpt(str(ensemble.base_checkpoint()))
    table = load_state_dict(folder / "trunk.ckpt")["cond_stage_model.embedding.weight"]
    x, t, labels = ImageNoise(0, (0, 1)).initial((2, 1, 8, 8)), torch.tensor([700.0, 3.0]), torch.tensor([4, 10])
    pipeline = load_ensemble(path, Sampling(seed=5), device="cpu")
    latents = pipeline.member_latents([3, 8], images=[0, 0])[:, :, 0]
    with torch.no_grad():
        together = MemberNetwork(model.network, ensemble.members)
        assert together.staged
        by_vmap = MemberNetwork(model.network, ensemble.members, staged=False)(x, t, labels)
        for member in range(2):
            a, b = (ensemble.members.overrides[name][member] for name in FACTORS)
            plain = tiny_model()
            plain.cond_stage_model.embedding.weight.copy_(table + (b @ a).T)
            alone = plain.network(x, t, labels)
            for found in (together(x, t, labels)[member], by_vmap[member]):
                torch.testing.assert_close(found, alone, atol=1e-4, rtol=1e-4)
            torch.testing.assert_close(SingleMember(model.network, ensemble.members, member)(x, t, labels), alone)
            start = ImageNoise(5, (0, 0)).initial((2, 1, 8, 8))
            guided = plain.denoiser(torch.tensor([3, 8]), 3.0)
            expected = run(ddim(guided, plain.schedule, start, plain.sampling_times(3)))
            # Folded and single batches round differently, and guided steps carry it on.
            torch.testing.assert_close(latents[member], expected, atol=5e-4, rtol=5e-4)
    assert pipeline.information(classes=[4]).mi.isfinite().all()
