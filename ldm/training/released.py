"""Released networks: fetched, and their keys and shapes checked against what was published."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf

from ldm.checkpoint import load_state_dict, matches
from ldm.data.prepare.archives import check_whole, unpack
from ldm.data.prepare.sources import ADM, ZOO, fetch_files
from ldm.training.config import load_config, packaged_configs
from ldm.util import atomic_write, instantiate_from_config

_FIRST_STAGE = "first_stage_model."
# Beside the model's own: averaged copies of its weights, and the loss of a first stage's training.
EXTRA_KEYS = ("model_ema.*", "loss.*")
KEYS_FILE = packaged_configs() / "latent-diffusion" / "cin256-v2.keys.txt"
Report = Callable[[str], Any]


def prepare_networks(folder: Path, mirror: str | None, report: Report = lambda sentence: None) -> list[Path]:
    """Fetch the released ImageNet model and its first stage, and check their keys and shapes."""
    archive, model = fetch_files("pretrained", folder, mirror)
    expected = read_keys(KEYS_FILE)
    report(check_keys(model, expected))
    networks = [path for path in unpack(archive, archive.parent) if path.suffix == ".ckpt"]
    of_stage = [name for name in expected if name.startswith(_FIRST_STAGE)]
    stage = {name.removeprefix(_FIRST_STAGE): expected[name] for name in of_stage}
    for path in networks:
        report(check_keys(path, stage))
    return [model, *networks]


def read_keys(path: Path) -> dict[str, tuple[int, ...]]:
    """Read {key: shape} from lines of `key 64x3x3x3`."""
    pairs = (line.split() for line in path.read_text().splitlines())
    return {name: tuple(map(int, shape.split("x"))) for name, shape in pairs}


def check_keys(path: Path, expected: Mapping[str, tuple[int, ...]]) -> str:
    """Compare the keys and shapes of a checkpoint with the expected ones; return a sentence that says so.

    Raises:
        ValueError: naming those that are missing, unknown, or of another shape, or if the file is damaged; it is left
            where it is.
    """
    check_whole(path)
    found = {name: tuple(value.shape) for name, value in load_state_dict(path).items()}
    faults = {
        "missing": sorted(expected.keys() - found.keys()),
        "unknown": sorted(name for name in found.keys() - expected.keys() if not matches(name, EXTRA_KEYS)),
        "of another shape": sorted(name for name in found.keys() & expected.keys() if found[name] != expected[name]),
    }
    found_faults = [f"{len(names)} {what} ({', '.join(names[:5])})" for what, names in faults.items() if names]
    if found_faults:
        raise ValueError(
            f"{path} is not the released network: of {len(expected)} expected keys {'; '.join(found_faults)}; "
            "move it away to fetch it again"
        )
    return f"{path}: all {len(expected)} keys and shapes as released"


def prepare_adm(
    folder: Path, mirror: str | None, only: Sequence[str] = (), report: Report = lambda sentence: None
) -> list[Path]:
    """Fetch released ADM models and check their keys and shapes against the networks of their configs, one by one."""
    paths = []
    for name in ADM:
        if only and name not in only:
            continue
        (path,) = fetch_files("adm", folder, mirror, [name])
        report(check_keys(path, read_shapes(f"guided-diffusion/{name}")))
        paths.append(path)
    return paths


def prepare_latent_diffusion(
    folder: Path, mirror: str | None, only: Sequence[str] = (), report: Report = lambda sentence: None
) -> list[Path]:
    """Fetch and unpack latent-diffusion's released zips, and check their keys and shapes against their configs.

    Each is checked before the next is fetched, so that an answer that is no such zip costs one download. Beside a
    diffusion model's checkpoint its config is written, unless a file of that name is there; its first stage is in the
    checkpoint.
    """
    networks = []
    for name, config in ZOO.items():
        if only and name not in only:
            continue
        (archive,) = fetch_files("latent-diffusion", folder, mirror, [name])
        found = [path for path in unpack(archive, archive.parent) if path.suffix == ".ckpt"]
        for path in found:
            report(check_keys(path, read_shapes(config)))
        if config.startswith("latent-diffusion/") and not (archive.parent / "config.yaml").exists():
            with atomic_write(archive.parent / "config.yaml") as partial:
                OmegaConf.save(OmegaConf.create({"model": read_model(config)}), partial)
        networks += found
    return networks


def read_model(config: str) -> dict[str, Any]:
    """Return the section `model` of a packaged config by its name without suffix, all of its paths left out."""
    found = load_config([str(packaged_configs() / f"{config}.yaml")])
    if "paths" in found:
        found.paths = dict.fromkeys(found.paths)
    return OmegaConf.to_container(found, resolve=True)["model"]


def read_shapes(config: str) -> dict[str, tuple[int, ...]]:
    """Return {key: shape} of a packaged config's network, without what a checkpoint may leave out.

    Of guided-diffusion's configs it is the network that lies in the model, as its files hold nothing else.
    """
    spec = read_model(config)
    if config.startswith("guided-diffusion/"):
        spec = spec["params"].get("unet_config", spec)
    with torch.device("meta"):
        network = instantiate_from_config(spec)
    shapes = {name: tuple(value.shape) for name, value in network.state_dict().items()}
    return {name: shape for name, shape in shapes.items() if not matches(name, EXTRA_KEYS)}
