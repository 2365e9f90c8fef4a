"""A posterior fitted in parts that are kept: a stopped fit continues, and several processes share one."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf
from torch.utils.data import Dataset

from ldm.checkpoint import load_state_dict, save_tensors
from ldm.jobs import WorkList, shard_from_environment, split_range
from ldm.laplace import LastLayerLaplace, mean_variance
from ldm.pipelines.laplace import new_posterior, observations
from ldm.pipelines.model import ModelPipeline

# Images in a part: what a process takes at once, and what is lost when it is stopped.
IMAGES_A_PART = 256
# A part holds the last layer's matrices (66 MB at Stable Diffusion's, 330 MB with the sandwich's).
MOST_PARTS = 64
# What a part gathers, counted up with it: parts of an earlier version are not joined with these.
SUMS = 2


@dataclass(frozen=True)
class LaplacePlan:
    """Which posterior of a model's last layer is fitted, and to which rows of each image.

    Attributes:
        curvature, layer, rank, temperature, visits: see `ldm.laplace.LaplaceState`.
        also: further curvatures that the fit gathers for.
        published_ef: double the empirical Fisher, as BayesDiff does.
        bins: noise levels with a sigma of their own, equally likely in training.
        draws: rows (x_t, t, condition) of each image, drawn as in training; see `rows`.
        seed: of the draws.
        batch_size: images in one pass, `draws` rows each.
        patches: rows whose patches are held at once.
    """

    curvature: str = "full"
    also: tuple[str, ...] = ()
    layer: str | None = None
    rank: int = 128
    published_ef: bool = False
    temperature: float = 1.0
    visits: float = 1.0
    bins: int = 1
    draws: int = 4
    seed: int = 42
    batch_size: int = 16
    patches: int = 4

    @property
    def rows(self) -> int:
        """Rows of each image: `draws`, but two at least for the sandwich, which parts images' spread from draws'."""
        return max(self.draws, 2) if "sandwich" in (self.curvature, *self.also) else self.draws

    def make_posterior(self, pipeline: ModelPipeline) -> LastLayerLaplace:
        """Return the posterior that the plan describes, unfitted."""
        return new_posterior(
            pipeline,
            layer=self.layer,
            curvature=self.curvature,
            rank=self.rank,
            published_ef=self.published_ef,
            temperature=self.temperature,
            visits=self.visits,
            time_edges=equal_time_edges(pipeline, self.bins),
            chunk=self.patches,
        )

    def fit(self, pipeline: ModelPipeline, data: Dataset, positions: Sequence[int]) -> LastLayerLaplace:
        """Return the posterior fitted to some images of a data set, by position."""
        rows = observations(
            pipeline.model,
            data,
            positions,
            draws=self.rows,
            seed=self.seed,
            batch_size=self.batch_size,
        )
        return self.make_posterior(pipeline).fit(rows, draws=self.rows, also=self.also)


def equal_time_edges(pipeline: ModelPipeline, bins: int) -> list[float]:
    """Return the network's times [bins - 1] that divide training into equally likely noise levels.

    Raises:
        ValueError: if there are fewer levels than bins.
    """
    if bins == 1:
        return []
    model = pipeline.model
    if model.num_timesteps is not None and bins > model.num_timesteps:
        raise ValueError(f"--bins {bins}: the model was trained at {model.num_timesteps} noise levels, take fewer bins")
    shares = torch.arange(1, bins, dtype=torch.float64) / bins
    drawn = shares if model.num_timesteps is None else (shares * model.num_timesteps).long()
    t = model.drawn_times(drawn).to(pipeline.device)
    x = torch.zeros(len(shares), *model.latent_shape, device=pipeline.device)
    return sorted(model.network_input(x, t)[1].double().tolist())


@dataclass(frozen=True)
class PartsOfFit:
    """A fit in parts of some images each; every part is a file in a folder named by all that its sums depend on.

    Attributes:
        positions: the images of the whole fit, by position in the data set.
        data_size: images of the data set, which those seen stand for.
        work: the list of parts, shared with other processes.
    """

    pipeline: ModelPipeline
    plan: LaplacePlan
    data: Dataset
    positions: Sequence[int]
    data_size: int
    work: WorkList

    @classmethod
    def in_folder(
        cls,
        stem: Path,
        pipeline: ModelPipeline,
        plan: LaplacePlan,
        data: Dataset,
        config: Any,
        positions: Sequence[int],
    ) -> PartsOfFit:
        """Return the parts below `{stem}_{digest}`; `config` is what the data set was built from."""
        size = len(data)  # type: ignore[arg-type]
        weights = {
            key: value for key, value in pipeline.describe().items() if key.startswith(("checkpoint", "averaged"))
        }
        given: Any = pipeline.config
        whole: Any = OmegaConf.to_container(OmegaConf.create(given), resolve=True)
        settings = {
            "sums": SUMS,
            "curvature": plan.curvature,
            "also": list(plan.also),
            "draws": plan.rows,
            "bins": plan.bins,
            "layer": plan.layer,
            "seed": plan.seed,
            "model": weights,
            "config": whole["model"],
            "data": config,
            "images": len(positions),
            "of": size,
        }
        work = WorkList.apart(stem, settings, shard_from_environment())
        return cls(pipeline, plan, data, positions, size, work)

    @property
    def spans(self) -> dict[str, range]:
        """The parts by their keys, as ranges of `positions`."""
        return split_range(len(self.positions), max(IMAGES_A_PART, math.ceil(len(self.positions) / MOST_PARTS)))

    @property
    def done(self) -> int:
        """Images that this process need not fit any more."""
        pending = self.work.pending(self.spans)
        return sum(len(span) for key, span in self.spans.items() if key not in pending)

    def fit(self, progress: Callable[[int], Any]) -> LastLayerLaplace | None:
        """Fit what this process's share lacks, then join all parts.

        Args:
            progress: called with the images of each part that was fitted.

        Returns:
            The posterior, which stands for the whole data set; None while parts of other processes are missing.
        """
        for key in self.work.pending(self.spans):
            span = self.spans[key]
            part = self.plan.fit(self.pipeline, self.data, self.positions[span.start : span.stop])
            save_tensors(part.state_dict(), self._file(key), {}, overwrite=True)
            self.work.save(key, {"images": len(span)})
            progress(len(span))
        if not self.work.complete(self.spans):
            return None
        first, *others = [self._read(key) for key in self.spans]
        for other in others:
            first = first.merge(other)
        first.data_size = self.data_size
        return first

    def discard_others(self) -> list[Path]:
        """Remove the parts of fits with other settings beside these, and return their folders."""
        own = self.work.folder
        folders = sorted(own.parent.glob("parts*"))
        others = [folder for folder in folders if folder != own and (folder / "settings.json").exists()]
        for folder in others:
            shutil.rmtree(folder, ignore_errors=True)
        return others

    def _file(self, key: str) -> Path:
        return self.work.folder / f"{key}.safetensors"

    def _read(self, key: str) -> LastLayerLaplace:
        part = self.plan.make_posterior(self.pipeline)
        part.load_state_dict(load_state_dict(self._file(key)))
        part.visits = self.plan.visits
        return part


def describe_fit(laplace: LastLayerLaplace) -> dict[str, Any]:
    """Return what a fit and its tuning found, for the record and the screen."""
    found: dict[str, Any] = {
        "curvature": laplace.curvature,
        "layer": laplace.name,
        "entries": laplace.layer.width,
        "channels": laplace.layer.outputs,
        "images": int(laplace.fitted().images),
        "draws": laplace.repeats,
        "data_size": laplace.data_size,
        "visits": float(f"{laplace.visits:.6g}"),
        "sigma_noise": [round(each, 6) for each in laplace.sigma_noise.tolist()],
        "prior_precision": float(f"{laplace.prior_precision:.6g}"),
        "temperature": float(f"{laplace.temperature:.6g}"),
    }
    if laplace.curvature != "isotropic":
        spectrum = laplace.spectrum()
        found["log_marginal_likelihood"] = laplace.log_marginal_likelihood()
        found["parameters_determined"] = float((spectrum / (spectrum + laplace.prior_precision)).sum())
    if laplace.fitted().gram is not None:
        found["mean_variance"] = float(f"{mean_variance(laplace.state):.6g}")
    return found
