"""What the benchmarks share: sizes, both sides timed in turn, the rate of matrix products, tables, JSON."""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from ldm.cli import add_device_arguments
from ldm.ensembles.heads import initialise, resolve_patterns, select
from ldm.ensembles.members import Members
from ldm.jobs import pick_device
from ldm.memory import keep_freed_memory, peak_bytes
from ldm.models.diffusion.ddpm import LatentDiffusion
from ldm.pipelines import build_model
from ldm.records import record
from ldm.training.config import load_config
from ldm.util import atomic_write, generator

# Weights are drawn. Parameters of the UNet, operations of a pass, latents.
SIZES = {
    "tiny": "configs/latent-diffusion/digits.yaml",  # 1.0 M, 0.04 GFLOP, 8x8x1
    "small": "configs/latent-diffusion/small.yaml",  # 24.2 M, 1.43 GFLOP, 16x16x3
    "cin256": "configs/latent-diffusion/cin256-v2.yaml",  # 400.9 M, 202 GFLOP, 64x64x3
}
Call = Callable[[], Any]


def add_benchmark_arguments(parser: argparse.ArgumentParser, repeats: int = 5) -> None:
    """Which size, where, how often, and where the numbers go."""
    add = parser.add_argument
    add("--size", choices=list(SIZES), default="small", help="network of random weights, see SIZES")
    add("--repeats", type=int, default=repeats, help="timings of each side, in turn")
    add("--threads", type=int, help="CPU threads (default: torch's)")
    add("--json", metavar="FILE", help="also write the numbers here")
    add_device_arguments(parser)


def start_timing(options: argparse.Namespace) -> torch.device:
    """The device, with the threads asked for."""
    if options.threads:
        torch.set_num_threads(options.threads)
    keep_freed_memory()
    return pick_device(options.device)


def load_size_config(size: str) -> DictConfig:
    """The config of a size, from the root of the repository."""
    return load_config([str(Path(__file__).parents[2] / SIZES[size])])


def random_model(config: Mapping[str, Any], device: torch.device, seed: int = 0) -> LatentDiffusion:
    """A model of a config none of whose layers is zero: what it computes is meaningless, what it costs is not."""
    model = build_model(config)
    source = generator("benchmark", seed)
    with torch.no_grad():
        for name, value in model.named_parameters():
            draw = torch.randn(value.shape, generator=source)
            spread = 1.0 if "embedding" in name else value[0].numel() ** -0.5 if value.ndim > 1 else 0.1
            value.copy_(spread * draw + (value.ndim == 1 and name.endswith("weight")))
    return model.eval().requires_grad_(False).to(device)


def random_members(model: LatentDiffusion, heads: list[str], count: int, seed: int) -> Members:
    """Members that differ in perturbed heads, the null class in common."""
    state = model.state_dict()
    names = select(state, resolve_patterns(heads, model.head_patterns))
    members = []
    for member in range(count):
        own = {name: state[name].clone() for name in names}
        initialise(own, "perturbed", generator(seed, member), 0.5)
        for name in [name for name in names if name in model.class_tables.axes]:
            own[name][model.null_class] = state[name][model.null_class]
        members.append(own)
    return Members.stack(members)


def synchronize(device: torch.device) -> None:
    """Wait until a device has finished what it was asked to do."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds(call: Call, device: torch.device) -> float:
    """Duration of one call."""
    synchronize(device)
    began = time.perf_counter()
    call()
    synchronize(device)
    return time.perf_counter() - began


@dataclass(frozen=True)
class Timing:
    """Durations of one side, in seconds."""

    values: tuple[float, ...]

    @property
    def median(self) -> float:
        return statistics.median(self.values)

    def __str__(self) -> str:
        return f"{1e3 * self.median:.1f} ms [{1e3 * min(self.values):.1f} .. {1e3 * max(self.values):.1f}]"


def in_turn(sides: Mapping[str, Call], device: torch.device, repeats: int, warm: int = 1) -> dict[str, Timing]:
    """Time every side `repeats` times, one after the other in each round, so that all see the same machine."""
    for call in sides.values():
        for _ in range(warm):
            call()
    rounds = [{name: seconds(call, device) for name, call in sides.items()} for _ in range(repeats)]
    return {name: Timing(tuple(one[name] for one in rounds)) for name in sides}


def ratios(slow: Timing, fast: Timing) -> tuple[float, float, float]:
    """Median, least and greatest ratio of the rounds of two sides."""
    values = sorted(a / b for a, b in zip(slow.values, fast.values, strict=True))
    return statistics.median(values), values[0], values[-1]


def matrix_product(device: torch.device, dtype: torch.dtype | None = None, side: int = 0) -> tuple[Call, float]:
    """A product of two square matrices, the ceiling of what a network can reach, and its operations."""
    side = side or (8192 if device.type == "cuda" else 2048)
    a, b = (torch.randn(side, side, generator=generator("product", k)).to(device, dtype) for k in range(2))
    return lambda: a @ b, 2.0 * side**3


def operations(call: Call) -> int:
    """Multiplications and additions of the matrix products, convolutions and attentions of a call."""
    with FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops()


def memory(call: Call, device: torch.device) -> int:
    """Most bytes that tensors of a call took at once, beyond what was there."""
    if device.type != "cuda":
        return peak_bytes(call)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    call()
    synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


def describe_device(options: argparse.Namespace) -> str:
    """The device, in words."""
    device = pick_device(options.device)
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"


def weights_bytes(module: nn.Module) -> int:
    """Bytes of a module's parameters."""
    return sum(value.numel() * value.element_size() for value in module.parameters())


def largest_difference(a: Tensor, b: Tensor) -> float:
    """Greatest absolute difference over the greatest absolute value of a."""
    return float((a.double() - b.double()).abs().max() / a.double().abs().max())


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Rows of the same keys as a Markdown table."""
    lines = ["| " + " | ".join(rows[0]) + " |", "| " + " | ".join("---" for _ in rows[0]) + " |"]
    return "\n".join([*lines, *("| " + " | ".join(str(value) for value in row.values()) + " |" for row in rows)])


def report(options: argparse.Namespace, rows: Sequence[Mapping[str, Any]], numbers: Any) -> None:
    """Write the numbers, with what produced them, where `--json` says."""
    if options.json:
        content = record(vars(options), table=list(rows), numbers=numbers, where=describe_device(options))
        with atomic_write(options.json, overwrite=True) as partial:
            partial.write_text(json.dumps(content, indent=1, default=str) + "\n")
