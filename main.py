"""Train a model: `decu train`, with latent-diffusion's options and DECU's (--help)."""

import importlib

from ldm.commands import run_as_script

# What released configs and scripts look for here; imported when it is asked for.
EXPORTS = {
    "CUDACallback": "ldm.training.callbacks",
    "DataModuleFromConfig": "ldm.data.module",
    "ImageLogger": "ldm.training.callbacks",
    "LearningRateMonitor": "pytorch_lightning.callbacks",
    "SetupCallback": "ldm.training.callbacks",
    "WrappedDataset": "ldm.data.module",
    "instantiate_from_config": "ldm.util",
}


def __getattr__(name: str) -> object:
    if name in EXPORTS:
        return getattr(importlib.import_module(EXPORTS[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


if __name__ == "__main__":
    run_as_script("train")
