"""Work lists: resume, sharding, and refusal to mix settings."""

import os
import signal

import pytest

from ldm.jobs import WorkList, refuse_several_processes, requeue_when_asked, shard_from_environment, sole_writer
from ldm.util import atomic_write


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


def test_writers_of_one_file_do_not_meet(tmp_path):
    """Also two with the same process number, on two machines."""
    file = tmp_path / "settings.json"
    with atomic_write(file, overwrite=True) as first, atomic_write(file, overwrite=True) as second:
        first.write_text("whole")
        second.write_text("another")
        assert first != second and not file.exists()
    assert file.read_text() == "whole" and list(tmp_path.iterdir()) == [file]


def test_shard_of_torchrun_and_slurm(monkeypatch):
    assert shard_from_environment() == (0, 1)
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "6")
    monkeypatch.setenv("SLURM_ARRAY_TASK_MIN", "5")
    monkeypatch.setenv("SLURM_ARRAY_TASK_COUNT", "4")
    monkeypatch.setenv("SLURM_NTASKS", "2")
    monkeypatch.setenv("SLURM_PROCID", "0")
    assert shard_from_environment() == (1, 4), "a batch script is one process, whatever its job may start"
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "2")
    monkeypatch.setenv("SLURM_PROCID", "1")
    assert shard_from_environment() == (3, 8), "srun in an array"
    monkeypatch.delenv("SLURM_ARRAY_TASK_ID")
    assert shard_from_environment() == (1, 2)
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "1")
    assert shard_from_environment() == (0, 1), "in a shell that srun started"
    monkeypatch.setenv("RANK", "2")
    monkeypatch.setenv("WORLD_SIZE", "3")
    assert shard_from_environment() == (2, 3)


@pytest.fixture
def scontrol(tmp_path, monkeypatch):
    """The file where a `scontrol` of its own notes what it is asked to do; it refuses job 3."""
    before = signal.getsignal(signal.SIGUSR1)
    file = tmp_path / "scontrol"
    file.write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/asked\n[ $2 != 3 ] || {{ echo no such job >&2; exit 1; }}\n')
    file.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    yield tmp_path / "asked"
    signal.signal(signal.SIGUSR1, before)


@pytest.mark.parametrize(
    ("variables", "job"),
    [({"JOB_ID": "7"}, "7"), ({"JOB_ID": "7", "ARRAY_JOB_ID": "7", "ARRAY_TASK_ID": "2"}, "7_2")],
    ids=["job", "array"],
)
def test_sigusr1_requeues_this_job_alone(scontrol, monkeypatch, variables, job):
    """The last task of array 7 has the number 7 too, by which the whole array would be requeued."""
    for name, value in variables.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    requeue_when_asked()
    worker = os.fork()
    if not worker:
        os.kill(os.getpid(), signal.SIGUSR1)
        os._exit(0)
    assert os.waitpid(worker, 0)[1] == 0 and not scontrol.exists(), "a worker asks nothing, and lives"
    os.kill(os.getpid(), signal.SIGUSR1)
    assert scontrol.read_text() == f"requeue {job}\n"


def test_a_job_that_cannot_be_requeued_goes_on(scontrol, monkeypatch, caplog):
    requeue_when_asked()
    assert signal.getsignal(signal.SIGUSR1) == signal.SIG_DFL, "outside SLURM the signal keeps its meaning"
    monkeypatch.setenv("SLURM_JOB_ID", "3")
    requeue_when_asked()
    os.kill(os.getpid(), signal.SIGUSR1)
    assert "did not requeue job 3: no such job" in caplog.text


def test_one_process_at_a_time_writes_what_comes_of_the_parts(tmp_path):
    with sole_writer(tmp_path / "parts") as first, sole_writer(tmp_path / "parts") as second:
        assert (first, second) == (True, False)
    with sole_writer(tmp_path / "parts") as again:
        assert again


def test_processes_started_together_are_refused_and_those_of_an_array_are_not(monkeypatch):
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "1")
    monkeypatch.setenv("SLURM_ARRAY_TASK_COUNT", "4")
    refuse_several_processes("training")
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "3")
    monkeypatch.setenv("SLURM_PROCID", "2")
    with pytest.raises(ValueError, match=r"training is not shared.*3 were started"):
        refuse_several_processes("training")
