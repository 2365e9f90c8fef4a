"""Time all members of an ensemble in one call against one call a member, and compare the outputs.

Examples:
  python scripts/benchmark_members.py --path logs/bootstrapped_digits_5
  python scripts/benchmark_members.py --base configs/latent-diffusion/digits.yaml --heads class_embedding output

Without --path the network has random weights and the members perturbed heads. Both sides alternate in one run; the
ratio is that of the medians, with the range over the repeats.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from omegaconf import OmegaConf
from torch import Tensor

from ldm.cli import HelpFormatter, add_device_arguments, pick_device, record, run_script
from ldm.heads import initialise, resolve_patterns, select
from ldm.opened import build_model
from ldm.uncertainty.ensemble import load_ensemble
from ldm.uncertainty.posterior import MemberNetwork, Members, single
from ldm.util import atomic_write, generator


def get_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--path", help="ensemble of save_ensemble.py")
    source.add_argument("--base", help="config of a model, for random weights")
    parser.add_argument("--members", type=int, default=5, help="members, with --base")
    parser.add_argument(
        "--heads", nargs="+", default=["class_embedding"], help="heads in which they differ, with --base"
    )
    parser.add_argument("--n", type=int, default=2, help="images")
    parser.add_argument("--repeats", type=int, default=20, help="timings of each side")
    parser.add_argument("--threads", type=int, help="CPU threads (default: torch's)")
    parser.add_argument("--json", help="also write the numbers here")
    add_device_arguments(parser)
    return parser


def open_members(options: argparse.Namespace, device: torch.device) -> tuple[torch.nn.Module, torch.nn.Module, Members]:
    """Model, its network, and members of a saved ensemble or of random heads."""
    if options.path:
        ensemble = load_ensemble(options.path)
        model = build_model(ensemble.spec["config"])
        model.init_from_ckpt(str(ensemble.trunk()), use_averaged=True)
        model = model.eval().to(device)
        return model, model.network, ensemble.members.to(device)
    model = build_model(OmegaConf.load(options.base)).eval().to(device)
    initialise(dict(model.named_parameters()), "random", generator(options.seed))
    state = model.state_dict()
    names = select(state, resolve_patterns(options.heads, model.head_patterns))
    heads = []
    for member in range(options.members):
        own = {name: state[name].clone() for name in names}
        initialise(own, "perturbed", generator(options.seed, member), 0.5)
        heads.append(own)
    return model, model.network, Members.stack(heads)


def seconds(call: Callable[[], Tensor], device: torch.device) -> float:
    """Duration of one call."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    began = time.perf_counter()
    call()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - began


@torch.no_grad()
def main(argv: list[str] | None = None) -> dict[str, float]:
    options = get_parser().parse_args(argv)
    device = pick_device(options.device)
    if options.threads:
        torch.set_num_threads(options.threads)
    model, network, members = open_members(options, device)
    together = MemberNetwork(network, members)
    apart = [single(network, members, member) for member in range(len(members))]
    source = generator(options.seed)
    labels = torch.arange(options.n, device=device) % model.n_classes
    t = torch.full((options.n,), 500.0, device=device)
    rows, worst = [], 0.0
    for shape, name in (((), "shared x"), ((len(members),), "own x")):
        x = torch.randn((*shape, options.n, *model.latent_shape), generator=source).to(device)

        def loop(x: Tensor = x) -> Tensor:
            return torch.stack([call(x[m] if x.ndim == 5 else x, t, labels) for m, call in enumerate(apart)])

        def fold(x: Tensor = x) -> Tensor:
            return together(x, t, labels)

        difference = float((loop() - fold()).abs().max())
        times = [(seconds(loop, device), seconds(fold, device)) for _ in range(options.repeats)]
        ratios = sorted(slow / fast for slow, fast in times)
        slow, fast = (1e3 * statistics.median(side) for side in zip(*times, strict=True))
        worst = max(worst, difference)
        rows.append(
            {"case": name, "loop_ms": slow, "together_ms": fast, "ratio": slow / fast, "difference": difference}
        )
        print(
            f"{name}: {len(members)} calls {slow:.1f} ms, one call {fast:.1f} ms, ratio {slow / fast:.2f} "
            f"({ratios[0]:.2f} .. {ratios[-1]:.2f}), largest difference {difference:.1e}"
        )
    if options.json:
        with atomic_write(Path(options.json), overwrite=True) as partial:
            partial.write_text(json.dumps(record(options, rows=rows, threads=torch.get_num_threads()), indent=1) + "\n")
    return {"difference": worst, "ratio": min(row["ratio"] for row in rows)}


if __name__ == "__main__":
    run_script(main)
