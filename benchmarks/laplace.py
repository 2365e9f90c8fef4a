"""Time the predictive variance of a last convolution in closed form against draws of its weights, in one run."""

from __future__ import annotations

import json
import resource
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ldm.commands.line import run_file
from ldm.laplace import LastLayerLaplace, Observation
from ldm.options import option
from ldm.records import record
from ldm.report.tables import markdown_table
from ldm.util import atomic_write, generator


class LastLayerAlone(nn.Module):
    """A network that is its last layer alone: x are the features."""

    def __init__(self, features: int, outputs: int):
        super().__init__()
        self.out = nn.Sequential(nn.Identity(), nn.Conv2d(features, outputs, 3, padding=1))

    def backbone(self, x: Tensor, t: Tensor, cond: Tensor | None) -> Tensor:
        """Return the features: x itself."""
        return x

    def forward(self, x: Tensor, t: Tensor, cond: Tensor | None) -> Tensor:
        """Return the layer's outputs [B, outputs, H, W]."""
        return self.out(self.backbone(x, t, cond))


def measure_seconds(call: Callable[[], object]) -> float:
    """Return the duration of one call in seconds."""
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


@dataclass(frozen=True)
class PredictiveVariance:
    """Time the predictive variance of a last convolution in closed form against draws of its weights, in one run.

    The default shape is that of Stable Diffusion's last layer, 320 -> 4 channels, 3 x 3, on 64 x 64 latents. The draws'
    side evaluates the layer once for each draw of a diagonal posterior and takes mean and variance, as BayesDiff does;
    the features are random and smooth, and the posterior is fitted to as many images as there are repeats.

    Examples:
      python benchmarks/laplace.py
      python benchmarks/laplace.py --features 128 --outputs 3 --side 64 --draws 100 --json results/laplace.json
    """

    features: int = 320
    """The channels into the layer."""
    outputs: int = 4
    """The channels out of it."""
    side: int = 64
    """The pixels of a side."""
    batch: int = 1
    """The number of images."""
    draws: int = 100
    """Draws of the weights, the published way."""
    rank: int = 128
    """The eigenvectors of lowrank."""
    repeats: int = 3
    """Timings of each side, in turn."""
    threads: Annotated[int | None, option(metavar="N", default="torch's")] = None
    """Threads of the CPU."""
    seed: int = 0
    """The seed of features and weights."""
    json: Annotated[str | None, option(metavar="FILE", default="the numbers are printed only")] = None
    """Write the numbers to this file, too."""

    def draw_features(self, number: int) -> Tensor:
        """Draw features [B, F, H, W] that mix 24 smooth patterns and a little noise, so that their spectrum decays."""
        source = generator("features", self.seed, number)
        coarse = torch.randn(self.batch, 24, self.side // 8, self.side // 8, generator=source)
        patterns = F.interpolate(coarse, (self.side, self.side), mode="bicubic")
        mix = torch.randn(self.features, 24, generator=generator("mix", self.seed))
        noise = torch.randn(self.batch, self.features, self.side, self.side, generator=source)
        return F.silu(torch.einsum("fk,bkhw->bfhw", mix, patterns) / 5 + 0.03 * noise)

    def observe(self, network: nn.Module, number: int) -> Observation:
        """Return features with targets: the network's outputs and noise of standard deviation 1."""
        x = self.draw_features(number)
        outputs = network(x, None, None)
        noise = torch.randn(outputs.shape, generator=generator(number))
        return Observation(x, torch.zeros(len(x)), None, outputs + noise)

    def make_draws_side(self, layer: nn.Conv2d, x: Tensor, deviation: Tensor) -> Callable[[], Tensor]:
        """Return the published way: the variance over draws of the weights, `deviation` [outputs, F * 9 + 1] apart."""
        source = generator("draws", self.seed)

        def draw_variance() -> Tensor:
            outputs = []
            for _ in range(self.draws):
                change = (deviation * torch.randn(deviation.shape, generator=source, dtype=torch.float64)).float()
                weight = layer.weight + change[:, :-1].reshape(layer.weight.shape)
                outputs.append(F.conv2d(x, weight, layer.bias + change[:, -1], padding=1))
            return torch.stack(outputs).var(0)

        return draw_variance

    @torch.no_grad()
    def run(self) -> dict[str, float]:
        """Print a table of a line a side; return how many times faster the diagonal closed form is."""
        if self.threads:
            torch.set_num_threads(self.threads)
        network = LastLayerAlone(self.features, self.outputs).eval()
        laplace = LastLayerLaplace(network, rank=self.rank, chunk=1, prior_precision=10.0)
        batches = [self.observe(network, number) for number in range(self.repeats)]
        fit = measure_seconds(lambda: laplace.fit(batches))
        sides = {name: laplace.with_curvature(name, self.rank) for name in ("diag", "lowrank", "full")}
        factorise = {name: measure_seconds(side.covariance) for name, side in sides.items()}

        x = batches[0].x
        deviation = sides["diag"].covariance().var.sqrt()
        drawn = f"{self.draws} weight draws"
        calls: dict[str, Callable[[], Tensor]] = {drawn: self.make_draws_side(network.out[1], x, deviation)}
        calls |= {name: lambda side=side: side.predict(x)[1] for name, side in sides.items()}
        times: dict[str, list[float]] = {name: [] for name in calls}
        for _ in range(self.repeats):
            for name, call in calls.items():
                times[name].append(measure_seconds(call))
        medians = {name: statistics.median(values) for name, values in times.items()}

        exact = sides["full"].predict(x)[1]
        rows = [
            {
                "predictive variance": name + (f", rank {self.rank}" if name == "lowrank" else ""),
                "seconds": value,
                "draws' seconds over these": medians[drawn] / value,
                "mean over the exact mean": float(calls[name]().mean() / exact.mean()),
                "factorised once, seconds": factorise.get(name),
            }
            for name, value in medians.items()
        ]
        self.write(rows, fit)
        return {"speedup": medians[drawn] / medians["diag"]}

    def write(self, rows: list[dict[str, Any]], fit: float) -> None:
        """Print the table, and write it where --json says; `fit` are the seconds of the posterior's fit."""
        print(markdown_table(rows, 3))
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        print(
            f"fit to {self.repeats * self.batch} images {fit:.2f} s; peak memory {peak:.2f} GB; "
            f"{torch.get_num_threads()} threads"
        )
        if self.json:
            with atomic_write(Path(self.json), overwrite=True) as partial:
                partial.write_text(json.dumps(record(self, rows=rows, fit=fit, peak_gb=peak), indent=1) + "\n")


if __name__ == "__main__":
    run_file(PredictiveVariance)
