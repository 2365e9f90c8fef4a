"""Tokens that a network lays out as an image: a posterior of theirs is that of a convolution with the same answers."""

import pytest
import torch
from torch import nn

from ldm.laplace import LastLayerLaplace, Observation, load_laplace, save_laplace, split_network
from ldm.laplace.arrangement import find_arrangement
from ldm.modules.dit import DiT
from ldm.modules.edm import SongUNet
from ldm.util import generator
from tests.test_cross_table import fill


def draw(*shape, name="x"):
    return torch.randn(*shape, generator=generator("arrangement", name), dtype=torch.float64)


class Patches(nn.Module):
    """DiT of labels as a network of (x, t, cond), none of whose layers is zero."""

    def __init__(self, learned=True):
        super().__init__()
        self.net = DiT(8, 2, 2, 16, 1, 2, num_classes=3, learn_sigma=learned)
        with torch.no_grad():
            for index, parameter in enumerate(self.net.parameters()):
                parameter.copy_(draw(*parameter.shape, name=str(index)) / parameter[0].numel() ** 0.5)
        self.double().eval()

    def forward(self, x, t, cond):
        return self.net(x, t, cond)


class AsConvolution(nn.Module):
    """The same output by a convolution of one pixel over the tokens' grid, whose channels are then shuffled."""

    def __init__(self, patches):
        super().__init__()
        self.net = patches.net
        linear = patches.net.final_layer.linear
        self.conv = nn.Conv2d(16, len(linear.weight), 1).double()
        with torch.no_grad():
            order = torch.arange(len(linear.weight)).unflatten(0, (2, 2, -1)).permute(2, 0, 1).flatten()
            self.conv.weight.copy_(linear.weight[order][..., None, None])
            self.conv.bias.copy_(linear.bias[order])

    def forward(self, x, t, cond):
        tokens = self.net.backbone(x, t, cond)
        return nn.functional.pixel_shuffle(self.conv(tokens.transpose(1, 2).unflatten(2, (4, 4))), 2)


def observe(network, count=6):
    x, t, cond = draw(count, 2, 8, 8), torch.linspace(1, 900, count).double(), torch.arange(count) % 3
    with torch.no_grad():
        output = network(x, t, cond)
    return Observation(x, t, cond, output[:, :2] + 0.5 * draw(count, 2, 8, 8, name="noise"))


def example(network):
    batch = observe(network, 1)
    return batch.x, batch.t, batch.cond


@pytest.mark.parametrize("curvature", ["full", "diag", "lowrank", "sandwich", "ef", "isotropic"])
def test_tokens_and_a_shuffled_convolution_agree(curvature):
    tokens = Patches()
    shuffled = AsConvolution(tokens)
    batch, new = observe(tokens), observe(tokens, 2)
    torch.testing.assert_close(tokens(*batch[:3]), shuffled(*batch[:3]))
    options = {"curvature": curvature, "outputs": 2, "prior_precision": 3.0, "rank": 8}
    one = LastLayerLaplace(tokens, "net.final_layer.linear", example=example(tokens), **options).fit([batch])
    two = LastLayerLaplace(shuffled, "conv", example=example(tokens), **options).fit([batch])
    assert one.layer.outputs == two.layer.outputs == 8, "the variance half of the rows is not regressed"
    torch.testing.assert_close(one(*new[:3]), two(*new[:3]))
    torch.testing.assert_close(one(*new[:3]).mean, tokens(*new[:3])[:, :2])
    if curvature == "full":
        assert one.log_marginal_likelihood() == pytest.approx(two.log_marginal_likelihood())


def test_draws_have_the_variance_and_leave_the_other_half(tmp_path):
    network = Patches()
    batch = observe(network)
    laplace = LastLayerLaplace(network, "net.final_layer.linear", example=example(network), outputs=2).fit([batch])
    draws = laplace.sample(400, torch.Generator().manual_seed(0))
    with torch.no_grad():
        outputs = torch.stack(
            [torch.func.functional_call(network, {name: each[m] for name, each in draws.overrides.items()}, batch[:3])
             for m in range(400)]
        )  # fmt: skip
    assert torch.equal(outputs[:, :, 2:], network(*batch[:3])[:, 2:].expand(400, -1, -1, -1, -1))
    ratio = outputs[:, :, :2].var(0) / laplace(*batch[:3]).variance
    assert 0.9 < ratio.mean() < 1.1 and ratio.min() > 0.6 and ratio.max() < 1.6
    save_laplace(laplace, tmp_path / "kept")
    again = load_laplace(tmp_path / "kept", network)
    torch.testing.assert_close(again(*batch[:3]), laplace(*batch[:3]), rtol=0, atol=0)


def test_images_of_another_size_than_the_arrangements_are_refused():
    """Where tokens lie is found once, and smaller images have fewer of them."""
    tokens = Patches()
    x, t, cond, target = observe(tokens)
    small = Observation(x[..., :4, :4], t, cond, target[..., :4, :4])
    laplace = LastLayerLaplace(tokens, "net.final_layer.linear", example=example(tokens), outputs=2)
    with pytest.raises(ValueError, match=r"images are \[2, 4, 4\].*model's own \[2, 8, 8\]: give images of that size"):
        laplace.fit([small])


def test_what_is_more_than_an_arrangement_is_refused():
    class After(nn.Module):
        def __init__(self, function):
            super().__init__()
            self.last, self.function = nn.Conv2d(2, 2, 1), function

        def forward(self, x, t, cond):
            return self.function(self.last(x), x)

    x, t = torch.randn(1, 2, 4, 4, generator=generator("after")), torch.zeros(1)
    assert find_arrangement(After(lambda made, x: made), "last", (x, t, None)) is None
    turned = find_arrangement(After(lambda made, x: made.flip(3)), "last", (x, t, None))
    assert turned.source[:4].tolist() == [3, 2, 1, 0]
    for function in (lambda made, x: made + x, lambda made, x: 0.5 * made, lambda made, x: made.tanh(),
                     lambda made, x: made[:, :1].expand(-1, 2, -1, -1)):  # fmt: skip
        with pytest.raises(ValueError, match="'last' of After does more than move its entries"):
            split_network(After(function), "last", (x, t, None))
    half = After(lambda made, x: made.flip(3)).bfloat16()
    found = find_arrangement(half, "last", (x.bfloat16(), t, None))
    assert torch.equal(found.source, turned.source), "a type that counts to 128 tells 32 entries apart"


def test_an_output_that_is_a_sum_over_levels_is_split_at_its_last_layer():
    """EDM's skip decoder adds the images of the levels above to what its last layer makes."""
    network = SongUNet(8, 1, 1, model_channels=16, channel_mult=[1, 1], num_blocks=1, decoder_type="skip")
    fill(network).eval()
    row = (draw(1, 1, 8, 8).float(), torch.ones(1), None)
    for example_row in (row, None):
        split = split_network(network, None, example_row)
        assert split.name == network.parts.last_layer
        with torch.no_grad():
            found = split.features(*row)
            features, added = found[:, : split.layer.in_channels], found[:, split.layer.in_channels :]
            torch.testing.assert_close(split.layer(features) + added, network(*row))
            assert float(added.abs().mean()) > 0.01
    assert split_network(SongUNet(8, 1, 1, model_channels=16, channel_mult=[1], num_blocks=1)).name.endswith("aux_conv")
