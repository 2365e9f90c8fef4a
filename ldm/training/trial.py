"""What a training will take on this machine: a few steps of it on made-up pictures."""

from __future__ import annotations

import resource
import sys
import time
from dataclasses import dataclass

import torch
from omegaconf import DictConfig

from ldm.jobs import pick_device
from ldm.util import generator, instantiate_from_config

WARM = 1
TIMED = 2


@dataclass(frozen=True)
class Trial:
    """What a step of a training took.

    Attributes:
        seconds: of a step.
        memory: peak in bytes: of the process on a CPU, of the device elsewhere.
        parameters: of the network that trains.
        device: where it ran, in words.
    """

    seconds: float
    memory: int
    parameters: int
    device: str

    def describe(self, steps: int) -> str:
        """Return what so many steps will take, in words."""
        minutes = steps * self.seconds / 60
        whole = f"{minutes:.0f} minutes" if minutes < 120 else f"{minutes / 60:.1f} hours"
        return (
            f"base model: {self.parameters / 1e6:.1f} M parameters, {self.seconds:.2g} s a step on {self.device}, so "
            f"{steps} steps take about {whole}; {self.memory / 2**30:.1f} GiB of memory at the peak"
        )


def try_steps(config: DictConfig) -> Trial:
    """Train the model of a config for three steps on noise, with its batch size, and time the last two.

    Latents are encoded by a first stage of random weights, as one that is trained would encode them.
    """
    node = config.model.copy()
    first_stage = node.params.get("first_stage_config", {}).get("params")
    if first_stage and "ckpt_path" in first_stage:
        first_stage.ckpt_path = None
    device = pick_device()
    model = instantiate_from_config(node).to(device).train()
    model.seed_draws(0, 0)
    batch = _make_batch(config, device)
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-6)
    seconds = []
    for step in range(WARM + TIMED):
        began = time.perf_counter()
        loss, _ = model.shared_step(batch, model.draws, step, range(config.data.params.batch_size))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - began)
    count = sum(weight.numel() for weight in trained)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{torch.get_num_threads()} CPU threads"
    return Trial(sum(seconds[WARM:]) / TIMED, _peak_memory(device), count, name)


def _make_batch(config: DictConfig, device: torch.device) -> dict[str, object]:
    params, size = config.data.params.train.params, config.data.params.batch_size
    shape = (size, params.image_size, params.image_size, params.channels)
    images = torch.rand(shape, generator=generator("trial")) * 2 - 1
    labels = torch.zeros(size, dtype=torch.int64)
    return {"image": images.to(device), "class_label": labels.to(device), "caption": ["a picture"] * size}


def _peak_memory(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
