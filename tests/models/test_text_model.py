"""A model conditioned on texts: training, dropout of captions, guidance, heads of tokens, prompts by number."""

from __future__ import annotations

import copy

import pytest
import torch
from torch.utils.data import Dataset

from ldm.checkpoint import save_checkpoint
from ldm.diffusion.noise import ImageNoise, TrainingDraws
from ldm.ensembles.classes import Classes
from ldm.pipelines.laplace import observations
from ldm.pipelines.prompts import make_text_choices, read_prompts
from ldm.training.joint import JointMembers, repeat_batch, start_members
from tests.texts import CAPTIONS, captioned_batch, text_model

TABLE = "cond_stage_model.transformer.token_emb.weight"


def loss_of(model, batch, draws=None):
    return model.shared_step(batch, draws or TrainingDraws(3), 0, range(len(batch["image"])))[0]


def test_captions_train_as_their_token_ids_do_and_the_draws_say_which_are_dropped():
    model, batch = text_model().train(), captioned_batch()
    tokens = model.cond_stage_model.tokenize(CAPTIONS)
    loss = loss_of(model, batch)
    assert torch.equal(loss, loss_of(model, {**batch, "caption": tokens}))
    loss.backward()
    assert model.get_parameter(TABLE).grad.abs().sum() > 0
    uniform = TrainingDraws(3)(0, range(4), (1, 8, 8), 1000)[2]
    dropped = uniform < 0.3
    assert 0 < dropped.sum() < 4  # else the test says nothing
    expected = torch.where(dropped[:, None], 0, tokens)
    assert torch.equal(model.read_labels(batch, uniform), expected)
    assert torch.equal(model.eval().read_labels(batch, uniform), tokens)


def test_guidance_is_between_a_text_and_the_empty_text():
    model = text_model().eval()
    tokens = model.cond_stage_model.tokenize(CAPTIONS[:2])
    x = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        cond, null, guided = (
            model.denoiser(own, scale)(x, 500.0).eps
            for own, scale in ((tokens, 1.0), (torch.zeros_like(tokens), 1.0), (tokens, 3.0))
        )
        assert torch.allclose(guided, null + 3 * (cond - null), atol=1e-5)
        assert torch.equal(model.get_learned_conditioning(CAPTIONS[:2]), model.embedder.embed(tokens))
        noise = ImageNoise(0, (0, 1))
        assert model.sample(tokens, noise, model.sampling_times(2), 3.0).shape == (2, 1, 8, 8)
        assert model.log_images(captioned_batch(), N=2, ddim_steps=2)["samples"].shape == (2, 1, 8, 8)


def members_on_a_base(tmp_path, count=2, **params):
    base = text_model(pretrained_path=str(tmp_path / "base.ckpt"), heads={"names": ["token_embedding"]}, **params)
    save_checkpoint({"state_dict": base.state_dict()}, tmp_path / "base.ckpt", overwrite=True)
    return base, start_members(copy.deepcopy(base), count, seed=5)


def test_members_are_token_rows_and_share_those_of_the_empty_text(tmp_path):
    base, members = members_on_a_base(tmp_path)
    tables = torch.stack([member.get_parameter(TABLE) for member in members])
    assert torch.equal(tables[:, 0], base.get_parameter(TABLE)[:1].expand(2, -1))  # padding, all of the empty text
    assert not torch.isclose(tables[0, 1:], tables[1, 1:]).any()
    trained = [name for name, parameter in members[0].named_parameters() if parameter.requires_grad]
    assert trained == [TABLE]
    loss_of(members[0].train(), captioned_batch()).backward()
    gradient = members[0].get_parameter(TABLE).grad
    assert not gradient[0].any() and gradient[2:].abs().sum() > 0
    with pytest.raises(ValueError, match="would shrink the shared null"):
        members_on_a_base(tmp_path, weight_decay=0.01)


def test_members_of_one_training_have_the_losses_of_their_own(tmp_path):
    _, members = members_on_a_base(tmp_path)
    joint, batch = JointMembers(members).train(), captioned_batch()
    draws = [member.draws for member in members]
    found = joint.losses(repeat_batch(batch, 2), draws, 0, range(4))
    for (loss, _), member in zip(found, members, strict=True):
        assert loss.item() == pytest.approx(loss_of(member.train(), batch, member.draws).item(), rel=1e-5)


class Pairs(Dataset):
    """The items of the batch."""

    def __len__(self):
        return len(CAPTIONS)

    def __getitem__(self, place):
        return {"image": captioned_batch()["image"][place].tanh(), "caption": CAPTIONS[place]}


def test_laplace_observes_captions_and_drops_them_as_training_does():
    model = text_model().eval()
    (seen,) = observations(model, Pairs(), draws=3, batch_size=4)
    tokens = model.cond_stage_model.tokenize(CAPTIONS).repeat_interleave(3, 0)
    empty = (seen.cond == 0).all(1)
    assert 0 < empty.sum() < 12
    assert torch.equal(seen.cond[~empty], tokens[~empty])


@torch.no_grad()
def test_prompts_are_classes_embedded_or_not(tmp_path):
    model = text_model().eval()
    x, t = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(1)), torch.full((2,), 9.0)
    tokens = model.cond_stage_model.tokenize(CAPTIONS[:2])
    expected = model.network(x, t, tokens)
    for embedded in (True, False):
        made = model.with_choices(make_text_choices(model, CAPTIONS, embedded))
        assert (made.n_classes, made.null_class) == (4, 4)
        assert torch.allclose(made.network(x, t, torch.tensor([0, 1])), expected, atol=1e-6)
        empty = made.network(x, t, torch.tensor([4, 4]))
        assert torch.allclose(empty, model.network(x, t, torch.zeros_like(tokens)), atol=1e-6)
    (tmp_path / "prompts.txt").write_text("a three\n\n two small sevens \n")
    assert read_prompts(tmp_path / "prompts.txt") == ["a three", "two small sevens"]
    with pytest.raises(ValueError, match="must be different"):
        make_text_choices(model, ["a three", "a three"], True)


def test_a_prompt_is_known_as_the_classes_that_it_names():
    spec = {"class_names": ["three", "seven", "box"], "bins": {0: 1, 1: 50, 2: "all"}, "split": "masked_classes"}
    spec["sees"] = {0: [0, 2], 1: [0, 1, 2]}
    found = Classes.of_choices(["two small sevens", "a three and a box", "a cat", "boxes"], spec, 2)
    assert found.sizes == {0: 50, 1: 1, 3: "all"}
    assert [found.groups(prompt).certain for prompt in range(3)] == [(1,), (0, 1), (0, 1)]
    assert found.number("boxes") == 3


def test_data_without_the_condition_are_refused_with_what_they_hold():
    batch = {"image": torch.zeros(2, 8, 8, 1), "class_label": torch.tensor([0, 1])}
    with pytest.raises(ValueError, match=r"hold no 'caption'.*cond_stage_key\), but \['class_label', 'image'\]"):
        text_model().read_conditions(batch)
