"""Schedulers of diffusers as noise processes here, and back: betas, target, clipping, spacing.

| diffusers | here |
| --- | --- |
| scaled_linear, linear, squaredcos_cap_v2, sigmoid, trained_betas | linear, sqrt_linear, cosine, given_betas |
| prediction_type epsilon, sample, v_prediction | parameterization eps, x0, v |
| rescale_betas_zero_snr | given_betas, the last of them 1 |
| clip_sample (to 1) | clip_denoised; DDIM's steps keep the predicted eps: x0_only |
| variance_type learned_range; fixed_large | learned_variance; variance |
| timestep_spacing leading, with steps_offset 1; trailing | spacing leading, leading_offset; trailing |
| last step to clean data, or the first entry | trailing, leading_offset_clean; trailing_first, leading_first |
| use_karras_sigmas, use_exponential_sigmas | spacing karras, exponential |
| FlowMatchEulerDiscreteScheduler, shift | `FlowSchedule`, target velocity, shift of its times |

What else a scheduler says of its times or levels is refused, or named in a warning.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ldm.diffusion.denoiser import Clipping
from ldm.diffusion.schedule import FlowSchedule, VPSchedule
from ldm.interop.betas import read_betas, write_betas
from ldm.models.diffusion.ddpm import LatentDiffusion
from ldm.settings.names import Spacing

log = logging.getLogger(__name__)

PREDICTIONS = {"epsilon": "eps", "sample": "x0", "v_prediction": "v"}
FLOWS = ("FlowMatchEulerDiscreteScheduler", "FlowMatchHeunDiscreteScheduler")
# Those whose clip_sample is true where their config does not say.
CLIPPING = ("DDIMScheduler", "DDPMScheduler", "DDIMParallelScheduler", "DDPMParallelScheduler")
# An argument of DDIM's steps there, which our export keeps beside those of the scheduler.
DERIVED_AGAIN = "use_clipped_model_output"
DDIMS = ("DDIMScheduler", "DDIMParallelScheduler")
# Whether the last step ends at clean data where the config does not say; False: at the first entry of the table.
ENDS_CLEAN = {"PNDMScheduler": False, **dict.fromkeys(DDIMS, True)}
# Spacings by the offset of their entries, and by whether the last step ends at clean data.
LEADING_SPACINGS: dict[tuple[int, bool], Spacing] = {
    (0, True): "leading",
    (0, False): "leading_first",
    (1, False): "leading_offset",
    (1, True): "leading_offset_clean",
}
# Schedulers whose `leading` has other times, for they count one step more; their levels are those of the whole table.
OTHER_LEADING = ("DPMSolver", "DEIS", "UniPC", "SASolver")
# Those that space their times `leading` where their config does not say; the others `linspace`.
LEADS = ("DDIM", "DDPM", "PNDM")
FIXED_VARIANCES = {"fixed_large": "fixed_large", "fixed_large_log": "fixed_large"}
# Arguments that make the process another one, by the values under which they do not.
REFUSED: dict[str, tuple[Any, ...]] = {
    "timestep_type": ("discrete",),
    "snr_shift_scale": (1, 1.0),
    "invert_sigmas": (False,),
}
# Arguments that move times, levels or states of sampling alone, by the values under which they do not.
LEFT_OUT: dict[str, tuple[Any, ...]] = {
    "thresholding": (False,),
    "use_beta_sigmas": (False,),
    "use_lu_lambdas": (False,),
    "final_sigmas_type": ("zero",),
    "sigma_min": (None,),
    "sigma_max": (None,),
    "use_dynamic_shifting": (False,),
    "shift_terminal": (None,),
}
# Schedulers of distilled networks, whose own steps are part of what the network was trained for.
DISTILLED = ("LCMScheduler", "TCDScheduler")


@dataclass(frozen=True)
class SchedulerFacts:
    """What a scheduler says of a model.

    Args:
        params: arguments of `LatentDiffusion`.
        spacing: of the sampler's times, as `Sampling` names it; "auto" where none of ours is theirs.
        shift: of a flow's times towards the noise, 1 where there is none.
        variance: of DDPM's steps, as `Sampling` names it; None: the default.
    """

    params: Mapping[str, Any]
    spacing: Spacing = "auto"
    shift: float = 1.0
    variance: str | None = None

    @property
    def sampling(self) -> dict[str, Any]:
        """What sampling takes of it where nothing is said, for the section `diffusers` of a config."""
        found = {"spacing": self.spacing, "variance": self.variance}
        return {name: value for name, value in found.items() if value not in ("auto", None)}


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
    flows = name in FLOWS or config.get("prediction_type") == "flow_prediction"
    if not flows and config.get("beta_schedule") is None and config.get("trained_betas") is None:
        raise ValueError(f"scheduler {name} is neither of a table of betas nor of a flow: give schedule= and target=")
    _name_the_rest(name, config)
    if flows:
        return _read_flow(config, time_scale)
    target = config.get("prediction_type", "epsilon")
    if target not in PREDICTIONS:
        raise ValueError(f"prediction_type must be one of {sorted(PREDICTIONS)}, got '{target}'")
    if config.get("rescale_betas_zero_snr") and target == "epsilon":
        raise ValueError(
            "rescale_betas_zero_snr goes with prediction_type v_prediction or sample: at the last state, pure noise, "
            "epsilon says nothing of the picture; got 'epsilon'"
        )
    variance = str(config.get("variance_type"))
    if variance == "learned":
        raise ValueError("variance_type must be learned_range where the network predicts the variance, got 'learned'")
    params = {
        **read_betas(config),
        "parameterization": PREDICTIONS[target],
        "clip_denoised": _read_clipping(name, config),
    }
    spacing = _read_spacing(name, config)
    _name_the_step_that_stands(name, spacing, params["clip_denoised"])
    return SchedulerFacts(params, spacing, variance=FIXED_VARIANCES.get(variance))


def _name_the_rest(name: str, config: Mapping[str, Any]) -> None:
    """Warn of what a scheduler says of sampling and none of ours does.

    Raises:
        ValueError: for what makes the times that the network takes, or the noise that it knows, another.
    """
    for key, allowed in REFUSED.items():
        if config.get(key, allowed[0]) not in allowed:
            raise ValueError(f"{key} of {name} must be {allowed[0]} here, got {config[key]!r}")
    said = {key: config[key] for key, plain in LEFT_OUT.items() if config.get(key, plain[0]) not in plain}
    if said:
        words = ", ".join(f"{key} {value!r}" for key, value in said.items())
        log.warning("of %s this is not taken over: %s; samples differ from its pipeline's", name, words)
    if name == "PNDMScheduler" and config.get("prediction_type") == "v_prediction":
        log.warning("%s averages v over steps, and PLMS here the eps that it gives: samples differ", name)
    if name in DISTILLED:
        log.warning("%s has steps of its own, which the network was distilled for and which are not here", name)


def _name_the_step_that_stands(name: str, spacing: Spacing, clipping: Clipping) -> None:
    """Warn of DDIM's last step where it goes from the first entry of the table to itself, and clips there once more.

    Times here descend: a step that stays where it is has no place among them. Without clipping it changes nothing.
    """
    if spacing == "leading_first" and clipping == "x0_only":
        log.warning(
            "the last step of %s stays at the first entry of the table (steps_offset 0, set_alpha_to_one False) and "
            "clips the picture once more (clip_sample): it is left out here, and samples differ by it",
            name,
        )


def _read_clipping(name: str, config: Mapping[str, Any]) -> Clipping:
    """Return `clip_denoised`: whether x0 is clamped to [-1, 1], and of DDIM's whether eps is left as it was predicted.

    Raises:
        ValueError: for another range.
    """
    if not config.get("clip_sample", name in CLIPPING):
        return False
    if float(config.get("clip_sample_range", 1.0)) != 1:
        raise ValueError(f"clip_sample_range must be 1, got {config['clip_sample_range']}")
    # Their step's argument, which their pipelines leave at False; our export says that it was True.
    return "x0_only" if name in DDIMS and not config.get(DERIVED_AGAIN) else True


def _read_flow(config: Mapping[str, Any], time_scale: float) -> SchedulerFacts:
    shift = float(config.get("shift", config.get("flow_shift", 1.0)) or 1.0)
    schedule = {
        "target": "ldm.diffusion.schedule.FlowSchedule",
        "params": {"time_scale": time_scale, "shift": shift},
    }
    return SchedulerFacts({"schedule_config": schedule, "parameterization": "velocity"}, shift=shift)


def _read_spacing(name: str, config: Mapping[str, Any]) -> Spacing:
    spacing = config.get("timestep_spacing", "leading" if name.startswith(LEADS) else "linspace")
    levels: Spacing
    for levels in ("karras", "exponential"):
        if config.get(f"use_{levels}_sigmas"):
            if spacing != "linspace" and not name.startswith(OTHER_LEADING):
                log.warning(
                    "the %s levels of %s lie between those of its timesteps (%s), here between the first and the last "
                    "of the table: say sigma_min and sigma_max for others",
                    *(levels, name, spacing),
                )
            return levels
    offset = int(config.get("steps_offset", 0))
    clean = bool(config.get("set_alpha_to_one", ENDS_CLEAN[name])) if name in ENDS_CLEAN else True
    if spacing == "trailing":
        return "trailing" if clean else "trailing_first"
    if spacing == "leading" and not name.startswith(OTHER_LEADING) and (offset, clean) in LEADING_SPACINGS:
        return LEADING_SPACINGS[offset, clean]
    log.warning(
        "timestep_spacing %s (steps_offset %s, last step to clean data: %s) of %s is not taken over: samples are taken "
        "at other times",
        *(spacing, offset, clean, name),
    )
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
        **write_betas(schedule),
        "prediction_type": names[model.target.name],
        "clip_sample": bool(model.clip_denoised),
        "timestep_spacing": "leading",
        "steps_offset": 1,
    }
    if model.learned_variance is not None:
        return {"_class_name": "DDPMScheduler", **config, "variance_type": "learned_range"}
    again = {DERIVED_AGAIN: True} if model.clip_denoised is True else {}
    return {"_class_name": "DDIMScheduler", **config, "set_alpha_to_one": False, **again}
