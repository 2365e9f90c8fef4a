"""A diffusion model of a torch module in memory, and an ensemble of a loaded model and state dicts."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from ldm.checkpoint import load_state_dict, tensors_sha256
from ldm.diffusion.schedule import EDMSchedule, FlowSchedule, Schedule, VPSchedule, make_betas
from ldm.ensembles.members import Members
from ldm.ensembles.storage import Ensemble
from ldm.models.autoencoder import IdentityFirstStage
from ldm.models.diffusion.ddpm import LatentDiffusion
from ldm.modules.adapted import (
    BELOW,
    AdaptedNetwork,
    Adapter,
    GivenLabels,
    call_plainly,
    describe_parts,
    find_last_layer,
)
from ldm.modules.conditioned import UNET, ConditionEmbedder
from ldm.modules.low_rank import add_factors_of
from ldm.modules.parts import Parts, find_parts
from ldm.util import read_image_size, shorten_size

# Schedules by name, with the published defaults of Ho et al. 2020, Nichol & Dhariwal 2021, Karras et al. 2022.
SCHEDULES: Mapping[str, Callable[[], Schedule]] = {
    "ddpm": lambda: VPSchedule(make_betas("sqrt_linear", 1000)),
    "cosine": lambda: VPSchedule(make_betas("cosine", 1000)),
    "edm": EDMSchedule,
    "flow": FlowSchedule,
}
CONDITIONS = ("class", None)
# What the names of a member's tensors may lack: they are the model's, or those of the user's network.
PREFIXES = ("", f"{UNET}{BELOW}", UNET)


@dataclass(frozen=True)
class OwnNetwork:
    """What has to be said of a network that was made elsewhere; `build` makes a diffusion model of it.

    Args:
        network: a torch module, called `network(x, t)`, or `network(x, t, labels)` with a condition; its weights are
            not copied.
        schedule: the noise it was trained on: a `Schedule`, a table of betas [T], or one of `SCHEDULES`.
        target: what it predicts: eps, x0, v, velocity or edm, see `ldm.diffusion.denoiser.Target`.
        shape: [C, H, W] of the states that are noised.
        condition: "class" (labels [B]), None, or a module with `embed(labels) -> what the network takes`.
        n_classes: number of real classes, with the condition "class".
        null_class: the network's label of guidance's null class; None: there is none. Classes are its other labels in
            their order: with null_class 0 class 0 is its label 1.
        time: what the network takes as time: None (what the schedule gives: u - 1 of a table, sigma's logarithm over 4
            of EDM, u of a flow), "unit" (u / T of a table), or a function of what the schedule gives, t -> t / 1000.
        adapter: how the network is called, see `AdaptedNetwork`.
        heads: {head: patterns of parameters, by the network's own names}, see `describe_parts`.
        last_layer: name of the layer that comes last; where None, the one that runs last.
        taps: {short name: submodule} of blocks that features are read from.
        first_stage: a module with `encode` and `decode`, for states that are latents.
        scale_factor: what its latents are multiplied by.
        guidance: scale of guidance where nothing else is said.
        label_dropout: share of labels that its training replaced by the null class.
    """

    network: nn.Module
    schedule: Schedule | Tensor | Sequence[float] | str
    target: str = "eps"
    shape: Sequence[int] = field(default=())
    condition: nn.Module | str | None = None
    n_classes: int | None = None
    null_class: int | None = None
    time: Callable[[Tensor], Tensor] | str | None = None
    adapter: Adapter | None = None
    heads: Mapping[str, Sequence[str]] | None = None
    last_layer: str | None = None
    taps: Mapping[str, str] | None = None
    first_stage: nn.Module | None = None
    scale_factor: float = 1.0
    guidance: float = 1.0
    label_dropout: float = 0.0

    def __post_init__(self) -> None:
        if len(self.shape) != 3:
            raise ValueError(f"shape is (C, H, W) of the states; got {tuple(self.shape)}")
        if isinstance(self.condition, str) and self.condition not in CONDITIONS:
            raise ValueError(f"condition must be 'class', None or a module that embeds, got '{self.condition}'")
        if (self.condition == "class") != (self.n_classes is not None):
            raise ValueError(f"condition 'class' and n_classes go together, got {self.condition}, {self.n_classes}")
        null = self.null_class
        if null is not None and (self.n_classes is None or isinstance(null, bool) or not isinstance(null, int)):
            raise ValueError(f"null_class is a label of the network's, with the condition 'class'; got {null!r}")

    def build(self) -> LatentDiffusion:
        """Make the diffusion model, whose network is this one.

        Raises:
            ValueError: if the network does not run, or its output is no prediction for states of this shape.
        """
        schedule = self._make_schedule()
        embedder = self._make_embedder()
        network = self.network.eval()
        given = find_parts(network) if isinstance(getattr(network, "parts", None), Parts) else None
        adapted = AdaptedNetwork(network, self._make_adapter(), given or Parts())
        learned = self._run_once(adapted, embedder)
        if given is None:
            rows = None if self.n_classes is None else self._label_rows
            last = self.last_layer or find_last_layer(network, lambda: self._run_once(adapted, embedder))
            parts = describe_parts(network, last, rows, self.heads, self.taps)
            adapted = AdaptedNetwork(network, self._make_adapter(), parts)
        return LatentDiffusion(
            first_stage_config=self.first_stage or IdentityFirstStage(),
            cond_stage_config="__is_unconditional__" if embedder is None else embedder,
            cond_stage_key=getattr(embedder, "key", "class_label"),
            conditioning_key=None if embedder is None else "crossattn",
            scale_factor=self.scale_factor,
            guidance_scale=self.guidance,
            unet_config=adapted,
            use_ema=False,
            channels=self.shape[0],
            image_size=shorten_size(read_image_size(self.shape[1:], "shape")),
            parameterization=self.target,
            learned_variance="hybrid" if learned else None,
            **_schedule_arguments(schedule),
        )

    def config(self) -> dict[str, Any]:
        """Return what records say of the model, in the form of a config."""
        size = shorten_size(read_image_size(self.shape[1:], "shape"))
        params = {"guidance_scale": self.guidance, "parameterization": self.target, "image_size": size}
        return {"model": {"target": "ldm.models.diffusion.ddpm.LatentDiffusion", "params": params},
                "network": type(self.network).__qualname__}  # fmt: skip

    def _make_schedule(self) -> Schedule:
        given = self.schedule
        if isinstance(given, str):
            if given not in SCHEDULES:
                raise ValueError(f"schedule must be one of {sorted(SCHEDULES)}, betas or a Schedule; got '{given}'")
            given = SCHEDULES[given]()
        if not isinstance(given, Schedule):
            given = VPSchedule(torch.as_tensor(given, dtype=torch.float64))
        if not isinstance(self.time, str):
            return given
        if self.time != "unit" or not isinstance(given, VPSchedule):
            raise ValueError(
                f"time is None, 'unit' with a table of betas, or a function of what {type(given).__name__} gives; "
                f"got '{self.time}'"
            )
        return VPSchedule(given.betas, unit_time=True)

    def _make_embedder(self) -> nn.Module | None:
        if self.condition != "class":
            return self.condition if isinstance(self.condition, nn.Module) else None
        null = self.null_class is not None
        assert self.n_classes is not None
        dropped = self.label_dropout if null else 0.0
        return GivenLabels(self.n_classes + null, null, ucg_rate=dropped, null_row=self.null_class)

    @property
    def _label_rows(self) -> int:
        """Rows of a table that has one for each of the network's labels."""
        assert self.n_classes is not None
        return self.n_classes if self.null_class is None else max(self.n_classes, self.null_class) + 1

    def _make_adapter(self) -> Adapter:
        call = self.adapter or call_plainly
        time = self.time
        if time is None or isinstance(time, str):
            return call
        return lambda network, x, t, cond: call(network, x, time(t), cond)

    @torch.no_grad()
    def _run_once(self, adapted: AdaptedNetwork, embedder: nn.Module | None) -> bool:
        """Whether the network predicts a variance besides, by the channels of its output for one state of zeros."""
        weight = next(self.network.parameters(), torch.zeros(()))
        x = torch.zeros((1, *self.shape), device=weight.device, dtype=weight.dtype)
        cond = None
        if embedder is not None:
            label = torch.zeros(1, dtype=torch.long, device=weight.device)
            cond = cast(ConditionEmbedder, embedder.to(weight.device)).embed(label)
        output = adapted(x, x.new_zeros(1), cond)
        expected = [(1, count, *self.shape[1:]) for count in (self.shape[0], 2 * self.shape[0])]
        if tuple(output.shape) not in expected:
            raise ValueError(
                f"{type(self.network).__name__} gives {list(output.shape)} for a state {list(x.shape)}; expected "
                f"{list(expected[0])}, or twice the channels with a learned variance"
            )
        return output.shape[1] != self.shape[0]


def _schedule_arguments(schedule: Schedule) -> dict[str, Any]:
    """Return arguments of `DiffusionModel` that make it hold a schedule."""
    if isinstance(schedule, VPSchedule):
        return {
            "given_betas": schedule.betas.tolist(),
            "unit_time": schedule.unit_time,
            "first_time": schedule.first_time,
        }
    return {"schedule_config": schedule}


def gather_ensemble(model: LatentDiffusion, members: Sequence[Mapping[str, Tensor] | str | Path]) -> Ensemble:
    """Return an ensemble of a model from state dicts, or files of them, of its members.

    Args:
        model: the base. Where members have low-rank factors of layers it is given these, all zero, so that it computes
            what it did.
        members: each a state dict of the network, whole or those tensors in which it differs from the base, by the
            names of the user's network or of the model.

    Raises:
        ValueError: if a name or a shape is not the model's, or no member differs from the base.
    """
    given = [one if isinstance(one, Mapping) else load_state_dict(one) for one in members]
    if given:
        _add_factors(model, given[0])
    base = model.network.state_dict()
    read = [_by_model_names(base, one) for one in given]
    whole = [{**base, **member} for member in read]
    named = {name for member in read for name in member}
    differ = [name for name in base if name in named and any(not torch.equal(one[name], base[name]) for one in whole)]
    if not differ:
        raise ValueError(f"no tensor of the {len(read)} members differs from the model's: they are one model")
    stacked = Members.stack([{name: member[name] for name in differ} for member in whole])
    spec = {
        "name": "in memory",
        "trunk": {"path": None, "sha256": tensors_sha256(base)},
        "heads": differ,
        "patterns": differ,
        "members": [{"component": index} for index in range(len(read))],
    }
    return Ensemble(Path("in memory"), spec, stacked)


def _add_factors(model: LatentDiffusion, member: Mapping[str, Tensor]) -> None:
    """Give the model the low-rank factors that a member has."""
    base = model.network.state_dict()
    for name, value in member.items():
        layer, _, factor = name.rpartition(".")
        start = next((one for one in PREFIXES if f"{one}{layer}.weight" in base), None)
        if factor == "lora_A" and start is not None:
            add_factors_of(model.network, {f"{start}{name}": value})


def _by_model_names(base: Mapping[str, Tensor], member: Mapping[str, Tensor]) -> dict[str, Tensor]:
    found = {}
    for name, value in member.items():
        known = next((start + name for start in PREFIXES if start + name in base), None)
        if known is None or base[known].shape != value.shape:
            has = "none of this name" if known is None else f"{list(base[known].shape)}"
            raise ValueError(f"a member holds '{name}' {list(value.shape)}, the model {has}: is this its base model?")
        found[known] = value.to(base[known])
    return found
