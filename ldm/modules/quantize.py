"""Vector quantisation with the interface, returns and state-dict keys of taming-transformers."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn


class VectorQuantizer2(nn.Module):
    """Replace each latent vector by the nearest entry of a codebook (van den Oord et al. 2017, arXiv 1711.00937).

    The loss is `mean((sg[z_q] - z)^2) + beta mean((z_q - sg[z])^2)`, with sg the stop-gradient (their equation 3 with
    the two terms swapped, as published, if `legacy`); gradients pass straight through to z.

    Args:
        n_e: entries K of the codebook.
        e_dim: width D of an entry.
        beta: weight of the second term (`legacy`), or of the first.
        remap: .npy file of the entries in use; indices then count among these.
        unknown_index: index given to entries not in use: "random", "extra" (one more) or a number.
        sane_index_shape: return indices as `[B, H, W]` rather than flat.
        legacy: put `beta` on the codebook's term, as the released models do.
    """

    def __init__(
        self,
        n_e: int,
        e_dim: int,
        beta: float = 0.25,
        remap: str | None = None,
        unknown_index: int | str = "random",
        sane_index_shape: bool = False,
        legacy: bool = True,
    ):
        super().__init__()
        self.n_e, self.e_dim, self.beta = n_e, e_dim, beta
        self.legacy, self.sane_index_shape = legacy, sane_index_shape
        self.embedding = nn.Embedding(n_e, e_dim)
        nn.init.uniform_(self.embedding.weight, -1 / n_e, 1 / n_e)
        self.remap, self.re_embed, self.unknown_index = remap, n_e, unknown_index
        if remap is not None:
            try:
                used = torch.from_numpy(np.load(remap, allow_pickle=False))
            except (ValueError, TypeError, EOFError) as error:
                raise ValueError(f"remap {remap} is no array of NumPy (.npy): {error}; fetch it again") from error
            self.register_buffer("used", used)
            self.re_embed = len(self.used) + (unknown_index == "extra")
            if unknown_index == "extra":
                self.unknown_index = len(self.used)
            elif isinstance(unknown_index, str) and unknown_index != "random":
                raise ValueError(f"unknown_index must be 'random', 'extra' or a number, got '{unknown_index}'")

    def forward(
        self, z: Tensor, temp: float | None = None, rescale_logits: bool = False, return_logits: bool = False
    ) -> tuple[Tensor, Tensor, tuple[None, None, Tensor]]:
        """Quantise latents.

        Args:
            z: `[B, D, H, W]`.
            temp, rescale_logits, return_logits: of taming's Gumbel quantiser; only their neutral values.

        Returns:
            quantised latents `[B, D, H, W]`, loss `[]`, and (None, None, indices `[B H W]`, `[B, H, W]` if
            `sane_index_shape`, `[B H W, 1]` if remapped).
        """
        if temp not in (None, 1.0) or rescale_logits or return_logits:
            raise ValueError("temp, rescale_logits and return_logits belong to a Gumbel quantiser; leave them out")
        if z.ndim != 4 or z.shape[1] != self.e_dim:
            raise ValueError(f"latents must have shape [B, {self.e_dim}, H, W], got {list(z.shape)}")
        z = z.movedim(1, -1)  # [B, H, W, D]
        indices = self.nearest(z)  # [B, H, W]
        quantised = self.embedding(indices)  # [B, H, W, D]
        to_encoder = (quantised.detach() - z).square().mean()  # []
        to_codebook = (quantised - z.detach()).square().mean()  # []
        weights = (1.0, self.beta) if self.legacy else (self.beta, 1.0)
        loss = weights[0] * to_encoder + weights[1] * to_codebook
        quantised = z + (quantised - z).detach()  # straight-through gradient
        if self.remap is not None:
            indices = self.remap_to_used(indices)
        if not self.sane_index_shape:
            indices = indices.reshape(-1, 1) if self.remap is not None else indices.flatten()
        return quantised.movedim(-1, 1).contiguous(), loss, (None, None, indices)

    def nearest(self, z: Tensor) -> Tensor:
        """Index of the nearest entry, of vectors `[..., D]`; returns `[...]`."""
        flat, table = z.flatten(0, -2), self.embedding.weight  # [N, D], [K, D]
        distances = flat.square().sum(1, keepdim=True) + table.square().sum(1) - 2 * flat @ table.T  # [N, K]
        return distances.argmin(1).reshape(z.shape[:-1])

    def remap_to_used(self, indices: Tensor) -> Tensor:
        """Positions among the entries in use, of codebook indices `[B, ...]`; the same shape.

        Random indices of unused entries come from a generator seeded afresh with 0, so that the result is repeatable.
        """
        match = indices[..., None] == self.used.to(indices.device)  # [B, ..., U]
        position = match.long().argmax(-1)  # [B, ...]
        if self.unknown_index == "random":
            draws = torch.Generator().manual_seed(0)
            other = torch.randint(self.re_embed, indices.shape, generator=draws).to(indices.device)
        else:
            other = torch.full_like(indices, int(self.unknown_index))
        return torch.where(match.any(-1), position, other)

    def unmap_to_all(self, indices: Tensor) -> Tensor:
        """Codebook indices of positions `[B, ...]` among the entries in use; extra positions give the first of them."""
        known = torch.where(indices < len(self.used), indices, 0)
        return self.used.to(indices.device)[known]

    def get_codebook_entry(self, indices: Tensor, shape: Sequence[int] | None = None) -> Tensor:
        """Entries of indices (any shape) as rows `[N, D]`, or with shape (B, H, W, D) as latents `[B, D, H, W]`."""
        if self.remap is not None:
            indices = self.unmap_to_all(indices)
        entries = self.embedding(indices.flatten())  # [N, D]
        return entries if shape is None else entries.reshape(tuple(shape)).movedim(-1, 1).contiguous()


VectorQuantizer = VectorQuantizer2
