"""What the training of members is timed with: a step of one, separate runs, and all members together."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ldm.checkpoint import save_checkpoint
from ldm.data.base import LabelledImages
from ldm.models.diffusion.ddpm import LatentDiffusion
from ldm.training.blocks import BlockOptions
from ldm.training.joint import JointMembers, start_members
from ldm.util import generator

TensorBatch = dict[str, Tensor]
LEARNING_RATE = 1e-4


def make_whole_step(
    model: LatentDiffusion, batch: TensorBatch, dtype: torch.dtype | None, options: BlockOptions
) -> Callable[[], Tensor]:
    """Return a training step of a base model, forward, backward and AdamW, which returns its loss.

    Args:
        model: of which a copy is trained, whole.
        batch: latents and labels.
        dtype: of the network's products, None for float32.
        options: how its blocks run.
    """
    model = copy.deepcopy(model)
    trained = [*model.model.parameters()]
    for parameter in trained:
        parameter.requires_grad_(parameter.is_floating_point())
    options.apply(model.train())
    optimiser = torch.optim.AdamW(trained, lr=LEARNING_RATE, weight_decay=0.0)
    samples = range(len(batch["image"]))

    def step() -> Tensor:
        with torch.autocast(model.device.type, dtype, enabled=dtype is not None):
            loss = model.shared_step(batch, model.draws, 0, samples)[0]
        loss.backward()
        optimiser.step()
        optimiser.zero_grad()
        return loss.detach()

    return step


def count_saved_bytes(step: Callable[[], Any]) -> int:
    """Return the bytes of the tensors that autograd keeps for the backward pass of a step, parameters aside."""
    kept: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: Tensor) -> Tensor:
        whole = tensor if tensor._base is None else tensor._base
        if not (whole.is_leaf and whole.requires_grad):
            storage = tensor.untyped_storage()
            kept[storage._cdata] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        step()
    return sum(storage.nbytes() for storage in kept.values())


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


def join_batches(batches: list[TensorBatch]) -> TensorBatch:
    """Return one batch [M B, ...] of all members."""
    return {name: torch.cat([batch[name] for batch in batches]) for name in batches[0]}


class TrainingSides:
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

    def _draw_batches(self, size: int) -> tuple[list[TensorBatch], list[TensorBatch]]:
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

    def loss(self, member: int, batches: list[TensorBatch]) -> Tensor:
        """Forward pass of one member."""
        model = self.members[member]
        with self.autocast():
            return model.shared_step(batches[member], model.draws, 0, self.samples)[0]

    def forward(self) -> Tensor:
        """Forward pass of the first member on latents, without autograd."""
        with torch.no_grad():
            return self.loss(0, self.latents)

    def step(self, member: int, batches: list[TensorBatch]) -> Tensor:
        """A step of one member."""
        loss = self.loss(member, batches)
        loss.backward()
        self.optimisers[member].step()
        self.optimisers[member].zero_grad()
        return loss.detach()

    def one(self) -> Tensor:
        """A step of the first member on latents."""
        return self.step(0, self.latents)

    def runs(self, batches: list[TensorBatch]) -> Tensor:
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


def start_timed_members(model: LatentDiffusion, heads: Sequence[str], count: int, seed: int) -> list[LatentDiffusion]:
    """Return members on a base checkpoint of a model's random weights, in training mode."""
    with tempfile.TemporaryDirectory() as folder:
        base = Path(folder) / "base.ckpt"
        save_checkpoint({"state_dict": {name: value.cpu() for name, value in model.state_dict().items()}}, base)
        model.pretrained_path = str(base)
        model.head_options = {"names": list(heads)}
        members = start_members(model, count, seed)
    return [member.train() for member in members]
