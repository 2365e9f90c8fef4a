"""What is measured of Gaussian classes in the plane; plain values, without torch, so that a command's help is quick."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from ldm.options import option

Numbers = Annotated[tuple[int, ...], option(metavar="N ...")]


@dataclass(frozen=True)
class ToySettings:
    """What is measured of Gaussian classes in the plane, whose epistemic uncertainty is known.

    Raises:
        ValueError: for settings under which there is nothing to measure.
    """

    members: int = 5
    """Members of the practical ensemble."""
    classes: int = 12
    """Classes, drawn from the prior."""
    observations: Numbers = (0, 1, 2, 5, 10, 20, 50, 100, 200, 500, 1000)
    """The numbers of observations at which each class is seen."""
    states: int = 8
    """Branch states of each class and number of observations."""
    sizes: Numbers = (2, 5, 10, 20, 50)
    """Ensemble sizes of the middle panel."""
    size_observations: Numbers = (0, 1, 10, 100)
    """Observations of the same."""
    map_class: int = 0
    """The class of the maps."""
    map_observations: Numbers = (2, 20, 200)
    """Observations of the maps."""
    map_size: int = 81
    """Pixels along a side of the maps."""
    map_distance: Literal["kl", "bhattacharyya"] = "kl"
    """The distance between members in the maps."""
    draws: int = 200
    """Monte-Carlo pairs of draws of each member."""
    steps: int = 10
    """Steps of the sampler."""
    eta: float = 1.0
    """The noise of DDIM, above 0; 1 has the variance of ancestral sampling."""
    step: Annotated[int | None, option(name="unc_branch", metavar="K", default="see --branch_t")] = None
    """The step at which members branch, 0 being the noisiest."""
    at: Annotated[float | None, option(name="branch_at", metavar="F", default="see --branch_t")] = None
    """The same as a fraction of the steps, 0 to 1."""
    time: Annotated[float | None, option(name="branch_t", metavar="T", default="200")] = None
    """The same as a time: the first step with t <= T."""
    prior_kappa: float = 0.05
    """Observations that the prior's mean is worth."""
    prior_shape: float = 4.0
    """The shape of the Gamma prior of the precision."""
    prior_rate: float = 1.0
    """The rate of the Gamma prior of the precision."""
    seed: int = 0
    """The seed of classes, observations, members and noise."""

    def __post_init__(self) -> None:
        if self.members < 2 or min(self.sizes) < 2 or not 0 < self.eta <= 1:
            raise ValueError(
                f"expected --members and --sizes of at least 2 and 0 < --eta <= 1, got {self.members}, "
                f"{list(self.sizes)}, {self.eta:g}: one member cannot disagree, and KL needs noise"
            )
        if self.states < 1 or not 0 <= self.map_class < self.classes:
            raise ValueError(f"expected --states of at least 1, --map_class from 0 to {self.classes - 1}")
        if sum(given is not None for given in (self.step, self.at, self.time)) > 1:
            raise ValueError("give one of --unc_branch (step), --branch_at (at), --branch_t (time)")
