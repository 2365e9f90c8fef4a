"""Texts to token ids: a list of words, or a tokenizer of transformers (extra `text`) from a folder or the hub."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

# One of these is in a folder of a tokenizer.
TOKENIZER_FILES = ("tokenizer.json", "vocab.txt", "vocab.json")
WORD = re.compile(r"[^\W_]+")


class WordTokenizer:
    """One id a word: 0 is padding, 1 a word that is not known, 2 .. the words of a list in their order.

    Args:
        words: the vocabulary, in small letters.
        max_length: ids of a text; shorter texts are padded, longer ones cut.
    """

    def __init__(self, words: Sequence[str], max_length: int = 8):
        if len(set(words)) != len(words) or not words:
            raise ValueError(f"words must be a list of different words, got {list(words)}")
        self.max_length = max_length
        self.ids = {word: 2 + place for place, word in enumerate(words)}

    def __len__(self) -> int:
        return 2 + len(self.ids)

    def __call__(self, texts: Sequence[str]) -> Tensor:
        """Return the ids [B, max_length] of B texts."""
        found = torch.zeros(len(texts), self.max_length, dtype=torch.long)
        for row, text in enumerate(texts):
            ids = [self.ids.get(word, 1) for word in WORD.findall(text.lower())]
            found[row, : len(ids)] = torch.tensor(ids[: self.max_length])
        return found


class BERTTokenizer:
    """BERT's tokenizer as latent-diffusion calls it: ids padded or cut to `max_length`, lower case.

    Args:
        device: of the ids; None: the CPU. The embedder moves them to its own.
        vq_interface: latent-diffusion's argument, which changes nothing here.
        max_length: ids of a text.
        version: a folder that holds the tokenizer's files, or its name on the hub.

    Raises:
        ValueError: if the tokenizer cannot be read.
    """

    def __init__(
        self,
        device: str | None = None,
        vq_interface: bool = True,
        max_length: int = 77,
        version: str = "bert-base-uncased",
    ):
        self.tokenizer = load_tokenizer("BertTokenizerFast", version)
        self.device = device
        self.max_length = max_length

    def __call__(self, texts: Sequence[str] | str) -> Tensor:
        """Return the ids [B, max_length] of B texts."""
        return pad_ids(self.tokenizer, texts, self.max_length).to(self.device or "cpu")

    def encode(self, texts: Sequence[str] | str) -> Tensor:
        """Return the ids [B, max_length]."""
        return self(texts)

    def decode(self, tokens: Tensor) -> list[str]:
        """Return the texts of ids [B, L]."""
        return self.tokenizer.batch_decode(tokens.tolist(), skip_special_tokens=True)


class CLIPTextTokenizer:
    """CLIP's tokenizer: ids padded or cut to `max_length`; arguments as `BERTTokenizer`'s."""

    def __init__(self, version: str, max_length: int = 77):
        self.tokenizer = load_tokenizer("CLIPTokenizer", version)
        self.max_length = max_length

    def __call__(self, texts: Sequence[str] | str) -> Tensor:
        """Return the ids [B, max_length] of B texts."""
        return pad_ids(self.tokenizer, texts, self.max_length)


def pad_ids(tokenizer: Any, texts: Sequence[str] | str, length: int) -> Tensor:
    """Return the ids [B, length] of B texts by a tokenizer of transformers."""
    texts = [texts] if isinstance(texts, str) else list(texts)
    return tokenizer(texts, truncation=True, max_length=length, padding="max_length", return_tensors="pt")["input_ids"]


def load_tokenizer(name: str, version: str) -> Any:
    """Load a tokenizer of transformers by the name of its class.

    Raises:
        ValueError: if transformers is not installed, or there are no files of this version.
    """
    try:
        import transformers
    except ImportError:
        raise ValueError("texts need a tokenizer of transformers: pip install 'decu-uncertainty[text]'") from None
    folder = Path(version)
    try:
        if folder.is_dir() and not any((folder / file).exists() for file in TOKENIZER_FILES):
            raise OSError(f"the folder holds none of {', '.join(TOKENIZER_FILES)}")
        return getattr(transformers, name).from_pretrained(version)
    except (OSError, TypeError, ValueError) as error:
        reason = str(error).split("\n")[0][:200]
        raise ValueError(
            f"no tokenizer at {version} ({reason}): name a folder that holds its files, "
            "model.params.cond_stage_config.params.tokenizer=FOLDER, or give token ids"
        ) from None
