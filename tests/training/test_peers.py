"""Processes of one training that lose another: who says what, and that none waits."""

import os
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest

from ldm.training import peers
from ldm.training.peers import LostProcess, describe_ended, describe_peer, watching
from ldm.training.slurm import end_step_at_exit

GLOO = "[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:534] Connection closed by peer [10.0.0.7]:41234"


def trainer(*children, rank=0, count=2):
    launcher = SimpleNamespace(procs=list(children))
    return SimpleNamespace(world_size=count, global_rank=rank, strategy=SimpleNamespace(launcher=launcher))


def child(code):
    return subprocess.Popen([sys.executable, "-c", code])


def test_who_ended_is_named():
    assert "process 1 of this training (number 77) was killed by SIGKILL" in describe_ended(1, 77, -9)
    assert "process 2 of this training (number 78) ended with code 3, and says why" in describe_ended(2, 78, 3)
    assert describe_peer(RuntimeError(GLOO), 1, 2).startswith("process 0 of this training at 10.0.0.7 ended before")
    assert describe_peer(RuntimeError("NCCL"), 1, 4).startswith("another process than 1, of 4, of this training ended")


def test_a_lost_connection_waits_for_the_name_of_the_dead():
    dead = child("import os, signal; os.kill(os.getpid(), signal.SIGKILL)")
    named = pytest.raises(LostProcess, match=rf"process 1 .* \(number {dead.pid}\) was killed by SIGKILL")
    with named as caught, watching(trainer(dead), first=True, launched=False):
        raise RuntimeError(GLOO)
    assert caught.value.told


def test_other_errors_and_single_processes_pass():
    for count in (1, 2):
        with pytest.raises(RuntimeError, match="shapes"), watching(trainer(count=count), True, False):
            raise RuntimeError("shapes differ")


def test_a_process_that_torch_does_not_tell_is_ended_where_it_waits():
    """Here a first process that computes without its peers, while its child is killed."""
    code = """
import subprocess, sys, time
from types import SimpleNamespace
from ldm.training import peers
peers.GRACE = 0.5
dead = subprocess.Popen([sys.executable, "-c", "import os; os._exit(7)"])
launcher = SimpleNamespace(procs=[dead])
trainer = SimpleNamespace(world_size=2, global_rank=0, strategy=SimpleNamespace(launcher=launcher))
with peers.watching(trainer, first=True, launched=False):
    time.sleep(60)
"""
    began = time.monotonic()
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=50)
    assert ended.returncode == 1 and time.monotonic() - began < 50
    assert "error: process 1 of this training (number" in ended.stderr and "ended with code 7" in ended.stderr


def test_a_process_whose_first_one_is_killed_ends(tmp_path):
    inner = """
import sys, time
from types import SimpleNamespace
from ldm.training import peers
peers.GRACE = 0.5
trainer = SimpleNamespace(world_size=2, global_rank=1)
with peers.watching(trainer, first=False, launched=True):
    print("watching", flush=True)
    time.sleep(60)
"""
    outer = "import subprocess, sys, time; subprocess.Popen([sys.executable, '-c', sys.argv[1]]); time.sleep(60)"
    with open(tmp_path / "errors", "w") as errors:
        first = subprocess.Popen([sys.executable, "-c", outer, inner], stdout=subprocess.PIPE, stderr=errors)
        assert first.stdout.readline() == b"watching\n"
        first.send_signal(signal.SIGKILL)
        assert first.stdout.read() == b""  # the end of the child, which holds the other end of the pipe
        first.wait()
    said = (tmp_path / "errors").read_text()
    assert f"error: the first process of this training (number {first.pid}) was killed" in said


def test_a_failure_in_a_slurm_step_ends_the_step_once_it_is_told(tmp_path):
    code = """
import sys
from ldm.training import slurm
slurm.ENDING = 0.1
slurm.end_step_at_exit()
sys.exit("error: the disk is full")
"""
    (tmp_path / "scancel").write_text(f'#!/bin/sh\necho "$@" > {tmp_path}/ended\nkill -TERM $PPID\n')
    (tmp_path / "scancel").chmod(0o755)
    step = {"SLURM_JOB_ID": "7", "SLURM_STEP_ID": "2", "SLURM_STEP_NUM_TASKS": "2", "SLURM_PROCID": "0"}
    environment = {**os.environ, **step, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    ended = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert ended.returncode == 1 and ended.stderr.strip() == "error: the disk is full"
    assert (tmp_path / "ended").read_text() == "7.2\n"


def test_outside_a_step_nothing_is_ended(monkeypatch):
    monkeypatch.delenv("SLURM_STEP_NUM_TASKS", raising=False)
    registered = []
    monkeypatch.setattr("ldm.training.slurm.atexit.register", registered.append)
    end_step_at_exit()
    assert registered == []


def test_the_observer_of_lightning_ends_without_a_kill():
    from lightning_fabric.strategies.launchers import subprocess_script

    dead = child("raise SystemExit(3)")
    dead.wait()
    observer = subprocess_script._ChildProcessObserver(os.getpid(), [dead], sleep_period=1)
    observer.start()
    peers._silence_observers()
    observer.join(10)
    assert not observer.is_alive()
