"""Objects from `target:`/`params:` configs, seeds from named integers, and files written whole or not at all."""

from __future__ import annotations

import hashlib
import importlib
import inspect
import struct
import sys
from collections.abc import Mapping, Sequence
from numbers import Integral
from typing import Any

import torch
from omegaconf import OmegaConf

from ldm.arguments import check_arguments, check_value, suggest_key
from ldm.files import atomic_write as atomic_write
from ldm.files import read_mapping as read_mapping

# Rates that a model's section holds beside its target, for the training.
RATES = ("base_learning_rate", "learning_rate")
# Targets named by released YAMLs whose classes live elsewhere here. Losses of a first stage only act in its training.
TARGET_ALIASES = {
    "taming.modules.losses.vqperceptual.VQLPIPSWithDiscriminator": "ldm.modules.losses.VQLoss",
    "taming.modules.losses.vqperceptual.DummyLoss": "torch.nn.Identity",
    "ldm.models.diffusion.ddpm.Layout2ImgDiffusion": "ldm.models.diffusion.ddpm.LatentDiffusion",
    "ldm.modules.losses.LPIPSWithDiscriminator": "ldm.modules.losses.KLLoss",
    "ldm.modules.losses.contperceptual.LPIPSWithDiscriminator": "ldm.modules.losses.KLLoss",
    "ldm.modules.losses.contperceptual.DummyLoss": "torch.nn.Identity",
    # latent-diffusion keeps these in its main.py; an installed package has no top-level module `main`.
    "main.CUDACallback": "ldm.training.callbacks.CUDACallback",
    "main.DataModuleFromConfig": "ldm.data.module.DataModuleFromConfig",
    "main.ImageLogger": "ldm.training.callbacks.ImageLogger",
    "main.LearningRateMonitor": "pytorch_lightning.callbacks.LearningRateMonitor",
    "main.SetupCallback": "ldm.training.callbacks.SetupCallback",
    "main.WrappedDataset": "ldm.data.module.WrappedDataset",
    # Data sets whose lists were not published; there is no such module, which building one of them says.
    "taming.data.faceshq.CelebAHQTrain": "ldm.data.faceshq.CelebAHQTrain",
    "taming.data.faceshq.CelebAHQValidation": "ldm.data.faceshq.CelebAHQValidation",
    "taming.data.faceshq.FFHQTrain": "ldm.data.faceshq.FFHQTrain",
    "taming.data.faceshq.FFHQValidation": "ldm.data.faceshq.FFHQValidation",
}
# Classes of diffusers that configs may name, and ours that put them in the stages that networks have here.
DIFFUSERS_TARGETS = {
    "diffusers.AutoencoderKL": "ldm.interop.first_stages.StagedAutoencoderKL",
    "diffusers.DiTTransformer2DModel": "ldm.interop.transformers.StagedDiT",
    "diffusers.FluxTransformer2DModel": "ldm.interop.transformers.StagedFlux",
    "diffusers.PixArtTransformer2DModel": "ldm.interop.pixart.StagedPixArt",
    "diffusers.SD3Transformer2DModel": "ldm.interop.transformers.StagedSD3",
    "diffusers.UNet2DConditionModel": "ldm.interop.unets.StagedUNet2DCondition",
    "diffusers.UNet2DModel": "ldm.interop.unets.StagedUNet2D",
    "diffusers.VQModel": "ldm.interop.first_stages.StagedVQModel",
}
# Where the modules went that targets of the first version's run directories name, and what their classes are called
# now.
MOVED_MODULES = {
    "ldm.models.diffusion.path": "ldm.diffusion.schedule",
    "ldm.models.diffusion.affine": "ldm.diffusion.affine",
    "ldm.models.diffusion.times": "ldm.diffusion.training_times",
    "ldm.models.diffusion.learned_variance": "ldm.diffusion.learned_variance",
    "ldm.opened.trunk": "ldm.pipelines.features",
}
RENAMED_TARGETS = {
    "TrunkFeatures": "BackboneFeatures",
    "LinearVPPath": "LinearVPSchedule",
    "VPPath": "VPSchedule",
    "EDMPath": "EDMSchedule",
    "VEPath": "VESchedule",
    "FlowPath": "FlowSchedule",
    "PolynomialPath": "PolynomialSchedule",
    "CosinePath": "CosineSchedule",
    "LinearAlphaPath": "LinearAlphaSchedule",
}
# Height and width of images: one number where they are equal.
ImageSize = int | Sequence[int]
# What takes the place of data sets that latent-diffusion's YAML files name, whose code it never published.
UNPUBLISHED_DATA = (
    "; latent-diffusion's files name data sets whose code was not published: name one in its place whose items hold "
    "the model's first_stage_key (image [H, W, 3]) and cond_stage_key (of layout2img: coordinates_bbox, 92 token ids "
    "of up to 30 boxes of OpenImages or COCO), see docs/data.md"
)
_MARKERS = ("__is_first_stage__", "__is_unconditional__")


def get_obj_from_str(path: str) -> Any:
    """Return the object a dotted path names.

    Raises:
        ValueError: if there is no such thing, or it is of Python's standard library: a model is built of none of it.
    """
    path = DIFFUSERS_TARGETS.get(path, TARGET_ALIASES.get(path, path))
    if path.startswith("diffusers."):
        raise ValueError(f"of diffusers' classes a config may name {', '.join(DIFFUSERS_TARGETS)}; got '{path}'")
    module, _, name = path.rpartition(".")
    if module in MOVED_MODULES:
        module, name = MOVED_MODULES[module], RENAMED_TARGETS.get(name, name)
    if not all(part.isidentifier() for part in path.split(".")) or not module:
        raise ValueError(f"target must be a dotted path such as 'package.module.Class', got '{path}'")
    if module.partition(".")[0] in sys.stdlib_module_names:
        raise ValueError(
            f"target {path} is of Python's standard library, of which nothing is built; name a class of a package"
        )
    try:
        return getattr(importlib.import_module(module), name)
    except ModuleNotFoundError as error:
        hint = ""
        if error.name and error.name.split(".")[0] == "taming":
            hint = "; taming-transformers is optional: pip install --no-deps taming-transformers-rom1504==0.0.6"
        if error.name and error.name.split(".")[0] == "diffusers":
            hint = "; models of diffusers need the extra `diffusers`: pip install 'decu-uncertainty[diffusers]'"
        if error.name and error.name.startswith("ldm.data."):
            hint = UNPUBLISHED_DATA
        raise ValueError(f"cannot import '{module}' for target '{path}': {error}{hint}") from error
    except AttributeError as error:
        raise ValueError(f"module '{module}' has no '{name}' (target '{path}')") from error


def instantiate_from_config(config: Mapping[str, Any] | torch.nn.Module | str) -> Any:
    """Build `target(**params)`; the strings `__is_first_stage__` and `__is_unconditional__` give None.

    `config` is never changed. A module in place of one is returned as it is.

    Raises:
        ValueError: if there is no `target`, it is no class, or it does not take one of the parameters.
    """
    if isinstance(config, str) and config in _MARKERS:
        return None
    if isinstance(config, torch.nn.Module):
        return config
    if not isinstance(config, Mapping):
        raise ValueError(f"expected a mapping with 'target' and 'params' or one of {_MARKERS}, got {config!r}")
    if "target" not in config:
        raise ValueError(f"config has no 'target'; its keys are {sorted(map(str, config))}")
    further = [str(key) for key in config if key not in ("target", "params", *RATES)]
    if further:
        nearest = suggest_key(further[0], ("target", "params"))
        raise ValueError(f"{config['target']} has a key '{further[0]}' beside target and params: {nearest}")
    params = config.get("params") or {}
    check_value(config["target"], str, "target")
    check_value(params, Mapping[str, Any], f"{config['target']}: params")
    target = get_obj_from_str(config["target"])
    _check_target(config["target"], target)
    check_arguments(target, _plain(params), config["target"])
    try:
        return target(**params)
    except (TypeError, ArithmeticError, LookupError, AttributeError, AssertionError, RuntimeError) as error:
        words = " ".join(str(error).split())[:300]
        given = ", ".join(sorted(map(str, params)))
        raise ValueError(
            f"{config['target']} cannot be built with these params ({type(error).__name__}: {words}): look at {given}"
        ) from error


def _plain(params: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return parameters with plain lists and mappings in place of OmegaConf's."""
    if not OmegaConf.is_config(params):
        return params
    plain = OmegaConf.to_container(params, resolve=True)  # type: ignore[arg-type]
    assert isinstance(plain, dict)
    return {str(name): value for name, value in plain.items()}


def instantiate_as(kind: type, config: Any, place: str) -> Any:
    """Build a config's target, which must be one of a kind.

    Args:
        kind: the class, `torch.nn.Module` for example.
        place: of the config, for messages.

    Raises:
        ValueError: if something else comes of it.
    """
    made = instantiate_from_config(config)
    if not isinstance(made, kind):
        named = config.get("target") if isinstance(config, Mapping) else config
        raise ValueError(f"{place}: {named} gave a {type(made).__name__}, expected a {kind.__name__}")
    return made


def _check_target(name: str, target: Any) -> None:
    """Check that a target is something to build: of this project a class of its own, of others a class or function.

    Raises:
        ValueError: saying what it is.
    """
    if not callable(target):
        raise ValueError(f"target {name} is a {type(target).__name__}; expected the name of a class")
    if not name.startswith("ldm.") or name in TARGET_ALIASES:
        return
    if not isinstance(target, type) or target.__module__.split(".")[0] != "ldm":
        kind = "a class" if isinstance(target, type) else "a function"
        raise ValueError(f"target {name} is {kind} of {target.__module__}; expected a class of this project")


def read_image_size(value: Any, name: str = "image_size") -> tuple[int, int]:
    """Return height and width of images whose size is one number of pixels, or [height, width].

    Raises:
        ValueError: for anything else, naming the value by `name`.
    """
    sides = (value, value) if isinstance(value, Integral) else value
    known = isinstance(sides, Sequence) and not isinstance(sides, str) and len(sides) == 2
    if not known or any(isinstance(side, bool) or not isinstance(side, Integral) or side < 1 for side in sides):
        raise ValueError(f"{name} must be a number of pixels, or [height, width] of two; got {value!r}")
    return int(sides[0]), int(sides[1])


def shorten_size(size: tuple[int, int]) -> int | tuple[int, int]:
    """Return the one number of a square size, as configs give it; else height and width."""
    return size[0] if size[0] == size[1] else size


def exists(value: Any) -> bool:
    """Return whether a value is not None."""
    return value is not None


def default(value: Any, otherwise: Any) -> Any:
    """Return a value, or what stands in for None: another value, or a function that makes it."""
    if value is not None:
        return value
    return otherwise() if inspect.isfunction(otherwise) else otherwise


def mean_flat(tensor: torch.Tensor) -> torch.Tensor:
    """Return the mean over all axes but the first, [B]."""
    return tensor.mean(dim=tuple(range(1, tensor.ndim)))


def mean_over_processes(value: torch.Tensor) -> torch.Tensor:
    """Return the mean of a tensor over the processes of a data-parallel training, so that all start alike."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return value
    total = value.clone()
    torch.distributed.all_reduce(total)
    return total / torch.distributed.get_world_size()


def count_params(model: torch.nn.Module, verbose: bool = False) -> int:
    """Return the number of a module's parameters; `verbose` is latent-diffusion's, and nothing is printed."""
    return sum(parameter.numel() for parameter in model.parameters())


def ismap(x: Any) -> bool:
    """Return whether x is a batch of maps [B, C, H, W] with more channels than a picture has."""
    return isinstance(x, torch.Tensor) and x.ndim == 4 and x.shape[1] > 3


def isimage(x: Any) -> bool:
    """Return whether x is a batch of pictures [B, C, H, W], grey or RGB."""
    return isinstance(x, torch.Tensor) and x.ndim == 4 and x.shape[1] in (1, 3)


def log_txt_as_img(wh: tuple[int, int], xc: Sequence[str], size: int = 10) -> torch.Tensor:
    """Draw captions as pictures in [-1, 1], [B, 3, height, width], for a logger of images.

    Args:
        wh: width and height in pixels.
        xc: the captions.
        size: height of the letters in pixels.
    """
    import numpy as np
    from PIL import Image, ImageDraw, ImageFont

    pictures = []
    letters = int(40 * wh[0] / 256)  # of a line
    for caption in xc:
        picture = Image.new("RGB", (wh[0], wh[1]), color="white")
        lines = "\n".join(caption[start : start + letters] for start in range(0, len(caption), letters))
        ImageDraw.Draw(picture).text((0, 0), lines, fill="black", font=ImageFont.load_default(size))
        pictures.append(torch.from_numpy(np.array(picture)).permute(2, 0, 1) / 127.5 - 1)
    return torch.stack(pictures)


def check_plain_name(what: str, name: str) -> str:
    """Return a name that becomes part of a folder's name, if it leads nowhere else.

    Args:
        what: the name is, for messages.

    Raises:
        ValueError: for one with a path in it.
    """
    if any(mark in name for mark in ("/", "\\", "\0")) or name in (".", ".."):
        raise ValueError(f"{what} is part of the name of a folder and holds no path; got '{name}'")
    return name


def derive_seed(*keys: int | str) -> int:
    """Hash integers and words to one 63-bit seed, so that draws named by different keys are independent."""
    digest = hashlib.blake2b(digest_size=8)
    for key in keys:
        digest.update(struct.pack("<q", key) if isinstance(key, int) else key.encode() + b"\0")
    return int.from_bytes(digest.digest(), "little") >> 1


def generator(*keys: int | str) -> torch.Generator:
    """Return a CPU generator seeded by `derive_seed(*keys)`."""
    return torch.Generator().manual_seed(derive_seed(*keys))
