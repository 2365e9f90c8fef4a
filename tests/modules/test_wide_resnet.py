"""The noise-conditional wide residual network: its size, its norms, its skips, and what it is told."""

from __future__ import annotations

import pytest
import torch

from ldm.modules.wide_resnet import WideResNet, group_norm, standardised
from ldm.util import generator


def test_wrn_28_10_has_the_published_number_of_parameters():
    with torch.device("meta"):
        net = WideResNet()
    trained = sum(parameter.numel() for parameter in net.parameters() if parameter.requires_grad)
    assert trained == 38_913_114
    assert sum(parameter.numel() for parameter in net.parameters()) - trained == 128
    assert [group_norm(width).num_groups for width in (16, 160, 320, 640)] == [4, 32, 32, 32]


@torch.no_grad()
def test_logits_ignore_brightness_and_contrast_but_not_the_noise_level():
    net = WideResNet(10, 1, classes=3, in_channels=1).eval()
    x = torch.randn(2, 1, 8, 8, generator=generator("wide"))
    low, high = torch.full((2,), 0.1), torch.full((2,), 0.9)
    assert net(x, low).shape == (2, 3)
    torch.testing.assert_close(net(5 * x + 2, low), net(x, low), rtol=1e-3, atol=1e-4)
    assert float((net(x, low) - net(x, high)).abs().max()) > 1e-4


def test_standardised_images():
    x = 3 + 7 * torch.randn(2, 3, 8, 8, generator=generator("standardised")).double()
    flat = standardised(x).flatten(1)
    torch.testing.assert_close(flat.mean(1), torch.zeros(2, dtype=torch.float64), rtol=0, atol=1e-12)
    torch.testing.assert_close(flat.std(1, correction=0), torch.ones(2, dtype=torch.float64))
    assert torch.equal(standardised(torch.ones(1, 3, 4, 4)), torch.zeros(1, 3, 4, 4))


def test_skips_average_and_pad_with_zeros():
    block = WideResNet(10, 1, in_channels=1).blocks[1]
    for parameter in block.conv2.parameters():
        torch.nn.init.zeros_(parameter)
    x = torch.randn(1, 16, 4, 4, generator=generator("skips"))
    out = block(x, torch.zeros(1, 512))
    assert out.shape == (1, 32, 2, 2)
    torch.testing.assert_close(out[:, 8:24], torch.nn.functional.avg_pool2d(x, 2))
    assert float(out[:, :8].detach().abs().max()) == float(out[:, 24:].detach().abs().max()) == 0.0


def test_depths_are_checked():
    with pytest.raises(ValueError, match="6 n"):
        WideResNet(12)
