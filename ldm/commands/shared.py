"""Values that several commands share: which model, ensemble or posterior, where it runs, and loading them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, TypeVar

from ldm.options import APPENDED, option
from ldm.settings import Branching, Sampling, Speed

if TYPE_CHECKING:
    from ldm.pipelines import EnsemblePipeline, ModelPipeline, PosteriorPipeline
    from ldm.pipelines.base import Pipeline

Loaded = TypeVar("Loaded", bound="Pipeline")

Split = Literal["binned_classes", "masked_classes"]
# The methods of `ldm.pipelines.METHODS`.
VarianceMethod = Literal[
    "persistent",
    "tangents",
    "redrawn",
    "bayesdiff",
    "bayesdiff_skip",
    "published",
    "published_skip",
    "path",
]
ClassNames = Annotated[tuple[int | str, ...], option(metavar="CLASS ...", default="all classes")]
SpreadClasses = Annotated[
    tuple[int | str, ...],
    option(metavar="CLASS ...", default="all of up to 20; of more, ten, spread over the images per class"),
]


@dataclass(frozen=True)
class Prompts:
    """The texts that a model of texts is sampled for: they take the place of its classes."""

    stands_alone: ClassVar[tuple[str, ...]] = ("prompt",)  # an empty text is one

    prompt: Annotated[tuple[str, ...], option(metavar="TEXT", default="none"), APPENDED] = ()
    """A prompt of a model of texts, in place of a class; the option may be repeated."""
    prompts: Annotated[str | None, option(metavar="FILE", default="none")] = None
    """A text file of prompts, one a line; those of --prompt come first."""

    def give_to(self, pipeline: Loaded) -> Loaded:
        """Return a pipeline whose classes are the prompts, or the pipeline itself where there are none."""
        from ldm.pipelines.prompts import read_prompts

        texts = [*self.prompt, *(read_prompts(self.prompts) if self.prompts is not None else ())]
        return pipeline.with_prompts(texts) if texts else pipeline


@dataclass(frozen=True)
class ModelSource:
    """Which model: the run directory of a training, or a config with a checkpoint."""

    run: Annotated[str | None, option(metavar="DIR", default="none; or give --base and --ckpt")] = None
    """The run directory of a training, or a checkpoint in one."""
    base: Annotated[str | None, option(metavar="YAML", default="none")] = None
    """In place of a run, the config of a model; it needs --ckpt."""
    ckpt: Annotated[str | None, option(metavar="FILE", default="none")] = None
    """The checkpoint of --base, a released one for example."""
    pretrained: Annotated[str | None, option(metavar="FILE", default="where the member's checkpoint says")] = None
    """The base checkpoint of a member, where it moved."""
    ema: Annotated[bool, option(default="averaged ones")] = True
    """Take averaged weights, where there are any; --no_ema takes those of the last step."""
    texts: Prompts = Prompts()

    def __post_init__(self) -> None:
        if self.run is not None and self.ckpt is not None:
            raise ValueError(
                "--run DIR takes the run's own checkpoint: give the other one as --run FILE where it lies in a run, "
                "or with --base CONFIG --ckpt FILE"
            )
        if self.run is not None and self.base is not None:
            raise ValueError("--run DIR has its own config: leave out --base, or give --base CONFIG --ckpt FILE alone")

    def load(
        self,
        sampling: Sampling | None = None,
        speed: Speed | None = None,
        device: str = "auto",
        steps: int = 200,
        epoch: int | None = None,
    ) -> ModelPipeline:
        """Load the model; `steps` are taken where neither `sampling` nor the config say.

        Args:
            epoch: with a run directory, the checkpoint kept of this epoch in place of the last.
        """
        from ldm.pipelines import Defaults, load_model

        loaded = load_model(
            self.run,
            sampling,
            base=self.base,
            ckpt=self.ckpt,
            ema=self.ema,
            epoch=epoch,
            pretrained=self.pretrained,
            speed=speed,
            device=device,
            defaults=Defaults(steps),
        )
        return self.texts.give_to(loaded)


@dataclass(frozen=True)
class EnsembleSource:
    """Which ensemble."""

    path: str
    """The folder that save_ensemble.py (decu gather) wrote."""
    pretrained: Annotated[str | None, option(metavar="FILE", default="where the record says")] = None
    """The base checkpoint, where it moved."""
    dataset: Annotated[Split | None, option(metavar="SPLIT", default="any")] = None
    """The split that the members must have been trained on; an error if they had another."""
    published: bool = False
    """Take what DECU's scripts take, unless given: 200 steps on CompVis' times, guidance 5, eta 0, their branch."""
    texts: Prompts = Prompts()

    def __post_init__(self) -> None:
        if self.path.startswith("hf://"):
            raise ValueError(
                f"commands write beside an ensemble: fetch it (hf download {self.path[5:]} --local-dir DIR) and give "
                "--path DIR; in Python load_ensemble takes the name"
            )

    def load(
        self,
        sampling: Sampling,
        branching: Branching,
        speed: Speed,
        device: str = "auto",
        published_branch: int | None = None,
    ) -> EnsemblePipeline:
        """Load the ensemble; `published_branch` is the step at which --published branches, the last where None."""
        from ldm.pipelines import load_ensemble

        if self.published:
            sampling = sampling.published()
        pipeline = load_ensemble(
            self.path,
            sampling,
            branching,
            pretrained=self.pretrained,
            dataset=self.dataset,
            speed=speed,
            device=device,
        )
        pipeline = self.texts.give_to(pipeline)
        if self.published and not branching.given:
            last = len(pipeline.times) - 2
            return pipeline.with_(step=last if published_branch is None else published_branch)
        return pipeline


# Under which methods of a command the fields of its `posterior` act, for its `acts_with`.
ACTS_UNDER_METHOD = {
    "posterior.draws": "method=persistent|tangents|redrawn",
    "posterior.particles": "method=bayesdiff|bayesdiff_skip|published|published_skip",
    "posterior.every": "method=bayesdiff_skip|published_skip",
}
# The same of commands that draw neither weights nor states, for their `without_effect`.
DRAWS_NOTHING = dict.fromkeys(ACTS_UNDER_METHOD, "this command draws neither weights nor states")


@dataclass(frozen=True)
class PosteriorSource:
    """Which posterior, seen how, and how members and states are drawn from it."""

    posterior: str
    """The folder that `decu laplace fit` wrote, of this model."""
    curvature: Annotated[str | None, option(metavar="NAME", default="the fit's")] = None
    """See the fit through another curvature that it gathered for (--also)."""
    prior_precision: Annotated[float | None, option(metavar="P", default="the fit's")] = None
    """Another prior precision than the fit's."""
    sigma_noise: Annotated[float | None, option(metavar="S", default="the fit's")] = None
    """Another standard deviation of the observations than the fit's."""
    temperature: Annotated[float | Literal["sandwich"] | None, option(metavar="T", default="the fit's")] = None
    """Another temperature than the fit's, or sandwich: so that the variance is that one's on average."""
    visits: Annotated[float | None, option(metavar="R", default="the fit's")] = None
    """How often the training saw each image, in place of what the fit was told."""
    draws: int = 16
    """Sampled weights of `persistent`, directions of `tangents`, states of `redrawn`."""
    particles: int = 32
    """States that `bayesdiff` and `published` draw at a step, an even number; BayesDiff took 10."""
    every: int = 5
    """Steps between two draws of the _skip methods."""

    def __post_init__(self) -> None:
        if self.particles % 2:
            raise ValueError(f"--particles takes an even number, since states lie in pairs, got {self.particles}")

    def load(self, model: ModelPipeline) -> PosteriorPipeline:
        """Load the posterior of a loaded model."""
        from ldm.pipelines import load_posterior

        return load_posterior(
            self.posterior,
            model,
            curvature=self.curvature,
            prior_precision=self.prior_precision,
            sigma_noise=self.sigma_noise,
            temperature=self.temperature,
            visits=self.visits,
            draws=self.draws,
            particles=self.particles,
            every=self.every,
        )


@dataclass(frozen=True)
class Placement:
    """Where it runs."""

    device: str = "auto"
    """auto, cpu or cuda[:N]."""


def read_params(words: Sequence[str]) -> dict[str, Any]:
    """Return the keywords that words A=B name, dotted ones nested."""
    from omegaconf import OmegaConf

    found = OmegaConf.to_container(OmegaConf.from_dotlist(list(words)))
    assert isinstance(found, dict)
    return {str(key): value for key, value in found.items()}


def read_scale(given: str | float) -> Literal["sum", "mean"] | float:
    """Read sum, mean, or a factor above 0.

    Raises:
        ValueError: for anything else.
    """
    if given == "sum":
        return "sum"
    if given == "mean":
        return "mean"
    try:
        factor = float(given)
    except ValueError:
        factor = 0.0
    if not 0 < factor < float("inf"):
        raise ValueError(f"--distance_scale takes sum, mean, or a number above 0; got '{given}'")
    return factor
