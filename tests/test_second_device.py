"""Trainings, ensembles, samplers, posteriors on a device that refuses the CPU's tensors beside its own, as a GPU does.

It computes by the CPU's kernels, so what commands write there is what they write on the CPU.
"""

import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from safetensors.torch import load_file
from torch.utils import cpp_extension

from tests.cli import call
from tests.ensembles import write_ensemble
from tests.posteriors import model_words, table, write_model
from tests.training.runs import losses

HERE = Path(__file__).parent
SOURCE = HERE / "second_device" / "device.cpp"

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def library(request, tmp_path_factory):
    """The device, compiled; kept in pytest's cache, where it has one."""
    compiler = shutil.which("g++") or pytest.skip("no g++ to compile the device with")
    tag = hashlib.sha256(SOURCE.read_bytes() + f"{torch.__version__} {sys.version}".encode()).hexdigest()[:16]
    cache = getattr(request.config, "cache", None)
    folder = tmp_path_factory.mktemp("second_device") if cache is None else cache.mkdir("second_device")
    built = folder / f"{tag}.so"
    if not built.exists():
        partial = built.with_suffix(f".{os.getpid()}")
        words = [compiler, "-O0", "-std=c++20", "-shared", "-fPIC", str(SOURCE), "-o", str(partial)]
        words += [f"-I{path}" for path in cpp_extension.include_paths()]
        words += [f"-L{path}" for path in cpp_extension.library_paths()] + ["-ltorch", "-ltorch_cpu", "-lc10"]
        made = subprocess.run(words, capture_output=True, text=True)
        if made.returncode:
            pytest.skip(f"the device does not compile against torch {torch.__version__}: {made.stderr[:300]}")
        os.replace(partial, built)
    return built


@pytest.fixture(scope="module")
def outputs(library, tmp_path_factory):
    """A folder of each study, `trainings`, `ensembles` and `posteriors`: all commands run in one process."""
    folder = tmp_path_factory.mktemp("outputs")
    studies = {"trainings": trainings, "ensembles": ensembles, "posteriors": posteriors}
    commands = []
    for name, study in studies.items():
        (folder / name).mkdir()
        commands += [[str(word) for word in words] for words in study(folder / name)]
    file = folder / "commands.json"
    file.write_text(json.dumps(commands))
    words = [sys.executable, "-m", "tests.second_device.run", str(library), str(file)]
    own = {"PYTHONPATH": str(HERE.parent), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(words, capture_output=True, text=True, env={**os.environ, **own}, cwd=HERE.parent)
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    return folder


def trainings(folder):
    """A base model with averages, pictures and validation, then two anchored members together; here on the CPU."""
    write_model(folder, use_ema=True)
    content = OmegaConf.load(folder / "tiny.yaml")
    content.data.target, content.model.base_learning_rate = "main.DataModuleFromConfig", 1e-2
    content.data.params.num_workers = 0
    OmegaConf.save(content, folder / "tiny.yaml")
    base = ["--base", folder / "tiny.yaml", "-t", "--gpus", "0,", "--scale_lr", "False", "--log_every_n_steps", "1"]
    base += ["--precision", "64-true"]
    trunk = [*base, "--max_steps", "4", "--val_check_interval", "2", "--limit_val_batches", "1", "--name", "backbone"]
    trunk += ["lightning.callbacks.image_logger.params={batch_frequency: 2, max_images: 2}"]
    members = [*base, "--max_steps", "3", "--start_from_pretrained", "--component", "all", "--members", "2"]
    members += ["--ensemble_name", "anchored", f"model.params.pretrained_path={folder / 'model.ckpt'}"]
    members += ["model.params.use_ema=false", "model.params.heads={init: anchored, row_rates: equal}"]
    for words in (trunk, members):
        call("train", [*words, "--logdir", folder / "cpu"])
        yield ["main.py", *words, "--logdir", folder / "second"]


def test_trainings_have_the_losses_of_the_cpu(outputs):
    for name in ("backbone", "anchoredall"):
        ours, theirs = (losses(next((outputs / "trainings" / where).glob(f"*{name}"))) for where in ("second", "cpu"))
        assert ours == pytest.approx(theirs, rel=1e-9) and len(theirs) >= 3


def ensembles(folder):
    """Mutual information and maps, pictures and rollouts of an ensemble; samples of a guided model by every sampler."""
    write_ensemble(folder)
    one = model_words(write_model(folder, guidance_scale=2.0))[:4]
    many = ["--classes", 3, 8, "--n", 2, "--curve", "--diversity", "--base_comp", "all"]
    commands = [
        ["decu", "uncertainty", "classes", "--path", folder, *many],
        ["decu", "uncertainty", "pixels", "--path", folder, "--classes", 3, 8, "--n", 1, "--space", "image", "latent"],
        ["decu", "sample", "members", "--path", folder, "--classes", 3, 8],
        ["decu", "rollout", "--path", folder, "--classes", 3],
    ]
    for sampler in ("DDIM", "DDPM", "PLMS", "DPM-Solver++", "Heun"):
        commands.append(["scripts/sample_diffusion.py", *one, "--n", 3, "--steps", 4, "--sampler", sampler])
    return both(commands, folder)


def posteriors(folder):
    """A posterior of a model's last layer, and its maps by three methods."""
    model = model_words(write_model(folder))[:4]
    fit = ["decu", "laplace", "fit", *model, "--n", 40, "--draws", 2, "--prior_precision", 50, "--also", "sandwich"]
    maps = ["decu", "laplace", "sample", *model, "--posterior", folder / "cpu0", "--n", 2, "--steps", 3]
    methods = (("persistent", "--draws"), ("tangents", "--draws"), ("bayesdiff", "--particles"))
    return both([fit, *([*maps, "--method", method, many, 4] for method, many in methods)], folder)


@pytest.mark.parametrize(("study", "count"), [("ensembles", 9), ("posteriors", 4)])
def test_outputs_are_those_of_the_cpu(outputs, study, count):
    found = sorted(path.name for path in (outputs / study).glob("second*"))
    assert len(found) == count
    for name in found:
        agree(outputs / study / name, outputs / study / name.replace("second", "cpu"))


def both(commands, folder):
    """Each command on the CPU and on the second device, into `cpu0`, `second0`, ..."""
    for number, words in enumerate(commands):
        for device in ("cpu", "second"):
            yield [*words, "--device", device, "--out", folder / f"{device}{number}"]


def agree(ours, theirs):
    """The arrays in two folders, or of two outputs, are equal to rounding."""
    files = sorted(path.relative_to(theirs) for path in theirs.rglob("*.npz"))
    tensors = sorted(path.relative_to(theirs) for path in theirs.rglob("*.safetensors"))
    tables = sorted(path.relative_to(theirs) for path in theirs.rglob("uncertainty.csv"))
    assert files or tensors or tables or list(theirs.rglob("*.png"))
    for name in tables:
        for row, expected in zip(table(ours / name), table(theirs / name), strict=True):
            for column in ("mi_mean", "mean_pairwise_distance", "epistemic_variance", "ssim", "multistep_mean"):
                assert float(row[column]) == pytest.approx(float(expected[column]), rel=1e-4)
    for name in files:
        with np.load(ours / name) as found, np.load(theirs / name) as expected:
            for key in expected:
                near(torch.from_numpy(found[key]), torch.from_numpy(expected[key]))
    for name in tensors:
        found, expected = load_file(ours / name), load_file(theirs / name)
        for key in expected:
            near(found[key], expected[key])


def near(found, expected):
    size = float(expected.abs().max()) if expected.numel() else 0.0
    loose = {"atol": 1.0, "rtol": 0.0} if expected.dtype == torch.uint8 else {"atol": 1e-4 * size, "rtol": 1e-3}
    torch.testing.assert_close(found, expected, **loose)
