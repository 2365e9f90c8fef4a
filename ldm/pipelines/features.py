"""A loaded model as an extractor of features: its backbone, its states of a data set, noise levels by any name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ldm.diffusion.noise import keyed_normal
from ldm.diffusion.schedule import EDMSchedule, Schedule
from ldm.diffusion.times import edm_times
from ldm.evaluation.taps import Backbone, Reading, resolve_taps
from ldm.models.diffusion.ddpm import LatentDiffusion
from ldm.modules.choices import Choices
from ldm.modules.encoders.text import TextEmbedder
from ldm.pipelines.building import build_model
from ldm.pipelines.loading import load_model
from ldm.pipelines.model import ModelPipeline
from ldm.settings import FeatureReading, Precision, Speed

# Steps of the EDM grid that published noise indices count on, from the clean end.
INDEX_STEPS = 18


class DataStates:
    """Clean states z of a data set's images, encoded by the model's first stage, and their classes.

    Args:
        data: `image` [H, W, C] in [-1, 1] by position, and `labels`.
        positions: which of its images, in this order; all where None.
        copy: number of the augmented copy, which the data set's transform takes for its epoch.
        name: what the data are, for records.
    """

    def __init__(
        self, model: LatentDiffusion, data: Any, positions: Sequence[int] | None = None, copy: int = 0, name: Any = None
    ):
        self.model, self.data, self.copy, self.name = model, data, copy, name
        self.positions = list(range(len(data)) if positions is None else positions)
        self.labels = torch.as_tensor(data.labels)[self.positions]

    def __len__(self) -> int:
        return len(self.positions)

    def read(self, start: int, stop: int) -> Tensor:
        """States [B, C, H, W] start .. stop - 1, on the model's device."""
        return self.at(range(start, min(stop, len(self))), self.copy)

    @torch.no_grad()
    def at(self, rows: Sequence[int], epoch: int | None = None) -> Tensor:
        """States [B, C, H, W] of some rows, augmented as in an epoch (else as this copy is)."""
        if hasattr(self.data, "set_epoch"):
            self.data.set_epoch(self.copy if epoch is None else epoch)
        items = [self.data[self.positions[row]] for row in rows]
        images = torch.stack([item["image"] for item in items]).permute(0, 3, 1, 2).contiguous()
        images = images.to(self.model.device)
        encoded = items[0].get("encoded", False)
        return self.model.get_first_stage_encoding(images if encoded else self.model.encode_first_stage(images))

    def describe(self) -> dict[str, Any]:
        positions = torch.tensor(self.positions)
        checksum = int((positions * torch.arange(1, len(positions) + 1)).sum())
        return {"data": self.name, "count": len(self), "copy": self.copy, "positions": checksum}


def make_backbone(model: LatentDiffusion, label: int | None = None) -> Backbone:
    """Make the backbone of a model; a conditional one sees `label`, or else its null class, or the empty text.

    Raises:
        ValueError: if the model needs a label and neither is there, or it joins pictures to its states.
    """
    embedder = model.cond_stage_model
    if model.network.joins_picture and model.network.needs_choices:
        raise ValueError(
            "features are read of images alone, and this model joins a picture to every state: in Python give it one "
            "(Pipeline.with_choices), and its label"
        )
    if isinstance(embedder, TextEmbedder) and model.choices is None and label is None:
        empty = Choices(("",), tokens=embedder.null_tokens[None])
        model, label = model.with_choices(empty), 0
    if model.n_classes is not None and label is None:
        if model.null_class is None:
            raise ValueError("this model is conditional and has no null class: choose the class that features see")
        label = model.null_class
    return Backbone(model.network.eval(), model.schedule, model.target, label)


def edm_index_times(schedule: Schedule, indices: Sequence[int]) -> list[float]:
    """Times at which sigma / alpha is that of EDM's grid of 18 steps, counted from its clean end.

    Raises:
        ValueError: for an index outside of 1 .. 18.
    """
    if not all(1 <= index <= INDEX_STEPS for index in indices):
        raise ValueError(f"--index counts 1..{INDEX_STEPS} from the clean end, got {list(indices)}")
    sigmas = edm_times(EDMSchedule(), INDEX_STEPS).flip(0)
    return [float(schedule.time_at(sigmas[index])) for index in indices]


def read_times(model: LatentDiffusion, given: Mapping[str, Any]) -> tuple[float, ...] | None:
    """Return times u of the schedule from `t`, `logsnr` or `index`; None where none of them is given.

    Raises:
        ValueError: for a level outside of the schedule.
    """
    schedule = model.schedule
    if given.get("t"):
        times = [float(t) for t in given["t"]]
    elif given.get("logsnr"):
        ratios = torch.tensor([-float(value) / 2 for value in given["logsnr"]], dtype=torch.float64).exp()
        times = schedule.time_at(ratios).tolist()
    elif given.get("index"):
        times = edm_index_times(schedule, given["index"])
    else:
        return None
    wrong = [u for u in times if not 0 < u <= schedule.end]
    if wrong:
        raise ValueError(f"noise levels lie above 0 and up to {schedule.end:g} on this schedule, got {wrong}")
    return tuple(times)


def log_snr(model: LatentDiffusion, u: float) -> float:
    """2 ln(alpha / sigma) at a time."""
    return -2 * float(model.schedule.ratio(u).log())


def make_reading(
    pipeline: ModelPipeline, backbone: Backbone, given: FeatureReading, search: bool = False, seed: int = 0
) -> Reading:
    """Make a reading from what is given, else from the config's section `probe`.

    Args:
        search: take the section's `grid` of levels and all layers, in place of its one level `at` and `layer`.

    Raises:
        ValueError: if neither names a noise level or a layer.
    """
    section = pipeline.config.get("probe") or {}
    levels = read_times(pipeline.model, vars(given))
    if levels is None:
        levels = read_times(pipeline.model, section.get("grid" if search else "at", {}))
    layers = given.layers
    if not layers and search:
        layers = ("all",)
    elif not layers and "layer" in section:
        layers = (section["layer"],)
    if levels is None or not layers:
        raise ValueError(
            "which noise level and layer? Give --t, --logsnr or --index and --layers, or a section `probe` in the "
            "config (grid: {t: [1, 11]}, at: {t: [11]}, layer: out_6); --grid searches all layers"
        )
    taps = resolve_taps(backbone.network, list(layers))
    pool = None if given.pool == "none" else int(given.pool)
    return Reading(levels, taps, pool, tuple(range(given.draws)), seed)


def reinitialise(pipeline: ModelPipeline, seed: int) -> None:
    """Give a loaded model's network fresh weights, torch's own initialisation from `seed`; its first stage stays."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        fresh = build_model(pipeline.config)
    pipeline.model.model.load_state_dict(fresh.model.state_dict())


class BackboneFeatures(nn.Module):
    """Features of a trained model as a network of images: `--features ldm.pipelines.features.BackboneFeatures`.

    All images get the same noises, so that the features are a function of the image alone.

    Args:
        run: run directory or checkpoint of one; or base and ckpt.
        t, logsnr, index: one noise level, see `read_times`; else the config's section `probe`.
        layer: a tap.
        draws: noises that features are averaged over; seed: of them.
    """

    def __init__(
        self,
        run: str | None = None,
        base: str | None = None,
        ckpt: str | None = None,
        t: float | None = None,
        logsnr: float | None = None,
        index: int | None = None,
        layer: str | None = None,
        pool: str | int = 1,
        draws: int = 1,
        seed: int = 0,
        precision: Precision = "float32",
        device: str = "cpu",
    ):
        super().__init__()
        if (run is None) == (base is None):
            raise ValueError("BackboneFeatures needs run=DIRECTORY, or base=CONFIG ckpt=FILE")
        given = FeatureReading(
            t=None if t is None else (t,),
            logsnr=None if logsnr is None else (logsnr,),
            index=None if index is None else (index,),
            layers=None if layer is None else (layer,),
            pool=str(pool),
            draws=draws,
        )
        speed = Speed(chunk=1, precision=precision)
        pipeline = load_model(run, base=base, ckpt=ckpt, speed=speed, device=device)
        self.model = pipeline.model
        self.backbone = make_backbone(pipeline.model)
        self.reading = make_reading(pipeline, self.backbone, given, seed=seed)
        self.source = {"checkpoint_sha256": pipeline.weights_sha256, **self.reading.describe()}

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        """Features [B, D] of images [B, C, H, W] in [-1, 1]."""
        images = images.to(self.model.device)
        x0 = self.model.get_first_stage_encoding(self.model.encode_first_stage(images))
        (u,) = self.reading.times
        (tap,) = self.reading.taps
        total = x0.new_zeros(())
        for draw in self.reading.draws:
            eps = keyed_normal([("trunk features", self.reading.seed, draw)], x0.shape[1:]).to(x0)
            read = self.backbone.read(self.reading.taps, x0, eps.expand_as(x0), u, self.reading.pool)
            total = total + read[tap]
        return total / len(self.reading.draws)
