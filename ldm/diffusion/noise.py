"""Random draws that depend on what they are for, not on the batch they fall into.

`noise(index, shape) -> tensor` is an argument of every sampler. Draw for image i at step k comes from a generator
seeded by (seed, image[, member], step): image i does not depend on the batch size, on the device, or on its
neighbours.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ldm.util import generator

INITIAL = -1


# Above every number of steps.
_BETWEEN = 1_000_000


def index_between(index: int) -> int:
    """Return the index of the draw inside step `index`, for samplers that draw twice a step."""
    return _BETWEEN + index


def keyed_normal(keys: Sequence[tuple[int | str, ...]], shape: Sequence[int]) -> Tensor:
    """Standard normal draws [len(keys), *shape], float32 on the CPU, row i from a generator seeded by keys[i]."""
    return torch.stack([torch.randn(tuple(shape), generator=generator(*key)) for key in keys])


def slerp(a: Tensor, b: Tensor, weights: Tensor) -> Tensor:
    """Points on the arc from a to b, so that between two noises of equal length all have it (Shoemake 1985).

        sin((1 - w) angle) / sin(angle) a + sin(w angle) / sin(angle) b

    Args:
        a, b: noises [C, H, W].
        weights: [F], 0 at a and 1 at b.

    Returns:
        [F, C, H, W]; on a straight line where a and b point the same way.

    Raises:
        ValueError: if the shapes differ, or no arc joins the two: one is zero, or they point in opposite directions.
    """
    if a.shape != b.shape:
        raise ValueError(f"slerp joins noises of one shape, got {tuple(a.shape)} and {tuple(b.shape)}")
    start, end = a.double().flatten(), b.double().flatten()
    lengths = start.norm() * end.norm()
    cosine = (start @ end / lengths).clamp(-1, 1)
    if lengths == 0 or cosine < -1 + 1e-9:
        raise ValueError("no arc joins these noises: one is zero, or they point in opposite directions")
    angle, w = torch.arccos(cosine), weights.double()[:, None]  # [], [F, 1]
    if angle < 1e-6:
        joined = (1 - w) * start + w * end
    else:
        joined = (((1 - w) * angle).sin() * start + (w * angle).sin() * end) / angle.sin()
    return joined.reshape(len(weights), *a.shape).to(a.dtype)


@dataclass(frozen=True)
class ImageNoise:
    """Noise of sampling: one stream an image, and one a member where members draw independently.

    Called as `noise(index, shape)`. Shape [B, C, H, W] gives one draw an image, shared by all members (the first
    branched step); shape [M, B, C, H, W] gives every member its own. `initial(shape)` is x at the noisiest time.
    """

    seed: int
    images: tuple[int, ...]
    device: torch.device | str = "cpu"

    def __call__(self, index: int, shape: Sequence[int]) -> Tensor:
        if shape[-4] != len(self.images):
            raise ValueError(f"noise for {len(self.images)} images was asked for a batch of {shape[-4]}")
        if len(shape) == 4:
            return keyed_normal([(self.seed, image, index) for image in self.images], shape[1:]).to(self.device)
        members = [
            keyed_normal([(self.seed, image, f"member{member}", index) for image in self.images], shape[2:])
            for member in range(shape[0])
        ]
        return torch.stack(members).to(self.device)

    def initial(self, shape: Sequence[int]) -> Tensor:
        """x_T / sigma_T: standard normal [B, C, H, W]."""
        return self(INITIAL, shape)


@dataclass
class CountedNoise:
    """Noise for callers that name no images: they are counted over the calls, so that no two calls give the same.

    Attributes:
        seed: of the draws.
        drawn: the number of images that were taken so far.
    """

    seed: int = 0
    drawn: int = 0

    def take(self, count: int, device: torch.device | str = "cpu") -> ImageNoise:
        """Return the noise of the next `count` images."""
        first = self.drawn
        self.drawn += count
        return ImageNoise(self.seed, tuple(range(first, self.drawn)), device)


@dataclass(frozen=True)
class TrainingDraws:
    """Draws of training, from generators seeded by (seed, member, step, sample): resumed runs and joint runs agree.

    `sample` is the position in the effective global batch (all devices, all accumulated parts of one step).
    """

    seed: int
    member: int = 0
    purpose: str = "train"

    def __call__(
        self, step: int, samples: Sequence[int], shape: Sequence[int], timesteps: int | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Times [B] in 0 .. timesteps - 1, noise [B, *shape] and a uniform draw [B] (label dropout).

        Where `timesteps` is None (a continuous schedule), a time is a float64 draw in [0, 1).
        """
        times, noises, uniforms = [], [], []
        for sample in samples:
            source = generator(self.purpose, self.seed, self.member, step, sample)
            if timesteps is None:
                times.append(torch.rand((), generator=source, dtype=torch.float64))
            else:
                times.append(torch.randint(0, timesteps, (), generator=source))
            uniforms.append(torch.rand((), generator=source))
            noises.append(torch.randn(tuple(shape), generator=source))
        return torch.stack(times), torch.stack(noises), torch.stack(uniforms)

    def perturbation(self, step: int, samples: Sequence[int], shape: Sequence[int]) -> Tensor:
        """Standard normal draws [B, *shape] of input perturbation, apart from the others."""
        return self._apart("input perturbation", step, samples, shape)

    def posterior_noise(self, step: int, samples: Sequence[int], shape: Sequence[int]) -> Tensor:
        """Standard normal draws [B, *shape] by which a KL first stage's posterior is sampled, apart from the others."""
        return self._apart("first stage", step, samples, shape)

    def _apart(self, of: str, step: int, samples: Sequence[int], shape: Sequence[int]) -> Tensor:
        keys = [(f"{self.purpose} {of}", self.seed, self.member, step, sample) for sample in samples]
        return keyed_normal(keys, shape)
