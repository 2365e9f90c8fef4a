"""The two stages of a latent diffusion model, built from their configs, and what they read; for `LatentDiffusion`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ldm.diffusion.noise import TrainingDraws
from ldm.ensembles.heads import ClassTables
from ldm.models.autoencoder import IdentityFirstStage
from ldm.models.diffusion.optimisation import measure_deviation, positions
from ldm.models.diffusion.training import read_images
from ldm.modules.conditioned import EMBEDDER, ConditionEmbedder
from ldm.modules.encoders.text import TextEmbedder
from ldm.modules.parts import Parts
from ldm.util import instantiate_as

# Entry of a batch of latents: the standard deviations [B, h, w, c] of a KL first stage's posteriors.
DEVIATIONS = "latent_std"
ENCODINGS = ("sample", "mode")


class HasStages(Protocol):
    """A model whose stages are set here."""

    first_stage_model: Any
    first_stage_encoding: str
    scale_factor: Any
    cond_stage_model: nn.Module | None
    cond_stage_trainable: bool
    cond_stage_key: str
    first_stage_key: str
    training: bool

    @property
    def embedder(self) -> ConditionEmbedder:
        """What embeds conditions; an unconditional model raises a ValueError."""

    @property
    def label_dropout(self) -> float:
        """Share of the conditions that training replaces by the null."""

    @property
    def parts(self) -> Parts:
        """Where the network and the embedder keep their parts."""

    @property
    def null_class(self) -> int | None:
        """Label of the null class."""

    def before_scaling(self, encoder_posterior: Any) -> Tensor:
        """Return a latent, of a distribution its mode."""

    def get_input(self, batch: Mapping[str, Any], k: str) -> Tensor:
        """Return the scaled latents of batch[k], of a KL first stage the means."""

    def encoded(self, batch: Mapping[str, Any]) -> Mapping[str, Any]:
        """Return a batch with latents in place of its images."""

    def encode_first_stage(self, x: Tensor) -> Any:
        """Encode images to latents, or to a distribution of them."""

    def decode_first_stage(self, z: Tensor, predict_cids: bool = False, force_not_quantize: bool = False) -> Tensor:
        """Decode scaled latents to images."""


def check_encoding(name: str) -> str:
    """Return what is made of a posterior in training, once it is known to be "sample" or "mode"."""
    if name not in ENCODINGS:
        raise ValueError(f"first_stage_encoding must be {' or '.join(ENCODINGS)}, got {name!r}")
    return name


def check_encoding_acts(model: Any, name: str | None) -> None:
    """Make sure that a choice of what is made of posteriors, where there is one, finds some.

    Raises:
        ValueError: for a model without a first stage, or with one that gives latents alone.
    """
    first_stage = getattr(getattr(model, "members", [model])[0], "first_stage_model", None)
    if name is not None and not getattr(first_stage, "has_posterior", first_stage is not None):
        kind = "there is no first stage" if first_stage is None else f"{type(first_stage).__name__} gives no posterior"
        raise ValueError(f"--first_stage {name} acts on models with a KL first stage, and here {kind}: leave it out")


def instantiate_first_stage(model: HasStages, config: Mapping[str, Any] | nn.Module) -> None:
    """Set the first stage, frozen and in evaluation mode; a config without a target leaves images as they are.

    Raises:
        ValueError: if what the config names does not encode and decode.
    """
    place = "model.params.first_stage_config"
    stage: Any = IdentityFirstStage() if isinstance(config, str) else instantiate_as(nn.Module, config, place)
    if not (hasattr(stage, "encode") and hasattr(stage, "decode")):
        raise ValueError(
            f"{place}: a {type(stage).__name__} does not encode and decode; a model of pixels has "
            "ldm.models.autoencoder.IdentityFirstStage"
        )
    model.first_stage_model = stage.eval().requires_grad_(False)


def instantiate_cond_stage(model: HasStages, config: Mapping[str, Any] | nn.Module | str) -> None:
    """Set what embeds conditions: None for an unconditional model; "__is_first_stage__" names the first stage.

    An embedder that does not train is frozen and in evaluation mode.
    """
    if config == "__is_first_stage__":
        model.cond_stage_model = model.first_stage_model
        return
    if config == "__is_unconditional__":
        model.cond_stage_model = None
        return
    embedder = instantiate_as(nn.Module, config, "model.params.cond_stage_config")
    model.cond_stage_model = embedder if model.cond_stage_trainable else embedder.eval().requires_grad_(False)


def decode_with_gradients(
    model: HasStages, z: Tensor, predict_cids: bool = False, force_not_quantize: bool = False
) -> Tensor:
    """Return `decode_first_stage`, which carries gradients here; in latent-diffusion it takes another method."""
    return model.decode_first_stage(z, predict_cids, force_not_quantize)


def join_labels(embedder: nn.Module | None, labels: Tensor | None, batch: Mapping[str, Any]) -> Tensor | None:
    """Join to labels [B] what an embedder takes beside them from a batch, as its `join` does."""
    join = getattr(embedder, "join", None)
    return labels if join is None else join(labels, batch)


def read_conditions(model: HasStages, batch: Mapping[str, Any]) -> Tensor | None:
    """Return the labels [B], or the token ids [B, L] of the texts, of a batch; None if unconditional.

    Raises:
        ValueError: if the batch does not hold the condition, naming what it holds.
    """
    embedder, key = model.cond_stage_model, model.cond_stage_key
    if embedder is None:
        return None
    if key not in batch:
        if getattr(embedder, "optional", False):
            return None
        raise ValueError(
            f"the data hold no '{key}', which the model is conditioned on (cond_stage_key), but "
            f"{sorted(map(str, batch))}: name a data set whose items hold it"
        )
    return embedder.read(batch[key]) if isinstance(embedder, TextEmbedder) else batch[key]


def read_kept_conditions(model: HasStages, batch: Mapping[str, Any], uniform: Tensor) -> Tensor | None:
    """Read the conditions of a batch after label dropout, which `uniform` [B] decides; None if unconditional."""
    labels = read_conditions(model, batch)
    if labels is not None and model.training and model.label_dropout:
        labels = model.embedder.drop_labels(labels, uniform)
    return join_labels(model.cond_stage_model, labels, batch)


def get_learned_conditioning(model: HasStages, c: Any) -> Tensor:
    """Embed a condition: labels [B], texts or their ids, or the mapping that holds them under `cond_stage_key`."""
    key = model.cond_stage_key
    if isinstance(c, Mapping):
        return model.embedder({key: c[key]}, key)
    embedder = model.cond_stage_model
    return model.embedder.embed(embedder.read(c) if isinstance(embedder, TextEmbedder) else c)


def null_condition(model: HasStages, cond: Tensor) -> Tensor | None:
    """Return the null condition for each of conditions [B, ...]: the null class, or the empty text; None: no null."""
    embedder = model.cond_stage_model
    if isinstance(embedder, TextEmbedder) and cond.ndim == 2:
        return embedder.nullified(cond, cond.new_ones(len(cond), dtype=torch.bool))
    return None if model.null_class is None else torch.full_like(cond, model.null_class)


def rename_released(model: HasStages, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return a released state dict under the names that the embedder's tensors have here."""
    rename = getattr(model.cond_stage_model, "released_names", None)
    if rename is None:
        return dict(state)
    own = {name.removeprefix(EMBEDDER): value for name, value in state.items() if name.startswith(EMBEDDER)}
    others = {name: value for name, value in state.items() if not name.startswith(EMBEDDER)}
    return others | {f"{EMBEDDER}{name}": value for name, value in rename(own).items()}


def make_class_tables(model: HasStages) -> ClassTables:
    """Return which parameters hold something for each class, and which rows of token tables the empty text reads."""
    parts = model.parts
    embedder = model.cond_stage_model
    null = getattr(embedder, "null_row", model.null_class)  # of tables that have it elsewhere than last
    tables = ClassTables.from_axes(parts.class_tables, null, model.label_dropout)
    if not isinstance(embedder, TextEmbedder) or not embedder.has_null:
        return tables
    rows = tuple(embedder.null_tokens.unique().tolist())
    return replace(tables, null_tokens=dict.fromkeys(parts.token_tables, rows))


def split_posterior(encoded: Any) -> tuple[Tensor, ...]:
    """Return what a first stage's `encode` gives as (latents,), or of a distribution as (means, deviations)."""
    return (encoded,) if isinstance(encoded, Tensor) else (encoded.mean, encoded.std)


@torch.no_grad()
def encode_images(model: HasStages, batch: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return a batch with latents [B, h, w, c] before scaling in place of its images, to encode them once.

    Of a KL first stage these are the means, and their standard deviations are the batch's `latent_std`.
    """
    if "encoded" in batch or isinstance(model.first_stage_model, IdentityFirstStage):
        return batch
    found = split_posterior(model.encode_first_stage(read_images(batch[model.first_stage_key])))
    parts = zip((model.first_stage_key, DEVIATIONS), found, strict=False)
    return {**batch, **{name: value.movedim(1, -1) for name, value in parts}, "encoded": True}


@torch.no_grad()
def draw_latents(
    model: HasStages, batch: Mapping[str, Any], draws: Sequence[TrainingDraws], step: int, samples: Sequence[int]
) -> Tensor:
    """Return the scaled latents [M B, c, h, w] of a batch, of a KL first stage one sample of each image's posterior.

        z = scale_factor (mean + deviation n),    n from the generator of (seed, member, step, sample)

    Where the model says `first_stage_encoding: mode`, or the first stage gives latents alone, z = scale_factor mean.

    Args:
        model: whose first stage encodes.
        batch: the images of M members, one member after the other, or what `encode_images` made of them.
        draws: of each member.
        step, samples: what the draws belong to; samples are numbers [B] of a member's images in its global batch.
    """
    encoded = model.encoded(batch)
    mean = model.get_input(encoded, model.first_stage_key)
    if model.first_stage_encoding == "mode" or DEVIATIONS not in encoded:
        return mean
    std = read_images(encoded[DEVIATIONS]).to(mean)
    noise = torch.cat([one.posterior_noise(step, samples, mean.shape[1:]) for one in draws])
    return mean + model.scale_factor * std * noise.to(mean)


def measure_scale(model: Any, batch: Mapping[str, Any], batch_idx: int) -> None:
    """With `scale_by_std`, set scale_factor = 1 / standard deviation on the first batch of a fresh run.

    Raises:
        ValueError: if the scale does not start from 1, or all values are the same.
    """
    fresh = model.member is None and model.global_step == 0 and batch_idx == 0
    if not (fresh and isinstance(model.scale_factor, Tensor)):
        return
    if float(model.scale_factor) != 1:
        raise ValueError(f"scale_by_std measures the scale; it cannot start from scale_factor {model.scale_factor}")
    samples = positions(model.trainer, len(batch[model.first_stage_key]))
    z = model.draw_input(batch, [model.draws], 0, samples)
    model.scale_factor.copy_(1 / measure_deviation(z, model.trainer))
