"""What is kept during a training, how it is chosen later, and that every kept file resumes exactly."""

import shutil
from pathlib import Path

import pytest
import torch

from ldm.checkpoint import load_checkpoint, load_state_dict, save_checkpoint
from ldm.commands.export import Export
from ldm.settings import Training
from ldm.training.checkpoints import KeepCheckpoints, link
from ldm.training.runs import RunDirectory, find_run
from ldm.training.session import train
from tests.training.runs import assert_same_end, losses, resume, run_training


def names(run):
    return sorted(path.name for path in (run / "checkpoints").iterdir())


@pytest.mark.slow
def test_epochs_are_kept_by_name_and_chosen_again(config, tmp_path):
    run = run_training(config, tmp_path, "model.params.monitor=null", name="run", every_n_epochs=1, max_steps=18)
    assert names(run) == ["epoch=000000.ckpt", "epoch=000001.ckpt", "epoch=000002.ckpt", "last.ckpt"]
    directory = RunDirectory(run)
    assert [load_checkpoint(directory.checkpoint(epoch))["global_step"] for epoch in (0, 1, None)] == [5, 10, 18]
    with pytest.raises(ValueError, match=r"has epochs \[0, 1, 2\]"):
        directory.checkpoint(7)
    with pytest.raises(ValueError, match="is a checkpoint"):
        find_run(directory.checkpoint(1), 1)
    base = Export(str(run), str(tmp_path / "base.ckpt"), epoch=1).run()
    kept = load_checkpoint(directory.checkpoint(1))["state_dict"]
    weight = "model.diffusion_model.out.2.weight"
    assert torch.equal(load_state_dict(base)[weight], kept["model_ema.diffusion_modelout2weight"])
    before = losses(run)
    assert train(Training(resume=str(run), epoch=1, gpus="0,")) == run
    assert losses(run) == before, "the third epoch again"
    assert len(list(run.glob("csv*"))) == 2


@pytest.mark.parametrize("kept", ["epoch=000000-step=00000003.ckpt", "epoch=000001-step=00000006.ckpt", "best"])
def test_every_kept_file_resumes_exactly(tmp_path, whole, kept):
    """Saved in mid-epoch, and after the validation at the end of the first epoch."""
    whole = Path(shutil.copytree(whole, tmp_path / whole.name))
    best = [name for name in names(whole) if name.startswith("best")]
    assert best == ["best-epoch=000000-step=00000005.ckpt"]
    before, file = losses(whole), whole / "checkpoints" / (best[0] if kept == "best" else kept)
    last = load_checkpoint(whole / "checkpoints" / "last.ckpt")["state_dict"]
    resume(file)
    (whole / "csv" / "metrics.csv").unlink()
    start = load_checkpoint(file)["global_step"]
    assert losses(whole) == {step: loss for step, loss in before.items() if step >= start}
    after = load_checkpoint(whole / "checkpoints" / "last.ckpt")["state_dict"]
    assert all(torch.equal(value, after[name]) for name, value in last.items())


def test_the_best_needs_its_metric(config, tmp_path, recwarn):
    run = run_training(config, tmp_path, "model.params.monitor=val/loss", check_val_every_n_epoch=50)
    assert names(run) == ["last.ckpt"]
    assert not [str(warning.message) for warning in recwarn if "monitor" in str(warning.message)]


class Evaluation:
    """The parts of a Trainer that `on_validation_end` looks at."""

    sanity_checking = validating = False
    is_global_zero, world_size = True, 1

    class state:
        fn = "fit"

    class strategy:
        broadcast = staticmethod(lambda value: value)

    def __init__(self, folder):
        self.folder, self.global_step, self.current_epoch = folder, 0, 0
        self.lightning_module, self.callback_metrics = torch.nn.Linear(1, 1), {}

    def save_checkpoint(self, path, weights_only):
        (self.folder / "new").write_text(str(self.global_step))
        (self.folder / "new").replace(path)


@pytest.mark.parametrize("mode", ["min", "max"])
def test_the_best_are_those_of_a_sorted_list(tmp_path, mode):
    values = [3.0, 1.0, float("nan"), 2.0, 5.0, 4.0, 0.5]
    trainer, keeper = Evaluation(tmp_path), KeepCheckpoints(tmp_path, monitor="m", mode=mode, save_top_k=2)
    for step, value in enumerate(values, 1):
        trainer.global_step, trainer.callback_metrics = step, {"m": torch.tensor(value)}
        keeper.on_validation_end(trainer, None)
    finite = [(value, step) for step, value in enumerate(values, 1) if value == value]
    expected = sorted(finite, reverse=mode == "max")[:2]
    kept = sorted(int(path.read_text()) for path in tmp_path.glob("best*"))
    assert kept == sorted(step for _, step in expected)


def test_links_and_copies_survive_the_next_save(tmp_path, monkeypatch):
    last = tmp_path / "last.ckpt"
    last.write_text("one")
    link(last, tmp_path / "a")
    monkeypatch.setattr("os.link", lambda *_: (_ for _ in ()).throw(OSError("no links here")))
    link(last, tmp_path / "b")
    other = tmp_path / "other"
    other.write_text("two")
    other.replace(last)
    assert [(tmp_path / name).read_text() for name in ("a", "b")] == ["one", "one"]


def test_options_of_checkpoints(tmp_path):
    given = {"every_n_train_steps": 5, "save_top_k": -1, "verbose": True, "filename": "{epoch:06}"}
    keeper = KeepCheckpoints.from_options(tmp_path, given, "val/loss")
    assert (keeper.every_n_steps, keeper.every_n_epochs, keeper.monitor) == (5, 0, None)
    keeper = KeepCheckpoints.from_options(tmp_path, given, "val/loss", every_n_epochs=2)
    assert (keeper.every_n_steps, keeper.every_n_epochs) == (0, 2)
    with pytest.raises(ValueError, match="unknown keys"):
        KeepCheckpoints.from_options(tmp_path, {"every": 5}, None)
    with pytest.raises(ValueError, match="min or max"):
        KeepCheckpoints(tmp_path, mode="low")


@pytest.mark.parametrize(
    "options",
    [
        {"precision": "bf16-mixed"},
        {"gradient_clip_val": 1},
        pytest.param({"accumulate_grad_batches": 2, "precision": "bf16-mixed"}, marks=pytest.mark.slow),
    ],
    ids=["bf16", "clip", "accumulate-bf16"],
)
def test_trainer_options_run_and_resume_exactly(config, tmp_path, options):
    whole = run_training(config, tmp_path, name="whole", max_steps=4, **options)
    part = run_training(config, tmp_path, name="part", max_steps=2, **options)
    resume(part, max_steps=4)
    assert losses(part) == losses(whole)
    assert_same_end(part, whole)


def test_clipping_changes_the_step(config, tmp_path):
    """A tiny bound on the gradient leaves Adam's epsilon in charge: the first step is smaller."""
    free, clipped = (
        run_training(config, tmp_path, name=name, max_steps=1, gradient_clip_val=value)
        for name, value in (("free", 1e9), ("clipped", 1e-9))
    )
    name = "model.diffusion_model.out.2.weight"
    moved = [
        load_checkpoint(run / "checkpoints" / "last.ckpt")["state_dict"][name].abs().max() for run in (free, clipped)
    ]
    assert moved[1] < 0.2 * moved[0], "out.2 starts at zero"


def _spoil(content, kind):
    """Take something out of a checkpoint, or put something else into it."""
    name = next(reversed(content["state_dict"]))
    if kind in content:
        del content[kind]
    elif kind == "missing":
        del content["state_dict"][name]
    elif kind == "unknown":
        content["state_dict"]["extra"] = torch.zeros(2)
    elif kind == "shape":
        content["state_dict"][name] = torch.zeros(3, 3, 3)
    elif kind == "moments":
        content["optimizer_states"][0]["param_groups"][0]["params"] = [0]
    elif kind == "junk":
        content["loops"] = {"fit_loop": 5}


@pytest.mark.slow
@pytest.mark.parametrize(
    "kind", ["optimizer_states", "loops", "global_step", "missing", "unknown", "shape", "moments", "junk"]
)
def test_a_checkpoint_that_no_training_can_go_on_from_is_named(kind, whole, tmp_path):
    run = tmp_path / whole.name
    shutil.copytree(whole, run)
    last = run / "checkpoints" / "last.ckpt"
    content = load_checkpoint(last)
    _spoil(content, kind)
    last.unlink()
    save_checkpoint(content, last)
    with pytest.raises(ValueError, match=r"last\.ckpt (does not fit|holds no whole) (the )?training") as told:
        resume(run, max_steps=9)
    assert "\n" not in str(told.value) and len(str(told.value)) < 800
