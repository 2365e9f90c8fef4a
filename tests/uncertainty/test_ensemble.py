"""An ensemble on disk comes back as it was, refuses a wrong base checkpoint, and is never replaced silently."""

import pytest
import torch

from ldm.checkpoint import save_checkpoint, sha256
from ldm.ensembles.storage import read_ensemble, write_ensemble


def make(tmp_path, **changes):
    save_checkpoint({"state_dict": {"w": torch.zeros(1)}}, tmp_path / "trunk.ckpt", overwrite=True)
    members = [{"head.weight": torch.full((2, 2), float(m))} for m in range(3)]
    spec = {
        "name": "test",
        "trunk": {"path": str(tmp_path / "trunk.ckpt"), "sha256": sha256(tmp_path / "trunk.ckpt")},
        "config": {"model": {"target": "ldm.models.diffusion.ddpm.LatentDiffusion"}},
        "heads": ["head"],
        "patterns": ["head.*"],
        "null_class": "shared",
        "members": [{"component": m, "seed": m, "run": f"run{m}", "step": 5} for m in range(3)],
        **changes,
    }
    return spec, members


def test_round_trip(tmp_path):
    spec, members = make(tmp_path)
    folder = write_ensemble(tmp_path / "e_3", spec, members)
    assert sorted(file.name for file in folder.iterdir()) == [
        "ensemble.yaml",
        *[f"member_00{m}.safetensors" for m in range(3)],
    ]
    ensemble = read_ensemble(folder)
    assert len(ensemble.members) == 3
    for m in range(3):
        assert torch.equal(ensemble.members.overrides["head.weight"][m], members[m]["head.weight"])
    assert ensemble.spec["format"] == 1
    assert ensemble.base_checkpoint() == tmp_path / "trunk.ckpt"
    with pytest.raises(FileExistsError, match="--overwrite"):
        write_ensemble(folder, spec, members)


def test_another_or_missing_base_is_refused(tmp_path):
    spec, members = make(tmp_path)
    ensemble = read_ensemble(write_ensemble(tmp_path / "e_3", spec, members))
    (tmp_path / "trunk.ckpt").rename(tmp_path / "moved.ckpt")
    with pytest.raises(ValueError, match="--pretrained"):
        ensemble.base_checkpoint()
    assert ensemble.base_checkpoint(str(tmp_path / "moved.ckpt")) == tmp_path / "moved.ckpt"
    save_checkpoint({"state_dict": {"w": torch.ones(1)}}, tmp_path / "other.ckpt")
    with pytest.raises(ValueError, match="not the base checkpoint"):
        ensemble.base_checkpoint(str(tmp_path / "other.ckpt"))


def test_incomplete_or_foreign_records_are_errors(tmp_path):
    spec, members = make(tmp_path)
    with pytest.raises(ValueError, match="3 members"):
        write_ensemble(tmp_path / "e_3", {**spec, "members": spec["members"][:2]}, members)
    with pytest.raises(ValueError, match=r"no ensemble\.yaml"):
        read_ensemble(tmp_path)
    folder = write_ensemble(tmp_path / "e_3", spec, members)
    text = (folder / "ensemble.yaml").read_text()
    (folder / "ensemble.yaml").write_text(text.replace("format: 1", "format: 2"))
    with pytest.raises(ValueError, match="expected format 1"):
        read_ensemble(folder)


def test_it_opens_from_any_folder_and_after_both_moved_together(tmp_path, monkeypatch):
    """The path of the base checkpoint is relative to the ensemble; the first version's is found above it, too."""
    spec, members = make(tmp_path)
    folder = write_ensemble(tmp_path / "logs" / "e_3", spec, members)
    assert read_ensemble(folder).spec["trunk"]["path"] == "../../trunk.ckpt"
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert read_ensemble(folder).base_checkpoint() == tmp_path / "trunk.ckpt"
    (tmp_path / "moved").mkdir()
    for name in ("logs", "trunk.ckpt"):
        (tmp_path / name).rename(tmp_path / "moved" / name)
    moved = read_ensemble(tmp_path / "moved" / "logs" / "e_3")
    assert moved.base_checkpoint() == tmp_path / "moved" / "trunk.ckpt"
    record = moved.folder / "ensemble.yaml"
    record.write_text(record.read_text().replace("../../trunk.ckpt", "trunk.ckpt"))
    assert read_ensemble(moved.folder).base_checkpoint() == tmp_path / "moved" / "trunk.ckpt"


def test_a_killed_overwrite_leaves_the_earlier_ensemble_whole(tmp_path, monkeypatch):
    spec, members = make(tmp_path)
    folder = write_ensemble(tmp_path / "e_3", spec, members)
    others = [{name: value + 7 for name, value in member.items()} for member in members]

    def killed(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("yaml.safe_dump", killed)
        with pytest.raises(KeyboardInterrupt):
            write_ensemble(folder, spec, others, overwrite=True)
    heads = read_ensemble(folder).members.overrides["head.weight"]
    assert torch.equal(heads[2], members[2]["head.weight"])
    write_ensemble(folder, spec, others, overwrite=True)
    heads = read_ensemble(folder).members.overrides["head.weight"]
    assert torch.equal(heads[2], others[2]["head.weight"])


def test_a_member_that_was_exchanged_is_refused(tmp_path):
    spec, members = make(tmp_path)
    folder = write_ensemble(tmp_path / "e_3", spec, members)
    (folder / "member_000.safetensors").write_bytes((folder / "member_001.safetensors").read_bytes())
    with pytest.raises(ValueError, match="gather the ensemble again"):
        read_ensemble(folder)
