"""Structural similarity against its formula with SciPy's filters, and in its limits."""

import numpy as np
import pytest
import torch
from scipy.ndimage import gaussian_filter
from torchmetrics.functional.image import lpips

from ldm.checkpoint import load_into, save_checkpoint
from ldm.evaluation.diversity import load_lpips, pairwise_lpips, pairwise_ssim, ssim, ssim_window
from ldm.modules.losses import LPIPS
from ldm.util import generator
from tests.comparisons import vgg16_layers


def draw(*shape, key=0):
    return torch.rand(shape, generator=generator("diversity", key), dtype=torch.float64) * 2 - 1


def by_formula(x, y, radius, sigma, data_range):
    """Wang et al. 2004, eq. 13, of one channel, by SciPy's Gaussian filter cut at the radius."""

    def smooth(z):
        return gaussian_filter(z, sigma, truncate=radius / sigma)[radius:-radius, radius:-radius]

    c1, c2 = (0.01 * data_range) ** 2, (0.03 * data_range) ** 2
    mx, my = smooth(x), smooth(y)
    vx, vy, cov = smooth(x * x) - mx**2, smooth(y * y) - my**2, smooth(x * y) - mx * my
    return ((2 * mx * my + c1) * (2 * cov + c2) / ((mx**2 + my**2 + c1) * (vx + vy + c2))).mean()


@pytest.mark.parametrize(("side", "radius"), [(8, 1), (28, 5), (40, 5)])
def test_ssim_is_the_formula(side, radius):
    a = draw(3, 2, side, side, key=1)
    b = 0.7 * a + 0.3 * draw(3, 2, side, side, key=2)
    expected = [
        np.mean([by_formula(x.numpy(), y.numpy(), radius, 0.3 * radius, 2.0) for x, y in zip(*pair, strict=True)])
        for pair in zip(a, b, strict=True)
    ]
    np.testing.assert_allclose(ssim(a, b).numpy(), expected, atol=1e-7)  # the library's kernel is float32 inside


def test_constant_images_have_the_luminance_term_alone():
    """Without variance SSIM = (2 a b + c1) / (a^2 + b^2 + c1), c1 = (0.01 * 2)^2."""
    a, b = torch.full((1, 1, 8, 8), 0.5).double(), torch.full((1, 1, 8, 8), -0.25).double()
    assert ssim(a, b).item() == pytest.approx((-0.25 + 4e-4) / (0.3125 + 4e-4), abs=1e-6)


def test_identical_members_have_one_and_a_range_of_one_on_bytes_is_wrong():
    images = draw(1, 4, 1, 8, 8).expand(3, -1, -1, -1, -1)
    torch.testing.assert_close(pairwise_ssim(images), torch.ones(4, dtype=torch.float64))
    noisy = images + 0.1 * draw(3, 4, 1, 8, 8, key=3)
    right = pairwise_ssim(noisy)
    as_bytes = (noisy + 1) * 127.5
    torch.testing.assert_close(pairwise_ssim(as_bytes, data_range=255.0), pairwise_ssim(noisy + 1))
    # The published code takes data_range 1 for values up to 255: both constants vanish.
    assert (pairwise_ssim(as_bytes, data_range=1.0) - right).abs().max() > 1e-3


def test_pairs_are_averaged_whatever_their_batches():
    images = draw(4, 5, 1, 12, 12, key=4)
    by_hand = torch.stack([ssim(images[i], images[j]) for i in range(4) for j in range(i)]).mean(0)
    for size in (1, 7, 64):
        torch.testing.assert_close(pairwise_ssim(images, pairs_at_once=size), by_hand)
    torch.testing.assert_close(pairwise_ssim(images, members=[3, 1]), ssim(images[1], images[3]))


def test_as_many_pictures_as_members_do_not_mix():
    images = draw(3, 3, 1, 8, 8, key=5)
    for picture in range(3):
        alone = pairwise_ssim(images[:, picture : picture + 1])
        torch.testing.assert_close(pairwise_ssim(images)[picture : picture + 1], alone)


def test_windows_fit_small_images():
    assert [ssim_window(side, side) for side in (6, 8, 12, 16, 22, 28, 256)] == [3, 3, 5, 7, 11, 11, 11]
    with pytest.raises(ValueError, match="6 x 6 pixels or more, got 5 x 8"):
        ssim_window(5, 8)
    with pytest.raises(ValueError, match="at least two members"):
        pairwise_ssim(draw(1, 2, 1, 8, 8))
    with pytest.raises(ValueError, match="of one shape"):
        ssim(draw(1, 1, 8, 8), draw(2, 1, 8, 8))


def test_lpips_agrees_with_torchmetrics(monkeypatch):
    """Its layers of VGG16 come from torchvision, which need not be there."""
    monkeypatch.setattr(lpips, "_get_tv_model_features", vgg16_layers)
    network, other, source = LPIPS().eval(), lpips._LPIPS(net="vgg", pnet_rand=True).eval(), generator("lpips vgg")
    with torch.no_grad():
        for value in other.net.parameters():
            value.copy_(torch.randn(value.shape, generator=source) * (2 / max(value[0].numel(), 1000)) ** 0.5)
    published = {name: value for name, value in other.state_dict().items() if not name.startswith("lins.")}
    load_into(network, published | {f"scaling_layer.{k}": v for k, v in network.scaling_layer.named_buffers()})
    a, b = draw(4, 3, 40, 32, key=1).float(), draw(4, 3, 40, 32, key=2).float()
    torch.testing.assert_close(network(a, b), other(a, b), rtol=1e-5, atol=1e-7)


def test_lpips_over_pairs_is_the_mean_of_single_calls(tmp_path):
    network, source = LPIPS().eval(), generator("lpips")
    with torch.no_grad():
        for value in network.parameters():
            value.copy_(torch.rand(value.shape, generator=source) / value[0].numel() ** 0.5)
    save_checkpoint({"state_dict": network.state_dict()}, tmp_path / "lpips.ckpt")
    again = load_lpips(tmp_path / "lpips.ckpt")
    images = draw(3, 2, 1, 16, 16, key=7)
    images[2, 1] = images[1, 1]
    colour = images.float().expand(3, 2, 3, 16, 16)
    pairs = [network(colour[i], colour[j])[:, 0, 0, 0] for i, j in ((0, 1), (0, 2), (1, 2))]
    assert pairs[2][1] == 0 and pairs[0].min() > 0
    found = pairwise_lpips(images, again, at_once=4)
    torch.testing.assert_close(found, torch.stack(pairs).mean(0).double(), rtol=1e-5, atol=0)
    with pytest.raises(ValueError, match="16 x 16"):
        pairwise_lpips(images[..., :8, :8], again)
    del network.lin0
    save_checkpoint({"state_dict": network.state_dict()}, tmp_path / "part.ckpt")
    with pytest.raises(ValueError, match="lin0"):
        load_lpips(tmp_path / "part.ckpt")
