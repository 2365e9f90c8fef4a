"""Quantiser, Gaussian posterior and first-stage losses against taming-transformers, torch and closed forms."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from ldm.modules.diffusionmodules.model import Decoder, Encoder
from ldm.modules.distributions.distributions import DiagonalGaussianDistribution, normal_kl
from ldm.modules.losses import LPIPS, ActNorm, KLLoss, NLayerDiscriminator, VQLoss, hinge_loss, vanilla_loss
from ldm.modules.quantize import VectorQuantizer, VectorQuantizer2

SMALL = {"disc_start": 2, "perceptual_weight": 0.0, "disc_ndf": 8, "disc_num_layers": 1}


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("legacy", [True, False])
@pytest.mark.parametrize("sane", [True, False])
@pytest.mark.parametrize("unknown", [None, "extra", 3])
def test_quantiser_equals_tamings(tmp_path, legacy, sane, unknown):
    taming = pytest.importorskip("taming.modules.vqvae.quantize")
    options = {"legacy": legacy, "sane_index_shape": sane}
    if unknown is not None:
        np.save(tmp_path / "used.npy", np.array([9, 2, 4, 7, 0, 11]))
        options |= {"remap": str(tmp_path / "used.npy"), "unknown_index": unknown}
    theirs, ours = taming.VectorQuantizer2(12, 3, 0.25, **options), VectorQuantizer(12, 3, 0.25, **options)
    theirs.embedding.weight.data = randn(12, 3)
    ours.load_state_dict(theirs.state_dict())
    results = []
    for quantiser in (theirs, ours):
        z = randn(2, 3, 4, 5, seed=1).requires_grad_()
        quantised, loss, (perplexity, encodings, indices) = quantiser(z)
        assert perplexity is None and encodings is None
        (loss + (quantised * randn(2, 3, 4, 5, seed=2)).sum()).backward()
        entry = quantiser.get_codebook_entry(indices.reshape(2, 4, 5).clone(), (2, 4, 5, 3))
        results.append((quantised, loss, indices, z.grad, quantiser.embedding.weight.grad, entry))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)
    assert results[0][2].shape == results[1][2].shape


def test_random_unknown_indices_are_valid_and_repeatable(tmp_path):
    np.save(tmp_path / "used.npy", np.array([1, 3]))
    quantiser = VectorQuantizer2(6, 3, remap=str(tmp_path / "used.npy"), sane_index_shape=True)
    quantiser.embedding.weight.data = randn(6, 3)
    z = randn(2, 3, 4, 4, seed=1)
    first, second = (quantiser(z)[2][2] for _ in range(2))
    assert torch.equal(first, second) and first.shape == (2, 4, 4) and first.max() <= 1


def test_quantiser_picks_the_nearest_entry():
    quantiser = VectorQuantizer2(20, 3)
    quantiser.embedding.weight.data = randn(20, 3)
    z = randn(2, 3, 4, 5, seed=1)
    expected = torch.cdist(z.movedim(1, -1).reshape(-1, 3), quantiser.embedding.weight).argmin(1)
    assert torch.equal(quantiser(z)[2][2], expected)
    with pytest.raises(ValueError, match=r"\[B, 3, H, W\]"):
        quantiser(randn(2, 4, 4, 4))


def test_gaussian_posterior_equals_torch_distributions():
    parameters, other = randn(2, 6, 4, 4).double(), randn(2, 6, 4, 4, seed=1).double()
    ours, theirs = DiagonalGaussianDistribution(parameters), DiagonalGaussianDistribution(other)
    p, q = (torch.distributions.Normal(d.mean, (0.5 * d.logvar).exp()) for d in (ours, theirs))
    standard = torch.distributions.Normal(torch.zeros_like(p.loc), 1.0)
    kl = torch.distributions.kl_divergence
    torch.testing.assert_close(ours.kl(), kl(p, standard).sum((1, 2, 3)))
    torch.testing.assert_close(ours.kl(theirs), kl(p, q).sum((1, 2, 3)))
    torch.testing.assert_close(normal_kl(ours.mean, ours.logvar, theirs.mean, theirs.logvar), kl(p, q))
    torch.testing.assert_close(normal_kl(ours.mean, ours.logvar, 0.0, 0.0), kl(p, standard))
    x = ours.sample(torch.Generator().manual_seed(0))
    torch.testing.assert_close(ours.nll(x), -p.log_prob(x).sum((1, 2, 3)))
    assert torch.equal(x, ours.sample(torch.Generator().manual_seed(0)))
    assert torch.equal(DiagonalGaussianDistribution(parameters, True).sample(torch.Generator()), ours.mode())


def test_adversarial_terms_start_on_time_and_are_balanced():
    loss = VQLoss(disc_weight=0.5, codebook_weight=2.0, **SMALL)
    decoder = nn.Conv2d(3, 3, 1)
    images, reconstructions = randn(2, 3, 16, 16), decoder(randn(2, 3, 16, 16, seed=1))
    common = (images, reconstructions, torch.tensor(0.25))
    before, _ = loss.generator_loss(*common, 1, decoder.weight)
    torch.testing.assert_close(before, (images - reconstructions).abs().mean() + 0.5)
    after, terms = loss.generator_loss(*common, 2, decoder.weight)
    torch.testing.assert_close(after - before, terms["d_weight"] * terms["g_loss"])
    fit, adversarial = (images - reconstructions).abs().mean(), -loss.discriminator(reconstructions).mean()
    norms = [torch.autograd.grad(term, decoder.weight, retain_graph=True)[0].norm() for term in (fit, adversarial)]
    torch.testing.assert_close(terms["d_weight"], 0.5 * norms[0] / (norms[1] + 1e-4), rtol=1e-4, atol=0)
    assert loss.discriminator_loss(images, reconstructions, 1)[0] == 0
    assert loss.discriminator_loss(images, reconstructions, 2)[0] > 0


def test_kl_loss_is_the_negative_evidence_bound():
    loss = KLLoss(kl_weight=0.1, logvar_init=0.3, pixel_loss="l2", disc_factor=0.0, disc_start=0, perceptual_weight=0)
    images, reconstructions, kl = randn(2, 3, 8, 8), randn(2, 3, 8, 8, seed=1), torch.tensor([3.0, 5.0])
    value, terms = loss.generator_loss(images, reconstructions, kl, 0, reconstructions)
    expected = ((images - reconstructions) ** 2 / np.exp(0.3) + 0.3).sum((1, 2, 3)).mean() + 0.1 * 4
    torch.testing.assert_close(value, expected)
    assert terms["kl_loss"] == 4 and not hasattr(loss, "discriminator")
    assert [name for name, _ in loss.named_parameters()] == ["logvar"]


def test_discriminator_losses_on_known_logits():
    real, fake = torch.tensor([2.0, 0.0]), torch.tensor([-3.0, 1.0])
    assert hinge_loss(real, fake).item() == pytest.approx(0.5 * (0.5 + 1.0))
    logistic = nn.functional.binary_cross_entropy_with_logits
    expected = 0.5 * (logistic(real, torch.ones(2)) + logistic(fake, torch.zeros(2)))
    torch.testing.assert_close(vanilla_loss(real, fake), expected)


def test_discriminator_has_the_published_keys():
    taming = pytest.importorskip("taming.modules.discriminator.model")
    for actnorm in (False, True):
        theirs = taming.NLayerDiscriminator(3, 8, 2, use_actnorm=actnorm)
        ours = NLayerDiscriminator(3, 8, 2, use_actnorm=actnorm)
        shapes = [{name: value.shape for name, value in net.state_dict().items()} for net in (ours, theirs)]
        assert shapes[0] == shapes[1]
        ours.load_state_dict(theirs.state_dict())
        x = randn(2, 3, 32, 32)
        torch.testing.assert_close(ours(x), theirs(x))


def test_actnorm_normalises_its_first_batch():
    layer, x = ActNorm(4), 3 + 2 * randn(8, 4, 5, 5)
    first = layer(x)
    torch.testing.assert_close(first.mean((0, 2, 3)), torch.zeros(4), atol=1e-5, rtol=0)
    torch.testing.assert_close(first.std((0, 2, 3)), torch.ones(4), atol=1e-4, rtol=0)
    torch.testing.assert_close(layer(x + 1), first + layer.scale)


def test_perceptual_distance():
    lpips = LPIPS()
    assert not lpips.is_loaded()
    for seed, parameter in enumerate(lpips.parameters()):
        fan_in = parameter[0].numel() if parameter.ndim > 1 else 1e4
        parameter.data = randn(*parameter.shape, seed=seed) * (2 / fan_in) ** 0.5
        if parameter.shape[0] == 1:
            parameter.data.abs_()  # published ones are not negative
    assert lpips.is_loaded()
    a, b = randn(2, 3, 32, 32), randn(2, 3, 32, 32, seed=1)
    distance = lpips(a, b)
    assert distance.shape == (2, 1, 1, 1) and (distance > 0).all()
    torch.testing.assert_close(lpips(b, a), distance)
    assert lpips(a, a).abs().max() == 0
    keys = set(lpips.state_dict())
    assert {"scaling_layer.shift", "net.slice1.0.weight", "net.slice5.28.bias", "lin4.model.1.weight"} <= keys
    assert sum(p.numel() for p in lpips.parameters()) == 14_714_688 + 1472  # VGG16's convolutions, five linear maps


def test_perceptual_term_without_weights_says_what_to_do():
    with pytest.raises(ValueError, match="perceptual_weight: 0"):
        VQLoss(disc_start=0, disc_weight=0.0).check_ready()
    named = VQLoss(disc_start=0, disc_weight=0.0, perceptual_loss={"target": "torch.nn.PairwiseDistance"})
    named.check_ready()
    assert isinstance(named.perceptual_loss, nn.PairwiseDistance)
    with pytest.raises(ValueError, match="no condition"):
        VQLoss(disc_start=0, disc_conditional=True)
    with pytest.raises(ValueError, match="got 'wgan'"):
        VQLoss(disc_start=0, disc_loss="wgan")


@pytest.mark.parametrize("kind", [Encoder, Decoder])
def test_linear_attention_has_a_former_spelling(kind):
    shape = {"ch": 32, "out_ch": 1, "num_res_blocks": 1, "attn_resolutions": [4], "in_channels": 1, "resolution": 4}
    former, now = (kind(**shape, z_channels=1, ch_mult=[1], **more).state_dict()
                   for more in ({"use_linear_attn": True}, {"attn_type": "linear"}))  # fmt: skip
    assert "mid.attn_1.to_qkv.weight" in former and former.keys() == now.keys()
