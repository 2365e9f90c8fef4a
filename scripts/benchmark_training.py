"""Time the training of an ensemble's components: a step against a forward pass, separate runs that encode their images
against all members together on cached latents, and the loader alone.

Examples:
  python scripts/benchmark_training.py --size small --threads 2
  python scripts/benchmark_training.py --size cin256 --batch_size 2 --members 1 --repeats 2
  python scripts/benchmark_training.py --size cin256 --device cuda --precision bf16 --batch_size 16

Random weights, random images, the same draws on both sides, whose losses are compared. The sides alternate in one run
with a matrix product between them, whose rate is the ceiling. A step is forward, backward and AdamW.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ldm.checkpoint import save_checkpoint
from ldm.cli import HelpFormatter, run_script
from ldm.data.base import LabelledImages
from ldm.data.joint import JointBatches, JointDataset
from ldm.data.latents import LatentStore, describe_data, with_latents
from ldm.data.module import KeyedBatches, ResumableLoader
from ldm.experiments import timing
from ldm.models.diffusion.ddpm import LatentDiffusion
from ldm.pipelines.speed import PRECISIONS
from ldm.training.joint import JointMembers, start_members
from ldm.util import generator

Batch = dict[str, Tensor]
LEARNING_RATE = 1e-4


def get_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    timing.add_benchmark_arguments(parser)
    add = parser.add_argument
    add("--members", type=int, default=5, help="members")
    add("--heads", nargs="+", default=["class_embedding"], help="what trains")
    add("--batch_size", type=int, default=16, help="images of a member's batch")
    add("--precision", choices=list(PRECISIONS), default="float32", help="autocast of the network's products")
    add("--workers", type=int, default=0, help="processes of the loader that is timed")
    return parser


class RandomImages(LabelledImages):
    """Images of drawn pixels, of the size that a model's first stage takes."""

    def __init__(self, count: int, shape: tuple[int, int, int], classes: int):
        super().__init__(torch.arange(count) % classes, [str(label) for label in range(classes)], shape)

    def read(self, index: int) -> Tensor:
        return 2 * torch.rand(self.image_shape, generator=generator("image", index)) - 1


def image_shape(model: LatentDiffusion) -> tuple[int, int, int]:
    """(H, W, C) of the images that a model decodes."""
    with torch.no_grad():
        image = model.decode_first_stage(torch.zeros((1, *model.latent_shape), device=model.device))
    return image.shape[2], image.shape[3], image.shape[1]


def start(options: argparse.Namespace, device: torch.device) -> list[LatentDiffusion]:
    """Members on a trunk of random weights, in training mode."""
    model = timing.random_model(timing.load_size_config(options.size), device, options.seed)
    with tempfile.TemporaryDirectory() as folder:
        trunk = Path(folder) / "trunk.ckpt"
        save_checkpoint({"state_dict": {name: value.cpu() for name, value in model.state_dict().items()}}, trunk)
        model.pretrained_path, model.head_options = str(trunk), {"names": options.heads}
        members = start_members(model, options.members, options.seed)
    return [member.train() for member in members]


def batches_of(options: argparse.Namespace, members: list[LatentDiffusion]) -> tuple[list[Batch], list[Batch]]:
    """(images, latents) of a batch of each member, of the same pictures."""
    model, size = members[0], options.batch_size
    data = RandomImages(size * len(members), image_shape(model), model.n_classes)
    images, latents = [], []
    for member in range(len(members)):
        items = [data.item(index) for index in range(member * size, (member + 1) * size)]
        batch = {name: torch.stack([torch.as_tensor(item[name]) for item in items]).to(model.device)
                 for name in ("image", "class_label")}  # fmt: skip
        z = model.get_input(batch, "image") / model.scale_factor
        images.append(batch)
        latents.append({**batch, "image": z.movedim(1, -1).contiguous(), "encoded": torch.ones(size, dtype=torch.bool)})
    return images, latents


def joined(batches: list[Batch]) -> Batch:
    """One batch [M B, ...] of all members."""
    return {name: torch.cat([batch[name] for batch in batches]) for name in batches[0]}


class Sides:
    """The steps that are timed; every call is one step of every member it is of, and returns their losses."""

    def __init__(self, options: argparse.Namespace, members: list[LatentDiffusion], device: torch.device):
        self.members, self.samples = members, range(options.batch_size)
        self.images, self.latents = batches_of(options, members)
        self.joint = JointMembers(members)
        self.together = joined(self.latents)
        heads = [[value for value in member.parameters() if value.requires_grad] for member in members]
        self.optimisers = [torch.optim.AdamW(own, lr=LEARNING_RATE, weight_decay=0.0) for own in heads]
        dtype = PRECISIONS[options.precision]
        self.autocast = lambda: torch.autocast(device.type, dtype, enabled=dtype is not None)

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

    def all(self) -> Tensor:
        """A step of all members on cached latents."""
        with self.autocast():
            found = self.joint.losses(self.together, [one.draws for one in self.members], 0, self.samples)
        losses = torch.stack([loss for loss, _ in found])
        losses.sum().backward()
        for optimiser in self.optimisers:
            optimiser.step()
            optimiser.zero_grad()
        return losses.detach()


def loader_of(options: argparse.Namespace, model: LatentDiffusion, folder: Path) -> tuple[ResumableLoader, int]:
    """A loader of all members' batches from a latent cache, and the images of an epoch."""
    count = 64 * options.batch_size
    data = RandomImages(count, image_shape(model), model.n_classes)
    shape = model.latent_shape
    store = LatentStore(folder, describe_data(data), count, 1)
    draws = generator("latents", options.seed)
    for _ in store.fill(data, lambda images: torch.randn((len(images), *shape), generator=draws), 256):
        pass
    parts = [KeyedBatches(with_latents(data, store), options.batch_size, m, m) for m in range(options.members)]
    joint = JointDataset([part.data for part in parts])
    return ResumableLoader(
        joint, batch_sampler=JointBatches(parts), num_workers=options.workers
    ), count * options.members


def main(argv: list[str] | None = None) -> dict[str, Any]:
    options = get_parser().parse_args(argv)
    device = timing.start_timing(options)
    members = start(options, device)
    sides, count = Sides(options, members, device), options.members
    losses = {"on the fly": torch.stack([sides.loss(m, sides.images) for m in range(count)]).detach()}
    losses["together"] = torch.stack([loss for loss, _ in sides.joint.losses(
        sides.together, [one.draws for one in members], 0, sides.samples)]).detach()  # fmt: skip
    product, made = timing.matrix_product(device, PRECISIONS[options.precision])
    calls: dict[str, Callable[[], Any]] = {
        "product": product,
        "forward pass, 1 member": sides.forward,
        "step, 1 member, latents": sides.one,
        f"{count} runs, images encoded": lambda: sides.runs(sides.images),
        f"{count} runs, cached latents": lambda: sides.runs(sides.latents),
        f"{count} together, cached latents": sides.all,
    }
    counted = {name: timing.operations(call) for name, call in calls.items()}
    timed = timing.in_turn(calls, device, options.repeats)
    rate = made / timed["product"].median
    slow = timed[f"{count} runs, images encoded"]
    rows = []
    for name in list(calls)[1:]:
        speed = timing.ratios(slow, timed[name])
        row = {"side": name, "time": str(timed[name]), "GFLOP": f"{counted[name] / 1e9:.1f}"}
        row["GFLOP/s"] = f"{counted[name] / timed[name].median / 1e9:.0f}"
        row["of the product's rate"] = f"{counted[name] / timed[name].median / rate:.0%}"
        whole = "member" not in name
        row["times faster"] = f"{speed[0]:.2f} [{speed[1]:.2f} .. {speed[2]:.2f}]" if whole else ""
        rows.append(row)
    difference = timing.largest_difference(losses["on the fly"], losses["together"])
    with tempfile.TemporaryDirectory() as folder:
        loader, images = loader_of(options, members[0], Path(folder))
        reading = timing.in_turn({"loader": lambda: [None for _ in loader]}, device, options.repeats)["loader"].median
    return finish(options, rows, counted, timed, rate, difference, images / reading)


def finish(
    options: argparse.Namespace,
    rows: list[dict[str, str]],
    counted: dict[str, int],
    timed: dict[str, timing.Timing],
    rate: float,
    difference: float,
    reading: float,
) -> dict[str, Any]:
    """Print and write what was found."""
    operations = counted["step, 1 member, latents"] / counted["forward pass, 1 member"]
    trained = options.members * options.batch_size / timed[f"{options.members} together, cached latents"].median
    print(
        f"{timing.describe_device(options)}, {options.size}: batches of {options.batch_size}, heads {options.heads}, "
        f"{options.precision}; matrix product {rate / 1e9:.0f} GFLOP/s\n"
        f"a step has {operations:.2f} times the operations of a forward pass; losses of the two ways differ by "
        f"{difference:.1e} (relative)\nthe loader alone gives {reading:.0f} images/s, the training takes {trained:.0f}"
    )
    print(timing.table(rows))
    numbers = {"rate": rate, "operations": counted, "ratio": operations, "difference": difference, "loader": reading}
    numbers |= {"trained": trained, "seconds": {name: one.values for name, one in timed.items()}}
    timing.report(options, rows, numbers)
    return numbers


if __name__ == "__main__":
    run_script(main)
