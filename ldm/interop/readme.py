"""The page beside an exported model: which classes of diffusers read it, and lines that sample it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ldm.interop.converted import Converted
from ldm.interop.schedulers import DERIVED_AGAIN

_HEAD = """# A model for diffusers

Written by `decu export --to diffusers`. Its parts:

{parts}
"""
_PIPELINE = """
```python
from diffusers import {name}

pipeline = {name}.from_pretrained("{folder}")
```
"""
_DERIVED = """
Its predicted x0 is clamped to [-1, 1], and eps follows from that: call `pipeline({word}=True)`.
"""
_CLASSES = """
## Classes

{sentence}

```python
import json
from pathlib import Path

import torch
from diffusers import {scheduler}, {network}
{load}
folder = Path("{folder}")
network = {network}.from_pretrained(folder, subfolder="{name}")
{fix}scheduler = {scheduler}.from_pretrained(folder, subfolder="scheduler")
null = json.loads((folder / "conditioning.json").read_text())["null_class"]


{function}

@torch.no_grad()
def sample(labels, noise, steps=50, scale=1.0):
    \"\"\"Latents or images [B, C, H, W] of classes [B] from noise [B, C, H, W], by guidance of a scale.\"\"\"
    scheduler.set_timesteps(steps)
    x = noise
    for t in scheduler.timesteps:
        prediction = predict(x, t, labels)
        if scale != 1:  # towards the classes, away from the null class
            without = predict(x, t, torch.full_like(labels, null))
            prediction = without + scale * (prediction - without)
        x = scheduler.step(prediction, t, x).prev_sample
    return x
```
"""
_TABLE = """table = load_file(folder / "class_embedding" / "diffusion_pytorch_model.safetensors")["embedding.weight"]


def predict(x, t, labels):
    return network(x, t, encoder_hidden_states=table[labels][:, None]).sample
"""
_LABELS = """def predict(x, t, labels):
    return network(x, t.expand(len(x)), class_labels=labels).sample{split}
"""
_SHIFT = """for block in network.transformer_blocks:  # the frequencies that DiT was trained with, see below
    block.norm1.emb.time_proj.downscale_freq_shift = 0
"""
_DIT = """
## Times of DiT

`DiTTransformer2DModel` embeds times with frequencies 10000^(-i / 127). DiT (Peebles & Xie 2023) was trained with
10000^(-i / 128), and so was this network. No argument of the class says so; after loading, set

```python
for block in transformer.transformer_blocks:
    block.norm1.emb.time_proj.downscale_freq_shift = 0
```

Without these two lines its outputs differ. This project reads the folder as it was trained.
"""
_SENTENCES = {
    "class_embedding": (
        "A class is a row of the table in `class_embedding/`: the network attends to the row as a context of one "
        "token, `encoder_hidden_states = table[labels][:, None]`. Row {null} is the null class of guidance."
    ),
    "class_labels": "A class is a label of the network, `class_labels`. Label {null} is the null class of guidance.",
}
_NO_NULL = " There is no null class, hence no guidance."


def make_readme(
    parts: Mapping[str, Converted],
    scheduler: Mapping[str, Any],
    index: Mapping[str, Any],
    conditioning: Mapping[str, Any],
    folder: str = ".",
) -> str:
    """Return the page of an exported model; its Python runs in the model's folder.

    Args:
        parts: {subfolder: network}.
        scheduler, index, conditioning: what the JSON files of the folder hold.
        folder: the path that the lines name.
    """
    lines = [f"- `{name}/`: `diffusers.{part.class_name}`" for name, part in parts.items()]
    lines.append(f"- `scheduler/`: `diffusers.{scheduler['_class_name']}`")
    text = _HEAD.format(parts="\n".join(lines))
    if index:
        text += _PIPELINE.format(name=index["_class_name"], folder=folder)
        text += _DERIVED.format(word=DERIVED_AGAIN) if scheduler.get(DERIVED_AGAIN) else ""
    if conditioning:
        text += _classes(parts, scheduler, conditioning, folder)
    if any(part.class_name == "DiTTransformer2DModel" for part in parts.values()):
        text += _DIT
    return text


def _classes(
    parts: Mapping[str, Converted], scheduler: Mapping[str, Any], conditioning: Mapping[str, Any], folder: str
) -> str:
    kind = "class_embedding" if conditioning.get("class_embedding") else "class_labels"
    null = conditioning["null_class"]
    sentence = _SENTENCES[kind].format(null=null)
    if null is None:
        sentence = sentence.split(" Row ")[0].split(" Label ")[0] + _NO_NULL
    name, network = next((name, part) for name, part in parts.items() if name in ("unet", "transformer"))
    learned = network.config["out_channels"] == 2 * network.config["in_channels"]
    split = f"[:, :{network.config['in_channels']}]" if learned and scheduler["_class_name"] != "DDPMScheduler" else ""
    return _CLASSES.format(
        sentence=sentence,
        scheduler=scheduler["_class_name"],
        network=network.class_name,
        folder=folder,
        load="from safetensors.torch import load_file\n" if kind == "class_embedding" else "",
        name=name,
        fix=_SHIFT if network.class_name == "DiTTransformer2DModel" else "",
        function=_TABLE if kind == "class_embedding" else _LABELS.format(split=split),
    )
