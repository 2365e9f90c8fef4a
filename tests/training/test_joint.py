"""`--component all`: one training of all members gives what their separate runs give."""

import json
import time

import pytest
import torch
from omegaconf import OmegaConf
from torch.utils.data import DataLoader

from ldm.checkpoint import load_checkpoint, save_checkpoint
from ldm.data.base import LabelledImages
from ldm.data.bins import plan_natural
from ldm.data.digits import Digits
from ldm.data.joint import JointBatches, JointDataset
from ldm.data.module import DataModuleFromConfig, KeyedBatches
from ldm.data.plans import sample_keys, write_subsets
from ldm.models.diffusion.optimisation import TrainingSet
from ldm.training.gathering import gather_members
from ldm.training.joint import JointMembers, JointOptimizer, start_members
from ldm.training.members import JointDataModule
from ldm.util import instantiate_from_config
from tests.conftest import tiny_config, tiny_model
from tests.training.conftest import write_config
from tests.training.runs import end_state, losses, resume, run_training

MEMBERS = {"start_from_pretrained": True, "ensemble_name": "b", "scale_lr": False}
JOINT = {**MEMBERS, "seed": 4, "component": "all", "members": 2}


@pytest.fixture
def config(tmp_path):
    """The tiny config, on a trunk, with two heads, a falling rate and gradients that are clipped."""
    save_checkpoint({"state_dict": tiny_model().state_dict()}, tmp_path / "trunk.ckpt")
    path = write_config(tmp_path)
    content = OmegaConf.load(path)
    content.model.base_learning_rate = 0.01
    params = content.model.params
    params.unet_config.params.dropout = 0.0
    params.pretrained_path, params.use_ema = str(tmp_path / "trunk.ckpt"), False
    params.heads = {"names": ["class_embedding", "output"]}
    params.scheduler_config = {
        "target": "ldm.lr_scheduler.LambdaLinearScheduler",
        "params": {"warm_up_steps": [0], "cycle_lengths": [8], "f_start": [1.0], "f_max": [1.0], "f_min": [0.0]},
    }
    content.lightning.trainer.gradient_clip_val = 0.05
    OmegaConf.save(content, path)
    return path


def members_of(tmp_path):
    return {path.name.rpartition("_")[2]: path for path in sorted((tmp_path / "logs").iterdir())}


def separate_runs(config, tmp_path):
    return [run_training(config, tmp_path / "apart", **MEMBERS, seed=4 + m, component=m) for m in range(2)]


def test_joint_training_equals_separate_runs(config, tmp_path):
    run = run_training(config, tmp_path, **JOINT)
    made, apart = members_of(tmp_path), separate_runs(config, tmp_path)
    assert sorted(made) == ["b4", "b5", "ball"]
    for number, single in enumerate(apart):
        own = end_state(made[f"b{4 + number}"])
        expected = end_state(single)
        assert own.keys() == expected.keys()
        for name, value in own.items():
            torch.testing.assert_close(value, expected[name], rtol=1e-5, atol=1e-6)
    assert not torch.equal(own["cond_stage_model.embedding.weight"], end_state(made["b4"])[
        "cond_stage_model.embedding.weight"])  # fmt: skip
    mean = [sum(pair) / 2 for pair in zip(*[losses(single).values() for single in apart], strict=True)]
    assert list(losses(run).values()) == pytest.approx(mean, rel=1e-5)
    gathered = gather_members(str(tmp_path / "logs"), "b", 2)
    assert (gathered / "member_001.safetensors").exists()


def test_resumed_joint_training_is_exact(config, tmp_path):
    whole = run_training(config, tmp_path, **JOINT)
    part = run_training(config, tmp_path / "stopped", **JOINT, max_steps=3)
    made = json.loads((part / "members.json").read_text())
    assert made.keys() == {"0", "1"}
    resume(part, max_steps=8)
    for name, value in end_state(whole).items():
        assert torch.equal(value, end_state(part)[name]), name
    content = load_checkpoint(part / "checkpoints" / "last.ckpt")
    assert [one["seed"] for one in content["components"]] == [4, 5]
    assert not any("input_blocks" in name for name in content["state_dict"]), "the trunk is not saved"
    assert json.loads((part / "members.json").read_text()) == made
    for number, folder in made.items():
        own = load_checkpoint(part.parent / folder / "checkpoints" / "last.ckpt")
        assert own["global_step"] == 8, "the members' runs go on with the training"
        for name, value in own["state_dict"].items():
            assert torch.equal(value, content["state_dict"][f"{number}.{name}"]), name


def test_batches_follow_each_members_own_order():
    """Members of different sizes go through their own epochs at their own pace."""
    sizes, done = (20, 33), 7
    members = [KeyedBatches(range(size), 4, seed, seed, done=lambda: done) for seed, size in enumerate(sizes)]
    joint = list(JointBatches(members))
    assert len(joint) == 1, "the longest member has eight batches an epoch, seven are done"
    for member, size in enumerate(sizes):
        epoch, batch = divmod(7, size // 4)
        expected = members[member].order(epoch)[4 * batch : 4 * batch + 4]
        assert [key for key in joint[0] if key[0] == member] == [(member, epoch, position) for position in expected]
    with pytest.raises(ValueError, match="choose a smaller"):
        JointBatches([KeyedBatches(range(size), 4, 0, 0) for size in (3, 20)])


def test_too_few_lists_are_said_for_all_members_at_once(tmp_path):
    data = {"target": "ldm.data.digits.Digits", "params": {"split": "train"}}
    digits = Digits("train")
    plan = plan_natural(digits.labels, digits.class_names, members=3, seed=0)
    write_subsets(tmp_path, plan, sample_keys(digits))
    params = {"dataset": data, "folder": str(tmp_path)}
    modules = [
        DataModuleFromConfig(2, {"target": "ldm.data.subsets.ComponentSubset", "params": {**params, "component": one}})
        for one in range(7)
    ]
    with pytest.raises(ValueError, match=r"--components 7 --seed 0 --natural --overwrite"):
        JointDataModule(modules).setup()


def test_items_carry_their_members_epoch():
    class Augmented:
        epoch = 0

        def set_epoch(self, epoch):
            self.epoch = epoch

        def __len__(self):
            return 4

        def __getitem__(self, position):
            return position + 100 * self.epoch

    data = JointDataset([Augmented(), Augmented()])
    assert [data[key] for key in ((0, 1, 2), (1, 0, 3), (0, 1, 0), (1, 2, 1))] == [102, 3, 100, 201]


class Shaken(LabelledImages):
    """Images whose whole content is drawn by the transform; the first of each batch of four comes late."""

    def __init__(self, count):
        super().__init__([0] * count, ["a"], (1, 1, 1), transform=lambda image, draws: torch.rand(1, generator=draws))

    def read(self, index):
        time.sleep(0.05 * (index % 4 == 0))
        return torch.zeros(1)


def test_workers_do_not_change_each_others_epochs():
    """One worker reads the last batch of a member's epoch while another reads the first of its next."""
    members = [Shaken(12), Shaken(40)]
    batches = JointBatches([KeyedBatches(data, 4, number, number) for number, data in enumerate(members)])
    alone, shared = (
        [batch["image"] for batch in DataLoader(JointDataset(members), batch_sampler=batches, num_workers=workers)]
        for workers in (0, 2)
    )
    assert torch.equal(torch.cat(alone), torch.cat(shared))


def test_members_share_the_trunk_and_clip_alone(tmp_path):
    save_checkpoint({"state_dict": tiny_model().state_dict()}, tmp_path / "trunk.ckpt")
    model = instantiate_from_config(tiny_config(pretrained_path=str(tmp_path / "trunk.ckpt")))
    members = start_members(model, 2, 0)
    first, second = (dict(member.named_parameters()) for member in members)
    for name in first:
        assert (first[name] is second[name]) == (name != "cond_stage_model.embedding.weight")
    joint = JointMembers(members)
    for value, size in zip(joint.parameters(), (100.0, 0.001), strict=True):
        value.grad = torch.full_like(value, size)
    joint.configure_gradient_clipping(None, 1.0, "norm")
    large, small = (value.grad for value in joint.parameters())
    assert float(large.norm()) == pytest.approx(1.0, rel=1e-4)
    assert torch.equal(small, torch.full_like(small, 0.001)), "the other member's gradient has no say"


def test_rules_of_rows_do_not_mind_where_the_table_is(tmp_path):
    """When optimisers are made, Lightning has moved the heads to their device, and not the members they belong to."""
    save_checkpoint({"state_dict": tiny_model().state_dict()}, tmp_path / "trunk.ckpt")
    heads = {"init": "anchored", "row_rates": "equal"}
    model = instantiate_from_config(tiny_config(pretrained_path=str(tmp_path / "trunk.ckpt"), heads=heads))
    (member,) = start_members(model, 1, 0)
    member.member.training_set = TrainingSet(100, 8, [place % 10 for place in range(100)])
    (expected,) = member.member.row_rules(member).values()
    embedding = member.cond_stage_model.embedding
    embedding.weight = torch.nn.Parameter(embedding.weight.detach().to("meta"))
    (rule,) = member.member.row_rules(member).values()
    assert torch.equal(rule.pull, expected.pull) and bool(rule.pull[:-1].all())
    assert rule.beside(embedding.weight).pull.device.type == "meta"


def test_every_member_has_its_own_noise_on_the_targets(tmp_path):
    """Losses from one pass are those of the members by themselves."""
    save_checkpoint({"state_dict": tiny_model().state_dict()}, tmp_path / "trunk.ckpt")
    heads = {"init": "anchored", "anchor": 2.0, "targets": "noisy"}
    model = instantiate_from_config(tiny_config(pretrained_path=str(tmp_path / "trunk.ckpt"), heads=heads))
    members = start_members(model, 2, 0)
    images = torch.randn(6, 8, 8, 1, generator=torch.Generator().manual_seed(0))
    batch = {"image": images, "class_label": torch.arange(6), "index": torch.tensor([3, 1, 4, 3, 1, 5])}
    for member in members:
        member.member.training_set = TrainingSet(100, 3)
        member.train()
    together = JointMembers(members).losses(batch, [member.draws for member in members], 2, range(3))
    for number, member in enumerate(members):
        own = {name: value[3 * number : 3 * number + 3] for name, value in batch.items()}
        expected, parts = member.shared_step(own, member.draws, 2, range(3))
        torch.testing.assert_close(together[number][0], expected)
        assert parts["train/loss_simple"] > 0.5, "the noise's variance of 1 is in it"


def test_together_steps_every_optimiser():
    """Two optimisers stepped as one equal the two, and their state goes through a state dict."""
    values = [torch.nn.Parameter(torch.tensor([1.0])) for _ in range(4)]
    apart = [torch.optim.AdamW([value], lr=0.1) for value in values[:2]]
    together = JointOptimizer([torch.optim.AdamW([value], lr=0.1) for value in values[2:]])
    for _ in range(3):
        for number, value in enumerate(values):
            value.grad = torch.tensor([1.0 + number % 2])
        for optimiser in (*apart, together):
            optimiser.step()
    assert torch.equal(values[0], values[2]) and torch.equal(values[1], values[3])
    again = JointOptimizer([torch.optim.AdamW([value], lr=0.1) for value in values[2:]])
    again.load_state_dict(together.state_dict())
    assert float(again.optimizers[1].state[values[3]]["step"]) == 3
