"""Head choices of a component: low-rank, combined, anchored, trained by row; what starts, trains, is shared, saved."""

import pytest
import torch

from ldm.checkpoint import save_checkpoint
from ldm.models.diffusion.optimisation import TrainingSet
from ldm.models.diffusion.row_adam import RowAdam
from ldm.util import instantiate_from_config
from tests.conftest import tiny_config, tiny_model
from tests.training.runs import take_steps

TABLE = "cond_stage_model.embedding.weight"
LABELS = torch.tensor([0] * 12 + [1] * 3 + [2] + [3] * 24)
EVERY = torch.arange(11)


def config_of(tmp_path, lora, embedder, **params):
    path = tmp_path / "trunk.ckpt"
    if not path.exists():
        save_checkpoint({"state_dict": tiny_model().state_dict()}, path)
    config = tiny_config(pretrained_path=str(path), **params)
    config["params"]["cond_stage_config"]["params"] |= {"lora": lora, "rank": 4, **embedder}
    return config


def start(tmp_path, component=0, seed=0, lora=None, embedder=(), weight_decay=0.0, **heads):
    lora = "lora" in heads.get("names", ()) if lora is None else lora
    model = instantiate_from_config(config_of(tmp_path, lora, dict(embedder), heads=heads, weight_decay=weight_decay))
    model.start_from_pretrained(component, seed)
    model.seed_draws(seed, component)
    model.member.training_set = TrainingSet(len(LABELS), 8, LABELS)
    model.learning_rate = 1e-2
    return model


def steps(model, count=3):
    """Training steps on a batch of classes 0, 1 and 3; class 2 has an image that these batches leave out."""
    optimizer, parts = take_steps(model, torch.tensor([0, 0, 0, 1, 3, 3, 3, 3]), count)
    model.eval()
    return optimizer, parts


def rows(model):
    with torch.no_grad():
        return model.cond_stage_model.embed(EVERY)[:, 0]


COMBINATIONS = [
    ["lora"],
    ["class_embedding", "output"],
    ["lora", "time_embedding"],
    ["lora", "class_embedding", "output"],
    ["lora", "model.diffusion_model.input_blocks.0.*"],
]


@pytest.mark.parametrize("init", ["pretrained", "perturbed", "random", "anchored"])
@pytest.mark.parametrize("names", COMBINATIONS, ids=["+".join(names) for names in COMBINATIONS])
def test_heads_go_together(tmp_path, names, init):
    """The trunk stays as it is, every head trains, the null class is the trunk's, a checkpoint holds the heads."""
    pretrained = tiny_model().cond_stage_model.embedding.weight.detach()
    model = start(tmp_path, names=names, init=init, row_rates="equal")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    steps(model)
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    changed = [name for name, value in model.state_dict().items() if not torch.equal(value, before[name])]
    assert sorted(changed) == sorted(trained)
    assert torch.equal(rows(model)[10], pretrained[10]), "the null class is shared, bit for bit"
    assert (rows(model)[[0, 1, 3]] - pretrained[[0, 1, 3]]).abs().amax(1).min() > 0
    saved = {"state_dict": dict(model.state_dict())}
    model.on_save_checkpoint(saved)
    assert sorted(saved["state_dict"]) == sorted(trained)
    assert any("lora" in name for name in trained) == ("lora" in names)
    again = start(tmp_path, names=names, init=init, row_rates="equal")
    again.on_load_checkpoint(saved)
    again.load_state_dict(saved["state_dict"])
    assert torch.equal(rows(again), rows(model))


def test_low_rank_members_start_where_they_should(tmp_path):
    """pretrained: the table's rows; perturbed and random: off, by how much see test_heads; each member its own."""
    table = tiny_model().cond_stage_model.embedding.weight.detach()
    same = [start(tmp_path, member, names=["lora"], init="pretrained") for member in range(2)]
    for model in same:
        assert torch.equal(rows(model), table)
    assert not torch.equal(same[0].cond_stage_model.lora_A, same[1].cond_stage_model.lora_A)
    for init in ("perturbed", "random"):
        one, other, again = (start(tmp_path, member, names=["lora"], init=init) for member in (0, 1, 0))
        assert torch.equal(rows(one), rows(again))
        assert (rows(one) - rows(other)).abs().amax(1)[:10].min() > 0.05
        assert torch.equal(rows(one)[10], table[10])


def test_own_null_classes_of_low_rank_members(tmp_path):
    table = tiny_model().cond_stage_model.embedding.weight.detach()
    trained = start(tmp_path, names=["lora"], null_class="trained", embedder={"ucg_rate": 0.9})
    first = rows(trained)[10]
    assert not torch.equal(first, table[10])
    steps(trained)
    assert not torch.equal(rows(trained)[10], first)


def test_a_trunk_without_low_rank_factors_loads_and_nothing_else_may_be_missing(tmp_path):
    trunk = tiny_model().state_dict()
    save_checkpoint({"state_dict": trunk}, tmp_path / "trunk.ckpt")
    model = instantiate_from_config(config_of(tmp_path, True, {}))
    assert sum("lora" in name for name in model.state_dict()) == 2
    model.init_from_ckpt(str(tmp_path / "trunk.ckpt"))
    assert torch.equal(rows(model), trunk[TABLE])
    factors = {"cond_stage_model.lora_A": torch.ones(4, 11), "cond_stage_model.lora_B": torch.ones(8, 4)}
    save_checkpoint({"state_dict": {**trunk, **factors}}, tmp_path / "corrected.ckpt")
    model.init_from_ckpt(str(tmp_path / "corrected.ckpt"))
    torch.testing.assert_close(rows(model), trunk[TABLE] + 4)
    for name, wrong, message in (
        ("half", {"cond_stage_model.lora_A": torch.ones(4, 11)}, r"missing from the file: cond_stage_model\.lora_B"),
        ("rank", {name: value[..., :3] for name, value in factors.items()}, "2 of another shape"),
        ("other", {"cond_stage_model.lora_C": torch.ones(1)}, r"unknown to the model: cond_stage_model\.lora_C"),
    ):
        save_checkpoint({"state_dict": {**trunk, **wrong}}, tmp_path / f"{name}.ckpt")
        with pytest.raises(ValueError, match=message):
            model.init_from_ckpt(str(tmp_path / f"{name}.ckpt"))
    less = {name: value for name, value in trunk.items() if name != TABLE}
    save_checkpoint({"state_dict": less}, tmp_path / "less.ckpt")
    with pytest.raises(ValueError, match=r"1 missing, 0 unknown"):
        model.init_from_ckpt(str(tmp_path / "less.ckpt"))
    corrected = config_of(tmp_path, True, {}, heads={"names": ["lora"]})
    corrected["params"]["pretrained_path"] = str(tmp_path / "corrected.ckpt")
    with pytest.raises(ValueError, match="low-rank correction of its own"):
        instantiate_from_config(corrected).start_from_pretrained(0, 0)


def test_an_anchored_member_starts_perturbed_and_is_pulled_back(tmp_path):
    """Its start is the perturbed one, its loss that plus the penalty; rows without data stay, to the last bit."""
    perturbed = start(tmp_path, names=["class_embedding", "output"])
    first = {name: value.clone() for name, value in perturbed.state_dict().items()}
    model = start(tmp_path, names=["class_embedding", "output"], init="anchored", anchor=3.0, noise=0.5)
    assert all(torch.equal(value, first[name]) for name, value in model.state_dict().items())
    _, parts = steps(model, 2)
    assert parts["train/loss_anchor"] > 0
    trunk, expected = tiny_model().state_dict(), 0.0
    probe = start(tmp_path, names=["class_embedding", "output"], init="anchored", anchor=3.0)
    steps(probe, 1)
    for name in (TABLE, "model.diffusion_model.out.0.weight", "model.diffusion_model.out.2.weight"):
        one = trunk[name] if trunk[name].ndim > 1 else trunk[name][None]
        deviation = 0.5 * one.flatten(1).std(1, unbiased=False).reshape(-1, *[1] * (one.ndim - 1))
        change = probe.state_dict()[name] - first[name]
        expected += ((change.reshape(one.shape) / deviation) ** 2).sum()
    for name in ("model.diffusion_model.out.0.bias", "model.diffusion_model.out.2.bias"):
        one = trunk[name]
        deviation = 0.5 * (one.std(unbiased=False) if len(one) > 1 else one.abs())
        expected += (((probe.state_dict()[name] - first[name]) / deviation) ** 2).sum()
    torch.testing.assert_close(parts["train/loss_anchor"], 3.0 / (2 * len(LABELS) * 64) * expected, rtol=1e-4, atol=0)
    assert torch.equal(rows(model)[[2, 4, 9]], first[TABLE][[2, 4, 9]])
    loose, stiff = start(tmp_path), start(tmp_path, init="anchored", anchor=1e8)
    first = rows(loose)
    assert torch.equal(rows(stiff), first)
    for one in (loose, stiff):
        steps(one, 20)
    moved = [(rows(one) - first).abs().max() for one in (loose, stiff)]
    assert moved[1] < 0.5 * moved[0]


def test_noisy_targets_are_the_images_own_whenever_they_are_seen(tmp_path):
    """The loss is that of target + noise: of an image the same at every step, of another member another."""
    images = torch.randn(3, 8, 8, 1, generator=torch.Generator().manual_seed(0))
    batch = {"image": images, "class_label": torch.tensor([0, 1, 3]), "index": torch.tensor([7, 2, 5])}
    options = {"init": "anchored", "anchor": 0.5}
    noisy, plain = start(tmp_path, targets="noisy", **options), start(tmp_path, **options)
    other = start(tmp_path, component=1, targets="noisy", **options)
    for model in (noisy, plain, other):
        model.train()
    x = plain.get_input(batch, "image")
    found = noisy.draw_target_noise(batch, x)
    assert found.std() == pytest.approx(0.5, abs=0.08), "sqrt(anchor / 2)"
    again = {**batch, "index": torch.tensor([5, 7, 9])}
    assert torch.equal(noisy.draw_target_noise(again, x)[:2], found[[2, 0]])
    assert not torch.equal(other.draw_target_noise(batch, x), found)
    assert plain.draw_target_noise(batch, x) is None
    t, noise, uniform = noisy.draws(4, range(3), x.shape[1:], noisy.num_timesteps)
    cond = plain.embed_condition(batch, uniform)
    output = plain.apply_model(*plain.network_input(plain.q_sample(x, t, noise), t), cond)
    expected = (output - noise - found).square().mean()
    _, parts = noisy.shared_step(batch, noisy.draws, 4, range(3))
    torch.testing.assert_close(parts["train/loss_simple"], expected.detach())
    noisy.eval()
    assert noisy.draw_target_noise(batch, x) is None, "validation compares with the targets themselves"
    noisy.train()
    with pytest.raises(ValueError, match="items need their `index`"):
        noisy.shared_step({key: batch[key] for key in ("image", "class_label")}, noisy.draws, 0, range(3))
    config = config_of(tmp_path, False, {}, heads={"targets": "noisy", **options}, loss_type="l1")
    with pytest.raises(ValueError, match="noise of a mean squared error"):
        instantiate_from_config(config).start_from_pretrained(0, 0)
    saved = {"state_dict": dict(noisy.state_dict())}
    noisy.on_save_checkpoint(saved)
    assert saved["component"]["targets"] == "noisy"


def test_a_member_adds_nothing_to_a_checkpoint(tmp_path):
    """What a member holds, its anchor too, is no part of the state dict; its record keeps its keys on disk."""
    model = start(tmp_path, init="anchored", row_rates="equal")
    assert model.member.anchor is not None and model.state_dict().keys() == tiny_model().state_dict().keys()
    saved = {"state_dict": dict(model.state_dict())}
    model.on_save_checkpoint(saved)
    assert list(saved["component"]) == [
        "index", "seed", "trunk_path", "trunk_sha256", "heads", "patterns", "init", "noise", "null_class", "anchor",
        "row_rates", "row_cap",
    ]  # fmt: skip


def test_rows_by_rule_are_the_data_sets(tmp_path):
    model = start(tmp_path, names=["lora", "class_embedding"], row_rates="equal", row_cap=3.0)
    optimizer = model.configure_optimizers()
    assert isinstance(optimizer, RowAdam)
    embedder = model.cond_stage_model
    assert {id(table): rule.axis for table, rule in optimizer.rules.items()} == {
        id(embedder.embedding.weight): 0,
        id(embedder.lora_A): 1,
    }
    rates = optimizer.rules[embedder.embedding.weight].rates
    # Class 3 (24 of 40 images) is in nearly every batch of 8, class 2 (one image) in a fifth of them.
    assert rates[[3, 2, 1]].tolist() == pytest.approx([1, 3, 1 / (1 - 37 * 36 * 35 * 34 * 33 * 32 * 31 * 30 / (
        40 * 39 * 38 * 37 * 36 * 35 * 34 * 33))], rel=2e-3)  # fmt: skip
    plain = start(tmp_path, names=["lora", "class_embedding"]).configure_optimizers()
    assert type(plain) is torch.optim.AdamW


def test_rows_by_rule_count_the_dropped_labels(tmp_path):
    given = {"null_class": "trained", "row_rates": "equal", "embedder": {"ucg_rate": 0.1}}
    model = start(tmp_path, **given)
    (rule,) = model.configure_optimizers().rules.values()
    visits = [1 - 0.9**8, 8 / 40 * 0.9]  # of the null class, of a class of one image
    assert float(rule.rates[2] / rule.rates[10]) == pytest.approx(visits[0] / visits[1], rel=1e-9)


def test_options_that_do_not_fit_are_refused(tmp_path):
    for wrong, message in (
        ({"anchor": 1.0}, "goes with heads.init: anchored"),
        ({"init": "anchored", "anchor": 0.0}, "must be positive"),
        ({"row_rates": "all"}, "heads.row_rates must be one of"),
        ({"row_cap": 0.5}, "at least 1"),
        ({"init": "anchored", "noise": 0.0}, "has no width"),
        ({"targets": "noisy"}, "noisy goes with heads.init: anchored"),
        ({"init": "anchored", "targets": "none"}, "heads.targets must be one of"),
        ({"embedder": {"null_class": False}, "null_class": "random"}, "no null class"),
    ):
        with pytest.raises(ValueError, match=message):
            start(tmp_path, **wrong)
    with pytest.raises(ValueError, match="tables of classes"):
        start(tmp_path, names=["output"], row_rates="equal").configure_optimizers()
    lone = start(tmp_path, row_rates="equal")
    lone.member.training_set = None
    with pytest.raises(ValueError, match=r"set model\.member\.training_set"):
        lone.configure_optimizers()
    lone.member.training_set = TrainingSet(40, 8)
    with pytest.raises(ValueError, match="labels"):
        lone.configure_optimizers()


def test_a_model_without_a_null_class(tmp_path):
    """Eleven classes: all train, none is the null class, and guidance is refused."""
    model = start(tmp_path, embedder={"null_class": False}, init="random", weight_decay=0.01)
    assert (model.null_class, model.n_classes) == (None, 11)
    assert tiny_model().n_classes == 10
    assert not torch.equal(rows(model)[10], tiny_model().cond_stage_model.embedding.weight[10])
    assert model.denoiser(torch.tensor([10]))(torch.zeros(1, 1, 8, 8), 500.0).x0.shape == (1, 1, 8, 8)
    with pytest.raises(ValueError, match="all 11 rows of its embedder are classes"):
        model.denoiser(torch.tensor([10]), 3.0)
