"""Schedulers of diffusers as noise processes here, and back: betas, target, clipping, spacing.

| diffusers | here |
| --- | --- |
| scaled_linear, linear, squaredcos_cap_v2, sigmoid, trained_betas | linear, sqrt_linear, cosine, given_betas |
| prediction_type epsilon, sample, v_prediction | parameterization eps, x0, v |
| rescale_betas_zero_snr | given_betas, the last of them 1 |
| clip_sample (to 1) | clip_denoised |
| variance_type learned_range | learned_variance |
| timestep_spacing leading with steps_offset 1 and set_alpha_to_one false; trailing | spacing published; trailing |
| leading with steps_offset 0 | `steps="ddim20"` |
| FlowMatchEulerDiscreteScheduler, shift | `FlowSchedule`, target velocity, shift of its times |
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from ldm.diffusion.process import BetaSchedule
from ldm.diffusion.schedule import FlowSchedule, VPSchedule, make_betas
from ldm.models.diffusion.ddpm import LatentDiffusion

FolderSpacing = Literal["auto", "trailing", "published"]
log = logging.getLogger(__name__)

BETAS = {"scaled_linear": "linear", "linear": "sqrt_linear", "squaredcos_cap_v2": "cosine"}
PREDICTIONS = {"epsilon": "eps", "sample": "x0", "v_prediction": "v"}
FLOWS = ("FlowMatchEulerDiscreteScheduler", "FlowMatchHeunDiscreteScheduler")
# Those whose clip_sample is true where their config does not say.
CLIPPING = ("DDIMScheduler", "DDPMScheduler", "DDIMParallelScheduler", "DDPMParallelScheduler")


@dataclass(frozen=True)
class SchedulerFacts:
    """What a scheduler says of a model.

    Args:
        params: arguments of `LatentDiffusion`.
        spacing: of the sampler's times, as `Sampling` names it; "auto" where none of ours is theirs.
        shift: of a flow's times towards the noise, 1 where there is none.
        learned_range: whether the network also predicts the variance of ancestral steps.
    """

    params: Mapping[str, Any]
    spacing: FolderSpacing = "auto"
    shift: float = 1.0
    learned_range: bool = False


def read_scheduler(config: Mapping[str, Any], time_scale: float = 1000.0) -> SchedulerFacts:
    """Read scheduler_config.json.

    Args:
        config: what the file holds.
        time_scale: what the network takes as the time of pure noise, of a flow.

    Raises:
        ValueError: for a scheduler whose noise is neither a table of betas nor a flow, or a network that predicts
            epsilon where the table ends without any signal.
    """
    name = str(config.get("_class_name"))
    if name in FLOWS or config.get("prediction_type") == "flow_prediction":
        return _read_flow(config, time_scale)
    if "beta_schedule" not in config and "trained_betas" not in config:
        raise ValueError(f"scheduler {name} is neither of a table of betas nor of a flow: give schedule= and target=")
    target = config.get("prediction_type", "epsilon")
    if target not in PREDICTIONS:
        raise ValueError(f"prediction_type must be one of {sorted(PREDICTIONS)}, got '{target}'")
    if config.get("rescale_betas_zero_snr") and target == "epsilon":
        raise ValueError(
            "rescale_betas_zero_snr goes with prediction_type v_prediction or sample: at the last state, pure noise, "
            "epsilon says nothing of the picture; got 'epsilon'"
        )
    if config.get("thresholding"):
        log.warning("thresholding of the scheduler is not taken over: predicted x0 is left as it is")
    clip = config.get("clip_sample", name in CLIPPING)
    if clip and float(config.get("clip_sample_range", 1.0)) != 1:
        raise ValueError(f"clip_sample_range must be 1, got {config['clip_sample_range']}")
    params = {**_read_betas(config), "parameterization": PREDICTIONS[target], "clip_denoised": bool(clip)}
    learned = str(config.get("variance_type", "")).startswith("learned")
    return SchedulerFacts(params, _read_spacing(config), learned_range=learned)


def _read_flow(config: Mapping[str, Any], time_scale: float) -> SchedulerFacts:
    if config.get("use_dynamic_shifting"):
        log.warning("the scheduler shifts its times by the size of the image; here `shift` alone acts")
    shift = float(config.get("shift", config.get("flow_shift", 1.0)) or 1.0)
    schedule = {
        "target": "ldm.diffusion.schedule.FlowSchedule",
        "params": {"time_scale": time_scale, "shift": shift},
    }
    return SchedulerFacts({"schedule_config": schedule, "parameterization": "velocity"}, shift=shift)


def _read_betas(config: Mapping[str, Any]) -> dict[str, Any]:
    found = _read_table(config)
    if not config.get("rescale_betas_zero_snr"):
        return found
    names = {"given_betas": "given", "beta_schedule": "name"}
    schedule = BetaSchedule(**{names.get(name, name): value for name, value in found.items()})
    betas = end_in_noise(schedule.build().betas)
    return {"timesteps": len(betas), "given_betas": betas.tolist()}


def end_in_noise(betas: Tensor) -> Tensor:
    """Return betas whose last state is pure noise: sqrt(alpha-bar) shifted to end at 0 and scaled to begin as it did.

    Args:
        betas: [T] in float64 (Lin et al. 2024, algorithm 1).
    """
    alphas = torch.cumprod(1 - betas, 0).sqrt()
    alphas = (alphas - alphas[-1]) * alphas[0] / (alphas[0] - alphas[-1])
    squares = torch.cat([alphas.new_ones(1), alphas]) ** 2
    return 1 - squares[1:] / squares[:-1]


def _read_table(config: Mapping[str, Any]) -> dict[str, Any]:
    steps = int(config.get("num_train_timesteps", 1000))
    given = config.get("trained_betas")
    if given is not None:
        return {"timesteps": len(given), "given_betas": [float(beta) for beta in given]}
    name = config["beta_schedule"]
    start, end = (float(config.get(f"beta_{place}", default)) for place, default in (("start", 1e-4), ("end", 0.02)))
    if name == "sigmoid":
        ramp = torch.linspace(-6, 6, steps, dtype=torch.float64).sigmoid()
        return {"timesteps": steps, "given_betas": (ramp * (end - start) + start).tolist()}
    if name not in BETAS:
        raise ValueError(f"beta_schedule must be one of {[*BETAS, 'sigmoid']}, got '{name}'")
    return {"timesteps": steps, "beta_schedule": BETAS[name], "linear_start": start, "linear_end": end}


def _read_spacing(config: Mapping[str, Any]) -> FolderSpacing:
    spacing = config.get("timestep_spacing", "leading")
    if spacing == "trailing":
        return "trailing"
    offset = int(config.get("steps_offset", 0))
    if spacing == "leading" and offset == 1 and not config.get("set_alpha_to_one", False):
        return "published"
    if spacing == "linspace":
        log.warning("the scheduler's timestep_spacing linspace is not taken over: samples are taken at other times")
    return "auto"


def make_scheduler(model: LatentDiffusion) -> dict[str, Any]:
    """Make scheduler_config.json of a model: DDIM's, DDPM's where the variance is learned, or a flow's.

    Raises:
        ValueError: for a noise process that none of diffusers' schedulers has.
    """
    schedule = model.schedule
    if isinstance(schedule, FlowSchedule):
        if schedule.reversed_time or schedule.time_scale != 1000 or model.target.name != "velocity":
            raise ValueError(
                "diffusers' flows regress noise - data at a time that counts to 1000 at pure noise; this model has "
                f"target '{model.target.name}', time_scale {schedule.time_scale}, reversed_time "
                f"{schedule.reversed_time}"
            )
        shift = schedule.shift
        return {"_class_name": FLOWS[0], "num_train_timesteps": 1000, "shift": shift}
    if not isinstance(schedule, VPSchedule) or schedule.unit_time:
        raise ValueError(
            f"diffusers' schedulers count the entries of a table of betas; this model has {type(schedule).__name__}"
            f"{' with unit_time' if isinstance(schedule, VPSchedule) else ''}"
        )
    names = {ours: theirs for theirs, ours in PREDICTIONS.items()}
    if model.target.name not in names:
        raise ValueError(f"diffusers' schedulers know the targets {sorted(names)}, got '{model.target.name}'")
    config = {
        "num_train_timesteps": schedule.end,
        **_write_betas(schedule),
        "prediction_type": names[model.target.name],
        "clip_sample": bool(model.clip_denoised),
        "timestep_spacing": "leading",
        "steps_offset": 1,
    }
    if model.learned_variance is not None:
        return {"_class_name": "DDPMScheduler", **config, "variance_type": "learned_range"}
    return {"_class_name": "DDIMScheduler", **config, "set_alpha_to_one": False}


def _write_betas(schedule: VPSchedule) -> dict[str, Any]:
    """The formula of a table where one of theirs gives it, else the table."""
    betas, steps = schedule.betas, schedule.end
    ends = {"beta_start": float(betas[0]), "beta_end": float(betas[-1])}
    for theirs, ours in BETAS.items():
        made = make_betas(ours, steps, ends["beta_start"], ends["beta_end"])
        if torch.allclose(made, betas, rtol=1e-9, atol=0.0):
            return {"beta_schedule": theirs, **ends}
    return {"beta_schedule": "linear", "trained_betas": betas.tolist()}
