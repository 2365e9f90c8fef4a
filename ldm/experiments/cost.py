"""What uncertainty costs beside plain samples: seconds, memory, evaluations of the network."""

from __future__ import annotations

import resource
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from ldm.experiments.variance_benchmarks import applicable
from ldm.pipelines import EnsemblePipeline, PosteriorPipeline
from ldm.records import Row


def measure_cost(task: Callable[[], Any], device: torch.device, repeats: int = 3) -> tuple[float, float]:
    """Return the shortest duration of a few calls in seconds, and the peak memory in MiB.

    Memory is that of the GPU, or of this process until now.
    """
    found = []
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    for _ in range(repeats):
        began = time.perf_counter()
        task()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        found.append(time.perf_counter() - began)
    if device.type == "cuda":
        return min(found), torch.cuda.max_memory_allocated(device) / 2**20
    return min(found), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10


def measure_ensemble_costs(pipeline: EnsemblePipeline, n: int) -> list[Row]:
    """Measure samples and uncertainty of n images of one class: seconds, peak memory, network passes an image."""
    labels, images = [0] * n, list(range(n))
    steps, branch, members = len(pipeline.times) - 1, pipeline.branch, pipeline.members
    tasks: dict[str, tuple[Callable[[], Any], int]] = {
        "plain model: samples": (lambda: pipeline.sample_latents(labels, images), steps),
        "ensemble: one-step uncertainty": (
            lambda: next(iter(pipeline.branched_steps(labels, images, (0,)))),
            branch + members,
        ),
        "ensemble: samples of all members": (
            lambda: pipeline.sample_branched(labels, images, (0,)),
            branch + members * (steps - branch),
        ),
    }
    rows = []
    for name, (task, passes) in tasks.items():
        duration, memory = measure_cost(task, pipeline.device)
        rows.append({"task": name, "images": n, "seconds": duration, "peak_mib": memory, "passes_an_image": passes})
    return rows


@torch.no_grad()
def measure_method_costs(posterior: PosteriorPipeline, labels: Sequence[int], images: Sequence[int]) -> list[Row]:
    """Measure seconds and evaluations an image of every method of variances, in one run beside plain sampling."""
    steps = len(posterior.pipeline.times) - 1
    tasks: dict[str, tuple[Callable[[], Any], int]] = {
        "plain sampling": (lambda: list(posterior.plain(labels, images)), steps)
    }
    for name, method in applicable(posterior):
        if method.evaluations(steps):
            tasks[name] = (lambda method=method: method.run(posterior, labels, images), method.evaluations(steps))
    rows: list[Row] = []
    for name, (task, evaluations) in tasks.items():
        task()
        began = time.perf_counter()
        task()
        seconds = (time.perf_counter() - began) / len(images)
        rows.append({"method": name, "evaluations": evaluations, "seconds": seconds})
    for row in rows:
        row["times_plain"] = row["seconds"] / rows[0]["seconds"]
    return rows
