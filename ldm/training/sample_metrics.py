"""Metrics of samples during a training: how good its images are, beside what real images score in the same number."""

from __future__ import annotations

import csv
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Callback
from torch import Tensor

from ldm.diffusion.noise import ImageNoise
from ldm.evaluation.extraction import FeatureSet
from ldm.evaluation.extractors import make_extractor
from ldm.evaluation.features import Extractor
from ldm.evaluation.metrics import METRICS, Options, Reference, measure, obstacle
from ldm.images import to_uint8
from ldm.models.diffusion.ddpm import LatentDiffusion
from ldm.models.diffusion.training import read_images
from ldm.training.joint import JointMembers
from ldm.util import atomic_write, generator, instantiate_from_config

log = logging.getLogger(__name__)

METRICS_TABLE = "sample_metrics.csv"
RECOGNISED = "recognised"
# What stands for the step of real training images in the table.
REAL = "real"
# Intervals take resamples, which a training does not wait for: `decu evaluate metrics` has them.
_PLAIN = {"resamples": 0, "fid_resamples": 0, "kid_subsets": 0, "splits": 1}


class SampleMetrics(Callback):
    """Measure samples in validations, with averaged weights where the model keeps them.

    Numbers are logged as `sample/fid`, `sample/recognised`, ... (a name that `monitor` takes for the best checkpoint)
    and written to `sample_metrics.csv`. Image i has the noise of image i and class i mod K in every measurement, so
    that two of them differ by the weights alone. What as many real training images score is measured once: a distance
    of n images is not 0 for images of the same law, and how far it is from 0 depends on n.

    Args:
        n: samples of a measurement.
        every_n_steps: a validation measures if so many steps have passed since the last that did; 0: each of them.
        metrics: names of `ldm.evaluation.metrics.METRICS`; and "recognised", the share of samples that the logits of
            the features take for their class.
        features: inception, clip, classifier, or a dotted target; see `make_extractor`.
        weights: file of the features.
        params: keywords of the features, where they take any.
        steps, scale: of the sampler DDIM and of guidance; the model's `guidance_scale` where None.
        seed: of the noise.
        split: whose images the samples are compared with.
        reference: number of these; all where None.
        batch_size: images in one pass.

    Raises:
        ValueError: for an unknown metric, or numbers below their least.
    """

    def __init__(
        self,
        n: int = 1000,
        every_n_steps: int = 0,
        metrics: Sequence[str] = ("fid", "kid"),
        features: str = "inception",
        weights: str | None = None,
        params: Mapping[str, Any] | None = None,
        steps: int = 50,
        scale: float | None = None,
        seed: int = 0,
        split: str = "validation",
        reference: int | None = None,
        batch_size: int = 100,
    ):
        unknown = [name for name in metrics if name not in (*METRICS, RECOGNISED)]
        if unknown:
            raise ValueError(f"sample_metrics knows {', '.join((*METRICS, RECOGNISED))}; got {unknown}")
        if min(n, batch_size, steps) < 1 or n < 2:
            raise ValueError(f"sample_metrics needs n of at least 2, steps and batch_size of 1; got {n}")
        self.n, self.every_n_steps, self.metrics = n, every_n_steps, tuple(metrics)
        self.features, self.weights, self.params = features, weights, params
        self.steps, self.scale, self.seed = steps, scale, seed
        self.split, self.count, self.batch_size = split, reference, batch_size
        self.measured_step = -1
        self.extractor: Extractor | None = None
        self.reference: Reference | None = None

    def state_dict(self) -> dict[str, Any]:
        return {"measured_step": self.measured_step}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.measured_step = int(state_dict["measured_step"])

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Measure the real images, so that what does not fit is refused before the first step.

        Raises:
            ValueError: if the model has no samples by class, or the config lacks a split.
        """
        model = choose_model(pl_module)
        # Grey images are repeated for networks of colours.
        self.extractor = make_extractor(self.features, self.weights, self.params).to(pl_module.device).eval()
        own = self._of_split(trainer, self.split, self.count)
        self.reference = Reference(own)
        real = self._of_split(trainer, "train", self.n)
        for name in self.metrics:
            reason = None if name == RECOGNISED else obstacle(name, own, real)
            if reason is not None:
                raise ValueError(f"sample_metrics cannot measure {name}: {reason}")
        if RECOGNISED in self.metrics and (own.logits is None or own.logits.shape[1] != model.n_classes):
            raise ValueError(
                f"sample_metrics: {RECOGNISED} needs features with a logit for each of the {model.n_classes} classes "
                "(features: classifier)"
            )
        values = self._measure(real, None)
        shown = ", ".join(f"{name} {value:.4g}" for name, value in values.items())
        if values:
            log.info("%d real training images against %d of %s: %s", len(real), len(own), self.split, shown)
        if trainer.is_global_zero:
            self._write(trainer, REAL, len(real), values)

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Measure, if it is time to, and log the numbers with those of the validation."""
        step = trainer.global_step
        waited = self.measured_step < 0 or step - self.measured_step >= max(1, self.every_n_steps)
        if trainer.sanity_checking or trainer.state.fn != "fit" or not waited:
            return
        self.measured_step = step
        model = choose_model(pl_module)
        samples, labels = self.draw_features(model, trainer)
        values = self._measure(samples, labels)
        pl_module.log_dict(
            {f"sample/{name}": value for name, value in values.items()}, on_step=False, on_epoch=True, sync_dist=False
        )
        shown = ", ".join(f"{name} {value:.4g}" for name, value in values.items())
        log.info("step %d: %s of %d samples", step, shown, self.n)
        if trainer.is_global_zero:
            self._write(trainer, str(step), self.n, values)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        path = Path(trainer.default_root_dir) / METRICS_TABLE
        if trainer.is_global_zero and path.exists():
            plot_curves(path)

    @torch.no_grad()
    def draw_features(self, model: LatentDiffusion, trainer: pl.Trainer) -> tuple[FeatureSet, Tensor | None]:
        """Sample images 0 .. n - 1, a share of them in each process; return their features and classes [n]."""
        world, rank = trainer.world_size, trainer.global_rank
        own = range(rank, -(-self.n // world) * world, world)  # as many in each process
        parts: list[dict[str, Tensor]] = []
        with model.ema_scope("metrics"):
            for start in range(0, len(own), self.batch_size):
                parts.append(self._activations(self.sample(model, own[start : start + self.batch_size])))
        joined = {kind: torch.cat([part[kind] for part in parts]) for kind in parts[0]}
        if world > 1:  # [world, images, D], every world-th image in each
            gathered = {kind: trainer.strategy.all_gather(value) for kind, value in joined.items()}
            joined = {kind: value.transpose(0, 1).flatten(0, 1) for kind, value in gathered.items()}
        found = FeatureSet(**{kind: value[: self.n].cpu().numpy() for kind, value in joined.items()})
        return found, choose_labels(model, range(self.n))

    def sample(self, model: LatentDiffusion, images: Sequence[int]) -> Tensor:
        """Return the images [B, C, H, W] in [-1, 1] of these numbers."""
        labels = choose_labels(model, images)
        scale = 1.0
        if labels is not None:
            scale = model.guidance_scale if self.scale is None else self.scale
        noise = ImageNoise(self.seed, tuple(images), device=model.device)
        steps = self.steps if model.num_timesteps is None else min(self.steps, model.num_timesteps)
        own = None if labels is None else labels.to(model.device)
        return model.decode_first_stage(model.sample(own, noise, model.sampling_times(steps), scale))

    def _activations(self, images: Tensor) -> dict[str, Tensor]:
        """Return the features of images [B, C, H, W] in [-1, 1] by kind."""
        assert self.extractor is not None, "on_fit_start makes it"
        pixels = torch.from_numpy(to_uint8(images.float().clamp(-1, 1))).permute(0, 3, 1, 2)
        found = self.extractor.activations(pixels.to(images.device))
        return {kind: value.float() for kind, value in found._asdict().items() if value is not None}

    @torch.no_grad()
    def _of_split(self, trainer: pl.Trainer, split: str, count: int | None) -> FeatureSet:
        """Return the features of a split's images as the config names them, or of some in a seeded order."""
        configs = getattr(getattr(trainer, "datamodule", None), "dataset_configs", {})
        if split not in configs:
            raise ValueError(f"sample_metrics compares with data.params.{split}, and the config has {sorted(configs)}")
        data = instantiate_from_config(configs[split])
        order = torch.randperm(len(data), generator=generator("sample metrics", split)).tolist()[:count]
        assert self.extractor is not None, "on_fit_start makes it"
        device = next(iter(self.extractor.state_dict().values())).device
        parts = []
        for start in range(0, len(order), self.batch_size):
            chosen = order[start : start + self.batch_size]
            images = torch.stack([torch.as_tensor(data[place]["image"]) for place in chosen])
            parts.append(self._activations(read_images(images).to(device)))
        return FeatureSet(**{kind: torch.cat([part[kind] for part in parts]).cpu().numpy() for kind in parts[0]})

    def _measure(self, samples: FeatureSet, labels: Tensor | None) -> dict[str, float]:
        """Return the metrics by name; of images without labels no recognition."""
        assert self.reference is not None, "on_fit_start makes it"
        names = [name for name in self.metrics if name != RECOGNISED]
        found = {row.metric: row.value for row in measure(names, self.reference, samples, Options(**_PLAIN))}
        if RECOGNISED in self.metrics and labels is not None and samples.logits is not None:
            guesses = torch.as_tensor(samples.logits).argmax(1)
            found[RECOGNISED] = float((guesses == labels.cpu()).float().mean())
        return found

    def _write(self, trainer: pl.Trainer, step: str, n: int, values: Mapping[str, float]) -> None:
        """Put rows of a measurement into the run's table, in place of those of the same step and metric."""
        path = Path(trainer.default_root_dir) / METRICS_TABLE
        rows: list[list[str]] = []
        if path.exists():
            with path.open(newline="", encoding="utf-8") as file:
                rows = [row for row in list(csv.reader(file))[1:] if row[0] != step or row[2] not in values]
        rows += [[step, str(n), name, f"{value:.8g}"] for name, value in values.items()]
        with atomic_write(path, overwrite=True) as partial, partial.open("w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows([["step", "n", "metric", "value"], *rows])


def choose_model(module: pl.LightningModule) -> LatentDiffusion:
    """Return the diffusion model of a training; of members together the first.

    Raises:
        ValueError: if there is none, or it is conditioned on more than classes.
    """
    model = module.members[0] if isinstance(module, JointMembers) else module
    if not isinstance(model, LatentDiffusion):
        raise ValueError(f"sample_metrics measures samples of a diffusion model, not of {type(model).__name__}")
    if model.reads_text or model.network.joins_picture:
        raise ValueError("sample_metrics samples by class: models of texts or pictures have no classes to sample")
    return model


def choose_labels(model: LatentDiffusion, images: Sequence[int]) -> Tensor | None:
    """Return the class of each image, the classes in turn; None for an unconditional model."""
    if not model.n_classes:
        return None
    return torch.tensor([image % model.n_classes for image in images])


def plot_curves(table: Path) -> Path:
    """Draw each metric of a run's table over the steps beside it, with what as many real images score as a line.

    `decu report RUN` shows both on a page.
    """
    from matplotlib.figure import Figure

    with table.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    names = list(dict.fromkeys(row["metric"] for row in rows if row["step"] != REAL))
    figure = Figure(figsize=(4 * max(1, len(names)), 3), layout="constrained")
    for place, name in enumerate(names):
        own = [row for row in rows if row["metric"] == name]
        axes = figure.add_subplot(1, len(names), place + 1, title=name, xlabel="step")
        measured = sorted((int(row["step"]), float(row["value"])) for row in own if row["step"] != REAL)
        axes.plot(*zip(*measured, strict=True), marker="o", label=f"{own[-1]['n']} samples")
        for row in own:
            if row["step"] == REAL:
                axes.axhline(float(row["value"]), linestyle="--", color="gray", label=f"{row['n']} real images")
        axes.legend()
    out = table.with_suffix(".png")
    with atomic_write(out, overwrite=True) as partial:
        figure.savefig(partial, format="png", dpi=100)
    return out
