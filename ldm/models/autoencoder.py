"""First stages: images to latents and back, as LightningModules with the published arguments and state-dict keys."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ldm.models.first_stage import FirstStage
from ldm.modules.distributions.distributions import DiagonalGaussianDistribution
from ldm.modules.quantize import VectorQuantizer2
from ldm.util import generator


class VQModel(FirstStage):
    """Vector-quantised autoencoder (Esser et al. 2021, arXiv 2012.09841); see `FirstStage` for the other arguments.

    Args:
        n_embed, embed_dim: entries of the codebook and width of each.
        ckpt_path, ignore_keys: weights to start from, and their keys that need not match.
        remap, sane_index_shape: of the quantiser.

    Attributes:
        has_posterior: whether `encode` gives a distribution of latents.
    """

    has_posterior = False

    def __init__(
        self,
        ddconfig: Mapping[str, Any],
        lossconfig: Mapping[str, Any],
        n_embed: int,
        embed_dim: int,
        ckpt_path: str | None = None,
        ignore_keys: Sequence[str] = (),
        image_key: str = "image",
        colorize_nlabels: int | None = None,
        monitor: str | None = None,
        batch_resize_range: Sequence[int] | None = None,
        scheduler_config: Mapping[str, Any] | None = None,
        lr_g_factor: float = 1.0,
        remap: str | None = None,
        sane_index_shape: bool = False,
        use_ema: bool = False,
        seed: int = 0,
    ):
        super().__init__(
            ddconfig,
            lossconfig,
            image_key,
            colorize_nlabels,
            monitor,
            batch_resize_range,
            scheduler_config,
            lr_g_factor,
            use_ema,
            seed,
        )
        self.n_embed = n_embed
        self.embed_dim = embed_dim
        self.quantize = VectorQuantizer2(n_embed, embed_dim, 0.25, remap=remap, sane_index_shape=sane_index_shape)
        self.quant_conv = nn.Conv2d(ddconfig["z_channels"], embed_dim, 1)
        self.post_quant_conv = nn.Conv2d(embed_dim, ddconfig["z_channels"], 1)
        self._complete(ckpt_path, ignore_keys)

    def encode_to_prequant(self, x: Tensor) -> Tensor:
        """Latents `[B, embed_dim, h, w]` before quantisation, of images `[B, C, H, W]`."""
        return self.quant_conv(self.encoder(x))

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor, tuple]:
        """Quantised latents `[B, embed_dim, h, w]`, the quantiser's loss `[]`, and its further returns."""
        return self.quantize(self.encode_to_prequant(x))

    def decode(self, quant: Tensor) -> Tensor:
        """Images `[B, C, H, W]` of quantised latents `[B, embed_dim, h, w]`."""
        return self.decoder(self.post_quant_conv(quant))

    def decode_code(self, code: Tensor) -> Tensor:
        """Images `[B, C, H, W]` of codebook indices `[B, h, w]`."""
        latents = self.quantize.get_codebook_entry(code, (*code.shape, self.embed_dim))
        return self.decoder(self.post_quant_conv(latents))

    def forward(self, x: Tensor, return_pred_indices: bool = False) -> tuple[Tensor, ...]:
        """Reconstruction `[B, C, H, W]`, quantiser's loss `[]`, and with `return_pred_indices` the indices."""
        quant, loss, (_, _, indices) = VQModel.encode(self, x)
        reconstruction = VQModel.decode(self, quant)
        return (reconstruction, loss, indices) if return_pred_indices else (reconstruction, loss)

    def reconstruct(self, images: Tensor, split: str) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        reconstruction, loss, indices = self(images, return_pred_indices=True)
        share = torch.bincount(indices.flatten(), minlength=self.quantize.re_embed).float() / indices.numel()  # [K]
        used = {"perplexity": torch.special.entr(share).sum().exp(), "cluster_usage": (share > 0).sum().float()}
        return reconstruction, loss, used


class VQModelInterface(VQModel):
    """First stage of a latent diffusion model: latents before quantisation are diffused, decoding quantises them."""

    def encode(self, x: Tensor) -> Tensor:  # type: ignore[override]  # as published: without the quantiser's returns
        """Latents `[B, embed_dim, h, w]` before quantisation, of images `[B, C, H, W]`."""
        return self.encode_to_prequant(x)

    def decode(self, h: Tensor, force_not_quantize: bool = False) -> Tensor:
        """Images `[B, C, H, W]` of latents `[B, embed_dim, h, w]`, quantised first unless `force_not_quantize`."""
        return super().decode(h if force_not_quantize else self.quantize(h)[0])


class AutoencoderKL(FirstStage):
    """Variational autoencoder (Kingma & Welling 2014); see `FirstStage` and `VQModel` for the arguments."""

    has_posterior = True

    def __init__(
        self,
        ddconfig: Mapping[str, Any],
        lossconfig: Mapping[str, Any],
        embed_dim: int,
        ckpt_path: str | None = None,
        ignore_keys: Sequence[str] = (),
        image_key: str = "image",
        colorize_nlabels: int | None = None,
        monitor: str | None = None,
        scheduler_config: Mapping[str, Any] | None = None,
        seed: int = 0,
    ):
        if not ddconfig.get("double_z", True):
            raise ValueError("AutoencoderKL needs ddconfig.double_z: true (a mean and a log-variance)")
        super().__init__(
            ddconfig, lossconfig, image_key, colorize_nlabels, monitor, scheduler_config=scheduler_config, seed=seed
        )
        self.embed_dim = embed_dim
        self.quant_conv = nn.Conv2d(2 * ddconfig["z_channels"], 2 * embed_dim, 1)
        self.post_quant_conv = nn.Conv2d(embed_dim, ddconfig["z_channels"], 1)
        self._complete(ckpt_path, ignore_keys)

    def encode(self, x: Tensor) -> DiagonalGaussianDistribution:
        """Posterior over latents `[B, embed_dim, h, w]`, of images `[B, C, H, W]`."""
        return DiagonalGaussianDistribution(self.quant_conv(self.encoder(x)))

    def decode(self, z: Tensor) -> Tensor:
        """Images `[B, C, H, W]` of latents `[B, embed_dim, h, w]`."""
        return self.decoder(self.post_quant_conv(z))

    def forward(self, x: Tensor, draws: torch.Generator | None = None) -> tuple[Tensor, DiagonalGaussianDistribution]:
        """Reconstruction `[B, C, H, W]` from a drawn latent (the mean if there are no `draws`), and the posterior."""
        posterior = self.encode(x)
        return self.decode(posterior.mode() if draws is None else posterior.sample(draws)), posterior

    def reconstruct(self, images: Tensor, split: str) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """As `FirstStage`; latents are drawn by a generator named by seed, process and step, or by the split."""
        when = self.generator_step if self.training else split
        reconstruction, posterior = self(images, generator("autoencoder", self.seed, self.global_rank, when))
        return reconstruction, posterior.kl(), {}


class IdentityFirstStage(nn.Module):
    """No first stage: latents are the images; with `vq_interface`, `quantize` returns as a quantiser does."""

    has_posterior = False

    def __init__(self, vq_interface: bool = False):
        super().__init__()
        self.vq_interface = vq_interface

    def encode(self, x: Tensor) -> Tensor:
        return x

    def decode(self, x: Tensor) -> Tensor:
        return x

    def quantize(self, x: Tensor) -> Tensor | tuple[Tensor, None, tuple[None, None, None]]:
        return (x, None, (None, None, None)) if self.vq_interface else x

    def forward(self, x: Tensor) -> Tensor:
        return x


class PixelsAsChannels(nn.Module):
    """An exact first stage without weights: squares of factor x factor pixels are the channels of one latent pixel.

    Images [B, C, H, W] are latents [B, C factor^2, H / factor, W / factor]. A network of latents half as wide costs a
    quarter; nothing is lost.
    """

    def __init__(self, factor: int = 2):
        super().__init__()
        if factor < 1:
            raise ValueError(f"factor must be 1 or more pixels, got {factor}")
        self.factor = factor

    def encode(self, x: Tensor) -> Tensor:
        return F.pixel_unshuffle(x, self.factor)

    def decode(self, z: Tensor) -> Tensor:
        return F.pixel_shuffle(z, self.factor)

    def forward(self, x: Tensor) -> Tensor:
        return self.decode(self.encode(x))
