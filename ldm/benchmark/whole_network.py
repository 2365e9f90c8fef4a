"""Posteriors beyond the last layer: Kronecker factors of every linear layer, and random subsets of the parameters.

    posterior precision = visits N F / sigma^2 + p,    F = E[J^T J] over images, times and noises

with J the derivative of a row's outputs in the parameters and sigma the residuals' deviation. The prior precision p is
the evidence's fixed point (MacKay 1992): p = gamma / |theta|^2, gamma = sum_i l_i / (l_i + p).
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

from ldm.benchmark.epistemic import spread
from ldm.benchmark.method import MethodKind, Scored
from ldm.benchmark.problem import Problem
from ldm.benchmark.trained import TrainedWorld
from ldm.ensembles.members import Members
from ldm.experiments.small_networks import SmallNetwork
from ldm.laplace import Observation
from ldm.util import generator

EXTRA = "pip install 'decu-uncertainty[laplace]'; beside a CPU build of torch its names one by one, with --no-deps"


def find_evidence_precision(data_precisions: Tensor, squared_norm: float, steps: int = 200) -> float:
    """Return the prior precision at which the evidence of a Gaussian around its mode is stationary.

    Args:
        data_precisions: eigenvalues l_i of the precision that the data add.
        squared_norm: |theta|^2 of the parameters.
    """
    precision = 1.0
    for _ in range(steps):
        known = float((data_precisions / (data_precisions + precision)).sum())
        precision = max(known / squared_norm, 1e-6)
    return precision


def scale_of(trained: TrainedWorld) -> float:
    """Return visits N / sigma^2: what E[J^T J] of a row is multiplied by."""
    images = len(trained.data[0])
    sigma = float(trained.laplace().sigma_noise.mean())
    return max(1.0, trained.recipe.visits(images)) * images / sigma**2


@dataclass(frozen=True)
class RandomSubset:
    """A Laplace posterior of parameters drawn at random from the whole network, all others held (FLARE's idea).

    Attributes:
        count: of the parameters.
    """

    count: int = 1000
    kind: ClassVar[MethodKind] = "epistemic"

    @property
    def name(self) -> str:
        """How many parameters."""
        return f"Laplace of {self.count:,} random parameters"

    def score(self, problem: Problem) -> Scored:
        """Return the variance over draws of the weights, held for the whole trajectory."""
        return spread(problem.sample(self.draws(problem)))

    def draws(self, problem: Problem) -> Members:
        """Return draws of the posterior, the same for every picture."""
        trained = problem.trained
        return Members(trained.artefacts.get(f"subset_{self.count}", lambda: draw_subset(trained, self.count)))


def draw_subset(trained: TrainedWorld, count: int) -> dict[str, Tensor]:
    """Return draws {name: [M, ...]} of a posterior of some parameters, with the others as they are."""
    network = trained.base
    parameters = {name: value.detach() for name, value in network.named_parameters()}
    flat = torch.cat([value.flatten() for value in parameters.values()])
    source = generator("random subset", trained.world.seed)
    chosen = torch.randperm(len(flat), generator=source)[:count].sort().values
    fisher = subset_fisher(network, parameters, chosen, trained.observe(trained.settings.fit_draws), source)
    values, vectors = torch.linalg.eigh(scale_of(trained) * fisher)
    values = values.clamp(min=0)
    precision = find_evidence_precision(values, float(flat[chosen].double().square().sum()))
    z = torch.randn(trained.settings.draws, len(chosen), generator=source, dtype=torch.float64)
    change = (z / (values + precision).sqrt()) @ vectors.T
    drawn = flat.repeat(len(z), 1)
    drawn[:, chosen] += change.float()
    sizes = [value.numel() for value in parameters.values()]
    parts = zip(parameters.items(), drawn.split(sizes, 1), strict=True)
    return {name: part.reshape(len(z), *value.shape).contiguous() for (name, value), part in parts}


def subset_fisher(
    network: nn.Module,
    parameters: Mapping[str, Tensor],
    chosen: Tensor,
    rows: Iterator[Observation],
    source: torch.Generator,
) -> Tensor:
    """Return E[J^T J] [P, P] of chosen parameters, float64, from one random direction z of the outputs a row.

    E over z ~ N(0, I) of (J^T z)(J^T z)^T is J^T J, so that a row costs one gradient.
    """

    def project(own: Mapping[str, Tensor], x: Tensor, t: Tensor, label: Tensor, z: Tensor) -> Tensor:
        output = functional_call(network, dict(own), (x[None], t[None], label[None]))
        return (output[0] * z).sum()

    per_row = vmap(grad(project), (None, 0, 0, 0, 0))
    total = torch.zeros(len(chosen), len(chosen), dtype=torch.float64)
    count = 0
    for row in rows:
        z = torch.randn(row.x.shape, generator=source)
        assert row.cond is not None  # the digits' classes
        found = per_row(dict(parameters), row.x, row.t, row.cond, z)
        own = torch.cat([value.flatten(1) for value in found.values()], 1)[:, chosen].double()
        total += own.T @ own
        count += len(own)
    return total / count


class _AsRegression(nn.Module):
    """The small network as a function of one mapping, with outputs [B, D], as curvlinops takes it."""

    def __init__(self, network: SmallNetwork):
        super().__init__()
        self.network = network

    def forward(self, given: Mapping[str, Tensor]) -> Tensor:
        return self.network(given["x"], given["t"], given["label"]).flatten(1)


@dataclass(frozen=True)
class KroneckerPosterior:
    """A Laplace posterior of every linear layer by EKFAC (George et al. 2018), as curvlinops computes it.

    The class table, which is no linear layer, is held.
    """

    name: str = "Laplace EKFAC, whole network"
    kind: ClassVar[MethodKind] = "epistemic"
    needs: ClassVar[tuple[str, str]] = ("curvlinops", "laplace")

    def score(self, problem: Problem) -> Scored:
        """Return the variance over draws of the weights, held for the whole trajectory."""
        return spread(problem.sample(self.draws(problem)))

    def draws(self, problem: Problem) -> Members:
        """Return draws of the posterior, the same for every picture."""
        trained = problem.trained
        return Members(trained.artefacts.get("ekfac", lambda: draw_kronecker(trained)))


@dataclass(frozen=True)
class KroneckerFactors:
    """E[J^T J] of linear layers in its eigenbasis, by the name of the parameter.

    Attributes:
        rows: {name: eigenvectors [D, D] of the outputs' side}.
        columns: {name: eigenvectors [K, K] of the inputs' side}, of weights alone.
        values: {name: eigenvalues [D, K] of a weight, [D] of a bias}.
    """

    rows: dict[str, Tensor]
    columns: dict[str, Tensor]
    values: dict[str, Tensor]


@torch.enable_grad()
def find_kronecker_factors(network: SmallNetwork, rows: Iterator[Observation], seed: int = 0) -> KroneckerFactors:
    """Return EKFAC's factors of the linear layers.

    Raises:
        ValueError: naming the extra, where curvlinops is not installed.
    """
    try:
        from curvlinops import EKFACLinearOperator
    except ImportError as error:
        raise ValueError(f"EKFAC is computed by curvlinops, which is not installed ({error}): {EXTRA}") from error
    model = _AsRegression(copy.deepcopy(network)).eval()
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, nn.Linear)}
    named = {
        f"{name}.{part}": layer.get_parameter(part) for name, layer in layers.items() for part in ("weight", "bias")
    }
    for value in named.values():
        value.requires_grad_(True)
    data = [({"x": row.x, "t": row.t, "label": row.cond}, row.target.flatten(1)) for row in rows]
    operator = EKFACLinearOperator(
        model,
        nn.MSELoss(),
        list(named.values()),
        data,
        check_deterministic=False,
        seed=seed,
        batch_size_fn=lambda given: len(given["x"]),
    )
    operator.compute_kronecker_factors()
    operator.compute_eigenvalue_correction()
    state = operator.state_dict()
    # The operator is of the mean over rows and outputs: 2 / outputs E[J^T J].
    unit = data[0][1].shape[1] / 2
    names = list(named)
    found = KroneckerFactors({}, {}, {})
    for layer, own in state["corrected_eigenvalues"].items():
        for place, values in own.items():
            name = names[place].removeprefix("network.")
            found.rows[name] = state["gradient_covariances_eigenvectors"][layer].detach()
            if values.ndim == 2:
                found.columns[name] = state["input_covariances_eigenvectors"][layer].detach()
            found.values[name] = unit * values.detach().double()
    return found


def draw_kronecker(trained: TrainedWorld) -> dict[str, Tensor]:
    """Return draws {name: [M, ...]} of the posterior of all linear layers."""
    network = trained.base
    factors = find_kronecker_factors(network, trained.observe(trained.settings.fit_draws), trained.world.seed)
    scale = scale_of(trained)
    own = {name: network.get_parameter(name).detach() for name in factors.values}
    every = torch.cat([scale * value.flatten() for value in factors.values.values()])
    norm = sum(float(value.double().square().sum()) for value in own.values())
    precision = find_evidence_precision(every, norm)
    source = generator("ekfac", trained.world.seed)
    drawn = {}
    for name, values in factors.values.items():
        z = torch.randn(trained.settings.draws, *values.shape, generator=source, dtype=torch.float64)
        z = (z / (scale * values + precision).sqrt()).float()
        if name in factors.columns:
            change = factors.rows[name] @ z @ factors.columns[name].T
        else:
            change = z @ factors.rows[name].T
        drawn[name] = own[name] + change
    return drawn
