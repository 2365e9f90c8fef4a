"""Losses of a first stage: reconstruction, perceptual and adversarial terms, and codebook or KL regularisation."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ldm.util import instantiate_from_config, mean_over_processes

# VGG16's convolutions as (index, channels in, channels out); five slices, whose last activations are compared.
VGG_SLICES = (
    ((0, 3, 64), (2, 64, 64)),
    ((5, 64, 128), (7, 128, 128)),
    ((10, 128, 256), (12, 256, 256), (14, 256, 256)),
    ((17, 256, 512), (19, 512, 512), (21, 512, 512)),
    ((24, 512, 512), (26, 512, 512), (28, 512, 512)),
)
PERCEPTUAL_HELP = (
    "give lpips_path (LPIPS weights, or a first-stage checkpoint that holds `loss.perceptual_loss.*`), load such a "
    "checkpoint with ckpt_path, name another module by perceptual_loss: {target: ..., params: ...}, or set "
    "perceptual_weight: 0"
)


class LPIPS(nn.Module):
    """Learned perceptual distance on VGG16 features (Zhang et al. 2018, arXiv 1801.03924, equation 1).

    Built empty: its weights come from a file. Keys as published with taming-transformers.
    """

    def __init__(self):
        super().__init__()
        self.scaling_layer = nn.Module()
        self.scaling_layer.register_buffer("shift", torch.tensor([-0.030, -0.088, -0.188])[None, :, None, None])
        self.scaling_layer.register_buffer("scale", torch.tensor([0.458, 0.448, 0.450])[None, :, None, None])
        self.net = nn.Module()
        for number, convolutions in enumerate(VGG_SLICES):
            layers = {str(index): nn.Conv2d(a, b, 3, padding=1) for index, a, b in convolutions}
            setattr(self.net, f"slice{number + 1}", nn.ModuleDict(layers))
            linear = nn.ModuleList([nn.Dropout(), nn.Conv2d(convolutions[-1][2], 1, 1, bias=False)])
            setattr(self, f"lin{number}", nn.ModuleDict({"model": linear}))
        for parameter in self.parameters():
            nn.init.zeros_(parameter)
        self.requires_grad_(False)

    def is_loaded(self) -> bool:
        """True once weights are there."""
        return bool(self.lin0["model"][1].weight.any())

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        """Distance of images `[B, 3, H, W]` in [-1, 1]; returns `[B, 1, 1, 1]`."""
        a, b = ((x - self.scaling_layer.shift) / self.scaling_layer.scale for x in (a, b))
        total = a.new_zeros(len(a), 1, 1, 1)
        for number in range(len(VGG_SLICES)):
            if number:
                a, b = F.max_pool2d(a, 2), F.max_pool2d(b, 2)  # [B, C, H / 2, W / 2]
            for convolution in getattr(self.net, f"slice{number + 1}").values():
                a, b = F.relu(convolution(a)), F.relu(convolution(b))  # [B, C, H', W']
            unit_a, unit_b = (x / (x.square().sum(1, keepdim=True).sqrt() + 1e-10) for x in (a, b))
            weighted = getattr(self, f"lin{number}")["model"][1]((unit_a - unit_b).square())  # [B, 1, H', W']
            total = total + weighted.mean((2, 3), keepdim=True)
        return total


class ActNorm(nn.Module):
    """Per-channel scale and shift that normalise the first training batch (Kingma & Dhariwal 2018, section 3.1)."""

    def __init__(self, channels: int):
        super().__init__()
        self.loc = nn.Parameter(torch.zeros(1, channels, 1, 1))
        self.scale = nn.Parameter(torch.ones(1, channels, 1, 1))
        self.register_buffer("initialized", torch.tensor(0, dtype=torch.uint8))

    def forward(self, x: Tensor) -> Tensor:
        if self.training and not self.initialized:
            with torch.no_grad():
                self.loc.copy_(-mean_over_processes(x.mean((0, 2, 3), keepdim=True)))
                self.scale.copy_(1 / (mean_over_processes(x.std((0, 2, 3), keepdim=True)) + 1e-6))
                self.initialized.fill_(1)
        return self.scale * (x + self.loc)  # [B, C, H, W]


class NLayerDiscriminator(nn.Module):
    """Discriminator of overlapping patches (PatchGAN; Isola et al. 2017, arXiv 1611.07004, section 3.2.2)."""

    def __init__(self, input_nc: int = 3, ndf: int = 64, n_layers: int = 3, use_actnorm: bool = False):
        super().__init__()
        widths = [ndf * min(2**level, 8) for level in range(n_layers + 1)]
        layers: list[nn.Module] = [nn.Conv2d(input_nc, ndf, 4, 2, 1), nn.LeakyReLU(0.2)]
        for level in range(1, n_layers + 1):
            stride = 2 if level < n_layers else 1
            layers.append(nn.Conv2d(widths[level - 1], widths[level], 4, stride, 1, bias=use_actnorm))
            layers.append(ActNorm(widths[level]) if use_actnorm else nn.BatchNorm2d(widths[level]))
            layers.append(nn.LeakyReLU(0.2))
        layers.append(nn.Conv2d(widths[-1], 1, 4, 1, 1))
        self.main = nn.Sequential(*layers)
        for layer in self.main:
            if isinstance(layer, nn.Conv2d):
                nn.init.normal_(layer.weight, 0.0, 0.02)
            elif isinstance(layer, nn.BatchNorm2d):
                nn.init.normal_(layer.weight, 1.0, 0.02)

    def forward(self, x: Tensor) -> Tensor:
        """Logits `[B, 1, h, w]` of patches being real, of images `[B, C, H, W]`."""
        return self.main(x)


def hinge_loss(real: Tensor, fake: Tensor) -> Tensor:
    """Discriminator's hinge loss `[]` of logits (Lim & Ye 2017, arXiv 1705.02894)."""
    return 0.5 * (F.relu(1.0 - real).mean() + F.relu(1.0 + fake).mean())


def vanilla_loss(real: Tensor, fake: Tensor) -> Tensor:
    """Discriminator's cross-entropy `[]` of logits (Goodfellow et al. 2014, equation 1)."""
    return 0.5 * (F.softplus(-real).mean() + F.softplus(fake).mean())


PIXEL_LOSSES = {"l1": F.l1_loss, "l2": F.mse_loss}
DISCRIMINATOR_LOSSES = {"hinge": hinge_loss, "vanilla": vanilla_loss}


class FirstStageLoss(nn.Module):
    """Reconstruction + perceptual + adversarial terms; subclasses add a regulariser.

    Args:
        disc_start: generator step from which the adversarial terms count.
        pixelloss_weight: of the pixel term.
        disc_num_layers, disc_in_channels, disc_ndf, use_actnorm: of the discriminator.
        disc_factor: of both adversarial terms; 0: no discriminator is built.
        disc_weight: of the generator's term, on top of the adaptive weight; 0: no discriminator is built.
        perceptual_weight: of the perceptual term; 0: off.
        disc_conditional: only False; first stages have no condition.
        disc_loss: "hinge" or "vanilla".
        pixel_loss: "l1" or "l2".
        perceptual_loss: "lpips" or a config {target, params} of a module `(a, b) -> [B, 1, 1, 1]`.
        lpips_path: file with the weights of LPIPS, read by the model that owns this loss.

    Source: Esser et al. 2021 (arXiv 2012.09841, equations 4 to 7).
    """

    regulariser_name = "regulariser"

    def __init__(
        self,
        *,
        disc_start: int,
        pixelloss_weight: float = 1.0,
        disc_num_layers: int = 3,
        disc_in_channels: int = 3,
        disc_factor: float = 1.0,
        disc_weight: float = 1.0,
        perceptual_weight: float = 1.0,
        use_actnorm: bool = False,
        disc_conditional: bool = False,
        disc_ndf: int = 64,
        disc_loss: str = "hinge",
        pixel_loss: str = "l1",
        perceptual_loss: str | Mapping[str, Any] = "lpips",
        lpips_path: str | None = None,
    ):
        super().__init__()
        if disc_conditional:
            raise ValueError("disc_conditional: a first stage has no condition to give; set it to False")
        if disc_loss not in DISCRIMINATOR_LOSSES or pixel_loss not in PIXEL_LOSSES:
            raise ValueError(
                f"disc_loss must be one of {sorted(DISCRIMINATOR_LOSSES)} and pixel_loss one of "
                f"{sorted(PIXEL_LOSSES)}, got '{disc_loss}' and '{pixel_loss}'"
            )
        self.disc_start, self.disc_factor, self.disc_weight = disc_start, disc_factor, disc_weight
        self.pixel_weight, self.perceptual_weight = pixelloss_weight, perceptual_weight
        self.pixel_loss, self.disc_loss = PIXEL_LOSSES[pixel_loss], DISCRIMINATOR_LOSSES[disc_loss]
        self.lpips_path = lpips_path
        if perceptual_weight > 0:
            lpips = perceptual_loss == "lpips"
            self.perceptual_loss = LPIPS() if lpips else instantiate_from_config(perceptual_loss)
        if self.adversarial:
            self.discriminator = NLayerDiscriminator(disc_in_channels, disc_ndf, disc_num_layers, use_actnorm)

    @property
    def adversarial(self) -> bool:
        """True if there is a discriminator to train."""
        return self.disc_factor > 0 and self.disc_weight > 0

    def check_ready(self) -> None:
        """Raise a ValueError if a perceptual term is on and its weights were never loaded."""
        if (
            self.perceptual_weight > 0
            and isinstance(self.perceptual_loss, LPIPS)
            and not self.perceptual_loss.is_loaded()
        ):
            raise ValueError(
                f"perceptual_weight is {self.perceptual_weight} but LPIPS has no weights: {PERCEPTUAL_HELP}"
            )

    def generator_loss(
        self, images: Tensor, reconstructions: Tensor, regulariser: Tensor, step: int, last_layer: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss of encoder and decoder.

        Args:
            images, reconstructions: `[B, C, H, W]` in [-1, 1].
            regulariser: codebook loss `[]` or KL divergence `[B]`.
            step: generator steps taken so far.
            last_layer: weight of the decoder's last layer, at which the two gradients are balanced.

        Returns:
            loss `[]` and its terms by name.
        """
        error = self.pixel_weight * self.pixel_loss(reconstructions, images, reduction="none")  # [B, C, H, W]
        terms = {}
        if self.perceptual_weight > 0:
            distance = self.perceptual_loss(images, reconstructions)  # [B, 1, 1, 1]
            error = error + self.perceptual_weight * distance
            terms["p_loss"] = distance.mean()
        terms["rec_loss"] = error.mean()
        terms["nll_loss"] = fit = self.fit(error)
        loss = fit + self.weighted_regulariser(regulariser)
        terms[self.regulariser_name] = regulariser.mean()
        if self.adversarial:
            adversarial = -self.discriminator(reconstructions).mean()
            weight = self._adaptive_weight(fit, adversarial, last_layer)
            loss = loss + weight * self._factor(step) * adversarial
            terms |= {"g_loss": adversarial, "d_weight": weight, "disc_factor": torch.tensor(self._factor(step))}
        return loss, {"total_loss": loss.detach()} | {name: term.detach() for name, term in terms.items()}

    def discriminator_loss(
        self, images: Tensor, reconstructions: Tensor, step: int
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss `[]` of the discriminator, and its terms by name; arguments of `generator_loss`."""
        real, fake = (self.discriminator(x.detach()) for x in (images, reconstructions))  # 2 x [B, 1, h, w]
        loss = self._factor(step) * self.disc_loss(real, fake)
        terms = {"disc_loss": loss, "logits_real": real.mean(), "logits_fake": fake.mean()}
        return loss, {name: term.detach() for name, term in terms.items()}

    def fit(self, error: Tensor) -> Tensor:
        """Reduce the weighted errors `[B, C, H, W]`."""
        return error.mean()

    def weighted_regulariser(self, regulariser: Tensor) -> Tensor:
        raise NotImplementedError

    def _factor(self, step: int) -> float:
        return self.disc_factor if step >= self.disc_start else 0.0

    def _adaptive_weight(self, fit: Tensor, adversarial: Tensor, last_layer: Tensor) -> Tensor:
        if not torch.is_grad_enabled():
            return torch.zeros_like(fit)
        fit_norm, adversarial_norm = (
            torch.autograd.grad(term, last_layer, retain_graph=True)[0].norm() for term in (fit, adversarial)
        )
        return (fit_norm / (adversarial_norm + 1e-4)).clamp(0.0, 1e4).detach() * self.disc_weight


class VQLoss(FirstStageLoss):
    """Loss of a vector-quantised first stage; further arguments are those of `FirstStageLoss`.

    Args:
        codebook_weight: of the quantiser's loss.
        n_classes: size of the codebook, accepted as published; the model reports its use.
    """

    regulariser_name = "quant_loss"

    def __init__(self, *, codebook_weight: float = 1.0, n_classes: int | None = None, **common):
        super().__init__(**common)
        self.codebook_weight, self.n_classes = codebook_weight, n_classes

    def weighted_regulariser(self, regulariser: Tensor) -> Tensor:
        return self.codebook_weight * regulariser.mean()


class KLLoss(FirstStageLoss):
    """Loss of a KL first stage: sums over an image, averaged over the batch; further arguments as `FirstStageLoss`.

    Args:
        logvar_init: log-variance of the pixel likelihood, held fixed (as the released models did in effect).
        kl_weight: of the KL divergence.
    """

    regulariser_name = "kl_loss"

    def __init__(self, *, logvar_init: float = 0.0, kl_weight: float = 1.0, **common):
        super().__init__(**common)
        self.kl_weight = kl_weight
        self.logvar = nn.Parameter(torch.tensor(float(logvar_init)), requires_grad=False)

    def fit(self, error: Tensor) -> Tensor:
        """Negative log likelihood, up to a constant, of the weighted errors `[B, C, H, W]`."""
        return (error / self.logvar.exp() + self.logvar).sum() / len(error)

    def weighted_regulariser(self, regulariser: Tensor) -> Tensor:
        return self.kl_weight * regulariser.mean()
