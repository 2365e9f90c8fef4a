"""The small published LatentDiffusion of the goldens: its configuration, weights and recorded tensors."""

from __future__ import annotations

import torch

from ldm.models.diffusion.ddpm import LatentDiffusion
from tests.conftest import golden_json, golden_tensors, ldm_small_weights


def build(**changes) -> LatentDiffusion:
    """The model with its weights in evaluation mode; `changes` replace parameters of its configuration."""
    model = LatentDiffusion(**{**golden_json("ldm_small")["config"]["params"], **changes})
    weights = ldm_small_weights()
    if changes.get("learn_logvar"):
        weights["logvar"] = model.logvar.detach()
    model.load_state_dict(weights)
    return model.eval()


def recorded() -> dict[str, torch.Tensor]:
    return golden_tensors("ldm_small_io")


def assert_close(actual, expected, tolerance):
    """Within a share of the largest value: other kernels round differently."""
    atol = tolerance * max(expected.abs().max().item(), 1e-30)
    torch.testing.assert_close(actual.to(expected.dtype), expected, rtol=0, atol=atol)
