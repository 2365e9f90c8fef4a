"""One training at a time in a run directory; what dead processes leave is taken away."""

import json
import os
import subprocess
import sys
import time
from dataclasses import asdict, replace

import pytest
from pytorch_lightning.utilities import rank_zero

from ldm.partials import remove_abandoned
from ldm.training.lock import LOCK_FILE, SILENCE, Holder, hold_run
from ldm.training.runs import new_run
from ldm.util import atomic_write


@pytest.fixture
def run(tmp_path):
    return new_run(tmp_path, "test")


def write_lock(run, holder, silence=0.0):
    path = run.path / LOCK_FILE
    path.write_text(json.dumps(asdict(holder)))
    os.utime(path, (time.time() - silence,) * 2)


def test_a_second_training_is_refused_by_name_and_the_first_lets_go(run):
    with hold_run(run):
        with pytest.raises(ValueError, match=f"process {os.getpid()} on .* is training in .*remove"), hold_run(run):
            pass
        assert (run.path / LOCK_FILE).exists(), "the refused one leaves the lock alone"
    assert not (run.path / LOCK_FILE).exists()
    with hold_run(run):
        pass


def test_what_a_dead_process_left_is_taken_away(run):
    """Its lock and its partial files, as soon as it is known to be dead."""
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    write_lock(run, replace(Holder.own(), process=process.pid))
    with atomic_write(run.checkpoints / "last.ckpt") as partial:
        left = partial.with_name(partial.name.replace(f"-{os.getpid()}-", f"-{process.pid}-"))
        partial.write_text("whole")
    left.write_text("half")
    with hold_run(run):
        assert [path.name for path in run.checkpoints.iterdir()] == ["last.ckpt"]
        assert json.loads((run.path / LOCK_FILE).read_text())["process"] == os.getpid()
    assert [path.name for path in run.path.iterdir() if not path.is_dir()] == []


def test_a_lock_of_another_time_or_place(run):
    """A later process of the same number, another host that is silent, and the job that was requeued let it go."""
    own = Holder.own()
    elsewhere = replace(own, host="elsewhere")
    for holder, silence in ((replace(own, started="1"), 0), (elsewhere, SILENCE + 60)):
        write_lock(run, holder, silence)
        with hold_run(run):
            assert json.loads((run.path / LOCK_FILE).read_text()) == asdict(own)
    write_lock(run, elsewhere, 30)
    with pytest.raises(ValueError, match=r"on elsewhere is training in .* sign of life 3. s ago"), hold_run(run):
        pass


def test_a_requeued_job_takes_its_lock_over(run, monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", "4711")
    write_lock(run, replace(Holder.own(), host="elsewhere"))
    with hold_run(run):
        pass
    write_lock(run, replace(Holder.own(), host="elsewhere", job="12"))
    with pytest.raises(ValueError, match="elsewhere"), hold_run(run):
        pass


def test_later_processes_of_a_refused_job_do_not_wait_for_its_first(run, monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", "4711")
    monkeypatch.setattr(rank_zero.rank_zero_only, "rank", 1, raising=False)
    write_lock(run, replace(Holder.own(), job="12"))
    with pytest.raises(ValueError, match=rf"process {os.getpid()} on .* is training"), hold_run(run):
        pass
    for holder in (Holder.own(), replace(Holder.own(), job="12", started="1")):  # of its own job, or ended
        write_lock(run, holder)
        with hold_run(run):
            assert (run.path / LOCK_FILE).exists()


def test_partial_files_of_the_living_and_of_other_hosts_stay_for_a_day(tmp_path):
    with atomic_write(tmp_path / "a.txt") as partial:
        partial.write_text("a")
        other = tmp_path / ".b.0123ab-7-01234567.partial.txt"
        older = tmp_path / ".c.01234567.partial.txt"
        for path in (other, older):
            path.write_text("half")
        os.utime(older, (0, 0))
        remove_abandoned(tmp_path)
        assert partial.exists() and other.exists() and not older.exists()
    assert (tmp_path / "a.txt").read_text() == "a"
