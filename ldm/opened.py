"""An ensemble opened for a script: its arguments, its model and members, and the walk to and from the branch."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch

from ldm.cli import add_device_arguments, pick_device
from ldm.data.subsets import DATASET_NAMES
from ldm.models.diffusion.ddpm import LatentDiffusion
from ldm.models.diffusion.noise import ImageNoise
from ldm.models.diffusion.sampler import SAMPLERS
from ldm.models.diffusion.sampler.grids import SPACINGS
from ldm.uncertainty.branch import Branched, branch, branch_index
from ldm.uncertainty.ensemble import Ensemble, load_ensemble
from ldm.uncertainty.posterior import MemberNetwork, single
from ldm.util import instantiate_from_config


def add_sampling_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the sampler; what is not given comes from the config's `uncertainty` section."""
    parser.add_argument("--sampler", default="DDIM", choices=sorted(SAMPLERS), help="sampler")
    parser.add_argument("--ddim_steps", type=int, help="number of steps (config, else 200)")
    parser.add_argument("--ddim_eta", type=float, default=0.0, help="0 deterministic .. 1 ancestral variance")
    parser.add_argument("--scale", type=float, help="guidance scale, 1 is off (config, else 5.0)")
    parser.add_argument("--spacing", default="auto", choices=SPACINGS, help="how the steps are spaced")


def add_ensemble_arguments(parser: argparse.ArgumentParser) -> None:
    """Which ensemble, and where its members part."""
    parser.add_argument("--path", required=True, help="folder that save_ensemble.py wrote")
    parser.add_argument("--pretrained", help="the trunk's checkpoint, where it moved")
    parser.add_argument("--dataset", default="binned_classes", choices=DATASET_NAMES, help="which split names the bins")
    branch = parser.add_mutually_exclusive_group()
    branch.add_argument("--unc_branch", type=int, help="grid step at which members part, 0 = noisiest")
    branch.add_argument("--branch_at", type=float, help="the same as a fraction of the steps, 0 .. 1")
    branch.add_argument("--branch_t", type=float, help="the same as a time: the first step with t <= this")
    parser.add_argument("--base_comp", type=int, default=0, help="member that walks to the branch")
    parser.add_argument("--chunk", type=int, help="images that one pass through the network holds at most")
    add_sampling_arguments(parser)
    add_device_arguments(parser)
    parser.add_argument("--overwrite", action="store_true", help="replace outputs that exist")


@dataclass(frozen=True)
class OpenEnsemble:
    """A loaded ensemble with everything the scripts ask of it."""

    model: LatentDiffusion
    ensemble: Ensemble
    network: MemberNetwork
    options: argparse.Namespace
    device: torch.device

    @property
    def members(self) -> int:
        return len(self.ensemble.members)

    @property
    def bins(self) -> dict[int, Any]:
        """{class: budget}; empty where the ensemble records none."""
        return {int(label): budget for label, budget in (self.ensemble.spec.get("bins") or {}).items()}

    @property
    def class_names(self) -> list[str]:
        """One name a class, without the null class."""
        count = self.model.null_class
        return list(self.ensemble.spec.get("class_names") or [str(label) for label in range(count)])

    def setting(self, name: str, default: Any) -> Any:
        """A value of the config's `uncertainty` section."""
        return (self.ensemble.spec["config"].get("uncertainty") or {}).get(name, default)

    @cached_property
    def grid(self) -> torch.Tensor:
        """Times of the chosen number of steps."""
        steps = self.options.ddim_steps or self.setting("steps", 200)
        return self.model.grid(steps, self.options.spacing)

    @cached_property
    def branch(self) -> int:
        """Grid step at which the members part."""
        given = {name: getattr(self.options, name) for name in ("unc_branch", "branch_at", "branch_t")}
        return branch_index(self.grid, **given, default=self.setting("branch_at", None))

    @property
    def scale(self) -> float:
        """Guidance scale."""
        configured = self.ensemble.spec["config"]["model"]["params"].get("guidance_scale", 5.0)
        return configured if self.options.scale is None else self.options.scale

    def noise(self, images: Sequence[int]) -> ImageNoise:
        return ImageNoise(self.options.seed, tuple(images), device=self.device)

    def labels(self, labels: Sequence[int]) -> torch.Tensor:
        """Class labels [B] on the device.

        Raises:
            ValueError: for a label the model does not have.
        """
        wrong = [label for label in labels if not 0 <= label < self.model.null_class]
        if wrong:
            raise ValueError(f"classes must be 0..{self.model.null_class - 1}, got {wrong}")
        return torch.tensor(list(labels), device=self.device)

    def walk(self, labels: Sequence[int], images: Sequence[int], **keep: bool) -> Branched:
        """Walk the base member to the branch and all members from there, for one label and noise an image.

        Raises:
            ValueError: if `--base_comp` is no member.
        """
        cond, noise = self.labels(labels), self.noise(images)
        x = noise.initial((len(images), *self.model.latent_shape)) * self.model.path.prior_std
        self.ensemble.members.select([self.options.base_comp])
        base = self.model.denoiser(
            cond, self.scale, single(self.model.network, self.network.members, self.options.base_comp)
        )
        members = self.model.denoiser(cond, self.scale, self.network)
        sampler = SAMPLERS[self.options.sampler]
        settings = {"noise": noise, "eta": self.options.ddim_eta, **keep}
        return branch(sampler, base, members, self.model.path, x, self.grid, self.branch, **settings)

    @torch.no_grad()
    def decode(self, z: torch.Tensor, chunk: int = 64) -> torch.Tensor:
        """Images in [-1, 1] of latents [..., c, h, w], decoded in bounded pieces, on the CPU."""
        flat = z.reshape(-1, *z.shape[-3:])
        images = torch.cat([self.model.decode_first_stage(piece).float().cpu() for piece in flat.split(chunk)])
        return images.reshape(*z.shape[:-3], *images.shape[1:]).clamp(-1, 1)

    def describe(self) -> dict[str, Any]:
        """What the outputs of this run depend on."""
        return {
            "ensemble": str(self.ensemble.folder),
            "trunk_sha256": self.ensemble.spec["trunk"]["sha256"],
            "members": self.members,
            "heads": list(self.ensemble.spec["heads"]),
            "sampler": self.options.sampler,
            "steps": len(self.grid) - 1,
            "eta": self.options.ddim_eta,
            "scale": self.scale,
            "spacing": self.options.spacing,
            "branch_step": self.branch,
            "branch_time": float(self.grid[self.branch]),
            "base_member": self.options.base_comp,
            "seed": self.options.seed,
        }


def open_ensemble(options: argparse.Namespace) -> OpenEnsemble:
    """Load the ensemble and the trunk that the options of `add_ensemble_arguments` name."""
    device = pick_device(options.device)
    ensemble = load_ensemble(options.path)
    model = instantiate_from_config(ensemble.spec["config"]["model"])
    model.init_from_ckpt(str(ensemble.trunk(options.pretrained)), use_averaged=True)
    model = model.to(device).eval().requires_grad_(False)
    network = MemberNetwork(model.network, ensemble.members.to(device), chunk=options.chunk)
    return OpenEnsemble(model, ensemble, network, options, device)
