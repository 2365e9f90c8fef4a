"""All members in one call equal M separate networks, for every kind of head, in every way of evaluation."""

import pytest
import torch
from torch.func import functional_call
from torch.utils.flop_counter import FlopCounterMode

from ldm.ensembles.heads import resolve_patterns, select
from ldm.ensembles.members import MemberNetwork, Members, SingleMember
from tests.conftest import tiny_model

HEADS = [
    ["class_embedding"],
    ["output"],
    ["time_embedding"],
    ["class_embedding", "output", "time_embedding"],
    ["model.diffusion_model.input_blocks.0.*"],
    ["model.diffusion_model.input_blocks.1.0.in_layers.0.*"],  # a norm, which no product of layers folds
]


def make_members(network, patterns, count, seed=1):
    """`count` perturbed copies of the parameters that fit the patterns."""
    source = torch.Generator().manual_seed(seed)
    state = network.state_dict()
    names = select(state, patterns)
    return [
        {name: state[name] + 0.3 * torch.randn(state[name].shape, generator=source) for name in names}
        for _ in range(count)
    ]


@pytest.fixture(scope="module")
def model():
    return tiny_model().double()


@pytest.mark.parametrize("heads", HEADS, ids=["+".join(heads) for heads in HEADS])
@pytest.mark.parametrize("shared", [True, False], ids=["shared-x", "own-x"])
def test_members_equal_separate_passes(model, heads, shared):
    network, source = model.network, torch.Generator().manual_seed(2)
    dictionaries = [
        {name: value.double() for name, value in member.items()}
        for member in make_members(network, resolve_patterns(heads, model.head_patterns), 3)
    ]
    x = torch.randn((2, 1, 8, 8) if shared else (3, 2, 1, 8, 8), generator=source, dtype=torch.float64)
    t, labels = torch.tensor([700.0, 3.0], dtype=torch.float64), torch.tensor([4, 10])
    with torch.no_grad():
        apart = torch.stack(
            [
                functional_call(network, member, (x if shared else x[m], t, labels))
                for m, member in enumerate(dictionaries)
            ]
        )
        members = Members.stack(dictionaries)
        together = MemberNetwork(network, members)
        by_vmap = MemberNetwork(network, members, staged=False)
        assert together.staged == (heads != HEADS[-1]) and together.folds == (heads == HEADS[-2])
        for candidate in (
            together,
            by_vmap,
            MemberNetwork(network, members, chunk=2),
            MemberNetwork(network, members, chunk=1),
        ):
            torch.testing.assert_close(candidate(x, t, labels), apart, atol=1e-11, rtol=1e-9)
        assert (apart[0] - apart[1]).abs().max() > 1e-3, "the members must differ, or nothing is tested"
        torch.testing.assert_close(SingleMember(network, members, 1)(x if shared else x[1], t, labels), apart[1])


def test_one_member_without_change_is_the_base_model_bit_for_bit():
    model = tiny_model()
    network = model.network
    weight = network.state_dict()["cond_stage_model.embedding.weight"]
    x, t, labels = (
        torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(3)),
        torch.tensor([10.0, 500.0]),
        torch.tensor([1, 2]),
    )
    with torch.no_grad():
        one = MemberNetwork(network, Members.stack([{"cond_stage_model.embedding.weight": weight}]))(x, t, labels)
        assert torch.equal(one[0], network(x, t, labels))


def test_guided_members_equal_guided_models(model):
    """Guidance, wrapped once around the members, equals guidance of each member's own model."""
    patterns = resolve_patterns(["class_embedding"], model.head_patterns)
    dictionaries = [
        {name: value.double() for name, value in member.items()} for member in make_members(model.network, patterns, 3)
    ]
    x = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    labels = torch.tensor([1, 7])
    with torch.no_grad():
        together = model.denoiser(labels, 3.0, MemberNetwork(model.network, Members.stack(dictionaries)))(x, 600.0)
        for m, member in enumerate(dictionaries):
            alone = functional_call_denoiser(model, member, labels)(x, 600.0)
            torch.testing.assert_close(together.x0[m], alone.x0, atol=1e-5, rtol=1e-5)
            torch.testing.assert_close(together.eps[m], alone.eps, atol=1e-5, rtol=1e-5)


def functional_call_denoiser(model, member, labels):
    network = model.network
    return model.denoiser(labels, 3.0, lambda x, t, cond: functional_call(network, member, (x, t, cond)))


def test_errors_say_what_is_wrong(model):
    with pytest.raises(ValueError, match="at least one member"):
        Members.stack([])
    with pytest.raises(ValueError, match="member 1 overrides"):
        Members.stack([{"a": torch.zeros(1)}, {"b": torch.zeros(1)}])
    with pytest.raises(ValueError, match="does not have"):
        MemberNetwork(model.network, Members({"nothing.weight": torch.zeros(2, 3)}))
    members = Members({"cond_stage_model.embedding.weight": torch.zeros(2, 11, 8)})
    with pytest.raises(ValueError, match="3 members"):
        MemberNetwork(model.network, members)(torch.zeros(3, 1, 1, 8, 8), torch.zeros(1), torch.zeros(1).long())
    with pytest.raises(ValueError, match=r"indices 0\.\.1"):
        members.select([2])


@pytest.mark.parametrize("heads", [["class_embedding"], ["class_embedding", "time_embedding"], ["output"]])
@pytest.mark.parametrize("shared", [True, False], ids=["shared-x", "own-x"])
def test_members_take_several_conditions_for_each_image(model, heads, shared):
    """r B conditions for B images give what r B images give, with the null row in common and in pieces."""
    network, source = model.network, torch.Generator().manual_seed(5)
    patterns = resolve_patterns(heads, model.head_patterns)
    dictionaries = [
        {name: value.double() for name, value in member.items()} for member in make_members(network, patterns, 3)
    ]
    for member in dictionaries:
        if "cond_stage_model.embedding.weight" in member:
            member["cond_stage_model.embedding.weight"][10] = 0.5
    x = torch.randn((2, 1, 8, 8) if shared else (3, 2, 1, 8, 8), generator=source, dtype=torch.float64)
    t, cond = torch.tensor([700.0, 3.0], dtype=torch.float64), torch.tensor([10, 10, 4, 7, 2, 2])
    members = Members.stack(dictionaries)
    with torch.no_grad():
        repeated = x.repeat(*[1] * (x.ndim - 4), 3, 1, 1, 1)
        expected = MemberNetwork(network, members, staged=False)(repeated, t.repeat(3), cond)
        for chunk in (None, 4, 1):
            found = MemberNetwork(network, members, chunk)(x, t, cond)
            torch.testing.assert_close(found, expected, atol=1e-11, rtol=1e-9)
    assert (expected[0] - expected[1]).abs().max() > 1e-3


def test_what_members_share_is_computed_once(model):
    """Operations of three guided members at a shared x: 3 conditioned passes and 1 for the null class they share."""
    network = model.network
    (member, *_), count = make_members(network, resolve_patterns(["class_embedding"], model.head_patterns), 1), 3
    weight = "cond_stage_model.embedding.weight"
    dictionaries = [{weight: member[weight].double().clone()} for _ in range(count)]
    for number, own in enumerate(dictionaries):
        own[weight][:10] += number
    x, labels = torch.zeros(2, 1, 8, 8, dtype=torch.float64), torch.tensor([1, 2])
    members = MemberNetwork(network, Members.stack(dictionaries))

    def operations(call):
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            call()
        return counter.get_total_flops()

    null = torch.full_like(labels, 10)
    t = torch.full((2,), 500.0, dtype=torch.float64)
    four = operations(lambda: network(x, t, torch.cat([labels, labels, labels, null])))
    six = operations(lambda: network(x.repeat(6, 1, 1, 1), t.repeat(6), labels.repeat(6)))
    guided = operations(lambda: model.denoiser(labels, 3.0, members)(x, 501.0))
    assert guided == pytest.approx(four, rel=0.01) and guided < 0.65 * six
