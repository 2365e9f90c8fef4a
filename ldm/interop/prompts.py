"""Prompts of a text-to-image folder as conditions by number: embedded by the folder's own text encoders.

| network | context of a prompt |
| --- | --- |
| UNet2DConditionModel (Stable Diffusion 1, 2) | CLIP's last hidden states [L, D] |
| SD3Transformer2DModel | two CLIPs' last but one states side by side, then T5's; both pooled vectors |
| FluxTransformer2DModel | T5's last hidden states; CLIP's pooled vector |
| PixArtTransformer2DModel | T5's last hidden states, with their mask |

A negative prompt, empty by default, is the null condition of guidance. Where a folder has no encoders, the caller
makes the same tensors: `Choices(names, context=pack_pooled(tokens, pooled), null=True)`.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ldm.files import read_mapping
from ldm.interop.folder import read_folder
from ldm.interop.library import require_diffusers
from ldm.interop.loading import PIXART_LENGTH
from ldm.interop.pooled import pack_masked, pack_pooled
from ldm.modules.choices import Choices

# Classes of transformers that a folder may name. Nothing else of it is imported, and no code of it is run.
ENCODERS = ("CLIPTextModel", "CLIPTextModelWithProjection", "T5EncoderModel")
TOKENIZERS = ("CLIPTokenizer", "CLIPTokenizerFast", "T5Tokenizer", "T5TokenizerFast")


@torch.no_grad()
def encode_prompts(
    path: str | Path, prompts: Sequence[str], negative: str = "", *, t5_length: int | None = None
) -> Choices:
    """Embed prompts by the text encoders of a folder, for `pipeline.with_choices`.

    Args:
        path: the folder, or a name on the hub.
        prompts: texts; label k of the model then stands for the k-th.
        negative: the null condition of guidance.
        t5_length: tokens of T5, 256 for SD3, 512 for Flux and 120 for PixArt (300 of Sigma) where None.

    Raises:
        ValueError: if there are no prompts, or the folder has no text encoder.
    """
    if not prompts:
        raise ValueError("expected at least one prompt, got none")
    folder = read_folder(path)
    texts = [*prompts, negative]
    kind = folder.network.class_name
    if kind == "SD3Transformer2DModel":
        context = _encode_sd3(folder.root, texts, int(folder.network.config["joint_attention_dim"]), t5_length or 256)
    elif kind == "FluxTransformer2DModel":
        tokens = _states(folder.root, "2", texts, t5_length or 512).last_hidden_state
        context = pack_pooled(tokens, _states(folder.root, "", texts).pooler_output)
    elif kind == "PixArtTransformer2DModel":
        length = t5_length or PIXART_LENGTH
        tokens = _states(folder.root, "", texts, length, masked=True).last_hidden_state
        context = pack_masked(tokens, _read_tokens(folder.root, "", texts, length).attention_mask)
    else:
        context = _states(folder.root, "", texts).last_hidden_state
    return Choices(tuple(prompts), context=context.float(), null=True)


def _encode_sd3(root: Path, texts: Sequence[str], width: int, t5_length: int) -> Tensor:
    """Tokens of two CLIPs beside each other and of T5 after them, and both pooled vectors; zeros for a missing T5."""
    clips = [_states(root, suffix, texts, states=True) for suffix in ("", "2")]
    beside = torch.cat([clip.hidden_states[-2] for clip in clips], dim=-1)  # [P, L, D1 + D2]
    tokens = F.pad(beside, (0, width - beside.shape[2]))
    if (root / "text_encoder_3").is_dir():
        after = _states(root, "3", texts, t5_length).last_hidden_state
    else:
        after = tokens.new_zeros(len(tokens), t5_length, width)
    pooled = torch.cat([clip.text_embeds for clip in clips], dim=-1)
    return pack_pooled(torch.cat([tokens, after.to(tokens)], dim=1), pooled)


def _states(
    root: Path,
    suffix: str,
    texts: Sequence[str],
    length: int | None = None,
    states: bool = False,
    masked: bool = False,
) -> Any:
    """What a text encoder of the folder gives for texts; `suffix` is that of its name, "", "2" or "3".

    Args:
        length: ids of a text; as many as the tokenizer gives where None.
        states: give those of every layer.
        masked: attend to no filling ids.
    """
    encoder, tokenizer = _find_folders(root, suffix)
    if not (encoder.is_dir() and tokenizer.is_dir()):
        raise ValueError(
            f"{root} has no {encoder.name} with {tokenizer.name}: embed the prompts yourself, "
            "pipeline.with_choices(Choices(prompts, context=..., null=True))"
        )
    model = _find(_named(encoder / "config.json", "architectures"), ENCODERS)
    read = _read_tokens(root, suffix, texts, length)
    network = model.from_pretrained(encoder, use_safetensors=True).float().eval()
    mask = {"attention_mask": read.attention_mask} if masked else {}
    return network(read.input_ids, output_hidden_states=states, **mask)


def _find_folders(root: Path, suffix: str) -> tuple[Path, Path]:
    """The folders of a text encoder and of its tokenizer."""
    end = f"_{suffix}" if suffix else ""
    return root / f"text_encoder{end}", root / f"tokenizer{end}"


def _read_tokens(root: Path, suffix: str, texts: Sequence[str], length: int | None) -> Any:
    """Ids [P, L] of texts and their mask, 0 where an id only fills, by a tokenizer of the folder."""
    _, tokenizer = _find_folders(root, suffix)
    reader = _find(_named(tokenizer / "tokenizer_config.json", "tokenizer_class"), TOKENIZERS)
    tokens = reader.from_pretrained(tokenizer)
    length = length or tokens.model_max_length
    return tokens(list(texts), padding="max_length", max_length=length, truncation=True, return_tensors="pt")


def _named(config: Path, key: str) -> str:
    found = read_mapping(config, "a config of transformers", "fetch the folder again").get(key)
    return str(found[0] if isinstance(found, list) else found)


def _find(name: str, allowed: Sequence[str]) -> Any:
    """Return a class of transformers.

    Raises:
        ValueError: for one that is not taken, or if transformers is not installed.
    """
    require_diffusers()
    if name not in allowed:
        raise ValueError(f"expected one of transformers' classes {', '.join(allowed)}; got '{name}'")
    try:
        return getattr(importlib.import_module("transformers"), name)
    except ModuleNotFoundError:
        raise ValueError("text encoders need transformers: pip install 'decu-uncertainty[diffusers]'") from None
