"""DECU's published ensemble file: what is read from it, and that it becomes an ensemble of ours."""

import pytest
import torch
from omegaconf import OmegaConf

from ldm.checkpoint import load_state_dict
from ldm.commands.gather import Gather
from ldm.commands.sample_members import SampleMembers
from ldm.commands.shared import EnsembleSource, Placement
from ldm.ensembles.storage import read_ensemble, read_published
from ldm.settings import Branching, Sampling
from tests.conftest import golden_json, tiny_config, tiny_model

TABLE = "cond_stage_model.embedding.weight"


@pytest.fixture(scope="module")
def model_pth(tmp_path_factory):
    """What DECU's published save_ensemble.py writes, at a tiny width: a bare state dict with three tables."""
    folder = tmp_path_factory.mktemp("published")
    state = dict(tiny_model().state_dict())
    shape = state.pop(TABLE).shape
    source = torch.Generator().manual_seed(8)
    tables = [torch.randn(shape, generator=source) for _ in range(3)]
    named = {f"cond_stage_model_ensemble.{index}.embedding.weight": table for index, table in enumerate(tables)}
    torch.save({**state, **named}, folder / "model.pth")
    OmegaConf.save(OmegaConf.create({"model": tiny_config(guidance_scale=2.0)}), folder / "tiny.yaml")
    return folder, state, tables


def test_the_published_ensemble_is_read(model_pth, tmp_path):
    folder, state, tables = model_pth
    trunk, members = read_published(folder / "model.pth")
    assert trunk.keys() == {*state, TABLE}
    assert all(torch.equal(trunk[name], value) for name, value in state.items())
    assert torch.equal(members.overrides[TABLE], torch.stack(tables))
    for wrong in ({}, {f"cond_stage_model_ensemble.{index}.embedding.weight": tables[0] for index in (0, 2)}):
        torch.save({**state, **wrong}, tmp_path / "wrong.pth")
        with pytest.raises(ValueError, match="no published ensemble"):
            read_published(tmp_path / "wrong.pth")


def test_its_keys_are_those_of_the_published_one():
    """The keys that the published code writes are the released ones with numbered tables in place of the one."""
    recorded = golden_json("keys_decu_ensemble")["decu_ensemble_5 (model.pth of save_ensemble.py is a bare state_dict, "
                                                 "not {'state_dict':...})"]  # fmt: skip
    assert recorded["keys_missing_vs_cin256"] == [TABLE]
    expected = [[f"cond_stage_model_ensemble.{i}.embedding.weight", [1001, 512], "float32"] for i in range(5)]
    assert recorded["keys_added_vs_cin256"] == expected


@pytest.mark.parametrize("sampler", ["DDIM", "PLMS", "DPM-Solver++"])
def test_the_published_ensemble_becomes_one_of_ours(model_pth, tmp_path, sampler):
    folder, _, tables = model_pth
    published = {"published": str(folder / "model.pth"), "base": str(folder / "tiny.yaml")}
    out = Gather(**published, out=str(tmp_path / "decu_3")).run()
    names = ["ensemble.yaml", *(f"member_00{m}.safetensors" for m in range(3)), "record.json", "trunk.safetensors"]
    assert sorted(file.name for file in out.iterdir()) == names
    for member, table in enumerate(tables):
        state = load_state_dict(out / f"member_00{member}.safetensors")
        assert list(state) == [TABLE] and torch.equal(state[TABLE], table)
    moved = out.rename(tmp_path / "elsewhere")
    assert read_ensemble(moved).base_checkpoint() == moved / "trunk.safetensors", "the trunk travels with the ensemble"
    options = {"sampling": Sampling(sampler, steps=5), "branching": Branching(step=0), "place": Placement("cpu")}
    picture = SampleMembers(EnsembleSource(str(moved)), classes=(1, 4), **options).run()
    found = load_state_dict(picture.with_suffix(".safetensors"))["latents"]
    assert found.shape == (3, 2, 1, 8, 8) and bool(found.isfinite().all())
    assert (found[0] - found[1]).abs().max() > 0.1
    with pytest.raises(FileExistsError):
        Gather(**published, out=str(moved)).run()
    with pytest.raises(ValueError, match="--published needs --base"):
        Gather(published=published["published"])


def test_a_published_ensemble_of_another_model_is_refused(model_pth, tmp_path):
    folder, _, _ = model_pth
    other = tiny_config()
    other["params"]["unet_config"]["params"]["model_channels"] = 64
    OmegaConf.save(OmegaConf.create({"model": other}), tmp_path / "other.yaml")
    base = str(tmp_path / "other.yaml")
    with pytest.raises(ValueError, match="of another shape"):
        Gather(published=str(folder / "model.pth"), base=base, out=str(tmp_path / "out")).run()
    assert not (tmp_path / "out").exists()
