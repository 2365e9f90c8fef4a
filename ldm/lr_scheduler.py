"""Learning-rate multipliers of the step, as `LambdaLR` takes them (config targets of latent-diffusion)."""

from __future__ import annotations

import math
from collections.abc import Sequence


class LambdaWarmUpCosineScheduler:
    """Linear warm-up from `lr_start` to `lr_max`, then a half cosine to `lr_min` at `max_decay_steps`; base rate 1."""

    def __init__(
        self,
        warm_up_steps: int,
        lr_min: float,
        lr_max: float,
        lr_start: float,
        max_decay_steps: int,
        verbosity_interval: int = 0,
    ):
        self.warm_up_steps, self.max_decay_steps = warm_up_steps, max_decay_steps
        self.lr_start, self.lr_min, self.lr_max = lr_start, lr_min, lr_max

    def schedule(self, step: int) -> float:
        if step < self.warm_up_steps:
            return self.lr_start + (self.lr_max - self.lr_start) * step / self.warm_up_steps
        done = min(1.0, (step - self.warm_up_steps) / (self.max_decay_steps - self.warm_up_steps))
        return self.lr_min + 0.5 * (self.lr_max - self.lr_min) * (1 + math.cos(done * math.pi))

    __call__ = schedule


class LambdaWarmUpCosineScheduler2:
    """Cycles of warm-up and cosine decay: cycle c lasts `cycle_lengths[c]` steps; multiplies the base rate.

    After the last cycle its final value holds.
    """

    def __init__(
        self,
        warm_up_steps: Sequence[int],
        f_min: Sequence[float],
        f_max: Sequence[float],
        f_start: Sequence[float],
        cycle_lengths: Sequence[int],
        verbosity_interval: int = 0,
    ):
        lengths = {len(warm_up_steps), len(f_min), len(f_max), len(f_start), len(cycle_lengths)}
        if len(lengths) != 1:
            raise ValueError(
                f"a scheduler needs one value a cycle in each list, got lists of lengths {sorted(lengths)}"
            )
        self.cycles = list(zip(warm_up_steps, f_start, f_max, f_min, cycle_lengths, strict=True))

    def remaining(self, step: int, warm_up: int, length: int) -> float:
        """How much of f_max - f_min is left at a step of a cycle, 1 .. 0: a half cosine after the warm-up."""
        return 0.5 * (1 + math.cos(math.pi * min(1.0, (step - warm_up) / max(1, length - warm_up))))

    def schedule(self, step: int) -> float:
        for index, (warm_up, f_start, f_max, f_min, length) in enumerate(self.cycles):
            if step < length or index == len(self.cycles) - 1:
                if step < warm_up:
                    return f_start + (f_max - f_start) * step / warm_up
                return f_min + (f_max - f_min) * self.remaining(step, warm_up, length)
            step -= length
        raise AssertionError("a scheduler has at least one cycle")

    __call__ = schedule


class LambdaLinearScheduler(LambdaWarmUpCosineScheduler2):
    """The same cycles with a linear decay over the whole cycle, warm-up included (as published)."""

    def remaining(self, step: int, warm_up: int, length: int) -> float:
        return max(0.0, (length - step) / length)
