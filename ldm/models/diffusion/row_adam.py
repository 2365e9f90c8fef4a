"""Optimisation of tables by row: rows of classes with few images move as far as rows of classes with many.

Under Adam a row that is in few batches moves little. A gradient in every step moves it by one learning rate each. An
isolated gradient, long after the last, moves it by

    (1 - b1) / sqrt(1 - b2) * sum_k (b1 / sqrt(b2))^k = 31.8 learning rates        b1 = 0.9, b2 = 0.999

of which the first step is (1 - b1) / sqrt(1 - b2) = 3.16 and the moment's decay in later steps the rest; so that after
T steps a row seen k times has moved by 31.8 k at most, against T.

`torch.optim.SparseAdam` leaves the moments of unvisited rows alone too, but corrects their bias by the steps of the
whole table: a first visit at step t moves its row by 3.16 sqrt(1 - b2^t) / (1 - b1^t) learning rates, 3.16 late in a
training. `RowAdam` corrects each row by its own visits, so that the first moves it by one, as every other.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class RowRule:
    """How the rows of one table are trained.

    Args:
        axis: of the table, along which the rows are counted.
        rates: multiples of the learning rate [K].
        centre: what the rows are pulled to, broadcasting to the table; None: nothing pulls.
        pull: where there is a centre, `pull * (table - centre)` joins a row's gradient whenever the row is visited.
    """

    axis: int
    rates: Tensor
    centre: Tensor | None = None
    pull: Tensor | None = None

    def beside(self, table: Tensor) -> RowRule:
        """Return the rule on the device of its table, in the table's type."""
        centre = None if self.centre is None else self.centre.to(table)
        pull = None if self.pull is None else self.pull.to(table)
        return replace(self, rates=self.rates.to(table), centre=centre, pull=pull)

    def pulled(self, gradient: Tensor, table: Tensor) -> Tensor:
        """Add the pull to the gradient of a table; both [K, ...] with the classes along `axis`."""
        if self.centre is None or self.pull is None:
            return gradient
        return gradient + self.pull * (table - self.centre)


class RowAdam(torch.optim.AdamW):
    """AdamW, but tables with a `RowRule` are updated row by row, and only the rows that a batch visits.

    A row is visited when its gradient is not zero. Its moments decay, and their bias is corrected, by its own count of
    visits n (Kingma & Ba 2015, Algorithm 1, applied to each row for itself):

        m <- b1 m + (1 - b1) g,   v <- b2 v + (1 - b2) g^2
        row <- row - lr rates[row] ((m / (1 - b1^n)) / (sqrt(v / (1 - b2^n)) + eps) + weight_decay row)

    So a gradient of constant sign moves a row by lr rates[row] a visit, whatever lies between two visits.

    Args:
        parameters: everything that trains, the tables included.
        rules: for each table.
        lr, weight_decay: as AdamW's; the decay of a table acts on visited rows alone.
    """

    def __init__(
        self, parameters: Iterable[nn.Parameter], rules: Mapping[nn.Parameter, RowRule], lr: float, weight_decay: float
    ):
        super().__init__(parameters, lr=lr, weight_decay=weight_decay)
        self.rules = dict(rules)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        gradients = {table: table.grad for table in self.rules if table.grad is not None}
        for table in gradients:
            table.grad = None  # AdamW passes over parameters without a gradient
        super().step()
        for group in self.param_groups:
            for table in group["params"]:
                if table in gradients:
                    table.grad = gradients[table]
                    self.rules[table] = self.rules[table].beside(table)
                    self._step_rows(table, gradients[table], self.rules[table], group)
        return loss

    def _step_rows(self, table: nn.Parameter, gradient: Tensor, rule: RowRule, group: Mapping[str, Any]) -> None:
        """Update the rows of a table that a gradient visits."""
        state = self.state[table]
        axis = rule.axis
        shape = [-1 if dimension == axis else 1 for dimension in range(table.ndim)]
        visited = gradient.movedim(axis, 0).flatten(1).ne(0).any(1)  # [K]
        if not state:
            state["step"] = torch.zeros(len(visited), dtype=torch.int64, device=table.device)
            state["exp_avg"] = torch.zeros_like(table)
            state["exp_avg_sq"] = torch.zeros_like(table)
        gradient = rule.pulled(gradient, table)
        state["step"] = state["step"].to(table.device) + visited
        counts = state["step"].clamp(min=1).double()
        seen = visited.reshape(shape)
        beta1, beta2 = group["betas"]
        mean = state["exp_avg"]
        square = state["exp_avg_sq"]
        mean.copy_(torch.where(seen, beta1 * mean + (1 - beta1) * gradient, mean))
        square.copy_(torch.where(seen, beta2 * square + (1 - beta2) * gradient.square(), square))
        first, second = ((1 - beta**counts).to(table).reshape(shape) for beta in (beta1, beta2))
        change = (mean / first) / ((square / second).sqrt() + group["eps"]) + group["weight_decay"] * table
        rates = group["lr"] * rule.rates.reshape(shape)
        table.copy_(torch.where(seen, table - rates * change, table))


def visit_probability(counts: Tensor, images: int, batch: int, dropped: float = 0.0) -> Tensor:
    """Return the probability that a batch holds an image of a class whose label is not dropped.

        1 - sum_k C(n, k) C(N - n, G - k) / C(N, G) q^k

    Args:
        counts: images of each class n [K].
        images: N of the data set.
        batch: G that one step sees, drawn without replacement (all of them where G > N).
        dropped: probability q of dropping a label.

    Returns:
        float64 [K]; 0 for classes without images.
    """
    batch = min(batch, images)
    n = counts.double()[:, None]  # [K, 1]
    most = min(batch, int(counts.max())) if dropped else 0
    k = torch.arange(most + 1, dtype=torch.float64, device=counts.device)
    possible = (k <= n) & (batch - k <= images - n)
    whole = torch.tensor(float(images), dtype=torch.float64)
    part = torch.tensor(float(batch), dtype=torch.float64)
    log = _log_choose(n, k) + _log_choose(images - n, batch - k) - _log_choose(whole, part)
    absent = torch.where(possible, log.exp() * float(dropped) ** k, 0.0).sum(1)
    return torch.where(counts > 0, 1 - absent, 0.0).clamp(0, 1)


def _log_choose(n: Tensor, k: Tensor) -> Tensor:
    """Return ln C(n, k) in float64; where k lies outside 0 .. n the value means nothing."""
    n, k = torch.broadcast_tensors(n, k)
    inside = k.clamp(min=0).minimum(n)
    return torch.lgamma(n + 1) - torch.lgamma(inside + 1) - torch.lgamma(n - inside + 1)


def equal_rates(probability: Tensor, cap: float) -> Tensor:
    """Return multiples of the learning rate [K] under which all rows with data move equally far: min(cap, p_max / p).

    A row is visited p T times in T steps, so it moves by at most lr p T rate = lr p_max T: as far as the row of most
    visits at rate 1. Rows without data (p = 0) get 1, and are never visited.
    """
    rates = probability.max() / probability.clamp(min=torch.finfo(probability.dtype).tiny)
    return torch.where(probability > 0, rates.clamp(max=cap), 1.0)
