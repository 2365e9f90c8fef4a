"""Share of a command's CPU time that is no arithmetic of the network: start, sampler, estimates, files."""

from __future__ import annotations

import cProfile
import pstats
import shlex
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import wraps
from typing import Annotated, Any

import torch
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from ldm.commands.line import main, run_file
from ldm.experiments.timing import write_numbers
from ldm.models.autoencoder import AutoencoderKL, VQModelInterface
from ldm.modules.conditioned import ConditionedNetwork
from ldm.options import option
from ldm.report.tables import markdown_table

FORWARD, BACKWARD, UPDATE, FIRST_STAGE = "network", "backward pass", "optimiser", "first stage"
# What is arithmetic, and under which name it is counted.
PARTS: tuple[tuple[type, str, str], ...] = (
    (ConditionedNetwork, "condition", FORWARD),
    (ConditionedNetwork, "backbone", FORWARD),
    (ConditionedNetwork, "readout", FORWARD),
    (torch.Tensor, "backward", BACKWARD),
    (AutoencoderKL, "encode", FIRST_STAGE),
    (AutoencoderKL, "decode", FIRST_STAGE),
    (VQModelInterface, "encode", FIRST_STAGE),
    (VQModelInterface, "decode", FIRST_STAGE),
)


@dataclass
class CPUShares:
    """CPU seconds by part; of parts within parts the outermost counts."""

    seconds: dict[str, float] = field(default_factory=dict)
    depth: int = 0
    began: float = 0.0

    def enter(self) -> None:
        """Begin a part."""
        if not self.depth:
            self.began = time.process_time()
        self.depth += 1

    def leave(self, part: str) -> None:
        """End a part."""
        self.depth -= 1
        if not self.depth:
            self.seconds[part] = self.seconds.get(part, 0.0) + time.process_time() - self.began

    def count(self, function: Callable[..., Any], part: str) -> Callable[..., Any]:
        """Return a function whose time is counted."""

        @wraps(function)
        def counted(*args: Any, **kwargs: Any) -> Any:
            self.enter()
            try:
                return function(*args, **kwargs)
            finally:
                self.leave(part)

        return counted

    def leave_out(self, function: Callable[[], Any], part: str) -> Callable[[], Any]:
        """Return a function whose time does not count to the part that calls it: Lightning's optimisers call a closure
        that runs the whole of a training step."""

        def apart() -> Any:
            self.leave(part)
            try:
                return function()
            finally:
                self.enter()

        return apart


@contextmanager
def counting(shares: CPUShares) -> Iterator[None]:
    """Count the time of all parts."""
    plain = [(owner, name, getattr(owner, name)) for owner, name, _ in PARTS]
    for owner, name, part in PARTS:
        setattr(owner, name, shares.count(getattr(owner, name), part))

    def before(optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        shares.enter()
        given = [*args, kwargs.get("closure")]
        closure = next((one for one in given[1:] if callable(one)), None)
        if closure is None:
            return None
        return (args[0], shares.leave_out(closure, UPDATE)), {}

    def after(optimizer: Optimizer, *_: Any) -> None:
        shares.leave(UPDATE)

    hooks = register_optimizer_step_pre_hook(before), register_optimizer_step_post_hook(after)
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
        for owner, name, function in plain:
            setattr(owner, name, function)


@dataclass(frozen=True)
class Overhead:
    """Run a command and say how much of its CPU time was no arithmetic of the network.

    Arithmetic is the network's forward pass (one that the compiler runs, too), the backward pass, the optimiser and the
    first stage. The rest is the sampler, the estimates, noise, data, files and figures; what the interpreter and
    imports take before the command runs is a row of its own.

    Examples:
      python benchmarks/overhead.py --command "uncertainty classes --path logs/bootstrapped_digits_5 --out report"
      python benchmarks/overhead.py --command "train --base configs/latent-diffusion/digits.yaml --max_steps 200"
    """

    command: str
    """The words of the command, after decu."""
    functions: int = 0
    """List as many functions as this by their own time; the measurement is then slower than the command."""
    json: Annotated[str | None, option(metavar="FILE", default="the numbers are printed only")] = None
    """Write the numbers to this file, too."""

    def run(self) -> dict[str, float]:
        """Run the command, print the table, and return CPU seconds by part."""
        start = time.process_time()
        shares = CPUShares()
        profile = cProfile.Profile()
        with counting(shares):
            words = shlex.split(self.command)
            if self.functions:
                profile.runcall(main, words)
            else:
                main(words)
        took = time.process_time() - start
        rest = took - sum(shares.seconds.values())
        seconds = {**shares.seconds, "everything else": rest}
        rows = [{"part": "start", "CPU seconds": f"{start:.2f}", "of the command": ""}]
        rows += [
            {"part": part, "CPU seconds": f"{one:.2f}", "of the command": f"{one / took:.0%}"}
            for part, one in seconds.items()
        ]
        print(markdown_table(rows))
        if self.functions:
            pstats.Stats(profile, stream=sys.stdout).sort_stats("tottime").print_stats(self.functions)
        write_numbers(self.json, self, rows, {"start": start, **seconds}, torch.device("cpu"))
        return {"start": start, **seconds}


if __name__ == "__main__":
    run_file(Overhead)
