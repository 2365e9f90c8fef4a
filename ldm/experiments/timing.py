"""What benchmarks measure with: networks of known sizes, sides that are timed in turn, operations, memory."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import torch
from omegaconf import DictConfig
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from ldm.ensembles.heads import initialise, resolve_patterns, select
from ldm.ensembles.members import Members
from ldm.jobs import pick_device
from ldm.memory import keep_freed_memory, peak_bytes
from ldm.models.diffusion.ddpm import LatentDiffusion
from ldm.options import option
from ldm.pipelines import build_model
from ldm.records import Row, record
from ldm.training.config import load_config, packaged_configs
from ldm.util import atomic_write, generator

# Configs whose networks are benchmarked with random weights: parameters of the UNet, operations of a pass, latents.
SIZES = {
    "tiny": "configs/latent-diffusion/digits.yaml",  # 1.0 M, 0.04 GFLOP, 8x8x1
    "uvit": "configs/uvit/digits.yaml",  # 0.27 M, 8x8x1, five blocks of one kind
    "small": "configs/latent-diffusion/small.yaml",  # 24.2 M, 1.43 GFLOP, 16x16x3
    "cin256": "configs/latent-diffusion/cin256-v2.yaml",  # 400.9 M, 202 GFLOP, 64x64x3
    "dit-xl-2": "configs/ddae/dit-xl-2-cifar10.yaml",  # 675.1 M, 229 GFLOP, 32x32x4
}
SizeName = Literal["tiny", "uvit", "small", "cin256", "dit-xl-2"]
Call = Callable[[], Any]
Clock = Callable[[], float]


@dataclass(frozen=True)
class TimingPlan:
    """How a benchmark times its sides, and where its numbers go."""

    repeats: int = 5
    """Timings of each side, in turn."""
    threads: Annotated[int | None, option(metavar="N", default="torch's")] = None
    """Threads of the CPU."""
    json: Annotated[str | None, option(metavar="FILE", default="the numbers are printed only")] = None
    """Write the numbers to this file, too."""

    def start(self, device: str) -> torch.device:
        """Take the threads that were asked for, keep memory between calls, and return the device."""
        if self.threads:
            torch.set_num_threads(self.threads)
        keep_freed_memory()
        return pick_device(device)


def load_size_config(size: str) -> DictConfig:
    """Load the config of a size, from the project's own configs."""
    return load_config([str(packaged_configs().parent / SIZES[size])])


def draw_model(config: Mapping[str, Any], device: torch.device, seed: int = 0) -> LatentDiffusion:
    """Build a model none of whose layers is zero: what it computes means nothing, what it costs is the real cost."""
    model = build_model(config)
    source = generator("benchmark", seed)
    with torch.no_grad():
        for name, value in model.named_parameters():
            draw = torch.randn(value.shape, generator=source)
            spread = 1.0 if "embedding" in name else value[0].numel() ** -0.5 if value.ndim > 1 else 0.1
            value.copy_(spread * draw + (value.ndim == 1 and name.endswith("weight")))
    return model.eval().requires_grad_(False).to(device)


def draw_members(model: LatentDiffusion, heads: Sequence[str], count: int, seed: int) -> Members:
    """Draw members that differ in perturbed heads and share the null class."""
    state = model.state_dict()
    names = select(state, resolve_patterns(list(heads), model.head_patterns))
    members = []
    for member in range(count):
        own = {name: state[name].clone() for name in names}
        initialise(own, "perturbed", generator(seed, member), 0.5)
        for name in names:
            if name in model.class_tables.axes:
                own[name][model.null_class] = state[name][model.null_class]
        members.append(own)
    return Members.stack(members)


def synchronize(device: torch.device) -> None:
    """Wait until a device has finished what it was asked to do."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def measure_seconds(call: Call, device: torch.device, clock: Clock = time.perf_counter) -> float:
    """Return the duration of one call in seconds."""
    synchronize(device)
    began = clock()
    call()
    synchronize(device)
    return clock() - began


@dataclass(frozen=True)
class Timing:
    """Durations of one side, in seconds."""

    values: tuple[float, ...]

    @property
    def median(self) -> float:
        """The median duration, in seconds."""
        return statistics.median(self.values)

    def __str__(self) -> str:
        return f"{1e3 * self.median:.1f} ms [{1e3 * min(self.values):.1f} .. {1e3 * max(self.values):.1f}]"


def time_in_turn(
    sides: Mapping[str, Call],
    device: torch.device,
    repeats: int,
    warm: int = 1,
    clock: Clock = time.perf_counter,
) -> dict[str, Timing]:
    """Time every side `repeats` times, one after the other in each round, so that all see the same machine.

    Args:
        sides: the calls by name.
        device: whose work is waited for.
        repeats: rounds.
        warm: calls of each side before the first round, which are not timed.
        clock: seconds; `time.process_time` is the CPU's own time, to which work beside does not count.
    """
    for call in sides.values():
        for _ in range(warm):
            call()
    rounds = [{name: measure_seconds(call, device, clock) for name, call in sides.items()} for _ in range(repeats)]
    return {name: Timing(tuple(one[name] for one in rounds)) for name in sides}


def compare_rounds(slow: Timing, fast: Timing) -> tuple[float, float, float]:
    """Return the median, the least and the greatest ratio of the rounds of two sides."""
    values = sorted(a / b for a, b in zip(slow.values, fast.values, strict=True))
    return statistics.median(values), values[0], values[-1]


def make_matrix_product(device: torch.device, dtype: torch.dtype | None = None, side: int = 0) -> tuple[Call, float]:
    """Return a product of two square matrices, whose rate bounds that of a network, and its operations."""
    side = side or (8192 if device.type == "cuda" else 2048)
    a, b = (torch.randn(side, side, generator=generator("product", k)).to(device, dtype) for k in range(2))
    return lambda: a @ b, 2.0 * side**3


def count_operations(call: Call) -> int:
    """Count multiplications and additions of the matrix products, convolutions and attentions of a call."""
    with FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops()


def measure_memory(call: Call, device: torch.device) -> int:
    """Return the most bytes that tensors of a call took at once, beyond what was there before."""
    if device.type != "cuda":
        return peak_bytes(call)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    call()
    synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


def describe_device(device: torch.device) -> str:
    """Name a device in words."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"


def count_weight_bytes(module: nn.Module) -> int:
    """Return the bytes of a module's parameters."""
    return sum(value.numel() * value.element_size() for value in module.parameters())


def largest_difference(a: Tensor, b: Tensor) -> float:
    """Return the greatest absolute difference over the greatest absolute value of a."""
    return float((a.double() - b.double()).abs().max() / a.double().abs().max())


def write_numbers(path: str | None, benchmark: Any, rows: Sequence[Row], numbers: Any, device: torch.device) -> None:
    """Write the table and the numbers of a benchmark as JSON, with what produced them.

    Args:
        path: the file, which is replaced; nothing is written where it is None.
        benchmark: the benchmark itself, a dataclass of options.
    """
    if path is None:
        return
    content = record(benchmark, table=list(rows), numbers=numbers, where=describe_device(device))
    with atomic_write(path, overwrite=True) as partial:
        partial.write_text(json.dumps(content, indent=1, default=str) + "\n")
