"""Explicit Runge-Kutta methods by their tableau, in fixed steps or with an error estimate, for d y / d tau = f(y, tau).

`Integrator` crosses any interval, forwards or backwards, with an optional integral beside the state (a likelihood's
divergence). The samplers' own fixed-step methods (`runge_kutta`) know besides where a network may not be asked.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

# (y, tau) -> (d y / d tau, rate of the integral or None)
Slope = Callable[[Tensor, float], tuple[Tensor, Tensor | None]]


@dataclass(frozen=True)
class Tableau:
    """Rows a (strictly lower), weights b, order; `error` b - b* of an embedded method where there is one.

    With an embedded method the last stage is the slope at the end of the step (first same as last).
    """

    a: tuple[tuple[float, ...], ...]
    b: tuple[float, ...]
    order: int
    error: tuple[float, ...] | None = None

    @property
    def nodes(self) -> tuple[float, ...]:
        return tuple(math.fsum(row) for row in self.a)


TABLEAUX = {
    "euler": Tableau(((),), (1.0,), 1),
    "midpoint": Tableau(((), (0.5,)), (0.0, 1.0), 2),
    "heun2": Tableau(((), (1.0,)), (0.5, 0.5), 2),
    "heun3": Tableau(((), (1 / 3,), (0.0, 2 / 3)), (0.25, 0.0, 0.75), 3),
    # Kutta's 3/8 rule, which is what torchdiffeq calls rk4; the sampler RK4 is the classical rule of the same order.
    "rk4": Tableau(((), (1 / 3,), (-1 / 3, 1.0), (1.0, -1.0, 1.0)), (1 / 8, 3 / 8, 3 / 8, 1 / 8), 4),
    # Dormand and Prince 1980, table 2: order 5 with an embedded order 4.
    "dopri5": Tableau(
        (
            (),
            (1 / 5,),
            (3 / 40, 9 / 40),
            (44 / 45, -56 / 15, 32 / 9),
            (19372 / 6561, -25360 / 2187, 64448 / 6561, -212 / 729),
            (9017 / 3168, -355 / 33, 46732 / 5247, 49 / 176, -5103 / 18656),
            (35 / 384, 0.0, 500 / 1113, 125 / 192, -2187 / 6784, 11 / 84),
        ),
        (35 / 384, 0.0, 500 / 1113, 125 / 192, -2187 / 6784, 11 / 84, 0.0),
        5,
        (71 / 57600, 0.0, -71 / 16695, 71 / 1920, -17253 / 339200, 22 / 525, -1 / 40),
    ),
}


def tableau(name: str) -> Tableau:
    """A tableau by the name that flow_matching's (torchdiffeq's) users know.

    Raises:
        ValueError: for an unknown name.
    """
    if name not in TABLEAUX:
        raise ValueError(f"method must be one of {list(TABLEAUX)}, got '{name}'")
    return TABLEAUX[name]


@dataclass
class Integrator:
    """Walks d y / d tau = slope(y, tau): one step an interval, or with an embedded method as many as its error asks.

    The error of a step is the largest over images of the root mean square of error / (atol + rtol |y|), at most 1, in
    the first member of states [M, B, ...] alone: members and tangents are carried along its steps.

    Attributes:
        width: size of the next adaptive step, carried from interval to interval.
        most: adaptive steps of an interval at most.
    """

    slope: Slope
    tableau: Tableau
    rtol: float = 1e-5
    atol: float = 1e-5
    most: int = 1000
    width: float | None = None
    last: tuple[Tensor, Tensor | None] | None = None

    def forget(self) -> None:
        """The state was changed from outside: the slope at its place is not known any more."""
        self.last = None

    def across(self, y: Tensor, start: float, stop: float) -> tuple[Tensor, Tensor | float]:
        """State at `stop` and the integral over the interval (0.0 where there is none).

        Raises:
            ValueError: if the adaptive steps do not get there: their number, or a state that is not finite.
        """
        if self.tableau.error is None:
            y, gained, _ = self._step(y, start, stop - start)
            return y, gained
        place = start
        total: Tensor | float = 0.0
        sign = math.copysign(1.0, stop - start)
        for _ in range(self.most):
            left = abs(stop - place)
            width = min(self._first_width(y, place, left) if self.width is None else self.width, left)
            ends = width >= left * (1 - 1e-12)
            after, gained, error = self._step(y, place, stop - place if ends else sign * width)
            grown = width * min(10.0, max(0.2, 0.9 * max(error, 1e-10) ** (-1 / self.tableau.order)))
            if error <= 1:
                y, total = after, total + gained
                # An interval's end that cut a step short says nothing of how long the next may be.
                self.width = max(grown, self.width or 0.0) if ends and width < (self.width or 0.0) else grown
                if ends:
                    return y, total
                place += sign * width
            else:
                self.width, self.last = grown, self.first
        raise ValueError(
            f"{self.most} adaptive steps did not lead from {start:g} to {stop:g} (now at {place:g}): is the state "
            "finite? otherwise loosen rtol and atol"
        )

    def _step(self, y: Tensor, tau: float, width: float) -> tuple[Tensor, Tensor | float, float]:
        """(state after one step, what the integral gained, error in units of the tolerance)."""
        slopes: list[tuple[Tensor, Tensor | None]] = []
        for row, node in zip(self.tableau.a, self.tableau.nodes, strict=True):
            if not slopes and self.last is not None:
                slopes.append(self.last)
                continue
            at = y if not slopes else y + width * _combined(row, [slope for slope, _ in slopes])
            slopes.append(self.slope(at, tau + node * width))
        states = [slope for slope, _ in slopes]
        rates = [rate for _, rate in slopes if rate is not None]
        after = y + width * _combined(self.tableau.b, states)
        gained = width * _combined(self.tableau.b, rates) if rates else 0.0
        if self.tableau.error is None:
            return after, gained, 0.0
        self.first, self.last = slopes[0], slopes[-1]
        error = self._size(width * _combined(self.tableau.error, states), y, after)
        if isinstance(gained, Tensor):
            missed = width * _combined(self.tableau.error, rates)
            error = max(error, float((missed.abs() / (self.atol + self.rtol * gained.abs())).max()))
        return after, gained, error if math.isfinite(error) else math.inf

    def _size(self, error: Tensor, before: Tensor, after: Tensor) -> float:
        before, after = (state[0] if state.ndim == 5 else state for state in (before, after))
        error = error[0] if error.ndim == 5 else error
        scaled = error / (self.atol + self.rtol * torch.maximum(before.abs(), after.abs()))
        return float(scaled.square().flatten(1).mean(1).sqrt().max())

    def _first_width(self, y: Tensor, tau: float, left: float) -> float:
        """A hundredth of the way in which the state would move by its own size (Hairer et al. 1993, II.4)."""
        self.last = self.slope(y, tau) if self.last is None else self.last
        speed = float(self.last[0].square().mean().sqrt())
        size = float(y.square().mean().sqrt())
        return min(left, 0.01 * max(size, self.atol) / speed) if speed > 0 else left


def _combined(weights: Sequence[float], slopes: Sequence[Tensor]) -> Tensor:
    total: Tensor | None = None
    for weight, slope in zip(weights, slopes, strict=False):
        if weight:
            total = weight * slope if total is None else total + weight * slope
    assert total is not None
    return total
