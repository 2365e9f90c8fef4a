"""Prompts as the classes of a pipeline."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from ldm.ensembles.classes import SHOW_ALL, Classes
from ldm.ensembles.storage import read_ensemble
from ldm.files import reading
from ldm.interop.loading import EmbeddedContext
from ldm.interop.prompts import encode_prompts
from ldm.models.diffusion.ddpm import LatentDiffusion
from ldm.modules.choices import Choices
from ldm.modules.encoders.text import TextEmbedder
from ldm.util import atomic_write


@torch.no_grad()
def make_text_choices(model: LatentDiffusion, prompts: Sequence[str], embedded: bool) -> Choices:
    """Return prompts, and the empty text as their null condition, as choices of a model.

    Args:
        embedded: hold their contexts, for a text encoder that is the same for all; else their token ids.

    Raises:
        ValueError: if the model takes no texts, there are no prompts, a prompt comes twice, or there is no tokenizer.
    """
    embedder = model.cond_stage_model
    if isinstance(embedder, EmbeddedContext) and embedder.folder is None:
        raise ValueError(
            "this model reads embedded prompts, and its folder has no text encoder: embed them yourself, in Python "
            "pipeline.with_choices(Choices(prompts, context=..., null=True))"
        )
    if not isinstance(embedder, TextEmbedder | EmbeddedContext):
        raise ValueError("this model takes no texts: leave out --prompt and --prompts")
    if not prompts or len(set(prompts)) != len(prompts):
        raise ValueError(f"prompts must be different texts, at least one; got {list(prompts)}")
    if isinstance(embedder, EmbeddedContext):
        return encode_prompts(str(embedder.folder), prompts)
    tokens = embedder.read(list(prompts))
    null = embedder.has_null
    if null:
        tokens = torch.cat([tokens, embedder.null_tokens[None].to(tokens)])
    rows = {"context": embedder.embed(tokens)} if embedded else {"tokens": tokens}
    return Choices(tuple(prompts), null=null, **rows)


def write_class_prompts(folder: str | Path, path: str | Path) -> None:
    """Write the captions that an ensemble was trained on as prompts: all of up to 20, else 20 spread over them.

    Args:
        folder: the ensemble, whose classes are captions.
        path: the text file.
    """
    spec = read_ensemble(folder).spec
    captions = Classes.from_record(spec, len(spec["class_names"]), len(spec["members"]))
    with atomic_write(path) as partial:
        partial.write_text("".join(f"{captions.name(one)}\n" for one in captions.choose(None, SHOW_ALL)))


def read_prompts(path: str | Path) -> list[str]:
    """Return the prompts of a text file, one a line; empty lines are left out.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it holds none.
    """
    with reading(path, "a text of prompts in UTF-8", "write it again"):
        prompts = [line.strip() for line in Path(path).read_text(encoding="utf-8-sig").splitlines() if line.strip()]
    if not prompts:
        raise ValueError(f"{path} holds no prompts: expected one a line")
    return prompts
