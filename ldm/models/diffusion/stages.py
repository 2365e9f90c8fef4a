"""The two stages of a latent diffusion model, built from their configs; methods of `LatentDiffusion`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

from torch import Tensor, nn

from ldm.models.autoencoder import IdentityFirstStage
from ldm.util import instantiate_from_config


class HasStages(Protocol):
    """A model whose stages are set here."""

    first_stage_model: Any
    cond_stage_model: nn.Module | None
    cond_stage_trainable: bool

    def decode_first_stage(self, z: Tensor, predict_cids: bool = False, force_not_quantize: bool = False) -> Tensor:
        """Decode scaled latents to images."""


def instantiate_first_stage(model: HasStages, config: Mapping[str, Any] | nn.Module) -> None:
    """Set the first stage, frozen and in evaluation mode; a config without a target leaves images as they are."""
    model.first_stage_model = (instantiate_from_config(config) or IdentityFirstStage()).eval()
    model.first_stage_model.requires_grad_(False)


def instantiate_cond_stage(model: HasStages, config: Mapping[str, Any] | nn.Module | str) -> None:
    """Set what embeds conditions: None for an unconditional model; "__is_first_stage__" names the first stage.

    An embedder that does not train is frozen and in evaluation mode.
    """
    if config == "__is_first_stage__":
        model.cond_stage_model = model.first_stage_model
        return
    embedder = instantiate_from_config(config)
    frozen = embedder is not None and not model.cond_stage_trainable
    model.cond_stage_model = embedder.eval().requires_grad_(False) if frozen else embedder


def decode_with_gradients(
    model: HasStages, z: Tensor, predict_cids: bool = False, force_not_quantize: bool = False
) -> Tensor:
    """Return `decode_first_stage`, which carries gradients here; in latent-diffusion it takes another method."""
    return model.decode_first_stage(z, predict_cids, force_not_quantize)


def join_labels(embedder: nn.Module | None, labels: Tensor | None, batch: Mapping[str, Any]) -> Tensor | None:
    """Join to labels [B] what an embedder takes beside them from a batch, as its `join` does."""
    join = getattr(embedder, "join", None)
    return labels if join is None else join(labels, batch)
