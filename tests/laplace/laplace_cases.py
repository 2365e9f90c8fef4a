"""Small networks with a last layer of every kind, observations, and dense answers by automatic differentiation."""

from __future__ import annotations

import torch
from torch import nn
from torch.func import functional_call, jacrev

from ldm.laplace import LastLayerLaplace, Observation


class Network(nn.Module):
    """x [B, 2, 5, 6], t [B], labels [B] -> output of `last`, whose input are smooth features of all three."""

    def __init__(self, last: nn.Module, width: int, tokens: bool):
        super().__init__()
        self.first, self.labels, self.tokens = nn.Conv2d(2, width, 3, padding=1), nn.Embedding(4, width), tokens
        self.out = nn.Sequential(nn.Tanh(), last)

    def backbone(self, x, t, cond):
        features = self.first(x) + (0.001 * t[:, None] + self.labels(cond))[:, :, None, None]
        return features.flatten(2).transpose(1, 2) if self.tokens else features

    def forward(self, x, t, cond):
        return self.out(self.backbone(x, t, cond))


LAYERS = {
    "convolution": lambda: (nn.Conv2d(3, 2, 3, padding=1), 3, False),
    "strided": lambda: (nn.Conv2d(2, 3, (2, 3), stride=2, padding=(1, 0), bias=False), 2, False),
    "dilated": lambda: (nn.Conv2d(2, 2, 2, dilation=2, padding="valid"), 2, False),
    "linear": lambda: (nn.Linear(5, 3), 5, True),
}


def make_network(kind="convolution", seed=0):
    network = Network(*LAYERS[kind]()).double()
    source = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=source, dtype=torch.float64) * 0.7)
    return network


def make_batch(network, count, seed=1, noise=0.5):
    """Rows with targets near the outputs, as after training."""
    source = torch.Generator().manual_seed(seed)
    x = torch.randn(count, 2, 5, 6, generator=source, dtype=torch.float64)
    t = torch.randint(1, 1000, (count,), generator=source).double()
    cond = torch.randint(0, 4, (count,), generator=source)
    with torch.no_grad():
        output = network(x, t, cond)
    target = output + noise * torch.randn(output.shape, generator=source, dtype=torch.float64)
    return Observation(x, t, cond, target)


def by_channel(parameters):
    """[weights [..., C, K], biases [..., C]] or the former alone, as one matrix, the bias last."""
    weight, *bias = parameters
    return torch.cat([weight, *[part[..., None] for part in bias]], -1)


def jacobian(network, x, t, cond):
    """d output / d last layer [B, positions x outputs, C, K] by autograd, outputs in the order of the output."""
    names = [name for name, _ in network.named_parameters() if name.startswith("out.1")]
    own = {name: dict(network.named_parameters())[name].detach() for name in names}
    result = jacrev(lambda parameters: functional_call(network, parameters, (x, t, cond)))(own)
    lead = network(x, t, cond).ndim
    parts = [result[name] for name in names]
    weight = parts[0].flatten(lead + 1)
    return by_channel([weight, *parts[1:]]).flatten(1, lead - 1).detach()


def dense_variance(jacobians, covariance, shape):
    """diag(J S J^T) for S [C K, C K] in the output's shape."""
    flat = jacobians.flatten(2)
    return torch.einsum("bpk,kl,bpl->bp", flat, covariance, flat).reshape(shape)


def precision(jacobians, sigma, prior):
    """J^T J / sigma^2 + prior I over all parameters [C K, C K]."""
    flat = jacobians.flatten(2).flatten(0, 1)
    return flat.T @ flat / sigma**2 + prior * torch.eye(flat.shape[1], dtype=flat.dtype)


def fitted(network, batch, curvature="full", draws=1, data_size=None, also=(), **options):
    laplace = LastLayerLaplace(network, "out.1", curvature=curvature, **options)
    return laplace.fit([batch], draws=draws, data_size=data_size, also=also)
