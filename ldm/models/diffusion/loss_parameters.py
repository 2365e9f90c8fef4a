"""The parameters of a loss that a model holds, so that they train, move and are saved with it."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import nn

from ldm.diffusion.losses import LossSettings
from ldm.models.diffusion.process import refuse_table_options


class HasLoss(Protocol):
    """A model that trains under a loss.

    Attributes:
        loss_settings: what its config says of the loss.
        loss_weight: the learned weight of its noise levels; None: there is none that trains.
    """

    loss_settings: LossSettings
    loss_weight: nn.Module | None

    @property
    def num_timesteps(self) -> int | None:
        """Number of entries of the table of betas; None on a continuous schedule."""


def hold_loss_parameters(model: HasLoss, logvar_start: float) -> None:
    """Give a model the parameters of its loss, once what its config says of the loss is known to go together.

    On a table of betas these are the logarithm `logvar` of the loss's variance at each entry [T], which trains or is
    held; with `loss_weight: learned` the module `loss_weight`.

    Raises:
        ValueError: see `LossSettings.check`; and for the options of a table on a continuous schedule.
    """
    assert isinstance(model, nn.Module)
    settings = model.loss_settings
    settings.check(model.num_timesteps)
    model.loss_weight = settings.weighting if isinstance(settings.weighting, nn.Module) else None
    learns = settings.learns_logvar
    if model.num_timesteps is None:
        refuse_table_options(learn_logvar=learns, original_elbo_weight=settings.bound_weight)
        model.register_buffer("logvar", None, persistent=False)
        return
    values = torch.full((model.num_timesteps,), float(logvar_start))
    if learns:
        model.register_parameter("logvar", nn.Parameter(values))
    else:
        model.register_buffer("logvar", values, persistent=False)
