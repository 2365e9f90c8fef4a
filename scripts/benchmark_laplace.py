"""Time the predictive variance of a last convolution in closed form against draws of its weights, in one run.

Examples:
  python scripts/benchmark_laplace.py
  python scripts/benchmark_laplace.py --features 128 --outputs 3 --side 64 --draws 100 --json results/laplace.json

The default shape is that of Stable Diffusion's last layer, 320 -> 4 channels, 3 x 3, on 64 x 64 latents. The draws'
side evaluates the layer once for each draw of a diagonal posterior and takes mean and variance, as BayesDiff does; the
features are random and smooth, and the posterior is fitted to as many images as there are repeats.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ldm.cli import HelpFormatter, run_script
from ldm.laplace import LastLayerLaplace, Observation
from ldm.records import record
from ldm.report.tables import markdown_table
from ldm.util import atomic_write, generator


def get_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    add = parser.add_argument
    add("--features", type=int, default=320, help="channels into the layer")
    add("--outputs", type=int, default=4, help="channels out of it")
    add("--side", type=int, default=64, help="pixels a side")
    add("--batch", type=int, default=1, help="images")
    add("--draws", type=int, default=100, help="weight draws of the published way")
    add("--rank", type=int, default=128, help="eigenvectors of lowrank")
    add("--repeats", type=int, default=3, help="timings of each side")
    add("--threads", type=int, help="CPU threads (default: torch's)")
    add("--seed", type=int, default=0, help="seed of features and weights")
    add("--json", help="also write the numbers here")
    return parser


class Last(nn.Module):
    """A network that is its last layer alone: x are the features."""

    def __init__(self, features: int, outputs: int):
        super().__init__()
        self.out = nn.Sequential(nn.Identity(), nn.Conv2d(features, outputs, 3, padding=1))

    def trunk(self, x: Tensor, t: Tensor, cond: Tensor | None) -> Tensor:
        return x

    def forward(self, x: Tensor, t: Tensor, cond: Tensor | None) -> Tensor:
        return self.out(self.backbone(x, t, cond))


def smooth_features(options: argparse.Namespace, number: int) -> Tensor:
    """Features [B, F, H, W] that mix 24 smooth patterns and a little noise, so that their spectrum decays."""
    source = generator("features", options.seed, number)
    coarse = torch.randn(options.batch, 24, options.side // 8, options.side // 8, generator=source)
    patterns = F.interpolate(coarse, (options.side, options.side), mode="bicubic")
    mix = torch.randn(options.features, 24, generator=generator("mix", options.seed))
    noise = torch.randn(options.batch, options.features, options.side, options.side, generator=source)
    return F.silu(torch.einsum("fk,bkhw->bfhw", mix, patterns) / 5 + 0.03 * noise)


def timed(call: Callable[[], object]) -> float:
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


@torch.no_grad()
def main(argv: list[str] | None = None) -> dict[str, float]:
    options = get_parser().parse_args(argv)
    if options.threads:
        torch.set_num_threads(options.threads)
    network = Last(options.features, options.outputs).eval()
    laplace = LastLayerLaplace(network, rank=options.rank, chunk=1, prior_precision=10.0)
    batches = []
    for number in range(options.repeats):
        x = smooth_features(options, number)
        target = network(x, None, None) + torch.randn(
            x.shape[0], options.outputs, *x.shape[2:], generator=generator(number)
        )
        batches.append(Observation(x, torch.zeros(len(x)), None, target))
    fit = timed(lambda: laplace.fit(batches))
    sides = {name: laplace.with_curvature(name, options.rank) for name in ("diag", "lowrank", "full")}
    factorise = {name: timed(side.covariance) for name, side in sides.items()}
    x, weight = batches[0].x, network.out[1]
    deviation = sides["diag"].covariance().var.sqrt()
    source = generator("draws", options.seed)

    def drawn() -> Tensor:
        outputs = []
        for _ in range(options.draws):
            change = (deviation * torch.randn(deviation.shape, generator=source, dtype=torch.float64)).float()
            own = weight.weight + change[:, :-1].reshape(weight.weight.shape)
            outputs.append(F.conv2d(x, own, weight.bias + change[:, -1], padding=1))
        return torch.stack(outputs).var(0)

    calls: dict[str, Callable[[], Tensor]] = {f"{options.draws} weight draws": drawn}
    calls |= {name: lambda side=side: side.predict(x)[1] for name, side in sides.items()}
    times = {name: [] for name in calls}
    for _ in range(options.repeats):
        for name, call in calls.items():
            times[name].append(timed(call))
    medians = {name: statistics.median(values) for name, values in times.items()}
    slow, exact = medians[f"{options.draws} weight draws"], sides["full"].predict(x)[1]
    rows = [
        {
            "predictive variance": name + (f", rank {options.rank}" if name == "lowrank" else ""),
            "seconds": value,
            "draws' seconds over these": slow / value,
            "mean over the exact mean": float(calls[name]().mean() / exact.mean()),
            "factorised once, seconds": factorise.get(name),
        }
        for name, value in medians.items()
    ]
    print(markdown_table(rows, 3))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(
        f"fit to {options.repeats * options.batch} images {fit:.2f} s; peak memory {peak:.2f} GB; "
        f"{torch.get_num_threads()} threads"
    )
    if options.json:
        with atomic_write(Path(options.json), overwrite=True) as partial:
            partial.write_text(json.dumps(record(vars(options), rows=rows, fit=fit, peak_gb=peak), indent=1) + "\n")
    return {"speedup": slow / medians["diag"]}


if __name__ == "__main__":
    run_script(main)
