"""Heads: which parameters they are, how they start, and that they come apart and together again."""

import pytest
import torch
from torch import nn

from ldm.ensembles.heads import freeze_all_but, initialise, initialise_low_rank, merge, resolve_patterns, select, split
from ldm.util import generator

NAMED = {"out": ("model.out.*",), "embedding": ("embedding.weight",)}


def test_names_and_patterns():
    assert resolve_patterns("out", NAMED) == ("model.out.*",)
    assert resolve_patterns(["embedding", "model.time.*"], NAMED) == ("embedding.weight", "model.time.*")
    with pytest.raises(ValueError, match="unknown head 'head'"):
        resolve_patterns("head", NAMED)
    with pytest.raises(ValueError, match="fits no parameter"):
        select(["a.weight"], ["b.*"])


def test_freeze_split_merge():
    module = nn.ModuleDict({"trunk": nn.Linear(2, 2), "head": nn.Linear(2, 1)})
    trained = freeze_all_but(module, ["head.*"])
    assert sorted(trained) == ["head.bias", "head.weight"]
    assert [name for name, p in module.named_parameters() if p.requires_grad] == list(trained)
    heads, trunk = split(module.state_dict(), ["head.*"])
    assert sorted(heads) == sorted(trained)
    assert merge({**trunk, **heads}, {"head.bias": torch.tensor([9.0])})["head.bias"].item() == 9
    with pytest.raises(ValueError, match="not in the base model"):
        merge(trunk, {"other": torch.zeros(1)})
    with pytest.raises(ValueError, match="shape"):
        merge({**trunk, **heads}, {"head.bias": torch.zeros(2)})


def test_initialisations_have_the_stated_spread():
    row_scale = torch.linspace(0.1, 3, 11)
    table = row_scale[:, None] * torch.randn(11, 4000, generator=generator("table"))
    start = {"embedding.weight": table.clone()}
    initialise(start, "pretrained", generator(1))
    assert torch.equal(start["embedding.weight"], table)
    initialise(start, "perturbed", generator(1), noise=0.5, rows={"embedding.weight": (10,)})
    change = start["embedding.weight"] - table
    assert torch.equal(change[10], torch.zeros(4000)), "the shared row keeps its value"
    # 4000 draws: the relative error of a standard deviation is about 1 / sqrt(8000) = 1.1 %.
    torch.testing.assert_close(change[:10].std(1), 0.5 * table[:10].std(1), rtol=0.06, atol=0)
    initialise(start, "random", generator(2))
    torch.testing.assert_close(start["embedding.weight"].std(1), torch.ones(11), rtol=0.06, atol=0)
    linear = {"out.weight": torch.zeros(8, 4000), "out.bias": torch.ones(8), "norm.weight": torch.zeros(8)}
    initialise(linear, "random", generator(3))
    torch.testing.assert_close(linear["out.weight"].std(1) * 4000**0.5, torch.ones(8), rtol=0.06, atol=0)
    assert torch.equal(linear["out.bias"], torch.zeros(8))
    assert torch.equal(linear["norm.weight"], torch.ones(8)), "a norm that multiplies by zero would cut the head off"
    with pytest.raises(ValueError, match="must be one of"):
        initialise(linear, "zeros", generator(3))


def test_draws_depend_on_seed_and_component_only():
    def draw(*keys):
        start = {"w": torch.zeros(3, 5)}
        initialise(start, "random", generator("heads", *keys))
        return start["w"]

    assert torch.equal(draw(0, 1), draw(0, 1))
    assert not torch.equal(draw(0, 1), draw(1, 0))


def test_low_rank_starts_have_the_stated_spread():
    deviations, a, b = torch.linspace(0.1, 2, 11), torch.empty(16, 11), torch.empty(50, 16)
    for how, expected in (("pretrained", 0 * deviations), ("perturbed", deviations), ("random", torch.ones(11))):
        source, squares = generator(how), torch.zeros(11)
        for _ in range(200):
            spread, width = initialise_low_rank(a, b, deviations, how, source, null=10)
            squares += (b @ a).square().mean(0) / 200
        expected = expected * (torch.arange(11) < 10)
        # A draw's mean square of a row varies by sqrt(2 / 16 + 2 / 50) = 0.4 of it, so 200 draws' root by 1.4 %.
        torch.testing.assert_close(squares.sqrt(), expected, rtol=0.06, atol=0)
        torch.testing.assert_close((spread * width)[0] * 16**0.5, expected)
        assert torch.equal(a[:, 10], torch.zeros(16))
    assert initialise_low_rank(a, b, deviations, "pretrained", generator(0))[0].tolist() == [[1.0] * 11]
    with pytest.raises(ValueError, match="must be one of"):
        initialise_low_rank(a, b, deviations, "zeros", generator(0))
