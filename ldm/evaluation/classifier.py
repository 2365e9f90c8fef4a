"""A small convolutional classifier, trained here on a project's own data: features where no published network fits.

Its penultimate layer is what FID, KID and the others measure on small images, and its softmax gives an Inception Score
whose K is the data's own number of classes. Values compare with those of the same weights only.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from omegaconf import OmegaConf
from torch import Tensor, nn

from ldm.arguments import check_value
from ldm.checkpoint import load_into, load_state_dict, save_tensors, sha256
from ldm.evaluation.fitting import Batches, Progress, minimise
from ldm.files import reading
from ldm.ranges import COUNT, check_range
from ldm.util import atomic_write, generator

# The side in pixels that the last feature map has at most.
MAP_SIDE = 8
_FORMAT = 1


@dataclass(frozen=True)
class Architecture:
    """Images [channels, side, side], classes, width of the first convolution, and dimensions of the features."""

    channels: int
    side: int
    n_classes: int
    width: int = 32
    num_features: int = 128


class SmallClassifier(nn.Module):
    """Convolutions of stride 2 until the map is at most 8 x 8, one more, a layer of features, a layer of logits.

    Args:
        architecture: sizes.
        seed: of the initial weights, N(0, 2 / fan_in) (He et al. 2015, arXiv 1502.01852).
    """

    def __init__(self, architecture: Architecture, seed: int = 0):
        super().__init__()
        self.architecture = architecture
        halvings, side = 0, architecture.side
        while side > MAP_SIDE:
            halvings, side = halvings + 1, (side + 1) // 2
        layers: list[nn.Module] = []
        width = architecture.channels
        for number, stride in enumerate([2] * halvings + [1]):
            wider = architecture.width * 2 ** min(number, 2)
            layers += [nn.Conv2d(width, wider, 3, stride, 1, bias=False), nn.BatchNorm2d(wider), nn.ReLU()]
            width = wider
        self.maps = nn.Sequential(*layers)
        self.features = nn.Linear(width * side**2, architecture.num_features)
        self.logits = nn.Linear(architecture.num_features, architecture.n_classes)
        source = generator("small classifier", seed)
        with torch.no_grad():
            for parameter in self.parameters():
                if parameter.ndim > 1:
                    parameter.copy_(torch.randn(parameter.shape, generator=source) * (2 / parameter[0].numel()) ** 0.5)
            self.features.bias.zero_()
            self.logits.bias.zero_()

    def activations(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Last map [B, W, h, w], features [B, D] and logits [B, K] of images [B, C, H, W] in [-1, 1]."""
        maps = self.maps(images)
        features = self.features(maps.flatten(1)).relu()
        return maps, features, self.logits(features)

    def forward(self, images: Tensor) -> Tensor:
        """Logits [B, K] of images [B, C, H, W] in [-1, 1]."""
        return self.activations(images)[2]


def signed(images: Tensor) -> Tensor:
    """uint8 images as float32 in [-1, 1]."""
    return images.float().div_(127.5).sub_(1)


@dataclass(frozen=True)
class ClassifierTraining:
    """How the classifier is trained: AdamW under a one-cycle rate (Smith & Topin 2017, arXiv 1708.07120)."""

    epochs: int = 3
    batch_size: int = 128
    learning_rate: float = 4e-3
    weight_decay: float = 1e-2
    shift: int = 0  # pixels by which training images are moved at random, the border filled with the darkest value


def shifted(images: Tensor, shift: int, source: torch.Generator) -> Tensor:
    """Each image of uint8 [B, C, H, W] moved by -shift .. shift pixels in both directions, 0 around it."""
    if shift == 0:
        return images
    height, width = images.shape[-2:]
    padded = F.pad(images, (shift,) * 4)
    corners = torch.randint(2 * shift + 1, (len(images), 2), generator=source).tolist()
    return torch.stack([image[:, y : y + height, x : x + width] for image, (y, x) in zip(padded, corners, strict=True)])


def train_classifier(
    model: SmallClassifier,
    images: Tensor,
    labels: Tensor,
    training: ClassifierTraining,
    seed: int,
    progress: Progress | None = None,
    device: str | torch.device = "cpu",
) -> None:
    """Train in place on uint8 images [N, C, H, W] and labels [N]; the order of (seed, epoch) is fixed.

    Raises:
        ValueError: if the images do not fit the model or the labels, or the loss is not finite.
    """
    sizes = model.architecture
    expected = (sizes.channels, sizes.side, sizes.side)
    if tuple(images.shape[1:]) != expected or len(images) != len(labels) or not len(images):
        raise ValueError(f"expected images [N, {expected}] and labels [N], got {images.shape} and {labels.shape}")
    model.to(device).train()
    batches = Batches(len(images), training.batch_size, training.epochs, "classifier order", seed)
    optimiser = torch.optim.AdamW(
        model.parameters(), lr=training.learning_rate, weight_decay=training.weight_decay, betas=(0.9, 0.99)
    )
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimiser, training.learning_rate, total_steps=batches.steps, pct_start=0.3
    )

    def loss(rows: Tensor, _epoch: int, source: torch.Generator) -> Tensor:
        batch = signed(shifted(images[rows], training.shift, source)).to(device)
        return F.cross_entropy(model(batch), labels[rows].to(device))

    minimise(loss, batches, optimiser, schedule, progress)
    model.eval()


@torch.no_grad()
def accuracy(model: SmallClassifier, images: Tensor, labels: Tensor, batch_size: int = 500) -> float:
    """Share of uint8 images [N, C, H, W] whose largest logit is that of their label [N]."""
    device = next(model.parameters()).device
    model.eval()
    found = [model(signed(part).to(device)).argmax(1).cpu() for part in images.split(batch_size)]
    return float((torch.cat(found) == labels).double().mean())


def record_path(path: str | os.PathLike) -> Path:
    """The YAML record beside a classifier's weights."""
    return Path(path).with_suffix(".yaml")


def save_classifier(
    model: SmallClassifier, path: str | os.PathLike, facts: Mapping[str, Any], overwrite: bool = False
) -> None:
    """Write weights (.safetensors) and beside them a YAML record: architecture, sha256 of the weights, and `facts`.

    Raises:
        ValueError: if the path has another suffix.
        FileExistsError: if a file exists and `overwrite` is False.
    """
    path = Path(path)
    if path.suffix != ".safetensors":
        raise ValueError(f"a classifier is saved as .safetensors, got {path}")
    if record_path(path).exists() and not overwrite:
        raise FileExistsError(f"{record_path(path)} exists; choose another path, or ask for it to be overwritten")
    save_tensors(model.state_dict(), path, overwrite=overwrite)
    content = {"format": _FORMAT, "architecture": asdict(model.architecture), "weights_sha256": sha256(path), **facts}
    with atomic_write(record_path(path), overwrite) as partial:
        OmegaConf.save(OmegaConf.create(content), partial)


def load_classifier(path: str | os.PathLike) -> SmallClassifier:
    """Read a classifier with its record, ready for evaluation.

    Raises:
        FileNotFoundError: if weights or record are absent.
        ValueError: if the weights are not those that the record was written for.
    """
    for file in (Path(path), record_path(path)):
        if not file.is_file():
            raise FileNotFoundError(
                f"no classifier at {file}; train one on your data with `decu evaluate classifier`, which writes NAME"
                ".safetensors and NAME.yaml"
            )
    again = "train the classifier again (decu evaluate classifier --overwrite)"
    with reading(record_path(path), "a classifier's record", again):
        spec = OmegaConf.to_container(OmegaConf.load(record_path(path)))
        described = spec["weights_sha256"]
        if spec["format"] != _FORMAT:
            raise ValueError(f"its format is {spec['format']}, expected {_FORMAT}")
        architecture = Architecture(**spec["architecture"])
        for name, value in asdict(architecture).items():
            check_value(value, int, name)
            check_range(name, value, {name: COUNT}, name)
    if sha256(path) != described:
        raise ValueError(f"{path} is not the file that {record_path(path)} describes (sha256); keep the two together")
    with reading(record_path(path), "the record of these weights", again):
        model = SmallClassifier(architecture)
    load_into(model, load_state_dict(path), file=path)
    return model.eval().requires_grad_(False)
