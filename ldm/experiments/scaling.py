"""Choosing lambda of epsilon scaling for a loaded model: by norms step by step, or by a search over b."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from torch import Tensor
from tqdm import tqdm

from ldm.diffusion.epsilon_scaling import EpsilonScaling, noise_level, tabulated
from ldm.evaluation.exposure import state_distance
from ldm.evaluation.extraction import extract, open_features
from ldm.evaluation.extractors import make_extractor
from ldm.evaluation.metrics import Options, Reference, measure
from ldm.evaluation.scaling_choice import estimated_factors
from ldm.experiments.exposure import Chains, MomentsByName, compute_factors, load_split, measure_chains
from ldm.jobs import WorkList, split_range
from ldm.pipelines.images import SampledImages
from ldm.pipelines.model import ModelPipeline

Score = Callable[[float], float]


@dataclass(frozen=True)
class ScalingStudy:
    """What every candidate is measured on.

    Attributes:
        pipeline: the model; a candidate takes the place of its scaling.
        folder: where measurements are kept, each below parts/NAME, so that a study that was stopped continues.
        n: images of each measurement.
        batch_size: images in one pass.
        split: the data set of the config, for norms and states.
    """

    pipeline: ModelPipeline
    folder: Path
    n: int = 1000
    batch_size: int = 100
    split: str = "train"

    def measure(self, name: str, scaling: EpsilonScaling, training: bool) -> MomentsByName:
        """Measure the norms and states of a chain under `scaling`, and the norms in training if asked for."""
        data = load_split(self.pipeline.config, self.split)
        chains = Chains(self.pipeline, data, {"sampling": scaling}, training)
        settings = {**self.pipeline.describe(), "split": self.split, "epsilon_scaling": scaling.as_dict()}
        work = WorkList(self.folder / "parts" / name, settings)
        parts = split_range(self.n, self.batch_size)
        with tqdm(total=self.n, desc=name, unit="image") as bar:
            moments = measure_chains(chains, work, parts, bar.update)
        assert moments is not None, "one process measures everything"
        return moments


@dataclass(frozen=True)
class ScalingEstimate:
    """The scaling that was found, and a row for each step: -log SNR, and lambda of every round."""

    scaling: EpsilonScaling
    rows: list[dict[str, float]]


def estimate_scaling(
    study: ScalingStudy, rounds: int = 3, direction: Literal["full", "x0_only"] = "full"
) -> ScalingEstimate:
    """Find the fixed point of lambda = mean norm of eps in sampling over that in training, step by step.

    Args:
        rounds: how often the norms are measured, since early corrections change later norms.
    """
    schedule = study.pipeline.model.schedule
    times = study.pipeline.times
    scaling = EpsilonScaling(direction=direction)
    training = None
    levels = noise_level(schedule, times[:-1]).tolist()
    rows = [{"step": step, "minus_log_snr": float(level)} for step, level in enumerate(levels)]
    for number in range(rounds):
        moments = study.measure(f"round{number}", scaling, number == 0)
        training = moments.get("training", training)
        assert training is not None
        factors = estimated_factors(moments["sampling"], training)
        for row, factor in zip(rows, factors.tolist(), strict=True):
            row[f"lambda_{number}"] = factor
        scaling = tabulated(schedule, times, factors, direction)
    return ScalingEstimate(scaling, rows)


def frechet_score(study: ScalingStudy, base: EpsilonScaling, reference: str) -> Score:
    """Return b -> Frechet distance of samples to a reference, in the features that it was made with.

    Args:
        base: the scaling whose b is replaced.
        reference: a folder that `decu evaluate reference` wrote.
    """
    device = study.pipeline.device
    compared = Reference(open_features(reference))
    made = compared.features.settings["features"]
    extractor = make_extractor(made["extractor"], made.get("weights"), made.get("params"), made.get("channels", 3))
    extractor = extractor.to(device)
    options = Options(fid_resamples=0, device=device)

    def score(b: float) -> float:
        source = SampledImages(study.pipeline.with_scaling(replace(base, b=b)), study.n)
        folder = study.folder / "parts" / f"b{b:.6f}"
        with tqdm(total=study.n, desc=f"b = {b:g}", unit="image") as bar:
            size = {"batch_size": study.batch_size, "device": device, "progress": bar.update}
            samples = extract(source, extractor, folder, **size)
        assert samples is not None, "one process extracts everything"
        return measure(["fid"], compared, samples, options)[0].value

    return score


def norm_score(study: ScalingStudy, base: EpsilonScaling) -> Score:
    """Return b -> mean over steps of (corrected norm / norm in training - 1)^2."""
    seen: dict[str, Tensor] = {}
    schedule = study.pipeline.model.schedule

    def score(b: float) -> float:
        scaling = replace(base, b=b)
        moments = study.measure(f"b{b:.6f}", scaling, "training" not in seen)
        if "training" in moments:
            seen["training"] = moments["training"].mean
        corrected = moments["sampling"].mean / compute_factors(schedule, study.pipeline.times, scaling)
        return float((corrected / seen["training"] - 1).square().mean())

    return score


def state_score(study: ScalingStudy, base: EpsilonScaling) -> Score:
    """Return b -> mean over steps of the squared distance of x_t in sampling from the true x_t."""
    schedule = study.pipeline.model.schedule

    def score(b: float) -> float:
        moments = study.measure(f"b{b:.6f}", replace(base, b=b), False)
        states = moments["sampling/states"]
        distance = state_distance(schedule, study.pipeline.times, states, moments["data"].pooled())
        return float(distance.mean())

    return score
