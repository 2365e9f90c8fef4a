"""Training a member of an ensemble: heads on a frozen base model, and checkpoints that hold the heads alone (DECU)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor, nn

from ldm.diffusion.losses import LossSettings
from ldm.ensembles.heads import (
    MemberRecord,
    freeze_all_but,
    initialise,
    initialise_low_rank,
    merge,
    row_deviations,
    split,
)
from ldm.models.diffusion.anchor import Anchor, TargetNoise
from ldm.models.diffusion.head_options import describe_member
from ldm.models.diffusion.optimisation import TrainingSet
from ldm.models.diffusion.row_adam import RowRule, equal_rates, visit_probability
from ldm.models.protocols import HasHeads
from ldm.modules.low_rank import add_factors, draw_factors, find_layers
from ldm.util import generator, read_image_size


class MemberTraining(nn.Module):
    """One member in training: which it is, what pulls its heads to their start, and how the rows of its tables move.

    It is a module so that the anchor follows the model from device to device. It has no parameters and saves no tensor.

    Args:
        record: which member it is, and what its heads are.
        anchor: the prior of an anchored member; None for any other.
        target_noise: of a member with `heads.targets: noisy`; None for any other.

    Attributes:
        training_set: what the rules ask of the training data; None: what the trainer's data module says.
    """

    def __init__(self, record: MemberRecord, anchor: Anchor | None = None, target_noise: TargetNoise | None = None):
        super().__init__()
        self.record = record
        self.anchor = anchor
        self.target_noise = target_noise
        self.training_set: TrainingSet | None = None

    def read_training_set(self, trainer: pl.Trainer | None) -> TrainingSet:
        """Return `training_set`, or what the data module of a trainer says of its training data.

        Raises:
            ValueError: if neither is there.
        """
        return self.training_set or TrainingSet.from_trainer(trainer)

    def check_loss(self, settings: LossSettings) -> None:
        """Raise a ValueError where the targets are noisy and the loss is not the mean squared error."""
        if self.target_noise is not None and settings != LossSettings():
            raise ValueError(
                "heads.targets: noisy is noise of a mean squared error: it goes neither with loss_type l1, a bound's "
                "weight, a learned variance or logvar, nor with loss_weight or another l_simple_weight than 1"
            )

    def draw_target_noise(self, batch: Mapping[str, Any], x: Tensor) -> Tensor | None:
        """Return what is added to the targets of a batch, like its clean states x [B, C, H, W]; None: nothing is.

        Raises:
            ValueError: if the batch does not say which images it holds.
        """
        if self.target_noise is None:
            return None
        index = batch.get("index")
        if index is None:
            raise ValueError("heads.targets: noisy gives every image its own noise: its items need their `index`")
        return self.target_noise(torch.as_tensor(index).tolist(), x.shape[1:]).to(x)

    def penalty(self, model: HasHeads, trainer: pl.Trainer | None) -> Tensor:
        """Return the anchored member's penalty [], 0 for any other member.

        Where tables are trained by row, their pull is the optimiser's (`RowRule`).
        """
        if self.anchor is None:
            return torch.zeros(())
        by_row = model.class_tables.axes if self.record.row_rates == "equal" else ()
        return self.anchor.penalty(model, self.read_training_set(trainer).images, by_row)

    def row_rules(self, model: HasHeads, trainer: pl.Trainer | None = None) -> dict[nn.Parameter, RowRule]:
        """With `heads.row_rates: equal`, return how the rows of the tables that train are updated; else nothing.

        A row's rate is the learning rate times min(row_cap, p_max / p), p being its probability to be in a batch, so
        that the expected sum of its steps is the same for every row with data. An anchored row is pulled whenever it is
        visited, by 1 / p of its pull, so that the minimum stays where the loss has it; rows without data stay at their
        anchor. See `RowAdam`.

        Raises:
            ValueError: if no table of classes trains, or the training data are not known.
        """
        if self.record.row_rates == "none":
            return {}
        data = self.read_training_set(trainer)
        rules: dict[nn.Parameter, RowRule] = {}
        for name, axis in model.class_tables.axes.items():
            table = model.get_parameter(name)
            if table.requires_grad:
                visits = _row_visits(model, data, table.shape[axis])
                centre, pull = self._row_pull(name, axis, table, visits, data)
                rules[table] = RowRule(axis, equal_rates(visits, self.record.row_cap), centre, pull)
        if not rules:
            raise ValueError(
                f"heads.row_rates: equal acts on tables of classes, and {list(self.record.heads)} have none"
            )
        return rules

    def _row_pull(
        self, name: str, axis: int, table: Tensor, visits: Tensor, data: TrainingSet
    ) -> tuple[Tensor | None, Tensor | None]:
        """(centre, pull) of an anchored table, both broadcasting to it; its rows have the probabilities `visits`."""
        if self.anchor is None:
            return None, None
        shape = [-1 if dimension == axis else 1 for dimension in range(table.ndim)]
        pull = self.anchor.pull(name, data.images)  # a joint training's table may be on its device before it
        return self.anchor.centre(name), pull * torch.where(visits > 0, 1 / visits, 0).to(pull).reshape(shape)

    def keep_heads(self, checkpoint: dict[str, Any]) -> None:
        """Replace a checkpoint's weights by the heads and a reference to the base checkpoint."""
        checkpoint["state_dict"] = split(checkpoint["state_dict"], self.record.patterns)[0]
        checkpoint["component"] = self.record.as_dict()


def merge_heads(checkpoint: dict[str, Any], member: MemberTraining | None, base: Mapping[str, Tensor]) -> None:
    """Put a member's checkpoint together again with the base weights that are loaded already.

    Raises:
        ValueError: if the run trains no member, or stands on another base checkpoint.
    """
    if member is None:
        raise ValueError("this checkpoint holds the heads of a member: resume with --start_from_pretrained")
    found = member.record.base_sha256
    expected = checkpoint["component"]["trunk_sha256"]
    if found != expected:
        raise ValueError(
            f"the member was trained on a base checkpoint with sha256 {expected[:12]}, {member.record.base_path} has "
            f"{found[:12]}: use the base checkpoint it was trained on"
        )
    checkpoint["state_dict"] = merge(base, checkpoint["state_dict"])


def start_member(model: HasHeads, base: str, index: int, seed: int, options: Mapping[str, Any]) -> MemberTraining:
    """Load the base checkpoint, freeze everything but the heads, and start them from draws seeded by (seed, index).

    Args:
        model: has the heads; it keeps no averages of its weights from now on.
        base: checkpoint of the trained base model.
        index: number of this member.
        seed: of this member's draws.
        options: `names` of heads or patterns; `init` (pretrained, perturbed, random, anchored); `noise` in row
            standard deviations; `null_class` (shared, trained, random); `anchor`, precision of an anchored member's
            prior (see `Anchor`), and its `targets` (plain, noisy); `row_rates` (none, equal) and `row_cap`, see
            `MemberTraining.row_rules`; `lora`, the `layers` (patterns, or "attention") and `rank` of the head lora.
            What is not given is taken from `DEFAULTS`.

    Raises:
        ValueError: for an unknown option, head or value, and for weight decay that would move a shared null class.
    """
    record = describe_member(model, base, index, seed, options)
    model.init_from_ckpt(base, use_averaged=True)
    model.drop_averages()
    if record.layers:
        add_factors(model.network, find_layers(model.network, record.layers), record.rank)
    parameters = freeze_all_but(model, record.patterns)
    shared = model.class_tables.null_rows(parameters) if record.null_class == "shared" else {}
    if model.weight_decay and any(axis == 0 for axis, _ in shared.values()):
        raise ValueError(
            f"weight_decay {model.weight_decay} would shrink the shared null class: set model.params.weight_decay to "
            "0, or heads.null_class to trained or random"
        )
    deviations = _draw_start(model, parameters, record, shared)
    for name, (axis, rows) in shared.items():
        parameters[name].register_hook(_without_rows(axis, rows))
    anchor = None
    if record.anchor is not None:
        for name, (axis, rows) in shared.items():
            everywhere = deviations[name].expand_as(parameters[name])
            deviations[name] = everywhere.index_fill(axis, torch.tensor(rows, device=everywhere.device), torch.inf)
        height, width = read_image_size(model.image_size)
        anchor = Anchor(parameters, deviations, record.anchor, model.channels * height * width)
    noise = None
    if anchor is not None and record.targets == "noisy":
        noise = TargetNoise(record.seed, record.index, anchor.noise_deviation)
    return MemberTraining(record, anchor, noise)


def _draw_start(
    model: HasHeads,
    parameters: Mapping[str, nn.Parameter],
    record: MemberRecord,
    shared: Mapping[str, tuple[int, tuple[int, ...]]],
) -> dict[str, Tensor]:
    """Draw the heads' start; return the deviations of the draw around what was loaded, broadcasting to each."""
    draws = generator("heads", record.seed, record.index)
    low_rank = model.class_tables.low_rank
    if low_rank is not None and not all(name in parameters for name in low_rank[:2]):
        low_rank = None
    factors = () if low_rank is None else low_rank[:2]
    deviations = _draw_layers(model, parameters, record, draws)
    plain = {name: value for name, value in parameters.items() if name not in factors and name not in deviations}
    deviations |= {name: record.noise * row_deviations(value) for name, value in plain.items()}
    # The table's rows set the factors' spread: read before the table itself is perturbed.
    rows = None if low_rank is None else record.noise * row_deviations(model.get_parameter(low_rank[2]))[:, 0]
    kept = {name: rows for name, (axis, rows) in shared.items() if axis == 0}
    tables = (*model.class_tables.axes, *model.class_tables.null_tokens)
    initialise(plain, record.init, draws, record.noise, kept, tables)
    if low_rank is not None and rows is not None:
        a, b = (parameters[name] for name in factors)
        if bool(b.any()):
            raise ValueError(f"the base checkpoint has a low-rank correction of its own: add it to {low_rank[2]} first")
        null = model.class_tables.null_class if record.null_class == "shared" else None
        spread = initialise_low_rank(a, b, rows, record.init, draws, null)
        deviations.update(zip(factors, spread, strict=True))
    return deviations


def _draw_layers(
    model: HasHeads, parameters: Mapping[str, nn.Parameter], record: MemberRecord, draws: torch.Generator
) -> dict[str, Tensor]:
    """Draw the start of the factors of layers; return their deviations, broadcasting to each."""
    deviations: dict[str, Tensor] = {}
    known = dict(model.named_parameters())
    for name, a in parameters.items():
        layer = name.removesuffix(".lora_A")
        weight = known.get(f"{layer}.weight")
        if layer == name or weight is None:
            continue
        spread = None
        if record.init in ("perturbed", "anchored"):
            spread = record.noise * row_deviations(weight)
        elif record.init == "random":
            spread = torch.full_like(row_deviations(weight), weight[0].numel() ** -0.5)
        b = f"{layer}.lora_B"
        deviations[name], deviations[b] = draw_factors(weight, a, parameters[b], spread, draws)
    return deviations


def _without_rows(axis: int, rows: Sequence[int]) -> Callable[[Tensor], Tensor]:
    """Make a hook that leaves rows of a gradient out: the shared null condition does not train."""

    def hook(gradient: Tensor) -> Tensor:
        return gradient.index_fill(axis, torch.tensor(rows, device=gradient.device), 0)

    return hook


def _row_visits(model: HasHeads, data: TrainingSet, rows: int) -> Tensor:
    """Probability that a batch holds an image of each class of a table, the null class among them: [rows]."""
    dropped = model.class_tables.label_dropout
    null = model.class_tables.null_class
    counts = data.counts(rows)
    if null is not None and 0 <= null < rows:  # classes are numbered without it
        counts = torch.cat([counts[:null], counts.new_zeros(1), counts[null:-1]])
    visits = visit_probability(counts, data.images, data.batch, dropped)
    if dropped and null is not None and 0 <= null < rows:
        visits[null] = 1 - (1 - dropped) ** min(data.batch, data.images)
    return visits
