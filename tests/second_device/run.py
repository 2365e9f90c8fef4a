"""Run scripts of the project on the second device: python -m tests.second_device.run LIBRARY COMMANDS.json

COMMANDS.json: a list of commands, each a list of words; the first is `decu`, or a script. `--gpus`
and `--device second` mean the second device. A device is registered for good, so this is a process of its own.
"""

from __future__ import annotations

import json
import runpy
import sys
import types
import warnings
from pathlib import Path

import pytorch_lightning as pl
import torch
from pytorch_lightning.strategies import SingleDeviceStrategy

from ldm.commands import line
from ldm.training import session
from ldm.training.trainer import Devices

ROOT = Path(__file__).parents[2]
NAME = "second"


class Accelerator(pl.accelerators.Accelerator):
    """What Lightning asks about a kind of device."""

    @staticmethod
    def parse_devices(devices):
        return devices

    @staticmethod
    def get_parallel_devices(devices):
        return [torch.device(NAME, 0)]

    @staticmethod
    def auto_device_count():
        return 1

    @staticmethod
    def is_available():
        return True

    @staticmethod
    def name():
        return NAME

    def setup_device(self, device):
        pass

    def get_device_stats(self, device):
        return {}

    def teardown(self):
        pass


class SecondDevice(Devices):
    @property
    def own(self):
        return torch.device(NAME, 0)


def register(library: str) -> None:
    """Make the device known to torch."""
    torch.ops.load_library(library)
    torch.utils.rename_privateuse1_backend(NAME)
    module = types.ModuleType(f"torch.{NAME}")
    module.is_available = module.is_initialized = lambda: True
    module.device_count, module.current_device = lambda: 1, lambda: 0
    module._is_in_bad_fork, module.manual_seed_all = lambda: False, lambda _: None
    module.get_rng_state, module.set_rng_state = lambda *_: torch.empty(0), lambda *_: None
    module.get_amp_supported_dtype = lambda: [torch.bfloat16, torch.float16]
    torch._register_device_module(NAME, module)
    torch.utils.generate_methods_for_privateuse1_backend()
    # As under CUDA a parameter that is moved stays the same object: members of a joint training share theirs.
    torch.__future__.set_swap_module_params_on_conversion(True)
    warnings.filterwarnings("ignore", message=".*fall back to run on the CPU.*")


def refuses_two_devices() -> None:
    """What the whole is for, and two calls that CUDA takes."""
    ours = torch.arange(6.0, device=NAME)
    attempts = {
        "a sum": lambda: ours + torch.ones(6),
        "a look-up": lambda: torch.nn.functional.embedding(torch.tensor([1]), ours[:, None]),
        "a list": lambda: torch.cat([ours, torch.ones(6)]),
        "an index": lambda: torch.ones(6)[torch.tensor([1], device=NAME)],
        "NumPy": lambda: ours.numpy(),
    }
    for name, attempt in attempts.items():
        try:
            attempt()
        except (RuntimeError, TypeError):
            continue
        raise SystemExit(f"{name} of two devices went through")
    assert (2 * ours)[torch.tensor([3])].item() == (ours * torch.tensor(2.0)).cpu()[3] == 6


def main(library: str, commands: str) -> None:
    register(library)
    refuses_two_devices()
    session.choose_devices = lambda *_: SecondDevice(
        {"devices": 1, "strategy": SingleDeviceStrategy(torch.device(NAME, 0), Accelerator())}, 1, NAME
    )
    for words in json.loads(Path(commands).read_text()):
        print("$", *words, flush=True)
        sys.argv = words
        if words[0] == "decu":
            line.main(words[1:])
        else:
            runpy.run_path(str(ROOT / words[0]), run_name="__main__")


if __name__ == "__main__":
    main(*sys.argv[1:])
