"""A fitted posterior on disk.

`laplace.safetensors` holds sums, mean and hyperparameters, `laplace.yaml` says what it is and which file it is of.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from torch import nn

from ldm.checkpoint import free_name, load_state_dict, save_tensors, tensors_sha256
from ldm.files import read_mapping, reading
from ldm.laplace.arrangement import make_arrangement
from ldm.laplace.posterior import LastLayerLaplace
from ldm.trust import accept
from ldm.util import atomic_write

_FORMAT = 1
FIT_AGAIN = "fit it again (decu laplace fit --overwrite)"

# Name of the arrangement's tensor in the file of the state.
SOURCE = "arrangement.source"


def save_laplace(
    laplace: LastLayerLaplace,
    folder: str | Path,
    record: Mapping[str, Any] | None = None,
    overwrite: bool = False,
) -> Path:
    """Write a fitted posterior and return its folder.

    The tensors get a name that is free and the record is written last: whoever is killed before leaves the earlier
    posterior whole.

    Args:
        record: says where it comes from: checkpoint and its sha256, data, seed.
        overwrite: replace a posterior that lies there.

    Raises:
        FileExistsError: if there is one and `overwrite` is False.
        ValueError: if it is not fitted.
    """
    folder = Path(folder)
    if (folder / "laplace.yaml").exists() and not overwrite:
        raise FileExistsError(f"{folder} holds a posterior; choose another folder, or ask for it to be overwritten")
    tensors = laplace.state_dict()
    arrangement = laplace.arrangement
    places = laplace.layer.places
    layout: dict[str, Any] = {}
    if arrangement is not None:
        tensors = {**tensors, SOURCE: arrangement.source}
        layout = {"layout": {"shape": list(arrangement.shape), "made": list(arrangement.made)}}
    earlier = set(folder.glob("laplace*.safetensors"))
    file = free_name(folder, "laplace", ".safetensors")
    save_tensors(tensors, folder / file, {"format": str(_FORMAT)})
    spec = {
        "format": _FORMAT,
        "file": file,
        "sha256": tensors_sha256(tensors),
        "layer": laplace.name,
        "outputs": laplace.layer.outputs if places is None else places.shape[0],
        **layout,
        "time_edges": list(laplace.time_edges),
        "curvature": laplace.curvature,
        "rank": laplace.rank,
        "published_ef": laplace.published_ef,
        "chunk": laplace.chunk,
        "record": dict(record or {}),
    }
    with atomic_write(folder / "laplace.yaml", overwrite=True) as partial:
        partial.write_text(yaml.safe_dump(spec, sort_keys=False))
    for replaced in earlier:
        replaced.unlink()
    return folder


def load_laplace(folder: str | Path, network: nn.Module) -> LastLayerLaplace:
    """Read a posterior of `network`, whose last layer must hold the weights that it was fitted around.

    Raises:
        ValueError: if the folder holds none, one of another format, or one of other weights.
    """
    file = Path(folder) / "laplace.yaml"
    if not file.is_file():
        raise ValueError(f"{folder} holds no laplace.yaml; fit a posterior and save it there")
    spec = accept(read_mapping(file, "a posterior's record", FIT_AGAIN, ("format", "layer", "record")), file)
    if spec.pop("format") != _FORMAT:
        raise ValueError(f"{file} is not of format {_FORMAT}: {FIT_AGAIN}")
    spec.pop("record", None)
    # The first version had one name for it, and no sum.
    held = file.with_name(str(spec.pop("file", "laplace.safetensors")))
    expected = spec.pop("sha256", None)
    tensors = load_state_dict(held)
    if expected is not None and tensors_sha256(tensors) != expected:
        raise ValueError(f"{held} is not the file that {file} was written with: {FIT_AGAIN}")
    layout = spec.pop("layout", None)
    with reading(file, "the record of the posterior beside it", FIT_AGAIN):
        arrangement = None if layout is None else make_arrangement(tensors.pop(SOURCE), **layout)
        laplace = LastLayerLaplace(network, **spec, example=arrangement)
    with reading(held, "the posterior of this record", FIT_AGAIN):
        laplace.load_state_dict(tensors)
    return laplace
