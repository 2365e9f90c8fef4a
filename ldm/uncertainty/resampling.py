"""Going back to an intermediate step and finishing the sampling from states around it: variety, and repair of a sample.

Source: Kou et al. 2024 (BayesDiff), whose `variance_utility.py` draws x ~ N(E x, Var x) at step `--cut`.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ldm.diffusion.denoiser import Denoiser
from ldm.diffusion.samplers import run
from ldm.diffusion.samplers.registry import Sampler
from ldm.diffusion.schedule import Schedule
from ldm.diffusion.transition import Noise
from ldm.uncertainty.propagation import VarianceStep

VARIANT_KINDS = ("variance", "uniform", "members")


def step_at(steps: Iterator[VarianceStep], cut: int) -> VarianceStep:
    """The step that ends at step `cut`: its `step.x_next` is the state there.

    Raises:
        ValueError: if the trajectory has no such step before its end.
    """
    for each in steps:
        if each.step.index + 1 == cut:
            return each
    raise ValueError(f"the trajectory has no step that ends at step {cut}")


def variants(at: VarianceStep, count: int, noise: Noise, kind: str = "variance", strength: float = 1.0) -> Tensor:
    """States [V, B, C, H, W] around that of a step, the state itself first.

    Args:
        noise: noise(index, shape) for shape [V - 1, B, C, H, W], each variant its own.
        kind: variance, x + sqrt(var) z (BayesDiff); uniform, the same total spread evenly over an image, so that what
            the map adds can be told; members, the sampled states themselves, coherent draws of the weights.
        strength: multiplies the standard deviation.

    Raises:
        ValueError: for an unknown kind, or members where none were sampled.
    """
    x = at.step.x_next
    if kind not in VARIANT_KINDS or count < 2:
        raise ValueError(f"expected a kind of {VARIANT_KINDS} and at least 2 variants, got '{kind}' and {count}")
    if kind == "members":
        if at.members is None or len(at.members) < count - 1:
            raise ValueError(
                f"{count} variants need {count - 1} sampled members: method persistent, and enough --draws"
            )
        away = at.members[: count - 1] - (0 if at.tangent else x)
        return torch.cat([x[None], x + strength * away])
    var = at.var.clamp(min=0)
    if kind == "uniform":
        var = var.mean((1, 2, 3), keepdim=True).expand_as(var)
    z = noise(at.step.index, (count - 1, *x.shape)).to(x)
    return torch.cat([x[None], x + strength * var.sqrt() * z])


@torch.no_grad()
def finished(
    sampler: Sampler,
    denoiser: Denoiser,
    schedule: Schedule,
    states: Tensor,
    times: Tensor,
    cut: int,
    noise: Noise | None = None,
) -> Tensor:
    """Where the plain sampler leads the states [V, B, C, H, W] of step `cut`: [V, B, C, H, W]."""
    return torch.stack([run(sampler(denoiser, schedule, each, times, start=cut, noise=noise)) for each in states])
