"""Time the training of an ensemble's members: a step, separate runs, all members together, and the loader alone."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ldm.checkpoint import save_checkpoint
from ldm.commands.line import run_file
from ldm.commands.shared import Placement
from ldm.data.base import LabelledImages
from ldm.data.joint import JointBatches, JointDataset
from ldm.data.latents import LatentStore, describe_data, with_latents
from ldm.data.module import KeyedBatches, ResumableLoader
from ldm.experiments import timing
from ldm.models.diffusion.ddpm import LatentDiffusion
from ldm.pipelines.speed import PRECISIONS
from ldm.report.tables import markdown_table
from ldm.settings import Precision
from ldm.training.joint import JointMembers, start_members
from ldm.util import generator

Batch = dict[str, Tensor]
LEARNING_RATE = 1e-4


class RandomImages(LabelledImages):
    """Images of drawn pixels, of the size that a model's first stage takes."""

    def __init__(self, count: int, shape: tuple[int, int, int], classes: int):
        super().__init__(torch.arange(count) % classes, [str(label) for label in range(classes)], shape)

    def read(self, index: int) -> Tensor:
        """Return an image [H, W, C] in [-1, 1]."""
        return 2 * torch.rand(self.image_shape, generator=generator("image", index)) - 1


def find_image_shape(model: LatentDiffusion) -> tuple[int, int, int]:
    """Return (H, W, C) of the images that a model decodes."""
    with torch.no_grad():
        image = model.decode_first_stage(torch.zeros((1, *model.latent_shape), device=model.device))
    return image.shape[2], image.shape[3], image.shape[1]


def join_batches(batches: list[Batch]) -> Batch:
    """Return one batch [M B, ...] of all members."""
    return {name: torch.cat([batch[name] for batch in batches]) for name in batches[0]}


class Sides:
    """The steps that are timed; every call is one step of every member it is of, and returns their losses.

    Args:
        members: the members, in training mode.
        batch_size: images of a member's batch.
        dtype: of the network's products, None for float32.
    """

    def __init__(self, members: list[LatentDiffusion], batch_size: int, dtype: torch.dtype | None):
        self.members = members
        self.samples = range(batch_size)
        self.images, self.latents = self._draw_batches(batch_size)
        self.joint = JointMembers(members)
        self.together = join_batches(self.latents)
        heads = [[value for value in member.parameters() if value.requires_grad] for member in members]
        self.optimisers = [torch.optim.AdamW(own, lr=LEARNING_RATE, weight_decay=0.0) for own in heads]
        device = members[0].device
        self.autocast = lambda: torch.autocast(device.type, dtype, enabled=dtype is not None)

    def _draw_batches(self, size: int) -> tuple[list[Batch], list[Batch]]:
        """Return a batch of images of each member, and the same pictures as latents."""
        model = self.members[0]
        data = RandomImages(size * len(self.members), find_image_shape(model), model.n_classes)
        images, latents = [], []
        for member in range(len(self.members)):
            items = [data.item(index) for index in range(member * size, (member + 1) * size)]
            batch = {}
            for name in ("image", "class_label"):
                batch[name] = torch.stack([torch.as_tensor(item[name]) for item in items]).to(model.device)
            z = model.get_input(batch, "image") / model.scale_factor
            encoded = torch.ones(size, dtype=torch.bool)
            images.append(batch)
            latents.append({**batch, "image": z.movedim(1, -1).contiguous(), "encoded": encoded})
        return images, latents

    def loss(self, member: int, batches: list[Batch]) -> Tensor:
        """Forward pass of one member."""
        model = self.members[member]
        with self.autocast():
            return model.shared_step(batches[member], model.draws, 0, self.samples)[0]

    def forward(self) -> Tensor:
        """Forward pass of the first member on latents, without autograd."""
        with torch.no_grad():
            return self.loss(0, self.latents)

    def step(self, member: int, batches: list[Batch]) -> Tensor:
        """A step of one member."""
        loss = self.loss(member, batches)
        loss.backward()
        self.optimisers[member].step()
        self.optimisers[member].zero_grad()
        return loss.detach()

    def one(self) -> Tensor:
        """A step of the first member on latents."""
        return self.step(0, self.latents)

    def runs(self, batches: list[Batch]) -> Tensor:
        """A step of every member's own run."""
        return torch.stack([self.step(member, batches) for member in range(len(self.members))])

    def joint_losses(self) -> Tensor:
        """Forward pass of all members on cached latents; their losses [M]."""
        found = self.joint.losses(self.together, [one.draws for one in self.members], 0, self.samples)
        return torch.stack([loss for loss, _ in found])

    def all(self) -> Tensor:
        """A step of all members on cached latents."""
        with self.autocast():
            losses = self.joint_losses()
        losses.sum().backward()
        for optimiser in self.optimisers:
            optimiser.step()
            optimiser.zero_grad()
        return losses.detach()


@dataclass(frozen=True)
class TrainingTimes:
    """Time the training of an ensemble's members.

    A step is timed against a forward pass, separate runs that encode their images against all members together on
    cached latents, and the loader alone. Random weights, random images, the same draws on both sides, whose losses are
    compared. The sides alternate in one run with a matrix product between them, whose rate is the ceiling. A step is
    forward, backward and AdamW.

    Examples:
      python benchmarks/training.py --size small --threads 2
      python benchmarks/training.py --size cin256 --batch_size 2 --members 1 --repeats 2
      python benchmarks/training.py --size cin256 --device cuda --precision bf16 --batch_size 16
    """

    size: timing.SizeName = "small"
    """The network, of random weights; ldm/experiments/timing.py lists the sizes."""
    members: int = 5
    """The number of members."""
    heads: tuple[str, ...] = ("class_embedding",)
    """The heads that train."""
    batch_size: int = 16
    """Images of a member's batch."""
    precision: Precision = "float32"
    """The precision of the network's products."""
    workers: int = 0
    """Processes of the loader that is timed."""
    seed: int = 42
    """The seed of weights and members."""
    plan: timing.TimingPlan = timing.TimingPlan()
    place: Placement = Placement()

    def start_members(self, device: torch.device) -> list[LatentDiffusion]:
        """Return members on a base checkpoint of random weights, in training mode."""
        model = timing.draw_model(timing.load_size_config(self.size), device, self.seed)
        with tempfile.TemporaryDirectory() as folder:
            base = Path(folder) / "base.ckpt"
            save_checkpoint({"state_dict": {name: value.cpu() for name, value in model.state_dict().items()}}, base)
            model.pretrained_path = str(base)
            model.head_options = {"names": list(self.heads)}
            members = start_members(model, self.members, self.seed)
        return [member.train() for member in members]

    def make_loader(self, model: LatentDiffusion, folder: Path) -> tuple[ResumableLoader, int]:
        """Return a loader of all members' batches from a latent cache, and the images of an epoch."""
        count = 64 * self.batch_size
        data = RandomImages(count, find_image_shape(model), model.n_classes)
        store = LatentStore(folder, describe_data(data), count, 1)
        draws = generator("latents", self.seed)

        def encode(images: Tensor) -> tuple[Tensor, ...]:
            return (torch.randn((len(images), *model.latent_shape), generator=draws),)

        for _ in store.fill(data, encode, 256):
            pass
        cached = with_latents(data, store)
        batches = [KeyedBatches(cached, self.batch_size, member, member) for member in range(self.members)]
        joint = JointDataset([each.data for each in batches])
        loader = ResumableLoader(joint, batch_sampler=JointBatches(batches), num_workers=self.workers)
        return loader, count * self.members

    def measure_loader(self, model: LatentDiffusion, device: torch.device) -> float:
        """Return the images a second of the loader alone."""
        with tempfile.TemporaryDirectory() as folder:
            loader, images = self.make_loader(model, Path(folder))
            calls = {"loader": lambda: [None for _ in loader]}
            return images / timing.time_in_turn(calls, device, self.plan.repeats)["loader"].median

    def run(self) -> dict[str, Any]:
        """Print a table of a line a side, and return the numbers."""
        device = self.plan.start(self.place.device)
        count, dtype = self.members, PRECISIONS[self.precision]
        sides = Sides(self.start_members(device), self.batch_size, dtype)
        apart = torch.stack([sides.loss(member, sides.images) for member in range(count)]).detach()
        difference = timing.largest_difference(apart, sides.joint_losses().detach())
        product, made = timing.make_matrix_product(device, dtype)
        calls: dict[str, Callable[[], Any]] = {
            "product": product,
            "forward pass, 1 member": sides.forward,
            "step, 1 member, latents": sides.one,
            f"{count} runs, images encoded": lambda: sides.runs(sides.images),
            f"{count} runs, cached latents": lambda: sides.runs(sides.latents),
            f"{count} together, cached latents": sides.all,
        }
        counted = {name: timing.count_operations(call) for name, call in calls.items()}
        timed = timing.time_in_turn(calls, device, self.plan.repeats)
        numbers = {
            "rate": made / timed["product"].median,
            "operations": counted,
            "ratio": counted["step, 1 member, latents"] / counted["forward pass, 1 member"],
            "difference": difference,
            "loader": self.measure_loader(sides.members[0], device),
            "trained": count * self.batch_size / timed[f"{count} together, cached latents"].median,
            "seconds": {name: one.values for name, one in timed.items()},
        }
        rows = self.make_rows(counted, timed, numbers["rate"])
        self.print(rows, numbers, device)
        timing.write_numbers(self.plan.json, self, rows, numbers, device)
        return numbers

    def make_rows(self, counted: dict[str, int], timed: dict[str, timing.Timing], rate: float) -> list[dict[str, Any]]:
        """Return a line a side, the matrix product left out, whose `rate` is in operations a second."""
        slow = timed[f"{self.members} runs, images encoded"]
        rows = []
        for name in list(timed)[1:]:
            speed = counted[name] / timed[name].median
            median, low, high = timing.compare_rounds(slow, timed[name])
            rows.append(
                {
                    "side": name,
                    "time": str(timed[name]),
                    "GFLOP": f"{counted[name] / 1e9:.1f}",
                    "GFLOP/s": f"{speed / 1e9:.0f}",
                    "of the product's rate": f"{speed / rate:.0%}",
                    "times faster": "" if "member" in name else f"{median:.2f} [{low:.2f} .. {high:.2f}]",
                }
            )
        return rows

    def print(self, rows: list[dict[str, Any]], numbers: dict[str, Any], device: torch.device) -> None:
        """Print what was found."""
        print(
            f"{timing.describe_device(device)}, {self.size}: batches of {self.batch_size}, heads {list(self.heads)}, "
            f"{self.precision}; matrix product {numbers['rate'] / 1e9:.0f} GFLOP/s\n"
            f"a step has {numbers['ratio']:.2f} times the operations of a forward pass; losses of the two ways differ "
            f"by {numbers['difference']:.1e} (relative)\nthe loader alone gives {numbers['loader']:.0f} images/s, "
            f"the training takes {numbers['trained']:.0f}"
        )
        print(markdown_table(rows))


if __name__ == "__main__":
    run_file(TrainingTimes)
