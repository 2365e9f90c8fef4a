"""What is trained for a benchmark's world: networks from scratch, members' heads, posteriors; each of them once."""

from __future__ import annotations

import copy
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.func import stack_module_state

from ldm.benchmark.artefacts import Artefacts, Tensors
from ldm.benchmark.images import BenchmarkImages
from ldm.benchmark.settings import BenchmarkSettings, World
from ldm.ensembles.heads import initialise, row_deviations
from ldm.ensembles.members import Members
from ldm.experiments.small_networks import SmallNetwork, SmallTraining, draw_noised, unstack_networks
from ldm.experiments.variance_benchmarks import published_posterior
from ldm.laplace import LastLayerLaplace, Observation, bootstrap_refits
from ldm.modules.low_rank import add_factors, draw_factors, find_layers
from ldm.util import generator

HEADS = {"classes": ("labels.weight",), "output": ("out.1.weight", "out.1.bias")}
# What the networks regress.
REGRESSED = "v"
FACTOR_RANK = 4


@dataclass(frozen=True)
class TrainedWorld:
    """The networks of one world. What is asked for is read of its file, or trained and written.

    Attributes:
        settings: sizes.
        world: which data.
        artefacts: the files.
        source: the images.
    """

    settings: BenchmarkSettings
    world: World
    artefacts: Artefacts
    source: BenchmarkImages
    _fits: dict[str, LastLayerLaplace] = field(default_factory=dict, compare=False)

    @classmethod
    def make(cls, settings: BenchmarkSettings, world: World, folder: Path, source: BenchmarkImages) -> TrainedWorld:
        """Return the networks of a world, whose files lie in {folder}/{world's name}."""
        return cls(settings, world, Artefacts(folder / world.name), source)

    @cached_property
    def data(self) -> tuple[Tensor, Tensor]:
        """Training images [N, D] and classes [N]."""
        return self.source.subset(self.world, self.settings)

    @cached_property
    def counts(self) -> Tensor:
        """Training images of each class [10]."""
        return self.data[1].bincount(minlength=10)

    @property
    def recipe(self) -> SmallTraining:
        """How a network is trained from scratch."""
        own = self.settings
        return SmallTraining(own.steps, own.batch, own.rate, target=REGRESSED, width=own.width)

    @property
    def head_recipe(self) -> SmallTraining:
        """How heads are trained."""
        return replace(self.recipe, steps=self.settings.head_steps)

    def bootstraps(self, purpose: str, count: int) -> Tensor:
        """Return positions of images drawn with replacement [count, N], others for every purpose."""
        size = len(self.data[0])
        return torch.randint(size, (count, size), generator=generator("bootstrap", purpose, self.world.seed))

    def _scratch(self) -> Tensors:
        """Train the base network, the deep ensemble and the oracle's networks, all in one pass."""
        images, labels = self.data
        counts = (self.settings.members, self.oracle_count)
        drawn = [self.bootstraps(name, count) for name, count in zip(("ensemble", "oracle"), counts, strict=True)]
        chosen = torch.cat([torch.arange(len(images))[None], *drawn])
        networks = self.recipe.train(images, labels, chosen, self.world.seed)
        return stack_module_state(networks)[0]

    @property
    def oracle_count(self) -> int:
        """Networks of the oracle."""
        return self.world.retrainings(self.settings)

    @property
    def scratch(self) -> Tensors:
        """Networks trained from scratch, stacked: the base, the ensemble's, the oracle's."""
        return self.artefacts.get("scratch", self._scratch)

    def scratch_seconds(self, count: int) -> float:
        """The share of so many networks in the seconds of all that were trained from scratch in one pass."""
        total = len(next(iter(self.scratch.values())))
        return self.artefacts.used["scratch"].seconds * count / total

    @cached_property
    def base(self) -> SmallNetwork:
        """The network that is asked what it does not know, trained on all images of the world."""
        return unstack_networks({name: value[:1] for name, value in self.scratch.items()})[0]

    @property
    def ensemble(self) -> Members:
        """Networks trained from scratch on bootstraps of their own, which no oracle has."""
        count = self.settings.members
        return Members(self.artefacts.get("ensemble", lambda: {n: v[1 : 1 + count] for n, v in self.scratch.items()}))

    @property
    def retrained(self) -> Members:
        """The oracle's networks."""
        return Members({name: value[1 + self.settings.members :] for name, value in self.scratch.items()})

    def fit(
        self,
        name: str,
        network: nn.Module,
        start: Mapping[str, Tensor],
        recipe: SmallTraining,
        bootstrap: bool = True,
        pull: Mapping[str, Tensor] | None = None,
    ) -> Tensors:
        """Return parameters [M, ...] trained from a start, of the file of this name or now, each on a bootstrap.

        Args:
            bootstrap: False trains on the images themselves.
            pull: of an anchored member, see `SmallTraining.fit`.
        """
        images, labels = self.data
        count = len(next(iter(start.values())))
        chosen = self.bootstraps(name, count) if bootstrap else torch.arange(len(images)).repeat(count, 1)
        source = generator("training", name, self.world.seed)
        return self.artefacts.get(name, lambda: recipe.fit(network, start, images, labels, chosen, source, pull=pull))

    def heads(self, head: str, start: str) -> Members:
        """Return DECU's members: heads trained on bootstraps, the rest of the network as it is.

        Args:
            head: one of `HEADS`.
            start: pretrained, perturbed, random or anchored; see `ldm.ensembles.heads.initialise`. An anchored member
                is pulled to its start as to a draw of the prior (Pearce et al. 2020), with the noise of the residuals.
        """
        source = generator("heads", head, self.world.seed)
        own = dict(self.base.named_parameters())
        drawn = []
        for _ in range(self.settings.members):
            one = {name: own[name].detach().clone() for name in HEADS[head]}
            initialise(one, start, source, tables=("labels.weight",))
            drawn.append(one)
        stacked = dict(Members.stack(drawn).overrides)
        pull = self.find_pull([*stacked]) if start == "anchored" else None
        return Members(self.fit(f"{head}_{start}", self.base, stacked, self.head_recipe, pull=pull))

    def find_pull(self, names: Sequence[str]) -> dict[str, Tensor]:
        """Return the factors of an anchored member's squares beside a loss that is a mean over images and pixels.

            sigma^2 / (N D s^2),    s = 0.5 times a row's deviation, that of the start

        as in `ldm.models.diffusion.anchor`, with sigma of the residuals.
        """
        images = self.data[0]
        noise = float(self.laplace().sigma_noise.square().mean()) / images.numel()
        own = dict(self.base.named_parameters())
        return {name: noise / (0.5 * row_deviations(own[name].detach())).square() for name in names}

    @cached_property
    def low_rank_network(self) -> SmallNetwork:
        """The base network with factors of a low rank beside the weights inside of it, all zero."""
        network = copy.deepcopy(self.base)
        add_factors(network, find_layers(network, ["first", "blocks.*", "conditions.*"]), FACTOR_RANK)
        return network.requires_grad_(False)

    def low_rank(self) -> Members:
        """Return members that train such factors on bootstraps, from corrections drawn apart."""
        network = self.low_rank_network
        source = generator("low rank", self.world.seed)
        known = network.state_dict()
        drawn = []
        for _ in range(self.settings.members):
            one = {name: known[name].clone() for name in known if "lora_" in name}
            for name in [name for name in one if name.endswith("lora_A")]:
                layer = name.removesuffix(".lora_A")
                weight = known[f"{layer}.weight"]
                draw_factors(weight, one[name], one[f"{layer}.lora_B"], 0.5 * row_deviations(weight), source)
            drawn.append(one)
        stacked = dict(Members.stack(drawn).overrides)
        return Members(self.fit("low_rank", network, stacked, self.head_recipe))

    @property
    def dropout_network(self) -> SmallNetwork:
        """A network that was trained with units dropped, on the images themselves."""
        source = generator("dropout", self.world.seed)
        network = copy.deepcopy(self.base).initialise(source)
        start = stack_module_state([network])[0]
        recipe = replace(self.recipe, dropout=self.settings.dropout)
        return unstack_networks(self.fit("dropout", network, start, recipe, bootstrap=False))[0]

    def observe(self, draws: int) -> Iterator[Observation]:
        """Yield rows of the training images as pictures [B, C, H, W], `draws` to an image."""
        images, labels = self.data
        source = generator("fit", self.world.seed)
        for part in torch.arange(len(images)).split(128):
            each = part.repeat_interleave(draws)
            row = draw_noised(images[each], labels[each], source, REGRESSED)
            yield Observation(self.source.square(row.x), row.t, row.cond, self.source.square(row.target))

    def laplace(self, curvature: str = "full") -> LastLayerLaplace:
        """Return the posterior of the base's last layer; sigma from residuals, precision by the evidence.

        Args:
            curvature: full, diag or sandwich; or published, BayesDiff's: doubled diagonal empirical Fisher, sigma 1 and
                precision 1.
        """
        if not self._fits:
            began = time.perf_counter()
            example = (torch.zeros(1, *self.source.shape), torch.zeros(1), torch.zeros(1, dtype=torch.long))
            visits = max(1.0, self.recipe.visits(len(self.data[0])))
            found = LastLayerLaplace(self.base, "out.1", visits=visits, chunk=256, example=example)
            draws = self.settings.fit_draws
            found.fit(self.observe(draws), draws=draws, also=["sandwich", "diag", "ef"])
            found.optimize_sigma_noise()
            found.optimize_prior_precision()
            self._fits["full"] = found
            self.artefacts.note("laplace", found.state_dict(), time.perf_counter() - began)
        self.artefacts.note("laplace")
        if curvature == "published" and curvature not in self._fits:
            self._fits[curvature] = published_posterior(self._fits["full"])
        if curvature not in self._fits:
            self._fits[curvature] = self._fits["full"].with_curvature(curvature)
        return self._fits[curvature]

    def refits(self) -> Members:
        """Return networks whose last layer alone was refitted to bootstrapped images."""
        draws = self.settings.refit_draws
        given = {"images": len(self.data[0]), "draws": draws, "count": self.settings.refits}
        source = generator("refits", self.world.seed)
        return bootstrap_refits(self.laplace(), self.observe(draws), **given, source=source).members()
