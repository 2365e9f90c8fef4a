"""Small networks trained by recipes that differ in one thing each, all of them and all seeds in one pass.

The network and the noising are those of `small_networks`; the loss weights, the averages and the augmentation are those
of trainings by a config. Images are drawn evenly with replacement, so that few and many images take the same steps.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.func import functional_call, stack_module_state
from tqdm import tqdm

from ldm.data.augmentation import NonLeaky
from ldm.data.base import by_class
from ldm.diffusion.affine import CosineSchedule
from ldm.diffusion.denoiser import Target
from ldm.diffusion.process import ContinuousProcess
from ldm.diffusion.training_times import UniformTimes
from ldm.diffusion.weighting import LossWeight, make_loss_weight
from ldm.experiments.small_networks import SmallNetwork, draw_noised, read_digits, read_mnist
from ldm.modules.power_averages import PowerAverages, Profile, combine_profiles, exponent_of
from ldm.util import generator

NULL_LABEL = 10
# Augmented versions of each image that trainings draw from, and the share of images that each change happens to.
VERSIONS, AUGMENTED_SHARE = 8, 0.12
# Widths of the averages that are stepped, and of which snapshots are kept.
STEPPED = (0.05, 0.1)
# The average that is taken where nothing else is said; "last" are the weights as they are.
WIDTH, LAST = 0.1, "last"
# Snapshots of a training, at which the held-out loss is taken as well.
SNAPSHOT_COUNT = 20
State = dict[str, Tensor]


@dataclass(frozen=True)
class SmallRecipe:
    """How one network is trained.

    Attributes:
        per_class: training images of each class; None: all.
        weight: name of the loss weight.
        dropout: share of units inside of the blocks that every image drops.
        augmented: whether images are augmented, and the network told of it.
        rate: the learning rate, after a warm-up.
    """

    per_class: int | None = None
    weight: str = "simple"
    dropout: float = 0.0
    augmented: bool = False
    rate: float = 3e-3


@dataclass(frozen=True)
class DigitBank:
    """The digits' training split with augmented versions of each image, and the held-out split.

    Attributes:
        images: [V + 1, N, D]; version 0 is the image itself. Without other versions, V = 0, nothing can be augmented.
        changes: augmentation labels [V + 1, N, 9].
        labels: [N].
        held_out: images [n, D] and labels [n] that nobody trains on.
    """

    images: Tensor
    changes: Tensor
    labels: Tensor
    held_out: tuple[Tensor, Tensor]

    @classmethod
    def make(cls, versions: int = VERSIONS) -> DigitBank:
        """Read the digits, and augment each so many times."""
        images, labels = read_digits("train")
        draw = NonLeaky(AUGMENTED_SHARE)
        banks = [images]
        changes = [torch.zeros(len(images), NonLeaky.size)]
        for version in range(versions):
            source = generator("augmented digits", version)
            made = [draw(image.reshape(8, 8, 1), source) for image in images]
            banks.append(torch.stack([image.flatten() for image, _ in made]))
            changes.append(torch.stack([facts["augment_labels"] for _, facts in made]))
        return cls(torch.stack(banks), torch.stack(changes), labels, read_digits("test"))

    @classmethod
    def read_mnist(cls, root: str, side: int, held_out: int = 1000) -> DigitBank:
        """Read MNIST, scaled to a side in pixels, without versions; so many images of the test split are held out."""
        images, labels = read_mnist(root, "train", side)
        others, classes = read_mnist(root, "test", side)
        drawn = torch.randperm(len(others), generator=generator("held-out images"))[:held_out]
        changes = torch.zeros(1, len(images), NonLeaky.size)
        return cls(images[None], changes, labels, (others[drawn], classes[drawn]))

    def choose(self, per_class: int | None, seed: int) -> Tensor:
        """Return the positions of the training images that a seed draws, so many of each class."""
        if per_class is None:
            return torch.arange(len(self.labels))
        chosen = []
        for label, own in by_class(self.labels).items():
            order = torch.randperm(len(own), generator=generator("few images", seed, label))
            chosen.append(own[order[:per_class]])
        return torch.cat(chosen)


@dataclass(frozen=True)
class RecipeResult:
    """What trainings left.

    Attributes:
        recipes: of each network, with its seed [M].
        states: parameters {name: [M, ...]}: by width of the average at the end, `LAST`, `best` (the average at each
            network's least held-out loss), and (step, width) of the average of `WIDTH` at a quarter, half, ...
        losses: held-out loss of the average of `WIDTH` by step, [M] each.
    """

    recipes: Sequence[tuple[SmallRecipe, int]]
    states: Mapping[object, State]
    losses: Mapping[int, Tensor]

    def network(self, recipe: SmallRecipe, seed: int, which: object = WIDTH) -> SmallNetwork:
        """Return a network, ready to be asked."""
        place = list(self.recipes).index((recipe, seed))
        return make_network({name: value[place] for name, value in self.states[which].items()})

    def loss(self, recipe: SmallRecipe, seed: int, best: bool = False) -> float:
        """Return the held-out loss at the end, or the least."""
        own = self.curve(recipe, seed)
        return min(own.values()) if best else own[max(own)]

    def best_step(self, recipe: SmallRecipe, seed: int) -> int:
        """Return the step of the least held-out loss."""
        own = self.curve(recipe, seed)
        return min(own, key=own.__getitem__)

    def curve(self, recipe: SmallRecipe, seed: int) -> dict[int, float]:
        """Return the held-out loss by step."""
        place = list(self.recipes).index((recipe, seed))
        return {step: float(values[place]) for step, values in self.losses.items()}


def make_network(state: Mapping[str, Tensor]) -> SmallNetwork:
    """Return the network of one state, frozen."""
    width, pixels = state["first.weight"].shape
    network = SmallNetwork(width, pixels=pixels, classes=NULL_LABEL + 1, augment_dim=NonLeaky.size)
    network.load_state_dict({**network.state_dict(), **state})
    return network.eval().requires_grad_(False)


@dataclass
class RecipeTraining:
    """Trains the networks of recipes together, each on its own images, noises and masks.

    Args:
        bank: the images.
        recipes: with their seeds [M].
        widths: of the averages that are combined at the end.
        steps, batch, width: steps of AdamW, images of a step, width of the networks.
        warm_up: steps over which the rate grows.
    """

    bank: DigitBank
    recipes: Sequence[tuple[SmallRecipe, int]]
    widths: Sequence[float]
    steps: int = 1000
    batch: int = 64
    width: int = 64
    warm_up: int = 100
    snapshots: list[tuple[Profile, State]] = field(default_factory=list)

    def __post_init__(self) -> None:
        if len(self.bank.images) == 1 and any(recipe.augmented for recipe, _ in self.recipes):
            raise ValueError("these images have no augmented versions: leave out the recipe that is augmented")
        chosen = [self.bank.choose(recipe.per_class, seed) for recipe, seed in self.recipes]
        self.counts = torch.tensor([len(own) for own in chosen])
        self.chosen = torch.stack([torch.nn.functional.pad(own, (0, int(self.counts.max()) - len(own)))
                                   for own in chosen])  # fmt: skip
        self.augmented = torch.tensor([recipe.augmented for recipe, _ in self.recipes])
        self.dropout = torch.tensor([recipe.dropout for recipe, _ in self.recipes])
        self.weights = {name: make_loss_weight(name) for name in {recipe.weight for recipe, _ in self.recipes}}
        self.process = ContinuousProcess(CosineSchedule(), UniformTimes())

    def draw(self, source: torch.Generator) -> tuple[Tensor, Tensor]:
        """Return images [M, B, D] and conditions [M, B, 10] of a step, some labels dropped for the null class."""
        shape = (len(self.recipes), self.batch)
        place = (torch.rand(shape, generator=source) * self.counts[:, None]).long()
        index = self.chosen.gather(1, place)
        drawn = torch.randint(1, max(2, len(self.bank.images)), shape, generator=source)
        version = drawn * self.augmented[:, None]
        label = torch.where(torch.rand(shape, generator=source) < 0.1, NULL_LABEL, self.bank.labels[index])
        changes = self.bank.changes[version, index]
        return self.bank.images[version, index], torch.cat([label[..., None], changes], dim=2)

    def weigh(self, error: Tensor, t: Tensor) -> Tensor:
        """Return the errors [M, B] of v under each network's weight."""
        found = torch.empty_like(error)
        for name, weight in self.weights.items():
            own = [place for place, (recipe, _) in enumerate(self.recipes) if recipe.weight == name]
            assert isinstance(weight, LossWeight)
            like = error.new_zeros(len(own) * self.batch, 1, 1, 1)
            factor = weight.of_target(self.process, Target("v"), t[own].flatten().double(), like)
            found[own] = error[own] * factor.reshape(len(own), -1).to(error)
        return found

    @torch.enable_grad()
    def run(self, seed: int, rate: float) -> RecipeResult:
        """Train all networks under one rate."""
        source = generator("recipes", seed, f"{rate:g}")
        pixels = self.bank.images.shape[2]
        starts = {own: SmallNetwork(self.width, pixels=pixels, classes=NULL_LABEL + 1, augment_dim=NonLeaky.size)
                  .initialise(generator("recipe start", own)) for _, own in self.recipes}  # fmt: skip
        network = starts[self.recipes[0][1]]
        stacked = stack_module_state([starts[own] for _, own in self.recipes])[0]
        parameters = {name: value.detach().clone().requires_grad_() for name, value in stacked.items()}
        optimizer = torch.optim.AdamW(parameters.values(), rate, weight_decay=0.0)
        averages = PowerAverages(STEPPED)
        forward = torch.vmap(lambda own, *rows: functional_call(network, own, rows))
        losses: dict[int, Tensor] = {}
        quarters: dict[object, State] = {}
        best: State = {}
        for step in tqdm(range(1, self.steps + 1), desc=f"{len(self.recipes)} networks", mininterval=5):
            optimizer.param_groups[0]["lr"] = rate * min(1.0, step / self.warm_up)
            images, cond = self.draw(source)
            rows = draw_noised(images, cond, source, "v")
            kept = torch.rand((*images.shape[:2], 2, self.width), generator=source) >= self.dropout[:, None, None, None]
            masks = {"masks": kept / (1 - self.dropout[:, None, None, None])}
            outputs = forward({**parameters, **masks}, rows.x, rows.t, rows.cond)
            error = (outputs - rows.target).square().mean(2)
            optimizer.zero_grad()
            self.weigh(error, rows.t).mean(1).sum().backward()
            optimizer.step()
            averages.update(parameters)
            if step % max(1, self.steps // SNAPSHOT_COUNT) == 0:
                self.keep(averages)
                losses[step] = self.hold_out(forward, averages.averages[WIDTH])
                best = pick_best(best, averages.averages[WIDTH], losses, step)
            if step % max(1, self.steps // 4) == 0:
                quarters[step, WIDTH] = copy_state(averages.averages[WIDTH])
        states: dict[object, State] = {width: self.combine(width) for width in self.widths}
        states |= {LAST: copy_state(parameters), "best": best, **quarters}
        return RecipeResult(self.recipes, states, losses)

    def keep(self, averages: PowerAverages) -> None:
        """Keep a snapshot of each average."""
        for width, state in averages.averages.items():
            self.snapshots.append((Profile(averages.time, exponent_of(width)), copy_state(state)))

    def combine(self, width: float) -> State:
        """Return the average of a width at the end, of all snapshots."""
        profiles = [profile for profile, _ in self.snapshots]
        end = Profile(max(profile.time for profile in profiles), exponent_of(width))
        total: State = {}
        for weight, (_, state) in zip(combine_profiles(profiles, end).tolist(), self.snapshots, strict=True):
            for name, value in state.items():
                total[name] = total.get(name, 0) + weight * value.double()
        return {name: value.float() for name, value in total.items()}

    @torch.no_grad()
    def hold_out(self, forward: Callable[..., Tensor], state: State, draws: int = 4) -> Tensor:
        """Return the mean squared error of v on held-out images [M], at noises that are the same every time."""
        images, labels = (part.repeat(draws, *[1] * (part.ndim - 1)) for part in self.bank.held_out)
        rows = draw_noised(images, labels, generator("held-out noise"), "v")
        count = len(self.recipes)
        masks = {"masks": torch.ones(count, len(images), 2, self.width)}
        given = [one.expand(count, *one.shape) for one in rows[:3]]
        return (forward({**state, **masks}, *given) - rows.target).square().mean((1, 2))


def pick_best(best: State, state: State, losses: Mapping[int, Tensor], step: int) -> State:
    """Return the states with those of this step where its held-out loss is the least until now."""
    if not best:
        return copy_state(state)
    better = losses[step] <= torch.stack(list(losses.values())).min(0).values
    return {name: torch.where(better.reshape(-1, *[1] * (value.ndim - 1)), state[name], value)
            for name, value in best.items()}  # fmt: skip


def copy_state(state: Mapping[str, Tensor]) -> State:
    """Return a state whose tensors nothing changes any more."""
    return {name: value.detach().clone() for name, value in state.items()}
