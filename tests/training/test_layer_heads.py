"""Members that are low-rank corrections of layers: what trains, what is saved, and that loaded members are those."""

import pytest
import torch

from ldm import Branching, Sampling, load_ensemble
from ldm.checkpoint import save_checkpoint, sha256
from ldm.ensembles import storage
from ldm.models.diffusion.ddpm import LatentDiffusion
from ldm.models.diffusion.optimisation import TrainingSet
from ldm.pipelines import build_model, load_weights
from ldm.training.joint import JointMembers, start_members
from ldm.util import instantiate_from_config
from tests.conftest import tiny_config, tiny_model
from tests.training.runs import take_steps
from tests.training.test_component import start

LORA = {"layers": ["*attn1*"], "rank": 2}
LAYERS = 16  # four transformers, whose self-attention has four maps


def draw(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def trained_member(tmp_path, index):
    model = start(tmp_path, index, names=["lora", "output"], lora=LORA)
    take_steps(model, torch.arange(8) % 4)
    saved = {"state_dict": {name: value.clone() for name, value in model.state_dict().items()}}
    model.on_save_checkpoint(saved)
    return model, saved


@pytest.mark.parametrize("init", ["pretrained", "perturbed", "random", "anchored"])
def test_factors_train_and_weights_stay(tmp_path, init):
    model = start(tmp_path, names="lora", lora=LORA, init=init)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    base = tiny_model().state_dict()
    x, t, labels = draw(2, 1, 8, 8), torch.tensor([3.0, 800.0]), torch.tensor([1, 10])
    started = model.network(x, t, labels)
    plain = tiny_model().network(x, t, labels)
    assert torch.allclose(started, plain, rtol=1e-4, atol=1e-5) == (init == "pretrained")
    model.member.training_set = TrainingSet(8, 8)
    take_steps(model, torch.arange(8) % 4)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert len(trained) == 2 * LAYERS and trained.isdisjoint(base)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]) == (name not in trained), name
        assert name in trained or torch.equal(value, base[name])


def test_saved_members_are_the_trained_ones(tmp_path):
    """As an ensemble, each beside the other; and one alone, folded into the weights of the base."""
    members = [trained_member(tmp_path, index) for index in range(2)]
    folder = tmp_path / "ensemble"
    spec = {
        "name": "lora",
        "trunk": {"path": str(tmp_path / "trunk.ckpt"), "sha256": sha256(tmp_path / "trunk.ckpt")},
        "config": {"model": tiny_config(guidance_scale=2.0), "uncertainty": {"steps": 3}},
        "heads": ["lora", "output"],
        "patterns": members[0][1]["component"]["patterns"],
        "null_class": "shared",
        "members": [{"component": index} for index in range(2)],
    }
    storage.write_ensemble(folder, spec, [saved["state_dict"] for _, saved in members])
    ensemble = load_ensemble(folder, Sampling(steps=2), device="cpu")
    x, t, labels = draw(3, 1, 8, 8), torch.tensor([3.0, 80.0, 800.0]), torch.tensor([1, 4, 10])
    with torch.no_grad():
        expected = torch.stack([model.eval().network(x, t, labels) for model, _ in members])
        torch.testing.assert_close(ensemble.network(x, t, labels), expected)
    assert float(ensemble.information([2], n=2, branching=Branching(at=0.0)).mean[0]) > 0

    save_checkpoint(members[1][1], tmp_path / "member.ckpt")
    alone = build_model({"model": tiny_config()}).eval()
    load_weights(alone, tmp_path / "member.ckpt")
    assert alone.state_dict().keys() == tiny_model().state_dict().keys()
    with torch.no_grad():
        torch.testing.assert_close(alone.network(x, t, labels), expected[1])


def test_joint_members_are_the_single_ones(tmp_path):
    singles = [start(tmp_path, index, index, names=["lora"], lora=LORA) for index in range(2)]
    config = tiny_config(pretrained_path=str(tmp_path / "trunk.ckpt"), heads={"names": ["lora"], "lora": LORA})
    together = JointMembers(start_members(instantiate_from_config(config), 2, 0)).train()
    batch = {"image": draw(4, 8, 8, 1), "class_label": torch.arange(4)}
    twice = {name: torch.cat([value, value]) for name, value in batch.items()}
    for single in singles:
        single.train()
    losses = together.losses(twice, [single.draws for single in singles], 0, range(4))
    for single, (loss, _) in zip(singles, losses, strict=True):
        torch.testing.assert_close(single.shared_step(batch, single.draws, 0, range(4))[0], loss)
    own = {id(value) for member in together.members for name, value in member.named_parameters() if "lora" in name}
    assert len(own) == 2 * 2 * LAYERS and isinstance(together.members[0], LatentDiffusion)


def test_what_the_head_does_not_know_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"heads\.lora takes \['layers', 'rank'\]"):
        start(tmp_path, names=["lora"], lora={"alpha": 8})
    with pytest.raises(ValueError, match=r"'\*.no_layer' fits no linear layer"):
        start(tmp_path, names=["lora"], lora={"layers": "*.no_layer"})
    with pytest.raises(ValueError, match=r"add lora to heads\.names"):
        start(tmp_path, names=["output"], lora=LORA)
