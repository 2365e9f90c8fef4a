"""A tiny ensemble on disk: a random trunk of `tiny_model`, and members whose class rows lie around the trunk's."""

import torch

from ldm.checkpoint import save_checkpoint, sha256
from ldm.ensembles import storage
from ldm.util import generator
from tests.conftest import tiny_config, tiny_model

TABLE = "cond_stage_model.embedding.weight"
# Spread of the members' rows by class_size: the fewer images, the further apart.
SPREAD = {1: 0.2, 10: 0.06, "all": 0.02}


def write_ensemble(folder, members=3, spread=None, params=None, **record):
    """Ten classes; class_sizes 1, 10 and all in turn unless `bins` says otherwise; `record` goes on top of the yaml.

    Args:
        params: of the model, a path for example.
        spread: standard deviation of the members' rows, [11]; by default that of the class's class_size.
    """
    params = params or {}
    trunk = tiny_model(**params)
    save_checkpoint({"state_dict": trunk.state_dict()}, folder / "trunk.ckpt", overwrite=True)
    bins = {label: list(SPREAD)[label % 3] for label in range(10)}
    if spread is None:
        spread = torch.tensor([*(SPREAD[bins[label]] for label in range(10)), 0.0])
    rows = trunk.state_dict()[TABLE]
    heads = [
        {TABLE: rows + spread[:, None] * torch.randn(rows.shape, generator=generator("ensemble", member))}
        for member in range(members)
    ]
    spec = {
        "name": "tiny",
        "trunk": {"path": "trunk.ckpt", "sha256": sha256(folder / "trunk.ckpt")},
        "config": {
            "model": tiny_config(guidance_scale=2.0, **params),
            "uncertainty": {"branch_at": 0.5, "steps": 4, "n": 3},
        },
        "heads": ["class_embedding"],
        "patterns": ["cond_stage_model.embedding.*"],
        "null_class": "shared",
        "bins": bins,
        "class_names": [f"name{label}" for label in range(10)],
        "split": "binned_classes",
        "members": [{"component": member, "seed": member, "run": "none", "step": 0} for member in range(members)],
        **record,
    }
    return storage.write_ensemble(folder, spec, heads, overwrite=True)
