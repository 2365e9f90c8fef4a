"""Images a second of what feeds a training at ImageNet's shapes: JPEGs, latent caches, the first stage."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader

from ldm.commands.line import run_file
from ldm.commands.shared import Placement
from ldm.data.folder import ImageFolder
from ldm.data.latents import LatentStore, describe_data, with_latents
from ldm.data.loading import Loader
from ldm.experiments import timing
from ldm.report.tables import markdown_table
from ldm.util import generator

# Height and width of a typical file of ImageNet, and its quality as a JPEG.
FILE_SIZE = (375, 500)
QUALITY = 90


def write_pictures(folder: Path, count: int, seed: int) -> int:
    """Write smooth random pictures of ImageNet's size as JPEGs of one class; return the bytes of them."""
    (folder / "class").mkdir(parents=True)
    total = 0
    for number in range(count):
        coarse = torch.rand(3, 24, 32, generator=generator("pictures", seed, number))
        pixels = torch.nn.functional.interpolate(coarse[None], FILE_SIZE, mode="bicubic")[0].clamp(0, 1)
        noise = 0.05 * torch.randn(pixels.shape, generator=generator("grain", seed, number))
        array = (255 * (pixels + noise).clamp(0, 1)).byte().movedim(0, -1).numpy()
        path = folder / "class" / f"{number:05d}.jpg"
        Image.fromarray(np.ascontiguousarray(array)).save(path, quality=QUALITY)
        total += path.stat().st_size
    return total


@dataclass(frozen=True)
class LoadingTimes:
    """Time what feeds a training at ImageNet's shapes, each alone: how many images a second it gives.

    The reader decodes JPEGs of 500 x 375 and crops them to the size; a latent cache of a VQ first stage holds 64 x 64 x
    3 numbers an image, one of a KL first stage means and deviations of 32 x 32 x 4; a batch is what a training step
    gets, with pinned memory and copied where there is a GPU. Encoding is a pass of the first stage of the config. The
    files are in the system's cache, so that no disk is timed.

    Examples:
      python benchmarks/loading.py --images 512 --workers 4
      python benchmarks/loading.py --images 2048 --workers 16 --encode 256 --device cuda
    """

    images: int = 256
    """Images of each source."""
    batch_size: int = 64
    """Images of a batch."""
    workers: int = 0
    """Processes that read."""
    image_size: int = 256
    """The side to which pictures are cropped."""
    encode: int = 2
    """Images that the first stage encodes; 0 leaves it out."""
    size: timing.SizeName = "cin256"
    """The config whose first stage encodes, with random weights."""
    cpu_time: bool = False
    """Count the CPU's own time, to which work beside does not count, rather than the clock's."""
    seed: int = 42
    """The seed of pictures and latents."""
    plan: timing.TimingPlan = timing.TimingPlan(repeats=3)
    place: Placement = Placement()

    @torch.no_grad()
    def run(self) -> dict[str, float]:
        """Print a table of a line a source, and return images a second."""
        device = self.plan.start(self.place.device)
        clock = time.process_time if self.cpu_time else time.perf_counter
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            size = write_pictures(folder / "files", self.images, self.seed)
            files = ImageFolder(str(folder / "files"), image_size=self.image_size)
            sources: dict[str, tuple[Any, float]] = {
                "JPEGs, decoded and cropped": (files, size / self.images),
                "latents 64x64x3 (VQ)": self.make_cache(files, folder / "vq", (3, 64, 64), 1),
                "means and deviations 32x32x4 (KL)": self.make_cache(files, folder / "kl", (4, 32, 32), 2),
            }
            calls = {name: self.make_call(data, device) for name, (data, _) in sources.items()}
            timed = timing.time_in_turn(calls, device, self.plan.repeats, 1, clock)
        rates = {name: self.images / one.median for name, one in timed.items()}
        rows = [
            {
                "source": name,
                "KiB an image": f"{sources[name][1] / 1024:.0f}",
                "images/s": f"{rate:.0f}",
                "range": f"{self.images / max(timed[name].values):.0f} .. {self.images / min(timed[name].values):.0f}",
            }
            for name, rate in rates.items()
        ]
        if self.encode:
            rates["encoding"] = rate = self.measure_encoding(device, clock)
            rows.append(
                {"source": f"encoding, {self.size}", "KiB an image": "", "images/s": f"{rate:.3g}", "range": ""}
            )
        print(f"{timing.describe_device(device)}; {self.workers} workers, batches of {self.batch_size}")
        print(markdown_table(rows))
        timing.write_numbers(self.plan.json, self, rows, rates, device)
        return rates

    def make_cache(
        self, files: ImageFolder, folder: Path, shape: tuple[int, int, int], parts: int
    ) -> tuple[Any, float]:
        """Return a data set that reads drawn latents, and the bytes of an image in it."""
        store = LatentStore(folder, describe_data(files), self.images, 1)
        draws = generator("latents", self.seed)

        def encode(images: Tensor) -> tuple[Tensor, ...]:
            return tuple(torch.randn((len(images), *shape), generator=draws) for _ in range(parts))

        for _ in store.fill(files, encode, 64):
            pass
        return with_latents(files, store), 4.0 * parts * float(np.prod(shape))

    def make_call(self, data: Any, device: torch.device) -> Callable[[], None]:
        """Return a call that takes every batch to the device."""
        loader: DataLoader = Loader(
            data, batch_size=self.batch_size, num_workers=self.workers, pin_memory=device.type == "cuda"
        )

        def read() -> None:
            for batch in loader:
                for value in batch.values():
                    if isinstance(value, Tensor):
                        value.to(device, non_blocking=True)

        return read

    def measure_encoding(self, device: torch.device, clock: timing.Clock) -> float:
        """Return the images a second that the first stage encodes."""
        model = timing.draw_model(timing.load_size_config(self.size), device, self.seed)
        side = self.image_size
        images = torch.rand(self.encode, 3, side, side, generator=generator("images", self.seed)).to(device) * 2 - 1
        first_stage = model.first_stage_model
        return self.encode / timing.measure_seconds(lambda: first_stage.encode(images), device, clock)


if __name__ == "__main__":
    run_file(LoadingTimes)
