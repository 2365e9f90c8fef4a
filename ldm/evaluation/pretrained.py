"""Published networks as feature extractors: torch-fidelity's Inception and CLIP from transformers, both optional."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ldm.checkpoint import load_state_dict, tensors_sha256
from ldm.evaluation.features import SPATIAL_CHANNELS, Activations, Extractor

INCEPTION_FILE = "weights-inception-2015-12-05-6726825d.pth"
INCEPTION_URL = f"https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/{INCEPTION_FILE}"
CLIP_MODEL = "openai/clip-vit-large-patch14-336"
# Mean and standard deviation of CLIP's training images, RGB in [0, 1] (Radford et al. 2021, arXiv 2103.00020).
CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


class InceptionFeatures(Extractor):
    """Inception v3 as TensorFlow's FID used it: pool [2048], logits without bias [1008], spatial features [2023].

    The spatial features of sFID are the first 7 channels after the 1 x 1 convolution of TensorFlow's block mixed_6,
    which is Mixed_6d here. Images of any size are scaled to 299 x 299 as TensorFlow 1 did.

    Args:
        weights: state dict of torch-fidelity's converted network; its own download where not given.
    """

    name, channels, num_features = "inception", 3, 2048

    def __init__(self, weights: str | os.PathLike | None = None):
        super().__init__()
        network = _fidelity_network()
        path = inception_weights(weights)
        try:
            self.network = network("inception", ["2048", "logits_unbiased"], None if path is None else str(path))
        except OSError as error:  # what urllib raises without a network
            raise ValueError(
                f"Inception's weights could not be fetched ({error}). On a machine with a network get {INCEPTION_URL}, "
                f"and give it as --weights, or place it in {hub_folder()}"
            ) from error
        self.network.eval().requires_grad_(False)
        self.network.Mixed_6d.branch1x1.register_forward_hook(self._keep)
        self.maps: Tensor | None = None
        given = None if weights is None else str(weights)
        self.source = {"extractor": self.name, "weights": given, "sha256": tensors_sha256(self.network.state_dict())}

    def _keep(self, _module: Any, _inputs: Any, output: Tensor) -> None:
        self.maps = output

    def activations(self, images: Tensor) -> Activations:
        pooled, logits = self.network(self.prepared(images))
        spatial, self.maps = self.maps[:, :SPATIAL_CHANNELS].flatten(1), None
        return Activations(pooled, logits, spatial)

    def describe(self) -> dict[str, Any]:
        return self.source


def _fidelity_network() -> type:
    """torch-fidelity's network, or a clear error."""
    try:
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
    except (ImportError, RuntimeError) as error:
        raise ValueError(
            f"features 'inception' need torch-fidelity ({error}): pip install 'decu-uncertainty[metrics]'. It brings "
            "torchvision, which must match the installed torch and cannot be imported beside a CPU build of it; there, "
            "use --features classifier"
        ) from error
    return FeatureExtractorInceptionV3


def hub_folder() -> Path:
    """Where torch keeps downloaded weights."""
    return Path(torch.hub.get_dir()) / "checkpoints"


def inception_weights(weights: str | os.PathLike | None) -> Path | None:
    """The file to load: the one given, one downloaded earlier, or None for the library's download.

    The file is read here first, since the library would run code that a file contains.
    """
    path = Path(weights) if weights is not None else hub_folder() / INCEPTION_FILE
    if weights is None and not path.is_file():
        return None
    load_state_dict(path)
    return path


class ClipFeatures(Extractor):
    """CLIP's image embeddings of unit length, as CMMD uses them (Jayasumana et al. 2024, arXiv 2401.09603).

    Images are scaled to the network's side by bicubic interpolation, without a crop, as in CMMD's published code.

    Args:
        weights: folder with the model's files, where they are not to be downloaded.
        model: name of a CLIP model; ViT-L/14 at 336 pixels is CMMD's, others give other values.
    """

    channels = 3

    def __init__(self, weights: str | os.PathLike | None = None, model: str = CLIP_MODEL):
        super().__init__()
        self.name = "clip" if model == CLIP_MODEL else f"clip:{model}"
        try:
            from transformers import CLIPVisionModelWithProjection
        except ImportError as error:
            raise ValueError(
                f"features 'clip' need transformers ({error}): pip install 'decu-uncertainty[clip]'"
            ) from error
        try:
            self.network = CLIPVisionModelWithProjection.from_pretrained(str(weights or model))
        except (OSError, ValueError) as error:
            reason = str(error).splitlines()[0].rstrip(".")
            raise ValueError(
                f"CLIP's weights could not be read from '{weights or model}': {reason}. "
                f"On a machine with a network run `hf download {model} --local-dir FOLDER`, copy the folder "
                "here (config.json and model.safetensors are enough) and give it as --weights FOLDER"
            ) from error
        self.network.eval().requires_grad_(False)
        self.side = self.network.config.image_size
        self.num_features = self.network.config.projection_dim
        self.register_buffer("mean", torch.tensor(CLIP_MEAN).reshape(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(CLIP_STD).reshape(1, 3, 1, 1), persistent=False)
        self.source = {
            "extractor": "clip",
            "params": {"model": model},
            "weights": None if weights is None else str(weights),
            "sha256": tensors_sha256(self.network.state_dict()),
        }

    def activations(self, images: Tensor) -> Activations:
        pixels = self.prepared(images).float() / 255
        pixels = F.interpolate(pixels, (self.side, self.side), mode="bicubic", align_corners=False)
        embeds = self.network(pixel_values=(pixels - self.mean) / self.std).image_embeds
        return Activations(F.normalize(embeds, dim=1))

    def describe(self) -> dict[str, Any]:
        return self.source
