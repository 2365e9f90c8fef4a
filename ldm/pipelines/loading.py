"""The three loaders: a model, an ensemble or a posterior from the files that a training or a command wrote."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor, nn

from ldm.checkpoint import load_into, load_state_dict
from ldm.ensembles.storage import Ensemble, read_ensemble
from ldm.interop.folder import is_model_folder, read_folder
from ldm.interop.loading import load_folder_weights, make_config
from ldm.interop.sharing import WEIGHTS_FILE, find_shared, is_shared_model, read_shared_config
from ldm.jobs import pick_device
from ldm.laplace import load_laplace
from ldm.memory import Chunker, rows_that_fit
from ldm.models.diffusion.ddpm import LatentDiffusion
from ldm.modules.low_rank import add_factors_of
from ldm.pipelines.base import Defaults, Pipeline
from ldm.pipelines.building import build_model, check_heads, load_weights
from ldm.pipelines.ensemble import EnsemblePipeline
from ldm.pipelines.laplace import adjust_posterior
from ldm.pipelines.model import ModelPipeline
from ldm.pipelines.own_network import OwnNetwork, gather_ensemble
from ldm.pipelines.posterior import PosteriorPipeline
from ldm.pipelines.speed import with_speed
from ldm.settings import Branching, Sampling, Speed
from ldm.training.config_keys import check_config, read_model_config
from ldm.training.runs import find_run
from ldm.trust import trusting

P = TypeVar("P", bound=Pipeline)


def load_model(
    run: str | Path | None = None,
    sampling: Sampling | None = None,
    *,
    base: str | Path | None = None,
    ckpt: str | Path | None = None,
    network: nn.Module | None = None,
    diffusers: str | Path | None = None,
    ema: bool = True,
    epoch: int | None = None,
    pretrained: str | Path | None = None,
    speed: Speed | None = None,
    device: str = "auto",
    defaults: Defaults | None = None,
    trust: Sequence[str] = (),
    **own: Any,
) -> ModelPipeline:
    """Load a diffusion model, ready to sample.

    Args:
        run: a run directory of a training, or a checkpoint in one; a folder that `decu export --to folder` wrote, or
            its name on the hub, hf://OWNER/NAME; a folder of diffusers is taken as `diffusers`.
        sampling: how it is sampled.
        base, ckpt: in place of `run` a config and a checkpoint, a released one for example.
        network: in place of both a torch module; `own` then says what it was trained for, with the fields of
            `OwnNetwork` (schedule, target, shape, condition, ...), and `ckpt` may name a file of its state dict.
        diffusers: in place of all these a folder that diffusers' `save_pretrained` wrote, or a name on the hub.
        ema: take averaged weights, where there are any.
        epoch: with a run directory, the kept checkpoint of this epoch in place of the last.
        pretrained: the base checkpoint of a member, where it moved.
        speed: precision, memory layout, compilation, and images in one pass.
        device: auto, cpu, or cuda[:N].
        defaults: what is taken where neither `sampling` nor the config say.
        trust: packages whose classes the config of the run may name beside those of `ldm.trust`.

    Raises:
        ValueError: if not exactly one of `run`, `diffusers`, `base` with `ckpt` and `network` is given, or weights do
            not fit.
        FileNotFoundError: if a file is missing.
        TypeError: for an argument that nothing takes.
    """
    if network is not None and run is None and base is None and diffusers is None:
        return _load_own(OwnNetwork(network, **own), ckpt, sampling, speed, device, defaults or Defaults())
    if own:
        raise TypeError(f"load_model takes {sorted(own)} with a network only: network=MODULE")
    if diffusers is None and run is not None and is_model_folder(run):
        run, diffusers = None, run
    if diffusers is not None and (run, base, ckpt) == (None, None, None):
        return _load_folder(diffusers, sampling, speed, device, defaults or Defaults())
    run = None if run is None else find_shared(run)
    if run is not None and (base, ckpt) == (None, None) and is_shared_model(run):
        return _load_shared(run, sampling, speed, device, defaults or Defaults(), trust)
    _check_sources(run, base, ckpt, diffusers, network)
    with trusting(trust):
        directory, checkpoint = find_run(str(run), epoch) if run is not None else (None, Path(str(ckpt)))
        config = read_model_config(directory, base)
    load_weights(model := build_model(config), checkpoint, ema, pretrained, config)
    kept: dict[str, Any] = {"averaged": ema, "defaults": defaults or Defaults()}
    return make_pipeline(ModelPipeline, model, config, checkpoint, sampling, speed, device, **kept)


def _load_own(
    given: OwnNetwork,
    ckpt: str | Path | None,
    sampling: Sampling | None,
    speed: Speed | None,
    device: str,
    defaults: Defaults,
) -> ModelPipeline:
    """Make a pipeline of a network in memory, with the weights of a file where one is named."""
    if ckpt is not None:
        load_into(given.network, load_state_dict(ckpt), file=ckpt)
    checkpoint = None if ckpt is None else Path(ckpt)
    kept = {"averaged": False, "defaults": defaults}
    return make_pipeline(ModelPipeline, given.build(), given.config(), checkpoint, sampling, speed, device, **kept)


def _check_sources(run: object, base: object, ckpt: object, diffusers: object, network: object) -> None:
    """Make sure that a model comes from one place."""
    if (run is None) == (base is None) or (base is None) != (ckpt is None):
        raise ValueError(
            "a model comes from --run DIRECTORY (of a training, or of diffusers), from --base CONFIG with --ckpt FILE, "
            f"or from network=MODULE; got run={run}, base={base}, ckpt={ckpt}, diffusers={diffusers}, "
            f"network={type(network).__name__}"
        )


def _load_shared(
    folder: str | Path,
    sampling: Sampling | None,
    speed: Speed | None,
    device: str,
    defaults: Defaults,
    trust: Sequence[str],
) -> ModelPipeline:
    """Load a folder that `decu export --to folder` wrote."""
    with trusting(trust):
        config = read_shared_config(Path(folder))
    checkpoint = Path(folder) / WEIGHTS_FILE
    load_weights(model := build_model(config), checkpoint, config=config)
    kept: dict[str, Any] = {"averaged": True, "defaults": defaults}
    return make_pipeline(ModelPipeline, model, config, checkpoint, sampling, speed, device, **kept)


def _load_folder(
    path: str | Path, sampling: Sampling | None, speed: Speed | None, device: str, defaults: Defaults
) -> ModelPipeline:
    """Load a folder of diffusers; where nothing is said, its scheduler's spacing and variance are taken."""
    folder = read_folder(path)
    config = make_config(folder)
    model = build_model(config)
    load_folder_weights(model, folder)
    weights = folder.network.weight_files[0]
    return make_pipeline(ModelPipeline, model, config, weights, sampling, speed, device, defaults=defaults)


def load_ensemble(
    path: str | Path | None = None,
    sampling: Sampling | None = None,
    branching: Branching | None = None,
    *,
    model: ModelPipeline | None = None,
    members: Sequence[Mapping[str, Tensor] | str | Path] = (),
    pretrained: str | Path | None = None,
    dataset: str | None = None,
    speed: Speed | None = None,
    device: str = "auto",
    trust: Sequence[str] = (),
) -> EnsemblePipeline:
    """Load an ensemble that save_ensemble.py wrote, from any folder.

    Its base checkpoint is read with averaged weights, where it holds any, since members train on these.

    Args:
        path: the folder of the ensemble.
        model, members: in place of it a loaded model and the state dicts, or files of them, of its members; see
            `gather_ensemble`. Where `sampling` is None it is the model's; device and speed are the model's.
        sampling, branching: how it is sampled, and where its members branch.
        pretrained: the base checkpoint, where it moved.
        dataset: the split that the members must have been trained on; any where None.
        speed, device, trust: as in `load_model`.

    Raises:
        ValueError: if the base checkpoint is missing or another, or the members were trained on another split.
    """
    if path is None:
        if model is None:
            raise ValueError("an ensemble comes from its folder, or from model= and members=; got neither")
        return _make_ensemble(model, gather_ensemble(model.model, members), sampling, branching or Branching())
    with trusting(trust):
        ensemble = read_ensemble(find_shared(path))
    split = ensemble.spec.get("split")
    if dataset not in (None, split):
        found = f"the members were trained on {split}" if split else "the ensemble records no split; leave it out"
        raise ValueError(f"--dataset {dataset}: {found}")
    config = ensemble.spec["config"]
    check_config(config, build=("model",), before=f"{ensemble.folder}/ensemble.yaml: config: ")
    checkpoint = ensemble.base_checkpoint(pretrained)
    base = build_model(config)
    load_weights(base, checkpoint, config=config)
    check_heads(ensemble.members.overrides, ensemble.spec["patterns"], base.state_dict(), ensemble.folder)
    add_factors_of(base.network, {name: value[0] for name, value in ensemble.members.overrides.items()})
    kept = {"defaults": Defaults(scale=5.0), "ensemble": ensemble, "branching": branching or Branching()}
    return make_pipeline(EnsemblePipeline, base, config, checkpoint, sampling, speed, device, **kept)


def _make_ensemble(
    model: ModelPipeline, ensemble: Ensemble, sampling: Sampling | None, branching: Branching
) -> EnsemblePipeline:
    """Make an ensemble of a loaded model, which both share."""
    kept = {field.name: getattr(model, field.name) for field in fields(Pipeline)}
    kept["sampling"] = sampling or model.sampling
    return EnsemblePipeline(**kept, ensemble=ensemble, branching=branching).check()


def load_posterior(
    folder: str | Path,
    model: ModelPipeline,
    *,
    curvature: str | None = None,
    prior_precision: float | None = None,
    sigma_noise: float | None = None,
    temperature: float | Literal["sandwich"] | None = None,
    visits: float | None = None,
    draws: int = 16,
    particles: int = 32,
    every: int = 5,
    trust: Sequence[str] = (),
) -> PosteriorPipeline:
    """Load a posterior of a model's last layer that `decu laplace fit` wrote.

    Args:
        folder: where it was written.
        model: the loaded model that it was fitted to.
        curvature: see the fit through another curvature that it gathered for.
        prior_precision, sigma_noise, temperature, visits: other values than the fit's; see `adjust_posterior`.
        draws: members of `persistent`, directions of `tangents`; the same weights for every image.
        particles: states that `bayesdiff` and `published` draw around the sampler's, an even number.
        every: steps between two draws of the `_skip` methods.
        trust: as in `load_model`.

    Raises:
        ValueError: if the folder holds no posterior, that of other weights, or none of this curvature.
    """
    values = {"prior_precision": prior_precision, "sigma_noise": sigma_noise, "visits": visits}
    with trusting(trust):
        laplace = load_laplace(folder, model.model.network)
    laplace = adjust_posterior(laplace, curvature, temperature, **values)
    return PosteriorPipeline(model, laplace, draws, particles, every, source=str(folder))


def make_pipeline(
    kind: type[P],
    model: LatentDiffusion,
    config: Mapping[str, Any],
    checkpoint: Path | None,
    sampling: Sampling | None,
    speed: Speed | None,
    device: str,
    **kept: Any,
) -> P:
    """Freeze a model with its weights on a device, let it run as `speed` says, and check how it is sampled.

    Args:
        kind: the pipeline that is made of it, which holds what one pass of the network and of the decoder may take.
        kept: fields of `kind` beside those of every pipeline.
    """
    place = pick_device(device)
    speed = speed or Speed()
    model = model.to(place).eval().requires_grad_(False)
    latents = torch.zeros((1, *model.latent_shape), device=place)
    decoding = Chunker(lambda: rows_that_fit(lambda: model.decode_first_stage(latents), place))
    fast, passes = with_speed(model, speed, place)
    return kind(fast, config, checkpoint, place, passes, decoding, sampling or Sampling(), speed, **kept).check()
