"""Deep features of a UNet kept between the steps of a sampler (DeepCache: Ma et al. 2024, arXiv 2312.00858).

The deep blocks of a UNet change slowly along a chain of steps. They run at every N-th evaluation of the network only,
and what they gave is taken again in between, where the first and the last blocks run alone. Every chain begins with an
evaluation of everything, and so does what follows a branch: the step at which members are compared is never a reused
one, what is approximated is the state that they are asked at.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from ldm.diffusion.denoiser import Denoiser, Prediction
from ldm.diffusion.samplers.registry import Sampler
from ldm.diffusion.transition import Steps

SplitFeatures = Callable[..., tuple[Tensor, Tensor]]


@dataclass
class Chain:
    """What the deep blocks gave in the last evaluation of everything, of one chain of steps.

    Attributes:
        every: evaluations from one of everything to the next.
        kept: (rows, deep features) of each pass of the network that it took, in their order.
        shape: of its states.
        age: evaluations since, that one counted.
        fresh: whether the present evaluation runs everything.
        taken: passes of the present evaluation so far.
        fits: whether these are those of the kept ones.
    """

    every: int
    kept: list[tuple[int, Tensor]] = field(default_factory=list)
    shape: tuple[int, ...] = ()
    age: int = 0
    fresh: bool = True
    taken: int = 0
    fits: bool = True

    def begin(self, shape: tuple[int, ...], fresh: bool) -> None:
        """Begin an evaluation at states of a shape."""
        self.fresh, self.taken, self.fits = fresh, 0, True
        self.age += 1
        if fresh:
            self.kept, self.shape, self.age = [], shape, 1

    def needs_all(self, shape: tuple[int, ...]) -> bool:
        """Whether the next evaluation, at states of a shape, has nothing to take."""
        return self.age % self.every == 0 or shape != self.shape

    @property
    def matched(self) -> bool:
        """Whether the passes of the evaluation that ended were those of the kept one."""
        return self.fresh or (self.fits and self.taken == len(self.kept))

    def run(self, split: SplitFeatures, shallow: int, x: Tensor, emb: Tensor, context: Tensor | None) -> Tensor:
        """Return features of one pass, and keep or take what is deep; see `UNetModel.split_features`."""
        rows = max(len(x), len(emb), 0 if context is None else len(context))
        if self.fresh:
            features, deep = split(x, emb, context, shallow)
            self.kept.append((rows, deep))
            return features
        found = self.kept[self.taken] if self.taken < len(self.kept) else None
        self.taken += 1
        known = found is not None and found[0] == rows
        self.fits = self.fits and known
        return split(x, emb, context, shallow, found[1] if found is not None and known else None)[0]


@dataclass
class ActiveChain:
    """The chain that is being walked, if any: what a sampler and the features of a network share."""

    chain: Chain | None = None

    @contextmanager
    def along(self, chain: Chain) -> Iterator[None]:
        """Let the network's passes keep and take deep features of a chain."""
        before, self.chain = self.chain, chain
        try:
            yield
        finally:
            self.chain = before


@dataclass(frozen=True)
class ReusingSampler:
    """A sampler whose every call walks one chain, along which deep features are kept.

    Args:
        sampler: with its options bound.
        active: what it shares with the features of the network that denoisers ask.
        every: evaluations from one of everything to the next.
    """

    sampler: Sampler
    active: ActiveChain
    every: int

    def __call__(self, denoiser: Denoiser, *where: Any, **options: Any) -> Steps:
        return self.sampler(ReusingDenoiser(denoiser, self.active, Chain(self.every)), *where, **options)


@dataclass(frozen=True)
class ReusingDenoiser:
    """A denoiser along one chain: each call is one evaluation, which runs everything where nothing fits.

    Raises:
        ValueError: if an evaluation had nothing to keep.
    """

    denoiser: Denoiser
    active: ActiveChain
    chain: Chain

    def __call__(self, x: Tensor, u: Tensor | float) -> Prediction:
        if not self.chain.needs_all(x.shape):
            found = self._evaluate(x, u, fresh=False)
            if self.chain.matched:
                return found
        found = self._evaluate(x, u, fresh=True)
        if not self.chain.kept:
            raise ValueError(
                "--deep_every keeps features along a sampler's steps, and these steps run all of the network at every "
                "evaluation (members that differ in its norms or attention, gradients, derivatives): leave it out"
            )
        return found

    def _evaluate(self, x: Tensor, u: Tensor | float, fresh: bool) -> Prediction:
        self.chain.begin(x.shape, fresh)
        with self.active.along(self.chain):
            return self.denoiser(x, u)
