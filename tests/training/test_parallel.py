"""main.py as a process of its own: what it prints, and two processes that train as one."""

import csv
import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf
from PIL import Image

from ldm.checkpoint import load_checkpoint, save_checkpoint
from ldm.diffusion.weighting import LOSS_WEIGHTS
from tests.conftest import tiny_model
from tests.training.runs import end_state, losses, run_training

ROOT = Path(__file__).parent.parent.parent
# In float64, for Adam makes of a gradient's rounding in float32 a step as large as any other.
TRAINER = {"precision": "64-true", "every_n_steps": 3}
WORDS = ["model.params.unet_config.params.dropout=0"]
SAME = [*(word for name, value in TRAINER.items() for word in (f"--{name}", str(value))), *WORDS]

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)}


def call(config, tmp_path, name, *words):
    """(run directory, exit code, what was printed) of `python main.py`."""
    command = [
        sys.executable,
        str(ROOT / "main.py"),
        "--base",
        str(config),
        "-t",
        "--logdir",
        str(tmp_path / name),
        *words,
    ]
    done = subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT, cwd=tmp_path, timeout=300)
    found = list((tmp_path / name).glob("*"))
    return found[0] if found else None, done.returncode, done.stdout + done.stderr


def validation(run):
    with open(run / "csv" / "metrics.csv") as rows:
        return [float(row["val/loss_ema"]) for row in csv.DictReader(rows) if row.get("val/loss_ema")]


@pytest.mark.slow
def test_two_processes_give_the_losses_of_one(config, tmp_path):
    """Half the batch in each: the same global batches, draws, losses, weights and averages, up to rounding."""
    one, code, printed = call(config, tmp_path, "one", "--gpus", "0,", *SAME, "data.params.batch_size=16")
    assert code == 0, printed
    words = [
        rf"run directory: {one}",
        r"device: CPU \(--gpus 0,: no CUDA device here\)  parameters: ([\d,]+), \1 of them trained  "
        r"images a step: 16  learning rate: 0.016, which is model.base_learning_rate 0.001 times 16 "
        r"\(--scale_lr False takes it as it is\)",
        rf"done: {one}",
    ]
    lines = [line for line in printed.splitlines() if line.strip()]
    assert len(lines) == 3 and all(re.fullmatch(word, line) for word, line in zip(words, lines, strict=True)), printed

    words = ["--cpus", "2", "--strategy", "ddp", *SAME, "data.params.batch_size=8"]
    two, code, printed = call(config, tmp_path, "two", *words)
    assert code == 0, printed
    assert len(list((tmp_path / "two").iterdir())) == 1, "both processes share one run directory"
    lines = [line for line in printed.splitlines() if line.strip()]
    assert len(lines) == 3 and "device: 2 CPU processes" in lines[1], printed
    first, second = losses(one), losses(two)
    assert list(first) == list(second) == list(range(8))
    assert list(second.values()) == pytest.approx(list(first.values()), rel=1e-9)
    assert validation(two) == pytest.approx(validation(one), rel=1e-9)
    ends = [end_state(run) for run in (one, two)]
    assert ends[0].keys() == ends[1].keys()
    for name, value in ends[0].items():
        torch.testing.assert_close(
            ends[1][name], value, rtol=0, atol=1e-9, msg=lambda text, name=name: f"{name}: {text}"
        )


@pytest.mark.slow
@pytest.mark.parametrize("weight", sorted(LOSS_WEIGHTS))
def test_two_processes_train_under_each_loss_weight_as_one(config, tmp_path, weight):
    """Losses and weights up to rounding, what a learned weight learns among them."""
    words = [f"model.params.loss_weight={weight}", *WORDS]
    own = {**TRAINER, "scale_lr": False, "max_steps": 4}
    one = run_training(config, tmp_path / "one", *words, "data.params.batch_size=16", **own)
    given = ["--cpus", "2", "--scale_lr", "False", "--max_steps", "4", *SAME, words[0], "data.params.batch_size=8"]
    two, code, printed = call(config, tmp_path, "two", *given)
    assert code == 0, printed
    first, second = losses(one), losses(two)
    assert len(first) == 4 and list(second.values()) == pytest.approx(list(first.values()), rel=1e-9)
    ends = [end_state(run) for run in (one, two)]
    assert any(name.startswith("loss_weight.") for name in ends[0]) == (weight == "learned")
    # Weights of the loss multiply its gradients, and with them the rounding of sums in another order.
    for name, value in ends[0].items():
        torch.testing.assert_close(
            ends[1][name], value, rtol=0, atol=1e-8, msg=lambda text, name=name: f"{name}: {text}"
        )


@pytest.mark.slow
def test_an_optimiser_whose_state_is_shared_out_trains_and_resumes_as_one(config, tmp_path):
    """The weights of one process, from a checkpoint that holds the whole state and that one process can continue."""
    one = run_training(config, tmp_path / "one", *WORDS, "data.params.batch_size=16", **TRAINER, scale_lr=False)
    given = ["--cpus", "2", "--strategy", "ddp_zero1", "--scale_lr", "False", *SAME, "data.params.batch_size=8"]
    two, code, printed = call(config, tmp_path, "two", *given, "--max_steps", "4")
    assert code == 0, printed
    state = load_checkpoint(two / "checkpoints" / "last.ckpt")["optimizer_states"][0]["state"]
    trained = [value for value in tiny_model().parameters() if value.requires_grad]
    assert len(state) == len(trained), "the moments of all parameters"
    resumed = ["--resume", str(two), "-t", "--cpus", "2", "--strategy", "ddp_zero1", "--max_steps", "8"]
    done = subprocess.run([sys.executable, str(ROOT / "main.py"), *resumed, "--precision", "64-true"],
                          capture_output=True, text=True, env=ENVIRONMENT, cwd=tmp_path, timeout=300)  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    first, second = losses(one), losses(two)
    assert len(first) == 8 and list(second.values()) == pytest.approx(list(first.values()), rel=1e-9)
    ends = [end_state(run) for run in (one, two)]
    for name, value in ends[0].items():
        torch.testing.assert_close(
            ends[1][name], value, rtol=0, atol=1e-9, msg=lambda text, name=name: f"{name}: {text}"
        )


@pytest.mark.slow
def test_a_slurm_step_of_two_processes(config, tmp_path, monkeypatch):
    """With what srun sets for each of its processes there is one run directory, and the losses are those of one."""
    words = ["--base", str(config), "-t", "--max_steps", "2", "--precision", "64-true", *WORDS]
    words += ["data.params.batch_size=8", "--logdir", str(tmp_path / "two")]
    step = {"JOB_ID": "4711", "STEP_ID": "0", "NODEID": "0", "NODELIST": "127.0.0.1"}
    step |= {"NTASKS": "2", "STEP_NUM_TASKS": "2", "JOB_NAME": "train"}
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        monkeypatch.setenv("MASTER_PORT", str(free.getsockname()[1]))
    for name, value in {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)}.items():
        monkeypatch.setenv(name, value)
    processes = []
    for rank in ("1", "0"):
        own = {f"SLURM_{name}": value for name, value in {**step, "PROCID": rank, "LOCALID": rank}.items()}
        command = [sys.executable, str(ROOT / "main.py"), *words, "--cpus", "2"]
        processes.append(
            subprocess.Popen(
                command, env={**os.environ, **own}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, cwd=tmp_path
            )
        )
    printed = [process.communicate(timeout=300)[0].decode() for process in processes]
    assert [process.returncode for process in processes] == [0, 0], printed
    (run,) = (tmp_path / "two").iterdir()
    assert (run / "slurm.json").exists() and (run / "finished.json").exists()
    changes = [*WORDS, "data.params.batch_size=16"]
    one = run_training(config, tmp_path / "one", *changes, max_steps=2, precision="64-true")
    assert losses(run) == pytest.approx(losses(one), rel=1e-9) and len(losses(one)) == 2


@pytest.mark.slow
def test_two_processes_train_the_members_of_one(config, tmp_path):
    """All components together, each with half of its batch in every process: the weights of one process."""
    save_checkpoint({"state_dict": tiny_model().state_dict()}, tmp_path / "trunk.ckpt")
    content = OmegaConf.load(config)
    content.model.params.pretrained_path = str(tmp_path / "trunk.ckpt")
    content.model.params.heads = {"names": ["class_embedding", "output"]}
    content.model.params.use_ema = False
    OmegaConf.save(content, config)
    words = [*SAME, "--start_from_pretrained", "--component", "all", "--members", "2", "--ensemble_name", "b"]
    words += ["--scale_lr", "False", "--max_steps", "4"]
    _, code, printed = call(config, tmp_path, "two", "--cpus", "2", *words, "data.params.batch_size=8")
    assert code == 0, printed
    own = {"component": "all", "members": 2, "ensemble_name": "b", "start_from_pretrained": True, "scale_lr": False}
    run_training(config, tmp_path / "one", *WORDS, "data.params.batch_size=16", **TRAINER, **own, max_steps=4)
    found = (sorted((tmp_path / name).glob("*_b[0-9]*")) for name in ("one/logs", "two"))
    ends = [[end_state(run) for run in runs] for runs in found]
    assert len(ends[0]) == len(ends[1]) == 2, printed
    for one, two in zip(*ends, strict=True):
        assert one.keys() == two.keys()
        for name, value in one.items():
            torch.testing.assert_close(
                two[name], value, rtol=0, atol=1e-9, msg=lambda text, name=name: f"{name}: {text}"
            )


@pytest.mark.slow
def test_a_first_stage_with_a_discriminator_trains_in_two_processes(tmp_path):
    """Its two optimisers leave some parameters without gradient; both processes end with the same weights."""
    config = ROOT / "configs" / "autoencoder" / "digits-vq.yaml"
    loss = {"disc_weight": 0.5, "disc_in_channels": 1, "disc_num_layers": 1, "use_actnorm": True}
    words = [f"model.params.lossconfig.params.{name}={value}" for name, value in loss.items()]
    words += ["data.params.batch_size=8", "data.params.num_workers=0", "--max_steps", "4", "--scale_lr", "False"]
    words += ["lightning.callbacks.same.target=tests.training.runs.AssertSameWeights"]
    run, code, printed = call(config, tmp_path, "two", "--cpus", "2", *words)
    assert code == 0, printed
    assert all(bool(torch.isfinite(value).all()) for value in end_state(run).values())


@pytest.mark.slow
@pytest.mark.parametrize("split", ["train", "validation"])
def test_a_broken_picture_in_a_worker_ends_all_processes(config, tmp_path, split):
    """With its sentence and exit code 1: no process waits for a worker, or for another process."""
    pictures = tmp_path / "pictures"
    for number in range(16):
        (pictures / "0").mkdir(parents=True, exist_ok=True)
        Image.new("L", (8, 8), number).save(pictures / "0" / f"{number:02}.png")
    (pictures / "0" / "11.png").write_bytes(b"<html>")
    words = ["data.params.num_workers=1", f"data.params.{split}.target=ldm.data.folder.ImageFolder"]
    names = [str(digit) for digit in range(10)]
    params = {"root": pictures, "image_size": 8, "channels": 1, "split": "all", "class_names": names}
    words += [f"data.params.{split}.params.{name}={value}" for name, value in params.items()]
    words += ["--limit_val_batches", "1.0", "--limit_train_batches", "1.0", "--max_steps", "400"]
    _, code, printed = call(config, tmp_path, "two", "--cpus", "2", "data.params.batch_size=4", *words)
    assert code == 1, printed
    told = [line for line in printed.splitlines() if line.startswith("error: cannot read image '0/11.png' in")]
    assert len(told) == 1, printed


@pytest.mark.slow
def test_an_error_is_one_line(config, tmp_path):
    words = ["--start_from_pretrained", "model.params.pretrained_path=nowhere/trunk.ckpt"]
    run, code, printed = call(config, tmp_path, "none", *words)
    assert (run, code) == (None, 1)
    (line,) = printed.splitlines()
    assert line.startswith("error: no base checkpoint at nowhere/trunk.ckpt")
