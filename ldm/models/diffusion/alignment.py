"""Alignment of a network's tokens with features of a frozen extractor (REPA, Yu et al. 2024, arXiv 2410.06940).

    loss = loss of the denoising - weight * mean over images and places n of cos(y[n], h(tokens[n]))

The tokens are the output of a named block on the noisy state, y the extractor's features of the clean image at the same
places, and h a perceptron that trains beside the network. Neither h nor the extractor takes part in sampling.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Protocol

import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import default_collate

from ldm.arguments import check_arguments
from ldm.diffusion.noise import TrainingDraws
from ldm.evaluation.extractors import make_extractor
from ldm.evaluation.features import Extractor
from ldm.evaluation.taps import resolve_taps
from ldm.models.diffusion.optimisation import attached_trainer, find_training_data
from ldm.ranges import COUNT, POSITIVE, check_range
from ldm.util import generator

# Where the features of an extractor are laid out over the image, by its name.
MAPS = {"classifier": "network.maps"}
_RANGES = {"weight": POSITIVE, "width": COUNT}
_Loss = tuple[Tensor, dict[str, Tensor]]


class Aligned(Protocol):
    """What is asked of the model whose network is aligned."""

    alignment_config: Mapping[str, Any] | None
    alignment: Alignment | None
    draws: TrainingDraws
    model: Any
    first_stage_key: str
    member: Any
    training: bool

    def shared_step(self, batch: Mapping[str, Any], draws: TrainingDraws, step: int, samples: Sequence[int]) -> _Loss:
        """Return loss [] and parts of a batch."""


@dataclass(frozen=True)
class AlignmentOptions:
    """What a config says under `alignment_config`.

    Args:
        tap: the block whose tokens are aligned: a tap of the network, or a dotted name.
        features: classifier, inception, clip, or a dotted target, see `make_extractor`.
        weights: file of the extractor.
        layer: dotted name, within the extractor, of the layer that gives maps [B, D, h, w] or tokens [B, N, D]; only a
            classifier's needs no name.
        weight: of the term, lambda in the paper.
        width: of the perceptron's two hidden layers.
        extras: tokens before those of the image in the extractor's output, a class token for example.
    """

    tap: str
    features: str = "inception"
    weights: str | None = None
    layer: str | None = None
    weight: float = 0.5
    width: int = 2048
    extras: int = 0


def read_alignment(given: Any, place: str = "model.params.alignment_config") -> AlignmentOptions | None:
    """Read what a config says of an alignment; None where it says nothing.

    Raises:
        ValueError: for a key or a value that is not taken, and for an extractor whose layer is not named.
    """
    if given is None:
        return None
    if not isinstance(given, Mapping):
        raise ValueError(f"{place} must be a mapping of keys, got {given!r}")
    check_arguments(AlignmentOptions, given, place)
    for key, value in given.items():
        check_range(str(key), value, _RANGES, f"{place}.{key}")
    options = AlignmentOptions(**given)
    if options.layer is None and options.features not in MAPS:
        raise ValueError(
            f"{place}.layer: name the layer of {options.features} that gives maps [B, D, h, w] or tokens [B, N, D]; it "
            f"is known of {', '.join(MAPS)} alone"
        )
    return options


def hold_alignment(model: Aligned, data: Any) -> None:
    """Give a model its alignment, before a checkpoint is read and the optimiser is made.

    Args:
        model: in training it calls `Alignment.add`.
        data: the training images, of whose first the perceptron's widths are read.
    """
    options = read_alignment(model.alignment_config)
    if options is None or model.alignment is not None:
        return
    assert isinstance(model, nn.Module)
    batch = default_collate([data[0]])
    check_images(batch)
    aligned = Alignment(model.model.diffusion_model, options, model.draws.seed)
    trains = model.training
    with torch.no_grad(), watch(model.model.diffusion_model, aligned.block) as seen:
        model.eval().shared_step(batch, model.draws, 0, range(1))
    model.train(trains)
    aligned.size(seen[-1], batch[model.first_stage_key])
    model.alignment = aligned.to(seen[-1].device)


def set_up_alignment(model: Aligned, stage: str) -> None:
    """Make what aligns a network before a training, if its config asks for it; members of ensembles have none."""
    if stage == "fit" and model.member is None and model.alignment_config is not None:
        assert isinstance(model, pl.LightningModule)
        hold_alignment(model, find_training_data(attached_trainer(model)))


def compute_aligned(model: Aligned, batch: Mapping[str, Any], compute: Callable[[], _Loss]) -> _Loss:
    """Compute the loss [] and its parts of a batch, in training with the term of an alignment, if there is one."""
    aligned = model.alignment if model.training else None
    return compute() if aligned is None else aligned.add(model, batch, compute)


class Projector(nn.Sequential):
    """Perceptron of tokens [..., D] with two hidden layers, whose start depends on the seed (Yu et al. 2024)."""

    def __init__(self, channels: int, width: int, features: int, seed: int):
        sizes = (channels, width, width, features)
        skipped = torch.nn.utils.skip_init  # whose draws would move those of the parameters that are made after
        layers = [skipped(nn.Linear, *pair) for pair in pairwise(sizes)]
        super().__init__(layers[0], nn.SiLU(), layers[1], nn.SiLU(), layers[2])
        source = generator("alignment", seed)
        with torch.no_grad():
            for layer in layers:
                bound = layer.in_features**-0.5
                for value in (layer.weight, layer.bias):
                    value.copy_((2 * torch.rand(value.shape, generator=source) - 1) * bound)


class Alignment(nn.Module):
    """The term that aligns the tokens of one block; its state dict holds the perceptron alone.

    Args:
        network: whose block it is.
        options: of the term.
        seed: of the perceptron's start.

    Raises:
        ValueError: if there is no such block, or no such layer of the extractor.
    """

    projector: Projector

    def __init__(self, network: nn.Module, options: AlignmentOptions, seed: int):
        super().__init__()
        self.options, self.seed = options, seed
        (self.block,) = resolve_taps(network, [options.tap]).values()
        extractor = make_extractor(options.features, options.weights).eval().requires_grad_(False)
        self.layer = options.layer or MAPS[options.features]
        if self.layer not in dict(extractor.named_modules()):
            raise ValueError(f"alignment_config.layer: {options.features} has no layer '{self.layer}'")
        self._frozen: Sequence[Extractor] = (extractor,)  # no part of the state dict, and of no optimiser

    def size(self, values: Tensor, images: Tensor) -> None:
        """Make the perceptron for the widths of what the block gives, and of the features of images."""
        channels = values.shape[2 if values.ndim == 3 else 1]
        features = self.read_features(images).shape[1]
        self.projector = Projector(channels, self.options.width, features, self.seed)

    @torch.no_grad()
    def read_features(self, images: Tensor) -> Tensor:
        """Return the extractor's features [B, D, h, w] of images [B, H, W, C] in [-1, 1].

        Raises:
            ValueError: if the layer gives something else, or tokens of no square.
        """
        (extractor,) = self._frozen
        extractor.to(images.device)
        pixels = ((images.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).movedim(-1, 1)
        with watch(extractor, self.layer) as seen, torch.autocast(images.device.type, enabled=False):
            extractor.activations(pixels)
        return lay_out(seen[-1], self.options.extras, None, f"layer '{self.layer}' of {self.options.features}").float()

    def add(self, model: Any, batch: Mapping[str, Any], compute: Callable[[], _Loss]) -> _Loss:
        """Compute a training loss [] and its parts, and add the term, from one pass of the network."""
        network = model.model.diffusion_model
        with watch(network, self.block) as seen:
            loss, parts = compute()
        tokens = lay_out(seen[-1], getattr(network, "extras", 0), getattr(network, "grid", None), f"'{self.block}'")
        term = self.compare(tokens, self.read_features(batch[model.first_stage_key]))
        loss = loss + self.options.weight * term
        return loss, {**parts, "train/loss_alignment": term.detach(), "train/loss": loss.detach()}

    def compare(self, tokens: Tensor, features: Tensor) -> Tensor:
        """Return the negative mean cosine similarity [] of tokens [B, C, h, w] and features [B, D, h', w'].

        Features of another grid are interpolated to that of the tokens.
        """
        if features.shape[2:] != tokens.shape[2:]:
            features = F.interpolate(features, tokens.shape[2:], mode="bilinear", antialias=True)
        projected = self.projector(tokens.movedim(1, -1))  # [B, h, w, D]
        return -F.cosine_similarity(projected, features.movedim(1, -1).to(projected), dim=-1).mean()


def check_images(batch: Mapping[str, Any]) -> None:
    """Make sure that a batch holds images.

    Raises:
        ValueError: if it holds latents in their place.
    """
    if "encoded" in batch:
        raise ValueError(
            "alignment_config needs the training images, and the data give cached latents: leave the latent cache out"
        )


@contextmanager
def watch(module: nn.Module, name: str) -> Iterator[list[Tensor]]:
    """Collect what a submodule returns inside the block."""
    seen: list[Tensor] = []

    def keep(_module: nn.Module, _inputs: Any, output: Tensor) -> None:
        seen.append(output)

    handle = module.get_submodule(name).register_forward_hook(keep)
    try:
        yield seen
    finally:
        handle.remove()


def lay_out(values: Tensor, extras: int, grid: tuple[int, int] | None, what: str) -> Tensor:
    """Return maps [B, D, h, w] of maps, of tokens [B, extras + h w, D] by row, or of one vector an image [B, D].

    Raises:
        ValueError: if the tokens are of no grid that is known.
    """
    if values.ndim == 4:
        return values
    if values.ndim == 2:
        return values[:, :, None, None]
    if values.ndim != 3:
        raise ValueError(
            f"alignment needs maps [B, D, h, w] or tokens [B, N, D], and {what} gives {list(values.shape)}"
        )
    tokens = values[:, extras:]
    side = round(tokens.shape[1] ** 0.5)
    height, width = (side, side) if grid is None else grid
    if height * width != tokens.shape[1]:
        raise ValueError(
            f"alignment needs tokens of a grid, and {what} gives {tokens.shape[1]} behind {extras} others: set "
            "alignment_config.extras to the number of tokens before those of the image"
        )
    return tokens.transpose(1, 2).unflatten(2, (height, width))
