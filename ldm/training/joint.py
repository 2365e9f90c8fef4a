"""All members of an ensemble in one training: one frozen base model, one network pass a step, M heads, M optimisers.

Member m follows the order, times, noises and label dropout of its own run (`--seed S+m --component m`): its losses and
weights are those of that run, to rounding. (Dropout in the network draws one mask for all, so there they differ.)
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from ldm.diffusion.noise import TrainingDraws
from ldm.ensembles.heads import MemberRecord
from ldm.ensembles.members import MemberNetwork, Members
from ldm.models.diffusion.ddpm import LatentDiffusion
from ldm.models.diffusion.head_options import own_names
from ldm.models.diffusion.members import MemberTraining
from ldm.models.diffusion.optimisation import TrainingSet, evaluation_positions, make_factor, positions


def share_base(model: LatentDiffusion, own: Sequence[str]) -> LatentDiffusion:
    """Copy a model that has parameters `own` for itself and all other tensors in common with it."""
    tensors = [*model.named_parameters(), *model.named_buffers()]
    return copy.deepcopy(model, {id(tensor): tensor for name, tensor in tensors if name not in own})


def start_members(model: LatentDiffusion, members: int, seed: int) -> list[LatentDiffusion]:
    """Start members 0 .. members - 1 of seeds seed, seed + 1, ..., which share the model's base checkpoint."""
    heads = own_names(model, model.head_options)
    started = [share_base(model, heads) for _ in range(members)]
    for index, member in enumerate(started):
        member.start_from_pretrained(index, seed + index)
        member.seed_draws(seed + index, index)
    return started


def repeat_batch(batch: Mapping[str, Any], times: int) -> dict[str, Any]:
    """Return the tensors [B, ...] and texts of a batch, all of them one after the other, so many times."""
    tensors = {name: value for name, value in batch.items() if isinstance(value, Tensor)}
    texts = {name: list(value) * times for name, value in batch.items() if isinstance(value, (list, tuple))}
    return texts | {name: value.repeat(times, *[1] * (value.ndim - 1)) for name, value in tensors.items()}


class JointOptimizer(torch.optim.Optimizer):
    """Optimisers of separate parameters, stepped as one."""

    def __init__(self, optimizers: Sequence[torch.optim.Optimizer]):
        groups = [group for optimizer in optimizers for group in optimizer.param_groups]
        super().__init__([parameter for group in groups for parameter in group["params"]], {})
        self.optimizers = list(optimizers)
        self.param_groups = groups

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for optimizer in self.optimizers:
            optimizer.step()
        return loss

    def state_dict(self) -> dict[str, Any]:
        return {"members": [optimizer.state_dict() for optimizer in self.optimizers]}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        for optimizer, state in zip(self.optimizers, state_dict["members"], strict=True):
            optimizer.load_state_dict(state)
        self.param_groups = [group for optimizer in self.optimizers for group in optimizer.param_groups]


class JointMembers(pl.LightningModule):
    """Trains the heads of `members` (see `start_members`) on batches [M B, ...] of `JointDataModule`.

    Its state dict is `{member}.{name}` for every head: the base weights belong to no member and are never saved.
    """

    use_ema = False

    def __init__(self, members: Sequence[LatentDiffusion]):
        super().__init__()
        self._members = tuple(members)
        if members[0].time_importance is not None:
            raise ValueError("members train together at uniform times: set schedule_sampler: uniform for members")
        self.monitor = members[0].monitor
        self.learning_rate: float | None = None
        self.heads = [
            {name: value for name, value in member.named_parameters() if value.requires_grad} for member in members
        ]
        flat = {f"{number}.{name}": value for number, heads in enumerate(self.heads) for name, value in heads.items()}
        self._names = list(flat)
        self._values = nn.ParameterList(flat.values())

    @property
    def records(self) -> list[MemberRecord]:
        """What checkpoints and runs say of each member."""
        return [training.record for training in self._trainings]

    @property
    def _trainings(self) -> list[MemberTraining]:
        """What each member holds for its training."""
        return [model.member for model in self._members if model.member is not None]

    @property
    def members(self) -> tuple[LatentDiffusion, ...]:
        """The members as models of their own, with the base weights in common."""
        return self._members

    def setup(self, stage: str) -> None:
        """Hand each member what its rules ask of its training data."""
        modules = getattr(getattr(self.trainer, "datamodule", None), "modules", ())
        accumulated = self.trainer.world_size * self.trainer.accumulate_grad_batches
        for training, module in zip(self._trainings, modules, strict=True):
            data = module.dataset("train")
            batch = module.batch_size * accumulated
            training.training_set = TrainingSet(len(data), batch, getattr(data, "labels", None))

    def on_fit_start(self) -> None:
        """Move the base weights, which are no part of this module, to its device."""
        for member in self._members:
            member.to(self.device)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        values = [value.detach() for value in self._values]
        checkpoint["state_dict"] = dict(zip(self._names, values, strict=True))
        checkpoint["components"] = [record.as_dict() for record in self.records]

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        saved = checkpoint.get("components")
        bases = [record.base_sha256 for record in self.records]
        if saved is None or [one["trunk_sha256"] for one in saved] != bases:
            raise ValueError(
                f"this checkpoint holds {'no' if saved is None else len(saved)} members on another base checkpoint or "
                f"of another number than {len(bases)}: resume with the --component all, members and base checkpoint "
                "that it had"
            )
        state = checkpoint["state_dict"]
        checkpoint["state_dict"] = {f"_values.{place}": state[name] for place, name in enumerate(self._names)}

    def _switch(self) -> None:
        """Put the members into this module's mode: Lightning switches its own module alone, without a call."""
        for member in self._members:
            if member.training != self.training:
                member.train(self.training)

    def losses(
        self, batch: Mapping[str, Any], draws: Sequence[TrainingDraws], step: int, samples: Sequence[int]
    ) -> list[tuple[Tensor, dict[str, Tensor]]]:
        """Loss and parts of each member at its part of a batch [M B, ...], from one pass of the network.

        Args:
            draws: of each member; samples: numbers [B] of a member's images in its global batch.
        """
        first, count = self._members[0], len(self._members)
        self._switch()
        x = first.draw_input(batch, draws, step, samples).unflatten(0, (count, -1))  # [M, B, c, h, w]
        parts = [{name: value[m * x.shape[1] : (m + 1) * x.shape[1]] for name, value in batch.items()}
                 for m in range(count)]  # fmt: skip
        drawn = [one(step, samples, x.shape[2:], first.drawn_timesteps) for one in draws]
        t, noise, uniform = (torch.stack(values).to(x.device) for values in zip(*drawn, strict=True))
        t = first.drawn_times(t)
        given = zip(self._members, parts, uniform, strict=True)
        labels = [member.read_labels(part, own) for member, part, own in given]
        seen = [first.input_noise(one, step, samples, own) for one, own in zip(draws, noise, strict=True)]
        inputs = [first.network_input(first.q_sample(*each), each[1]) for each in zip(x, t, seen, strict=True)]
        noisy, times = (torch.stack(values) for values in zip(*inputs, strict=True))
        stacked = Members({name: torch.stack([heads[name] for heads in self.heads]) for name in self.heads[0]})
        network = MemberNetwork(first.network, stacked)
        known = [one for one in labels if one is not None]
        output = network(noisy, times, torch.stack(known) if known else None)  # [M, B, c, h, w]
        found = []
        for m, member in enumerate(self._members):
            of_targets = member.draw_target_noise(parts[m], x[m])
            loss = member.compute_loss(output[m], x[m], t[m], noise[m], seen[m], of_targets)
            found.append(member.add_penalty(*loss))
        return found

    def training_step(self, batch: Mapping[str, Any], batch_idx: int) -> Tensor:
        samples = self._samples(batch, batch_idx % self.trainer.accumulate_grad_batches)
        found = self.losses(batch, [member.draws for member in self._members], self.global_step, samples)
        loss = torch.stack([loss for loss, _ in found])  # [M]
        self._log(found, on_step=True, on_epoch=False)
        self.log("loss", loss.detach().mean(), prog_bar=True, logger=False, on_step=True, on_epoch=False)
        return loss.sum()

    def _samples(self, batch: Mapping[str, Any], part: int) -> range:
        return positions(self.trainer, len(batch[self._members[0].first_stage_key]) // len(self._members), part)

    def _log(self, found: Sequence[tuple[Tensor, Mapping[str, Tensor]]], **options: Any) -> None:
        """Every number as the members' mean, and the loss of each member."""
        names = found[0][1]
        means = {name: torch.stack([parts[name] for _, parts in found]).mean() for name in names}
        loss = next(name for name in names if name.endswith("/loss"))
        each = {f"{loss}_member{number}": parts[loss] for number, (_, parts) in enumerate(found)}
        step = {"step": float(self.global_step)} if options.get("on_step") else {}
        self.log_dict({**means, **each, **step}, logger=True, sync_dist=self.trainer.world_size > 1, **options)

    @torch.no_grad()
    def validation_step(self, batch: Mapping[str, Any], batch_idx: int) -> None:
        repeated = repeat_batch(batch, len(self._members))
        draws = [member.validation_draws for member in self._members]
        size = len(batch[self._members[0].first_stage_key])
        found = self.losses(repeated, draws, batch_idx, evaluation_positions(self.trainer, size))
        self._log(found, on_step=False, on_epoch=True, batch_size=size)

    def log_images(self, batch: Mapping[str, Any], **options: Any) -> dict[str, Tensor]:
        """Pictures of the first member."""
        self._switch()
        return self._members[0].log_images(batch, **options)

    def configure_optimizers(self) -> Any:
        """Each member's own optimiser, as its own run has it."""
        optimizers = []
        for member in self._members:
            member.learning_rate = self.learning_rate
            made = member.configure_optimizers()
            optimizers.append(made[0][0] if isinstance(made, tuple) else made)
        together = JointOptimizer(optimizers)
        schedule = self._members[0].scheduler_config
        if schedule is None:
            return together
        factor = make_factor(schedule)
        return [together], [{"scheduler": LambdaLR(together, factor), "interval": "step", "frequency": 1}]

    def configure_gradient_clipping(
        self,
        optimizer: torch.optim.Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip the gradient of each member by itself."""
        if not gradient_clip_val:
            return
        for heads in self.heads:
            if gradient_clip_algorithm == "value":
                nn.utils.clip_grad_value_(list(heads.values()), gradient_clip_val)
            else:
                nn.utils.clip_grad_norm_(list(heads.values()), gradient_clip_val)
