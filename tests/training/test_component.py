"""Training one component: the published optimisation steps, the frozen trunk, the shared null class."""

import pytest
import torch

from ldm.checkpoint import load_into, save_checkpoint
from ldm.util import instantiate_from_config
from tests.conftest import golden_json, golden_tensors, ldm_small_weights, tiny_config, tiny_model
from tests.training.runs import take_steps

LABELS = torch.arange(8) % 4


def test_four_published_steps():
    """AdamW with weight decay 0.01 on the embedding alone, trunk frozen (golden decu_training)."""
    spec, golden = golden_json("decu_training"), golden_tensors("decu_training")
    config = golden_json("ldm_small")["config"]
    model = instantiate_from_config(config)
    load_into(model, ldm_small_weights())
    model.requires_grad_(False)
    table = model.cond_stage_model.embedding.weight.requires_grad_(True)
    with torch.no_grad():
        table.copy_(golden["embedding_init"])
    model.weight_decay, model.learning_rate = spec["optimizer"]["defaults"]["weight_decay"], spec["lr"]
    optimizer = model.configure_optimizers()
    for step in range(4):
        z, t, noise, labels = (golden[name][step] for name in ("z", "t", "noise", "labels"))
        loss, _ = model.p_losses(z, model.get_learned_conditioning({"class_label": labels}), t, noise)
        optimizer.zero_grad()
        loss.backward()
        scale = golden[f"step{step}/grad"].abs().max()
        torch.testing.assert_close(loss, golden[f"step{step}/loss"], rtol=3e-5, atol=0)
        torch.testing.assert_close(table.grad, golden[f"step{step}/grad"], rtol=0, atol=3e-5 * float(scale))
        optimizer.step()
        after = golden[f"step{step}/embedding_after"]
        # Adam divides by the gradient's own size: entries whose gradient is rounding noise move by it.
        torch.testing.assert_close(table.detach(), after, rtol=0, atol=3e-5 * float(after.abs().max()))


def start(tmp_path, component=0, seed=0, **heads):
    path = tmp_path / "trunk.ckpt"
    if not path.exists():
        save_checkpoint({"state_dict": tiny_model().state_dict()}, path)
    params = {"pretrained_path": str(path), "heads": heads}
    model = instantiate_from_config(tiny_config(**params))
    model.start_from_pretrained(component, seed)
    model.seed_draws(seed, component)
    model.learning_rate = 1e-2
    return model


@pytest.mark.parametrize("heads", [["class_embedding"], ["output", "class_embedding"], ["time_embedding"]])
def test_trunk_stays_bit_identical(tmp_path, heads):
    model = start(tmp_path, names=heads)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    take_steps(model, LABELS)
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]) == (name not in trained), name
    saved = {"state_dict": dict(model.state_dict())}
    model.on_save_checkpoint(saved)
    assert sorted(saved["state_dict"]) == sorted(trained), "a checkpoint holds the heads alone"


def test_null_class_is_shared_unless_asked(tmp_path):
    pretrained = tiny_model().cond_stage_model.embedding.weight.detach()
    shared = start(tmp_path, init="perturbed")
    take_steps(shared, LABELS)
    table = shared.cond_stage_model.embedding.weight
    assert torch.equal(table[10], pretrained[10])
    assert (table[:4] - pretrained[:4]).abs().min() > 0
    own = start(tmp_path, init="random", null_class="random")
    assert not torch.equal(own.cond_stage_model.embedding.weight[10], pretrained[10])


def test_shared_null_class_refuses_weight_decay(tmp_path):
    start(tmp_path)
    config = tiny_config(pretrained_path=str(tmp_path / "trunk.ckpt"), weight_decay=0.01)
    with pytest.raises(ValueError, match="shrink the shared null class"):
        instantiate_from_config(config).start_from_pretrained(0, 0)


def test_resume_needs_the_same_trunk(tmp_path):
    model = start(tmp_path)
    saved = {"state_dict": dict(model.state_dict())}
    model.on_save_checkpoint(saved)
    again = {**saved, "state_dict": dict(saved["state_dict"])}
    model.on_load_checkpoint(again)
    assert again["state_dict"].keys() == model.state_dict().keys()
    other = {**saved, "component": {**saved["component"], "trunk_sha256": "0" * 64}}
    with pytest.raises(ValueError, match="use the base checkpoint it was trained on"):
        model.on_load_checkpoint(other)
    with pytest.raises(ValueError, match="--start_from_pretrained"):
        tiny_model().on_load_checkpoint(saved)


def test_unknown_options_and_a_missing_trunk(tmp_path):
    with pytest.raises(ValueError, match="pretrained_path"):
        tiny_model().start_from_pretrained(0, 0)
    start(tmp_path)
    for wrong, message in (
        ({"noises": 1}, "unknown keys"),
        ({"init": "zero"}, "must be one of"),
        ({"names": "x"}, "unknown head"),
    ):
        with pytest.raises(ValueError, match=message):
            start(tmp_path, **wrong)
