"""Anchored members: the minimum of a linear-Gaussian problem is the formula's; noisy members are posterior draws."""

import pytest
import torch
from torch import nn

from ldm.models.diffusion.anchor import Anchor, TargetNoise
from ldm.models.diffusion.row_adam import RowAdam, RowRule, equal_rates, visit_probability

COUNTS = torch.tensor([1, 4, 20, 0])
STRENGTH, DEVIATION, SIGMA = 0.8, 0.7, 0.5


def problem():
    """A table of class means [4, 3], labels [N], observations [N, 3], and an anchored table."""
    source = torch.Generator().manual_seed(0)
    labels = torch.arange(4).repeat_interleave(COUNTS)
    module = nn.Embedding(4, 3).double()
    with torch.no_grad():
        module.weight.copy_(torch.randn(4, 3, generator=source, dtype=torch.float64))
    observed = 2 + SIGMA * torch.randn(len(labels), 3, generator=source, dtype=torch.float64)
    deviations = DEVIATION * torch.ones(4, 1, dtype=torch.float64)
    return module, labels, observed, Anchor({"weight": module.weight}, {"weight": deviations}, STRENGTH, 3)


def minimum(anchor, labels, observed):
    """Where mean |theta_c - y|^2 / D + strength / (2 N D) |theta - anchor|^2 / s^2 has no gradient, class by class."""
    sums = torch.zeros(4, 3, dtype=torch.float64).index_add(0, labels, observed)
    precision = STRENGTH / DEVIATION**2
    return (2 * sums + precision * anchor) / (2 * COUNTS[:, None] + precision)


def data_loss(module, labels, observed):
    return (module(labels) - observed).square().mean()


def test_the_anchored_minimum_is_the_formula():
    module, labels, observed, anchor = problem()
    start = module.weight.detach().clone()
    optimizer = torch.optim.LBFGS(
        module.parameters(), max_iter=30, tolerance_grad=1e-12, tolerance_change=0, line_search_fn="strong_wolfe"
    )

    def closure():
        optimizer.zero_grad()
        loss = data_loss(module, labels, observed) + anchor.penalty(module, len(labels))
        loss.backward()
        return loss

    optimizer.step(closure)
    torch.testing.assert_close(module.weight.detach(), minimum(start, labels, observed), atol=1e-7, rtol=1e-7)
    assert torch.equal(module.weight[3], start[3]), "a class without data stays at its anchor"


def test_at_twice_the_noise_members_are_draws_of_the_posterior():
    """Pearce et al. 2020: with anchors from the prior and resampled data the minima are distributed as the posterior.

    The posterior of a mean seen n times is N(v n ybar / sigma^2, v), 1 / v = n / sigma^2 + 1 / s^2, for a prior mean of
    0. The minimum is linear in the data's mean and in the anchor, with weights from the loss's curvature 2 / D and the
    pull; strength 2 sigma^2 must give those weights, and through them the variance v.
    """
    n, entries = 4, 3
    module = nn.Embedding(1, entries).double()
    deviation = torch.full((1, 1), DEVIATION, dtype=torch.float64)
    pull = Anchor({"weight": module.weight}, {"weight": deviation}, 2 * SIGMA**2, entries).pull("weight", n).item()
    of_data, of_anchor = 2 / entries / (2 / entries + pull), pull / (2 / entries + pull)
    variance = 1 / (n / SIGMA**2 + 1 / DEVIATION**2)
    assert of_data == pytest.approx(variance * n / SIGMA**2)
    assert of_anchor**2 * DEVIATION**2 + of_data**2 * SIGMA**2 / n == pytest.approx(variance)


def test_gradient_of_the_penalty_is_the_pull_and_constants_have_none():
    module, labels, _, anchor = problem()
    start = module.weight.detach().clone()
    with torch.no_grad():
        module.weight.add_(1)
    anchor.penalty(module, len(labels)).backward()
    torch.testing.assert_close(
        module.weight.grad, anchor.pull("weight", len(labels)) * (module.weight.detach() - start)
    )
    constant = anchor.penalty(module, len(labels), leave_out=["weight"])
    assert not constant.requires_grad
    torch.testing.assert_close(constant, anchor.penalty(module, len(labels)))
    assert not anchor.state_dict(), "it is drawn again from the seed"
    assert torch.equal(anchor.centre("weight"), start)


def test_a_pull_at_visits_has_the_same_minimum():
    """Batches of two of 25 images under equal rates: rows are pulled when they are seen, by 1 / p of the pull."""
    module, labels, observed, anchor = problem()
    start, size, steps = module.weight.detach().clone(), 2, 2000
    table, source = module.weight, torch.Generator().manual_seed(1)
    visits = visit_probability(COUNTS, len(labels), size)
    shares = torch.where(visits > 0, 1 / visits, 0)[:, None]
    rule = RowRule(0, equal_rates(visits, 2000.0), anchor.centre("weight"), anchor.pull("weight", len(labels)) * shares)
    optimizer = RowAdam([table], {table: rule}, 1e-2, 0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)
    for _ in range(steps):
        chosen = torch.randperm(len(labels), generator=source)[:size]
        optimizer.zero_grad()
        data_loss(module, labels[chosen], observed[chosen]).backward()
        optimizer.step()
        schedule.step()
    # Steps shrink to zero, so what is left is the noise of the last batches.
    torch.testing.assert_close(table.detach(), minimum(start, labels, observed), atol=0.05, rtol=0)
    assert torch.equal(table[3], start[3])
    assert (table[0] - start[0]).abs().max() > 0.2


def test_a_prior_without_width_is_refused():
    module, *_ = problem()
    with pytest.raises(ValueError, match="no width"):
        Anchor({"weight": module.weight}, {"weight": torch.zeros(4, 1)}, 1.0, 3)


@pytest.mark.parametrize("images", [1, 3, 10, 30, 100])
def test_with_noisy_targets_members_are_draws_of_the_posterior(images):
    """The Bayesian linear model: y = X theta + noise, N images of D entries, a prior deviation of each parameter.

    The minimum of mean |y + e - X theta|^2 + penalty is where its gradient, by the class's own pull, vanishes. Without
    e its covariance is S P S, with it S, the posterior's.
    """
    entries, width, members = 4, 6, 300
    source = torch.Generator().manual_seed(images)
    draw = {"generator": source, "dtype": torch.float64}
    design = torch.randn(images * entries, width, **draw)
    observed = design @ torch.randn(width, **draw) + SIGMA * torch.randn(images * entries, **draw)
    deviations = 0.5 + torch.rand(width, **draw)
    prior = torch.diag(deviations**-2)
    posterior = torch.linalg.inv(design.T @ design / SIGMA**2 + prior)
    weight = 2 / (images * entries)  # of a gradient of the mean error
    spreads = {}
    for kind in ("plain", "noisy"):
        minima = []
        for number in range(members):
            centre = deviations * torch.randn(width, **draw)
            anchor = Anchor({"theta": centre}, {"theta": deviations}, 2 * SIGMA**2, entries)
            target = observed
            if kind == "noisy":
                noise = TargetNoise(0, number, anchor.noise_deviation)
                target = observed + noise(range(images), (entries,)).double().flatten()
            pull = anchor.pull("theta", images)
            left = weight * design.T @ design + torch.diag(pull)
            minima.append(torch.linalg.solve(left, weight * design.T @ target + pull * anchor.centre("theta")))
        spreads[kind] = torch.cov(torch.stack(minima).T)
    assert anchor.noise_deviation == pytest.approx(SIGMA)
    assert 0.9 < float(spreads["noisy"].trace() / posterior.trace()) < 1.1
    without = (posterior @ prior @ posterior).trace()
    assert 0.9 < float(spreads["plain"].trace() / without) < 1.1
    if images > 10:
        assert without < 0.1 * posterior.trace(), "of the anchors alone"
