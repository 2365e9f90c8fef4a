"""Influence of training images by Kronecker factors of the Gauss-Newton matrix (K-FAC), for networks of linear layers.

The loss is the mean of squared errors over D outputs. For a layer y = V [a, 1] the Gauss-Newton matrix over the rows of
the data, and what K-FAC takes for it, are

    E[(2 / D) J^T J (x) a a^T]  ~  S (x) A,    S = E[(2 / D) J^T J],    A = E[a a^T],    J = d outputs / d y

Both expectations are exact, no targets are drawn. The factors are the matrix itself where J is the same for all rows:
in every layer of a linear network, and in the last layer of any. By first order, the loss of query q rises without
image i by

    g_q^T (S (x) A + damping I)^-1 g_i / N

Sources: Martens and Grosse 2015 (K-FAC); Koh and Liang 2017 (influence); Grosse et al. 2023, arXiv 2308.03296 (the
damping of a tenth of the mean eigenvalue of each layer); Mlodozeniec et al. 2024, arXiv 2410.13850 (of diffusion).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ldm.laplace import Observation

# The damping of a layer, as a share of its mean eigenvalue (Grosse et al. 2023).
DAMPING = 0.1


@dataclass(frozen=True)
class LayerFactors:
    """The factors of a layer of O outputs and K inputs, the bias's 1 among them.

    Attributes:
        outputs: S [O, O], float64.
        inputs: A [K, K], float64.
    """

    outputs: Tensor
    inputs: Tensor

    def solve(self, gradients: Tensor, damping: float = DAMPING) -> Tensor:
        """Return (S (x) A + damping mean_eigenvalue I)^-1 times gradients [N, O, K], of the same shape."""
        values, vectors = torch.linalg.eigh(self.outputs)
        others, their_vectors = torch.linalg.eigh(self.inputs)
        eigenvalues = values.clamp(min=0)[:, None] * others.clamp(min=0)
        turned = vectors.T @ gradients.double() @ their_vectors
        return vectors @ (turned / (eigenvalues + damping * eigenvalues.mean())) @ their_vectors.T


def gather_factors(network: nn.Module, batches: Iterable[Observation]) -> dict[str, LayerFactors]:
    """Return the factors of every linear layer and embedding by its name.

    Args:
        network: called once a batch, as network(x, t, cond); every layer sees rows [B, ...] once.

    Raises:
        ValueError: if there is no batch, or a layer sees several positions of a row.
    """
    sums: dict[str, tuple[Tensor, Tensor]] = {}
    count = 0
    for batch in batches:
        with _tapped(network) as seen, torch.enable_grad():
            outputs = network(batch.x, batch.t, batch.cond).flatten(1)
        size = outputs.shape[1]
        each = torch.eye(size).to(outputs)[:, None].expand(-1, len(outputs), -1)
        taps = [tap for _, tap in seen.values()]
        jacobians = torch.autograd.grad(outputs, taps, each, is_grads_batched=True)  # [D, B, O] of each layer
        for (name, (inputs, _)), jacobian in zip(seen.items(), jacobians, strict=True):
            rows = jacobian.flatten(0, 1).double()
            own = (2 / size * rows.T @ rows, inputs.T @ inputs)
            before = sums.get(name, (torch.zeros_like(own[0]), torch.zeros_like(own[1])))
            sums[name] = (before[0] + own[0], before[1] + own[1])
        count += len(outputs)
    if not count:
        raise ValueError("Kronecker factors are means over rows of the data, and there is no batch")
    return {name: LayerFactors(outputs / count, inputs / count) for name, (outputs, inputs) in sums.items()}


def layer_gradients(network: nn.Module, gradients: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return gradients [N, O, K] by layer, from those {parameter: [N, ...]} of the network's parameters."""
    found = {}
    for name, layer in _layers(network).items():
        weight = gradients[f"{name}.weight"]
        if isinstance(layer, nn.Embedding):
            weight = weight.mT
        bias = gradients.get(f"{name}.bias")
        found[name] = weight if bias is None else torch.cat([weight, bias[..., None]], -1)
    return found


def influence(
    factors: Mapping[str, LayerFactors],
    own: Mapping[str, Tensor],
    queries: Mapping[str, Tensor],
    layers: Sequence[str] | None = None,
) -> Tensor:
    """Return how much the loss of each query rises without each training image [N, Q], float64.

    Args:
        own, queries: gradients of the losses of training images [N, O, K] and of queries [Q, O, K] by layer.
        layers: those that are added up; all where None.
    """
    total = torch.zeros(())
    for name in factors if layers is None else layers:
        solved = factors[name].solve(queries[name])
        total = total + own[name].flatten(1).double() @ solved.flatten(1).T / len(own[name])
    return total


def _layers(network: nn.Module) -> dict[str, nn.Module]:
    kinds = nn.Linear | nn.Embedding
    return {name: layer for name, layer in network.named_modules() if isinstance(layer, kinds)}


@contextmanager
def _tapped(network: nn.Module) -> Iterator[dict[str, tuple[Tensor, Tensor]]]:
    """Give {layer: (its inputs [B, K] float64, zeros that are added to its outputs [B, O])} of one call."""
    seen: dict[str, tuple[Tensor, Tensor]] = {}

    def tap(name: str, layer: nn.Module, inputs: tuple[Tensor], output: Tensor) -> Tensor:
        if output.ndim != 2 or name in seen:
            raise ValueError(f"K-FAC of layer {name} takes one vector a row, and it saw several")
        added = torch.zeros_like(output).requires_grad_()
        if isinstance(layer, nn.Embedding):
            given = F.one_hot(inputs[0], layer.num_embeddings).double()
        else:
            given = inputs[0].detach().double()
            given = given if layer.bias is None else F.pad(given, (0, 1), value=1.0)
        seen[name] = (given, added)
        return output + added

    handles = [layer.register_forward_hook(partial(tap, name)) for name, layer in _layers(network).items()]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()
