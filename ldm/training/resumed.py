"""A run that goes on: what it may change, which is nothing that its checkpoint keeps."""

from __future__ import annotations

import math
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from ldm.training.checkpoint_io import NOT_FITTING
from ldm.training.runs import RunDirectory

# Parts of a config that the checkpoint brings along: the optimiser with its rates and decay, averages, noise levels.
RESTORED = {
    "model.params.weight_decay": "the optimiser's state",
    "model.params.use_ema": "the averages",
    "model.params.ema": "the averages",
    "model.params.timesteps": "the noise levels",
    "model.params.beta_schedule": "the noise levels",
    "model.params.linear_start": "the noise levels",
    "model.params.linear_end": "the noise levels",
    "model.params.cosine_s": "the noise levels",
    "model.params.given_betas": "the noise levels",
    "model.params.v_posterior": "the noise levels",
    "model.params.scale_by_std": "the scale of the latents",
    "model.params.learn_logvar": "the weights",
    "model.params.logvar_init": "the weights",
    "model.params.heads": "the member's heads",
    "model.params.pretrained_path": "the member's base checkpoint",
}
NEW_RUN = "leave it out, or start a new run from the checkpoint (model.params.ckpt_path={checkpoint})"
# Lightning's module that fills a training from a checkpoint.
RESTORER = "checkpoint_connector.py"
# How much two rates may differ that were reckoned in another order.
ROUNDING = 1e-9


@contextmanager
def restoring(checkpoint: Path | None) -> Iterator[None]:
    """Name the checkpoint in what is raised where its content does not fit the training that goes on from it.

    Raises:
        ValueError: with the file, the words of the library that met it, and the remedy.
    """
    try:
        yield
    except Exception as error:
        frames = traceback.extract_tb(error.__traceback__)
        met = any(Path(frame.filename).name == RESTORER for frame in frames)
        if checkpoint is None or not met or "site-packages" not in frames[-1].filename:
            raise
        words = " ".join(str(error).split())[:200]
        raise ValueError(NOT_FITTING.format(path=checkpoint, words=words)) from error


def describe_steps(images: int, rate: float) -> dict[str, Any]:
    """Return what a run keeps in its config of an optimiser step: its images, on all devices, and its rate."""
    return {"images_per_step": images, "learning_rate": rate}


def check_resumed(run: RunDirectory, saved: DictConfig, config: DictConfig, steps: Mapping[str, Any]) -> None:
    """Make sure that a resumed run is trained as it was: what is given would not act, or change what a step is.

    Args:
        run: the run that goes on.
        saved: its config.
        config: what it would go on with.
        steps: from `describe_steps`; where the run kept none, the keys of its config are compared.

    Raises:
        ValueError: naming the key, both values, and why it cannot change.
    """
    remedy = NEW_RUN.format(checkpoint=run.checkpoints / "last.ckpt")
    for key, holder in RESTORED.items():
        before, now = (OmegaConf.select(one, key) for one in (saved, config))
        if before != now:
            raise ValueError(
                f"{key} is {before} in {run.path}, and {holder} in its checkpoint keep it, not {now}: {remedy}"
            )
    kept = saved.get("run") or {}
    images, rate = kept.get("images_per_step"), kept.get("learning_rate")
    if images is not None and images != steps["images_per_step"]:
        raise ValueError(
            f"the run took {images} images in a step, and would take {steps['images_per_step']} now (devices times "
            "data.params.batch_size times accumulate_grad_batches), which is another training: set "
            f"data.params.batch_size so that it is {images} again, or start a new run"
        )
    if rate is not None and not math.isclose(rate, steps["learning_rate"], rel_tol=ROUNDING):
        raise ValueError(
            f"the learning rate of the run is {rate:g}, and the optimiser's state in its checkpoint keeps it, not "
            f"{steps['learning_rate']:g}: {remedy}"
        )
    if images is not None:
        return
    for key in ("model.base_learning_rate", "model.learning_rate", "data.params.batch_size"):
        before, now = (OmegaConf.select(one, key) for one in (saved, config))
        if before != now:
            raise ValueError(f"{key} is {before} in {run.path}, not {now}, and a resumed run keeps it: {remedy}")
