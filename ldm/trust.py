"""Which classes may be built of a file that comes from elsewhere: a run, an ensemble, a posterior, a reference, a plan.

A config names what is built by `target`, and building calls what is named. A file that the user names as a config
(--base) is the user's own and may name any class. A file that a program wrote travels: its targets are looked up in the
list here before anything is imported, and it is not told what is in the environment.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from ldm.util import DIFFUSERS_TARGETS, MOVED_MODULES, TARGET_ALIASES

# Rooms of this project whose classes configs name; commands, trainings and what fetches files are none.
ROOMS = (
    "ldm.data",
    "ldm.diffusion",
    "ldm.evaluation",
    "ldm.interop",
    "ldm.lr_scheduler",
    "ldm.models",
    "ldm.modules",
    "ldm.pipelines.features",
    "ldm.training.callbacks",
    "ldm.training.posthoc",
    "ldm.training.sample_metrics",
    *MOVED_MODULES,
)
_LAYERS = (
    *("Identity", "Flatten", "Sequential", "Dropout", "Linear", "Conv2d", "AvgPool2d", "AdaptiveAvgPool2d"),
    *("ReLU", "LeakyReLU", "SiLU", "GELU", "ELU", "Tanh", "Sigmoid", "Softplus"),
    *("L1Loss", "MSELoss", "SmoothL1Loss", "PairwiseDistance", "CosineSimilarity"),
)
_CALLBACKS = (
    *("DeviceStatsMonitor", "EarlyStopping", "GradientAccumulationScheduler", "LearningRateMonitor"),
    *("ModelCheckpoint", "ModelSummary", "RichModelSummary", "RichProgressBar", "StochasticWeightAveraging"),
    *("Timer", "TQDMProgressBar"),
)
# Classes of other packages, one by one.
NAMED = frozenset(
    [
        *(f"torch.nn.{name}" for name in _LAYERS),
        *(f"pytorch_lightning.callbacks.{name}" for name in _CALLBACKS),
        *(f"lightning.pytorch.callbacks.{name}" for name in _CALLBACKS),
        *TARGET_ALIASES,
        *DIFFUSERS_TARGETS,
    ]
)
_PACKAGE = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)*")
# Another value of the same config; everything else that begins as it does asks a function of omegaconf.
_REFERENCE = r"\$\{[^${}:]+\}"
_ASKED = re.compile(rf"(?!{_REFERENCE})\$\{{([^${{}}]*)\}}")
# A dollar that could begin such a question, by itself or joined to what it refers to.
_OPEN = re.compile(rf"(?!{_REFERENCE})\$(?=[{{$]|$)")
_DOLLAR = re.compile(r"(\\*)\$\{")
_TRUSTED: ContextVar[frozenset[str]] = ContextVar("trusted", default=frozenset())


@contextmanager
def trusting(names: Iterable[str]) -> Iterator[None]:
    """Inside the block, admit the classes of further packages, or single targets; nothing of it is kept.

    Raises:
        ValueError: for a word that is no name of a package.
    """
    names = [names] if isinstance(names, str) else list(names)
    wrong = sorted(str(name) for name in names if not (isinstance(name, str) and _PACKAGE.fullmatch(name)))
    if wrong:
        raise ValueError(f"--trust takes the name of a Python package, mypackage or mypackage.module; got '{wrong[0]}'")
    token = _TRUSTED.set(_TRUSTED.get() | frozenset(names))
    try:
        yield
    finally:
        _TRUSTED.reset(token)


def is_admitted(target: str) -> bool:
    """Whether a file from elsewhere may name this class; nothing is imported to tell.

    A target is written out: one that refers to other values could become any name. In the rooms of this project it is
    a module and one name in it that is written as classes are, so `ldm.data.pictures.os.system` is none.
    """
    if target in NAMED or any(target == one or target.startswith(f"{one}.") for one in _TRUSTED.get()):
        return True
    return any(target.startswith(f"{one}.") for one in ROOMS) and _is_written_as_class(target)


def _is_written_as_class(target: str) -> bool:
    """Whether a target could be a class of a module of this project, as far as names and files tell."""
    *module, name = target.split(".")
    folders = [Path(__file__).parent.joinpath(*module[1:end]) for end in range(2, len(module))]
    in_file = any(folder.with_suffix(".py").is_file() for folder in folders)  # a name of a name in a file
    return name[:1].isupper() and name.isidentifier() and not in_file


def find_targets(config: Any, place: str = "") -> Iterator[tuple[str, Any]]:
    """Find what a config names as `target`, at every depth: (dotted place, name)."""
    if isinstance(config, (list, tuple)):
        config = dict(enumerate(config))
    for key, value in config.items() if isinstance(config, Mapping) else ():
        inner = f"{place}.{key}" if place else str(key)
        if key == "target":
            yield inner, value
        yield from find_targets(value, inner)


def find_own_classes(config: Any) -> set[str]:
    """Return the classes that a config of the user's names, as far as they are written out."""
    named = find_targets(OmegaConf.to_container(config, resolve=False))
    return {target for _, target in named if isinstance(target, str) and "$" not in target}


def accept(content: Mapping[str, Any], source: str | Path) -> dict[str, Any]:
    """Return what a file from elsewhere holds, once all classes that it names are known.

    References to other values of it stay; a question to the environment (`${oc.env:HOME}`) becomes mere words,
    `<oc.env:HOME>`.

    Args:
        content: what was read, with nothing filled in.
        source: the file or folder, for messages.

    Raises:
        ValueError: naming a target that is not admitted; nothing has been imported.
    """
    plain = OmegaConf.to_container(content, resolve=False) if OmegaConf.is_config(content) else content
    safe = _disarm(plain)
    for place, target in find_targets(safe):
        if not isinstance(target, str) or not is_admitted(target):
            raise ValueError(
                f"{source}: {place} names {target}, which is no class of this project, and nothing of the file was "
                "built: if it is a package of your own, or one that you trust, name it by --trust PACKAGE (in Python "
                "trust=['PACKAGE'])"
            )
    return safe


def accept_config(config: DictConfig, source: str | Path) -> DictConfig:
    """Do the same for a config of omegaconf; see `accept`."""
    return OmegaConf.create(accept(config, source))


def _disarm(value: Any) -> Any:
    """Return plain values in whose texts no question to the environment is left, nor the parts of one."""
    if isinstance(value, Mapping):
        return {key: _disarm(one) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [_disarm(one) for one in value]
    if not isinstance(value, str) or "$" not in value:
        return value
    while _ASKED.search(value):
        value = _ASKED.sub(r"<\1>", value)
    return _OPEN.sub("<", value)


def escape(value: Any) -> Any:
    """Return plain values written so that OmegaConf reads every text as it is: `\\${` for `${`, which would refer.

    What has its references filled in and becomes a config again goes through here: a class may be named `${b}`.
    """
    if isinstance(value, Mapping):
        return {key: escape(one) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [escape(one) for one in value]
    return _DOLLAR.sub(r"\1\1\\${", value) if isinstance(value, str) else value


def settle(config: DictConfig) -> DictConfig:
    """Return the user's own config with the answers of the environment written out, for the files of a run.

    References to other values of it stay.
    """
    return OmegaConf.create(_settle(OmegaConf.to_container(config, resolve=False), config))


def _settle(raw: Any, node: Any) -> Any:
    if isinstance(raw, dict):
        return {key: _settle(value, node[key]) if _is_asking(value) else value for key, value in raw.items()}
    if isinstance(raw, list):
        return [_settle(value, node[place]) if _is_asking(value) else value for place, value in enumerate(raw)]
    return node


def _is_asking(raw: Any) -> bool:
    """Whether a question to the environment is in a plain value, at any depth."""
    if isinstance(raw, dict):
        return any(map(_is_asking, raw.values()))
    if isinstance(raw, list):
        return any(map(_is_asking, raw))
    return isinstance(raw, str) and "\\$" not in raw and _disarm(raw) != raw
