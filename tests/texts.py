"""A tiny text-conditional model, its words, and a batch of captions."""

from __future__ import annotations

import torch

from tests.conftest import tiny_config, tiny_model

WORDS = ("a", "bold", "faint", "three", "seven", "sevens", "two", "small")
LENGTH = 5
CAPTIONS = ["a bold three", "two small sevens", "a faint seven", "a three"]


def text_params(**embedder) -> dict:
    """The parameters in which the tiny text model differs from the tiny class model."""
    tokenizer = {
        "target": "ldm.modules.encoders.modules.WordTokenizer",
        "params": {"words": list(WORDS), "max_length": LENGTH},
    }
    params = {"n_embed": 8, "n_layer": 1, "vocab_size": 2 + len(WORDS), "max_seq_len": LENGTH, "tokenizer": tokenizer}
    return {
        "cond_stage_key": "caption",
        "cond_stage_config": {
            "target": "ldm.modules.encoders.modules.BERTEmbedder",
            "params": {**params, **embedder},
        },
    }


def text_model(seed: int = 0, **params):
    """The tiny text model, every parameter drawn anew."""
    return tiny_model(seed, **{**text_params(ucg_rate=0.3), **params})


def text_config(**params) -> dict:
    """Its config."""
    return tiny_config(**{**text_params(ucg_rate=0.3), **params})


def captioned_batch() -> dict:
    """Four pictures [4, 8, 8, 1] with their captions."""
    images = torch.randn(len(CAPTIONS), 8, 8, 1, generator=torch.Generator().manual_seed(7))
    return {"image": images, "caption": list(CAPTIONS)}
