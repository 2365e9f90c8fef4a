"""Plain values: how samples are drawn, where members branch, how fast the network runs, where features are read.

A pipeline holds these values, and a command shows their fields as options of the same names. Nothing here imports
torch, so that a command's help answers at once. A field that is None takes what the config says, or the default that
its description names.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Annotated, Any, Literal

from ldm.options import PAIRS, OptionValue, check_options, one_of, option
from ldm.settings.guidance import ClassifierGuidance, Guidance, Steering
from ldm.settings.names import (
    SAMPLER_NAMES,
    SECOND_NAMES,
    SECOND_SPACINGS,
    SPACING_NAMES,
    SamplerName,
    SecondName,
    SecondSpacing,
    Spacing,
)

Variance = Literal["fixed_small", "fixed_large", "learned_range"]
Precision = Literal["float32", "bf16", "fp16"]
Published = Literal["published", "published-linear"]
_FINEST_GRID = 1024


@dataclass(frozen=True)
class Scaling:
    """Epsilon scaling: the predicted noise is divided by k t + b at every step (docs/epsilon_scaling.md)."""

    b: Annotated[
        float | Published | None, option(name="eps_scaler", metavar="B|published|published-linear", default="1, off")
    ] = None
    """The divisor b, or `published`: the values of the config for this number of steps."""
    slope: Annotated[float | None, option(name="eps_slope", metavar="K", default="0")] = None
    """The slope k of the divisor in t, in the unit that --eps_unit names."""
    unit: Annotated[
        Literal["step", "log_snr"] | None,
        option(name="eps_unit", metavar="step|log_snr", default="the file's, or step"),
    ] = None
    """t counts steps from the cleanest one (step), or is -log SNR (log_snr)."""
    schedule: Annotated[str | None, option(name="eps_schedule", metavar="FILE", default="none")] = None
    """A schedule file that `decu exposure choose` wrote, in place of b and k."""
    window: Annotated[
        tuple[float, float] | None, option(name="eps_window", metavar="LOW HIGH", default="everywhere")
    ] = None
    """Scale only where sigma / alpha lies between these two values."""
    direction: Annotated[
        Literal["full", "x0_only"] | None,
        option(name="eps_direction", metavar="full|x0_only", default="the file's, or full"),
    ] = None
    """Scale the noise everywhere (full), or only in the predicted x0 (x0_only)."""

    def __post_init__(self) -> None:
        check_options(self)

    @property
    def given(self) -> bool:
        """Whether a divisor is named, without which unit, window and direction say nothing."""
        return (self.b, self.slope, self.schedule) != (None, None, None)


@dataclass(frozen=True)
class Sampling:
    """How samples are drawn. What is None comes from the config of the model, else from the stated default.

    `steps` counts steps of the sampler, or is a respacing of ADM ("ddim50", "10,10,5"). `scale` is the scale of
    classifier-free guidance, eps = e_null + scale (e_cond - e_null), and 1 turns it off. Image i draws its noise from
    (seed, i, step), whatever the batch.

    Raises:
        ValueError: for a number of steps below 1, or words that are no respacing.
    """

    sampler: Annotated[SamplerName | SecondName, one_of(SAMPLER_NAMES), option("--solver", metavar="NAME")] = "DDIM"
    """The sampler, DDIM, DDPM, Heun or DPM-Solver++ for example; docs/samplers.md has all, k-diffusion's names too."""
    steps: Annotated[
        int | str | None,
        option("--ddim_steps", "--timesteps", metavar="N", default="the config's uncertainty.steps, or {steps}"),
    ] = None
    """The number of steps, or a respacing such as ddim50 or 10,10,5."""
    eta: Annotated[
        float | None, option("--ddim_eta", metavar="ETA", default="1 of ancestral and SDE samplers, or 0")
    ] = None
    """The noise of DDIM, of ancestral and SDE samplers: 0 draws none, 1 has the posterior variance; Heun's share of
    the greatest churn."""
    scale: Annotated[float | None, option(metavar="S", default="the config's guidance_scale, or {scale}")] = None
    """The scale of classifier-free guidance; 1 turns it off."""
    spacing: Annotated[Spacing | SecondSpacing, one_of(SPACING_NAMES), option("--skip_type", metavar="HOW")] = "auto"
    """How the steps are spaced: auto, trailing, published (CompVis), leading or leading_offset (diffusers), quad,
    respace, time_uniform or time_quadratic; by sigma / alpha karras, exponential, polyexponential, vp or logsnr.
    trailing_first, leading_first and leading_offset_clean end elsewhere (docs/samplers.md)."""
    rho: Annotated[float | None, option(metavar="R", default="7, or 1 of polyexponential")] = None
    """The power of the spacings karras (auto on EDM's schedule) and polyexponential."""
    sigma_min: Annotated[float | None, option(metavar="S", default="the schedule's")] = None
    """The lowest sigma / alpha of a spacing by sigma / alpha."""
    sigma_max: Annotated[float | None, option(metavar="S", default="the schedule's")] = None
    """The highest, with which sampling begins."""
    options: Annotated[
        Mapping[str, OptionValue], PAIRS, option(name="sampler_options", metavar="A=B ...", default="none")
    ] = field(default_factory=dict)
    """Further options of the sampler by name, S_churn=40 S_min=0.05 S_max=50 of Heun for example; docs/samplers.md."""
    variance: Annotated[
        Variance | None, option(metavar="NAME", default="learned_range where it is learned, or fixed_small")
    ] = None
    """The variance of the steps of DDPM: fixed_small, fixed_large or learned_range."""
    clip: Annotated[bool | None, option(name="clip_denoised", metavar="True|False", default="the config's, or off")] = (
        None
    )
    """Clamp predicted pixels to [-1, 1]."""
    seed: int = 42
    """The seed of the noise: image i draws from (seed, i, step)."""
    scaling: Scaling = field(default_factory=Scaling)
    guidance: Guidance = field(default_factory=Guidance)
    classifier: ClassifierGuidance = field(default_factory=ClassifierGuidance)
    steering: Steering = field(default_factory=Steering)

    def __post_init__(self) -> None:
        if isinstance(self.steps, str) and self.steps.isdigit():
            object.__setattr__(self, "steps", int(self.steps))
        check_steps(self.steps)
        check_options(self)
        if self.scale is not None and self.guidance.member_scales is not None:
            raise ValueError("--member_scales says the scale of each member: leave out --scale")
        object.__setattr__(self, "sampler", SECOND_NAMES.get(self.sampler, self.sampler))
        object.__setattr__(self, "spacing", SECOND_SPACINGS.get(self.spacing, self.spacing))

    @property
    def levels(self) -> dict[str, float | None]:
        """What `make_times` takes of the noise levels, by name."""
        return {"rho": self.rho, "sigma_min": self.sigma_min, "sigma_max": self.sigma_max}

    def published(self, steps: int = 200, scale: float = 5.0) -> Sampling:
        """Return these values with DECU's published ones where nothing was given: 200 steps on CompVis' times."""
        chosen = replace(
            self,
            steps=steps if self.steps is None else self.steps,
            scale=scale if self.scale is None else self.scale,
        )
        if chosen.spacing == "auto" and not isinstance(chosen.steps, str):
            return replace(chosen, spacing="published")
        return chosen


def check_steps(steps: int | str | None) -> None:
    """Refuse what is neither a number of steps nor a respacing.

    Raises:
        ValueError: naming what was given.
    """
    if steps is None:
        return
    words = str(steps).removeprefix("ddim") if isinstance(steps, str) else str(steps)
    counts = words.split(",")
    if not all(count.isdigit() and int(count) > 0 for count in counts):
        raise ValueError(f"expected a number of steps, or a respacing such as ddim50 or 10,10,5; got '{steps}'")


@dataclass(frozen=True)
class Branching:
    """Where the members of an ensemble branch, and which member samples up to there.

    One of `step`, `at` and `time` says where, and each may hold several points. `step` k counts steps from the
    noisiest (0); `at` f is the step floor(f S) of S steps; `time` b is the first step with t <= b. Where none is
    given, the config's `uncertainty.branch_at` decides, else the last step.

    Raises:
        ValueError: if more than one of the three is given.
    """

    step: Annotated[
        tuple[int, ...] | int | None, option(name="unc_branch", metavar="K ...", default="the config's, or the last")
    ] = None
    """Branch at these steps, counted from the noisiest one (0)."""
    at: Annotated[
        tuple[float, ...] | float | None, option(name="branch_at", metavar="F ...", default="see --unc_branch")
    ] = None
    """Branch at these fractions of the steps, 0 to 1."""
    time: Annotated[
        tuple[float, ...] | float | None, option(name="branch_t", metavar="T ...", default="see --unc_branch")
    ] = None
    """Branch at the first steps with t <= T."""
    base: Annotated[
        tuple[int | Literal["all"], ...] | int | Literal["all"] | None,
        option(name="base_comp", metavar="M ...|all", default="member 0"),
    ] = None
    """The members that sample up to the branch: numbers, or all; -1 is DECU's word for member 0."""
    uncertain: Annotated[bool, option(name="uncertain_comp")] = False
    """Sample up to the branch with a member that the class was hidden from (masked classes)."""

    def __post_init__(self) -> None:
        given = {name: getattr(self, name) for name in ("step", "at", "time") if getattr(self, name) is not None}
        check_options(self)
        if len(given) > 1:
            raise ValueError(f"give one of --unc_branch (step), --branch_at (at), --branch_t (time); got {given}")

    @property
    def given(self) -> bool:
        """Whether a branch point was named."""
        return (self.step, self.at, self.time) != (None, None, None)


@dataclass(frozen=True)
class Speed:
    """How the network runs; results agree to the precision that is chosen, and with `deep_every` above 1 they are
    approximate (docs/performance.md)."""

    chunk: Annotated[int | Literal["auto"], option(metavar="N|auto")] = "auto"
    """Images in one pass of the network; auto takes what fits into memory."""
    precision: Annotated[Precision, option(metavar="float32|bf16|fp16")] = "float32"
    """The precision of the network's products; samplers and estimates stay in float32 and float64."""
    channels_last: bool = False
    """Lay images out with channels innermost."""
    compile: bool = False
    """Compile the blocks of the network, each kind once: a minute at first, less in later commands."""
    deep_every: int = 1
    """Run the deep blocks of a UNet at every N-th evaluation of the network, and take what they gave between; 1 is
    exact, and more is for the steps before a branch (docs/performance.md)."""
    shallow_blocks: Annotated[int | None, option(metavar="N", default="1")] = None
    """With --deep_every, the blocks at either end of the UNet that run at every evaluation."""

    def __post_init__(self) -> None:
        if self.chunk != "auto" and self.chunk < 1:
            raise ValueError(f"--chunk is a number of images of at least 1, or auto; got {self.chunk}")
        check_options(self)
        if self.shallow_blocks is not None and self.deep_every == 1:
            raise ValueError("--shallow_blocks says what runs where deep features are kept: give --deep_every, 2 say")

    def check_exact(self) -> None:
        """Refuse deep features that are kept along the steps of a sampler, for what takes no such steps.

        Raises:
            ValueError: if there are any.
        """
        if self.deep_every > 1:
            raise ValueError(
                f"--deep_every {self.deep_every} keeps features between the steps of a sampler, and no sampler steps "
                "here: leave it out"
            )

    def describe(self) -> dict[str, Any]:
        """Return what results depend on beyond rounding, for records."""
        found = {"precision": self.precision, "deep_every": self.deep_every, "shallow_blocks": self.shallow_blocks}
        plain = Speed()
        return {name: value for name, value in found.items() if value != getattr(plain, name)}


@dataclass(frozen=True)
class FeatureReading:
    """Where features of a backbone are read: noise levels, layers, pooling, draws.

    One of `t`, `logsnr` and `index` names the noise levels; what is None comes from the config's section `probe`.

    Raises:
        ValueError: if more than one of the three is given.
    """

    t: Annotated[tuple[float, ...] | None, option(metavar="T ...", default="the config's section probe")] = None
    """Noise levels as times of the schedule: entries of the table, or sigma of EDM."""
    logsnr: Annotated[tuple[float, ...] | None, option(metavar="R ...", default="see --t")] = None
    """Noise levels as log signal-to-noise ratios, 2 ln(alpha / sigma)."""
    index: Annotated[tuple[int, ...] | None, option(metavar="I ...", default="see --t")] = None
    """Noise levels as the 18 steps of EDM, 1 being the cleanest."""
    layers: Annotated[tuple[str, ...] | None, option(metavar="NAME ...", default="the config's section probe")] = None
    """Layers: in_1 .. mid .. out_1 .., dotted names, or all."""
    pool: Annotated[str, option(metavar="K|none")] = "1"
    """Means of a K x K grid of the map, or none for every position."""
    draws: int = 1
    """Noise draws that features are averaged over."""
    label: Annotated[int | None, option(metavar="CLASS", default="the null class")] = None
    """The class that a conditional backbone is given."""
    images_per_pass: int = 100
    """Images in one pass through the backbone."""

    def __post_init__(self) -> None:
        given = {name: getattr(self, name) for name in ("t", "logsnr", "index") if getattr(self, name) is not None}
        if len(given) > 1:
            raise ValueError(f"give one of --t, --logsnr, --index; got {given}")
        if self.pool != "none" and not (self.pool.isdecimal() and 1 <= int(self.pool) <= _FINEST_GRID):
            raise ValueError(f"--pool takes a number from 1 to {_FINEST_GRID}, or none; got '{self.pool}'")
