"""An ensemble on disk comes back as it was, refuses a wrong trunk, and is never replaced silently."""

import pytest
import torch

from ldm.checkpoint import save_checkpoint, sha256
from ldm.ensembles.storage import load_ensemble, save_ensemble


def make(tmp_path, **changes):
    save_checkpoint({"state_dict": {"w": torch.zeros(1)}}, tmp_path / "trunk.ckpt", overwrite=True)
    members = [{"head.weight": torch.full((2, 2), float(m))} for m in range(3)]
    spec = {
        "name": "test",
        "trunk": {"path": str(tmp_path / "trunk.ckpt"), "sha256": sha256(tmp_path / "trunk.ckpt")},
        "config": {"model": {"target": "x"}},
        "heads": ["head"],
        "patterns": ["head.*"],
        "null_class": "shared",
        "members": [{"component": m, "seed": m, "run": f"run{m}", "step": 5} for m in range(3)],
        **changes,
    }
    return spec, members


def test_round_trip(tmp_path):
    spec, members = make(tmp_path)
    folder = save_ensemble(tmp_path / "e_3", spec, members)
    assert sorted(file.name for file in folder.iterdir()) == [
        "ensemble.yaml",
        *[f"member_00{m}.safetensors" for m in range(3)],
    ]
    ensemble = load_ensemble(folder)
    assert len(ensemble.members) == 3
    for m in range(3):
        assert torch.equal(ensemble.members.overrides["head.weight"][m], members[m]["head.weight"])
    assert ensemble.spec["format"] == 1
    assert ensemble.trunk() == tmp_path / "trunk.ckpt"
    with pytest.raises(FileExistsError, match="--overwrite"):
        save_ensemble(folder, spec, members)


def test_another_or_missing_trunk_is_refused(tmp_path):
    spec, members = make(tmp_path)
    ensemble = load_ensemble(save_ensemble(tmp_path / "e_3", spec, members))
    (tmp_path / "trunk.ckpt").rename(tmp_path / "moved.ckpt")
    with pytest.raises(ValueError, match="--pretrained"):
        ensemble.trunk()
    assert ensemble.trunk(str(tmp_path / "moved.ckpt")) == tmp_path / "moved.ckpt"
    save_checkpoint({"state_dict": {"w": torch.ones(1)}}, tmp_path / "other.ckpt")
    with pytest.raises(ValueError, match="not the base checkpoint"):
        ensemble.trunk(str(tmp_path / "other.ckpt"))


def test_incomplete_or_foreign_records_are_errors(tmp_path):
    spec, members = make(tmp_path)
    with pytest.raises(ValueError, match="3 members"):
        save_ensemble(tmp_path / "e_3", {**spec, "members": spec["members"][:2]}, members)
    with pytest.raises(ValueError, match=r"no ensemble\.yaml"):
        load_ensemble(tmp_path)
    folder = save_ensemble(tmp_path / "e_3", spec, members)
    text = (folder / "ensemble.yaml").read_text()
    (folder / "ensemble.yaml").write_text(text.replace("format: 1", "format: 2"))
    with pytest.raises(ValueError, match="expected format 1"):
        load_ensemble(folder)
