"""Work lists: resume, sharding, and refusal to mix settings."""

import pytest

from ldm.jobs import WorkList, shard_from_environment


def test_resume_and_shards_cover_everything_once(tmp_path):
    keys = [str(key) for key in range(7)]
    shards = [WorkList(tmp_path, {"seed": 1}, (rank, 3)) for rank in range(3)]
    taken = [key for shard in shards for key in shard.pending(keys)]
    assert sorted(taken) == keys
    shards[0].save("0", {"value": 1.5})
    assert "0" not in WorkList(tmp_path, {"seed": 1}).pending(keys)
    assert not shards[0].complete(keys)
    for key in keys[1:]:
        shards[1].save(key, {"value": 0})
    assert shards[2].complete(keys)
    assert shards[2].load("0") == {"value": 1.5}


def test_other_settings_are_refused(tmp_path):
    WorkList(tmp_path, {"seed": 1, "n": 4})
    with pytest.raises(ValueError, match="n: 4 -> 5"):
        WorkList(tmp_path, {"seed": 1, "n": 5})


def test_shard_of_torchrun_and_slurm(monkeypatch):
    assert shard_from_environment() == (0, 1)
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "6")
    monkeypatch.setenv("SLURM_ARRAY_TASK_MIN", "5")
    monkeypatch.setenv("SLURM_ARRAY_TASK_COUNT", "4")
    assert shard_from_environment() == (1, 4)
    monkeypatch.setenv("RANK", "2")
    monkeypatch.setenv("WORLD_SIZE", "3")
    assert shard_from_environment() == (2, 3)
