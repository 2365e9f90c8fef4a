"""The network as a function of (x, t, condition), in three stages, so that members of an ensemble share what they can.

condition(t, cond) -> state         per-member heads at the input: class embedding, text encoder, time embedding
backbone(x, *state)   -> features      frozen
readout(features)  -> output        per-member heads at the output
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn

from ldm.modules.choices import Choices, Condition, split_condition
from ldm.modules.parts import Parts, check_call, find_parts
from ldm.state_dicts import bare_names, choose_weights, is_state_dict
from ldm.util import instantiate_as

CONDITIONING_KEYS = (None, "concat", "crossattn", "hybrid", "adm")
# Those where pictures are joined to the network's input.
JOINING = ("concat", "hybrid")
UNET = "model.diffusion_model."
EMBEDDER = "cond_stage_model."
# The first layer of the networks that DDAE trains.
DDAE_FIRST = "image_proj.weight"
# The first layer of all of EDM's networks, and what its preconditioners put before the names of theirs.
EDM_FIRST = "map_layer0.weight"
# How a network's own names begin: UNetModel, DDAE's UNets, DiT, U-ViT, DDPM's UNet, EDM's.
FIRST_LAYERS = ("input_blocks.", "image_proj.", "x_embedder.", "patch_embed.", "temb.", EDM_FIRST)
PRECONDITIONED = "model."
# EDM's preconditioners by class, and what the networks in them regress.
PRECONDITIONERS = {"EDMPrecond": "edm", "VPPrecond": "eps", "iDDPMPrecond": "eps", "VEPrecond": "score"}


def is_bare(state: Mapping[str, Tensor]) -> bool:
    """Whether a state dict is a network's own, as guided-diffusion and DiT publish them, without names around it."""
    return any(name.startswith(FIRST_LAYERS) for name in state)


def network_alone(content: Mapping[str, Any] | Sequence[Any], averaged: bool) -> dict[str, Tensor] | None:
    """A network's own state dict out of a published file that holds nothing else of a model; None for other files.

    guided-diffusion, DiT and U-ViT publish it as it is, EDM below the `model.` of its preconditioner. DDIM's training
    writes a list: the model as it trains, each name below `module.`, the optimiser, two counts, and last the averages.
    DDAE's training writes {MODEL, EMA, opt}: `MODEL` is the model as it trains, `EMA` holds its averages below
    `ema_model.` (ema-pytorch); in both the network lies below a name of its own, and tables of the process beside it.
    In any of them one prefix on all names (`module.`, `model.diffusion_model.`) is taken off. `averaged` takes the
    averages.

    Raises:
        ValueError: if a file laid out as DDIM's or DDAE's holds no network of its kind, with what it does hold.
    """
    if not isinstance(content, Mapping):
        return _from_list(content, averaged)
    if "MODEL" not in content:
        state = choose_weights(content, averaged)
        if not is_state_dict(state):
            return None
        if PRECONDITIONED + EDM_FIRST in state:
            return {name.removeprefix(PRECONDITIONED): value for name, value in state.items()}
        return bare_names(state, FIRST_LAYERS)
    part = "EMA" if averaged and "EMA" in content else "MODEL"
    start = "ema_model." if part == "EMA" else ""
    first = next((name for name in content[part] if name.startswith(start) and name.endswith(DDAE_FIRST)), None)
    if first is None:
        raise ValueError(
            f"{part} of this file holds no '{start}..{DDAE_FIRST}', the first layer of DDAE's networks; it holds "
            f"{len(content[part])} entries, among them: {', '.join(map(str, list(content[part])[:8]))}"
        )
    prefix = first.removesuffix(DDAE_FIRST)
    return {name.removeprefix(prefix): value for name, value in content[part].items() if name.startswith(prefix)}


def _from_list(content: Sequence[Any], averaged: bool) -> dict[str, Tensor]:
    """Read what DDIM's training writes: [model, optimiser, epoch, step, averages], the averages where it kept them."""
    part = content[-1 if averaged and len(content) == 5 else 0] if content else None
    if not isinstance(part, Mapping) or not all(isinstance(value, Tensor) for value in part.values()):
        raise ValueError(
            "this file holds a list, and of lists only that of DDIM's training is known: [model, optimiser, epoch, "
            f"step, averages]; it holds {[type(one).__name__ for one in content][:8]}"
        )
    return {name.removeprefix("module."): value for name, value in part.items()}


def check_preconditioner(content: Any, parameterization: str) -> None:
    """Make sure that the network of a pickle of EDM's regresses what the config says; other files do not tell.

    Raises:
        ValueError: if it regresses something else.
    """
    name = content.get("class_name") if isinstance(content, Mapping) else None
    known = PRECONDITIONERS.get(name, parameterization) if isinstance(name, str) else parameterization
    if known != parameterization:
        raise ValueError(
            f"the file's network was trained under {name}, which is parameterization: {known}, and the config says "
            f"{parameterization}: take the config of its preconditioner (docs/edm.md)"
        )


class DiffusionWrapper(nn.Module):
    """Hands a condition to the UNet the way `conditioning_key` says (latent-diffusion, `ddpm.py`)."""

    def __init__(self, diff_model_config: Mapping[str, Any] | nn.Module, conditioning_key: str | None = None):
        super().__init__()
        if conditioning_key not in CONDITIONING_KEYS:
            raise ValueError(f"conditioning_key must be one of {CONDITIONING_KEYS}, got '{conditioning_key}'")
        self.diffusion_model = instantiate_as(nn.Module, diff_model_config, "model.params.unet_config")
        check_call(self.diffusion_model, conditioning_key)
        self.conditioning_key = conditioning_key

    def forward(
        self, x: Tensor, t: Tensor, c_concat: list[Tensor] | None = None, c_crossattn: list[Tensor] | None = None
    ) -> Tensor:
        key = self.conditioning_key
        if key in JOINING:
            x = torch.cat([x, *(c_concat or [])], dim=1)
        if key in ("crossattn", "hybrid"):
            contexts = c_crossattn or []
            return self.diffusion_model(x, t, context=contexts[0] if len(contexts) == 1 else torch.cat(contexts, 1))
        if key == "adm":
            return self.diffusion_model(x, t, y=c_crossattn[0] if c_crossattn else None)
        return self.diffusion_model(x, t)


class ConditionEmbedder(Protocol):
    """What is asked of the module that embeds conditions."""

    def __call__(self, batch: Mapping[str, Any], key: str) -> Tensor:
        """Embed batch[key]."""

    def embed(self, labels: Tensor | None) -> Tensor:
        """Embed labels [B] to a context [B, L, D]."""

    def drop_labels(self, labels: Tensor | None, uniform: Tensor) -> Tensor | None:
        """Replace labels [B] by the null class where `uniform` [B] says so."""


def find_model_parts(model: DiffusionWrapper, embedder: nn.Module | None) -> Parts:
    """Return the parts of a UNet and the tables of an embedder, under the names that they have in LatentDiffusion.

    A UNet without a stage `condition` has none with its embedder either. The embedder's tables count where the UNet
    reads what is embedded: where labels go to the UNet itself (adm), its own table does.
    """
    parts = find_parts(model.diffusion_model).below(UNET)
    if embedder is None:
        return parts
    condition = (f"{EMBEDDER}*", *parts.condition) if parts.condition else ()
    tables = dict(parts.class_tables)
    if model.conditioning_key in ("crossattn", "hybrid"):
        tables |= find_parts(embedder).below(EMBEDDER).class_tables
    tokens = find_parts(embedder).below(EMBEDDER).token_tables
    return replace(parts, class_tables=tables, token_tables=tokens, condition=condition)


class ConditionedNetwork(nn.Module):
    """UNet and condition embedder under the names they have in LatentDiffusion, as one network of raw conditions.

    `network(x, t, cond)`: x [B, C, H, W], t [B], cond one of: class labels [B]; labels [B] of `choices`; token ids
    [B, L] or an embedded context [B, L, D]; a picture [B, C', H, W] that is joined to x; of a hybrid network rows that
    hold both (`join_condition`); None. Where it `shares_x` also r B labels, label j for image j mod B. Keys equal the
    base model's, so a posterior's overrides apply through `torch.func.functional_call` as they are.

    Args:
        model: the UNet, and how conditions reach it.
        cond_stage_model: what embeds conditions, where they are embedded.
        choices: the conditions that labels stand for, in place of classes.

    Raises:
        ValueError: if the choices lack what the UNet is conditioned on.
    """

    def __init__(
        self, model: DiffusionWrapper, cond_stage_model: nn.Module | None = None, choices: Choices | None = None
    ):
        super().__init__()
        self.model = model
        self.cond_stage_model = cond_stage_model
        self.choices = choices
        self.joins_picture = model.conditioning_key in JOINING
        self.reads_context = model.conditioning_key in ("crossattn", "hybrid")
        self.shares_x = getattr(model.diffusion_model, "shares_x", False) and not self.joins_picture
        if choices is not None:
            self._check_choices(choices)

    def _check_choices(self, choices: Choices) -> None:
        texts = choices.tokens is not None or choices.context is not None
        pictures = choices.picture is not None
        lacking = self.joins_picture and texts and not pictures  # a hybrid model's, whose pictures are to be given
        if (pictures or lacking, texts) != (self.joins_picture, self.reads_context):
            raise ValueError(
                f"conditioning_key '{self.model.conditioning_key}' takes a picture: {self.joins_picture}, text: "
                f"{self.reads_context}; the choices hold a picture: {pictures}, text: {texts}"
            )

    @property
    def parts(self) -> Parts:
        """Parts of the UNet and tables of the embedder, see `find_model_parts`."""
        return find_model_parts(self.model, self.cond_stage_model)

    @property
    def in_stages(self) -> bool:
        """Whether `condition`, `backbone` and `readout` each act on parameters of their own."""
        return bool(self.parts.condition)

    @property
    def needs_choices(self) -> bool:
        """Whether this is a network of texts or pictures that has no list of them yet."""
        embedder = self.cond_stage_model
        labelled = getattr(embedder, "n_classes", None) is not None or getattr(embedder, "optional", False)
        if self.joins_picture:
            return self.choices is None or self.choices.picture is None
        return self.reads_context and self.choices is None and not labelled

    def blank_choice(self, size: Sequence[int], channels: int) -> Choices:
        """Return one choice of zeros of the shape that the network takes, to measure the network by.

        Args:
            size: height and width of the states; channels: of these.
        """
        unet = self.model.diffusion_model
        length = getattr(self.cond_stage_model, "max_length", 1)
        context = torch.zeros(1, length, unet.context_dim) if self.reads_context else None
        picture = torch.zeros(1, unet.in_channels - channels, *size) if self.joins_picture else None
        return Choices(("blank",), context=context, picture=picture)

    def read_condition(self, cond: Tensor | None) -> Condition:
        """Return what raw conditions [B, ...] are, as the class says; None gives none.

        Raises:
            ValueError: if a condition of a hybrid model has no picture.
        """
        if cond is None:
            return Condition()
        if self.choices is not None and cond.ndim == 1:
            return self.choices.pick(cond)
        if self.joins_picture and self.reads_context:
            if cond.ndim != 2 or not cond.is_floating_point():
                raise ValueError(
                    "conditioning_key 'hybrid' takes rows that hold text and picture (join_condition), or labels of "
                    f"choices that do; got {cond.dtype} {list(cond.shape)}"
                )
            return split_condition(cond, getattr(self.cond_stage_model, "max_length", None))
        if self.joins_picture:
            return Condition(picture=cond)
        return Condition(context=cond) if cond.is_floating_point() and cond.ndim == 3 else Condition(tokens=cond)

    def condition(self, t: Tensor, cond: Tensor | None) -> tuple[Tensor | None, ...]:
        """Time (and label) embedding [B, E]; context [B, L, D] and picture [B, C', H, W] where the UNet takes them."""
        embedding = self.model.diffusion_model.condition(t, cond if self.model.conditioning_key == "adm" else None)
        if not (self.reads_context or self.joins_picture):
            return (embedding, None)
        read = self.read_condition(cond)
        context = self._embed(read) if self.reads_context else None
        if not self.joins_picture:
            return (embedding, context)
        return (embedding, context, read.picture) if self.reads_context else (embedding, read.picture)

    def _embed(self, read: Condition) -> Tensor | None:
        if read.context is not None or read.tokens is None:
            return read.context
        embedder = cast("ConditionEmbedder | None", self.cond_stage_model)
        return read.tokens if embedder is None else embedder.embed(read.tokens)

    def backbone(self, x: Tensor, embedding: Tensor, *state: Tensor | None) -> Tensor:
        """Features [B, F, H, W], the input of the output block; `state` is what `condition` returned after it."""
        given = [one for one in state if one is not None]
        if self.joins_picture:
            if not given:
                raise ValueError(
                    f"conditioning_key '{self.model.conditioning_key}' joins a picture to the state: give one an image"
                )
            picture = given.pop()
            x = torch.cat([x, picture.reshape(len(picture), -1, *x.shape[-2:])], dim=1)
        return self.model.diffusion_model.features(x, embedding, given[0] if given else None)

    def readout(self, features: Tensor) -> Tensor:
        """Output [B, C', H, W]."""
        return self.model.diffusion_model.readout(features)

    def forward(self, *args: Any, stage: str = "whole") -> Any:
        """`network(x, t, cond)`, or one stage by name with its own arguments (for `functional_call`)."""
        if stage != "whole":
            return getattr(self, stage)(*args)
        x, t, cond = args
        return self.readout(self.backbone(x, *self.condition(t, cond)))
