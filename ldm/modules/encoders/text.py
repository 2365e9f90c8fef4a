"""Embedders of texts under their published constructors: latent-diffusion's transformers, and Stable Diffusion's CLIP.

Each takes strings or token ids: with ids no tokenizer is asked for. The null condition of guidance is the empty text.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ldm.checkpoint import load_state_dict
from ldm.modules.encoders.tokenizers import BERTTokenizer, CLIPTextTokenizer
from ldm.modules.encoders.transformer import START, ClipTextModel, TokenTransformer
from ldm.modules.parts import Parts
from ldm.util import instantiate_from_config, read_mapping

Texts = str | Sequence[str] | Tensor
# Rows of BERT's table, and the ids of its empty text: [CLS] [SEP], then padding with 0.
BERT_VOCABULARY = 30522
BERT_EMPTY = (101, 102)
# Ids of the first and the last token of a text of CLIP, which is padded with the last.
CLIP_EMPTY = (49406, 49407)
# CLIP ViT-L/14 on the hub.
CLIP_LARGE = "openai/clip-vit-large-patch14"


class TextEmbedder(nn.Module):
    """What embedders of texts share; a subclass gives `embed`, and says where its token rows are.

    Args:
        key: entry of a batch that holds the texts, or their ids [B, L].
        max_length: ids of a text.
        ucg_rate: share of the texts in training that become the empty one (Ho & Salimans 2022, arXiv 2207.12598).
        tokenizer: `tokenizer(texts) -> ids [B, max_length]`, its config, or what `_load_tokenizer` makes one of.
    """

    # Name of the table that has a row a token.
    token_table: str

    def __init__(self, key: str, max_length: int, ucg_rate: float, tokenizer: Any):
        super().__init__()
        if not 0 <= ucg_rate <= 1:
            raise ValueError(f"ucg_rate must be a probability in [0, 1], got {ucg_rate}")
        self.key = key
        self.max_length = max_length
        self.ucg_rate = ucg_rate
        self._tokenizer = instantiate_from_config(tokenizer) if isinstance(tokenizer, Mapping) else tokenizer
        self._null: Tensor | None = None

    def _load_tokenizer(self, version: Any) -> Any:
        """Return the tokenizer that `version` names."""
        raise ValueError("this embedder was built without a tokenizer: give token ids, or params.tokenizer")

    def _make_null(self) -> Tensor:
        """Return the ids [L] of the empty text."""
        return self.tokenize([""])[0]

    @property
    def parts(self) -> Parts:
        """The table of token rows."""
        return Parts(token_tables=(self.token_table,))

    @property
    def tokenizer_source(self) -> str | None:
        """Folder or hub's name of a tokenizer of transformers; None of any other tokenizer, or of none."""
        if isinstance(self._tokenizer, BERTTokenizer | CLIPTextTokenizer):
            return str(self._tokenizer.tokenizer.name_or_path)
        return self._tokenizer if isinstance(self._tokenizer, str) else None

    @property
    def has_null(self) -> bool:
        """Whether there is an empty text: there is none of token ids that are no texts."""
        return self._null is not None or self._tokenizer is not None

    @property
    def null_tokens(self) -> Tensor:
        """Ids [L] of the empty text, which is the null condition."""
        if self._null is None:
            self._null = self._make_null()
        return self._null

    def tokenize(self, texts: Sequence[str]) -> Tensor:
        """Return the ids [B, L] of B texts.

        Raises:
            ValueError: if there is no tokenizer.
        """
        if not callable(self._tokenizer):
            self._tokenizer = self._load_tokenizer(self._tokenizer)
        return self._tokenizer(list(texts))

    def read(self, given: Texts) -> Tensor:
        """Return the ids [B, L] of texts, or of ids, on the device of this embedder."""
        if isinstance(given, str):
            given = [given]
        tokens = given if isinstance(given, Tensor) else self.tokenize(given)
        return tokens.to(next(self.parameters()).device)

    def embed(self, tokens: Tensor) -> Tensor:
        """Return the context [B, L, D] of ids [B, L]."""
        raise NotImplementedError(f"{type(self).__name__} must define embed(tokens)")

    def encode(self, text: Texts) -> Tensor:
        """Return the context [B, L, D] of texts, or of their ids [B, L]."""
        return self.embed(self.read(text))

    def forward(self, text: Texts | Mapping[str, Any], key: str | None = None) -> Tensor:
        """Return the context [B, L, D] of texts or ids, or of a batch that holds them under `key`."""
        return self.encode(text[self.key if key is None else key] if isinstance(text, Mapping) else text)

    def drop_labels(self, labels: Tensor, uniform: Tensor) -> Tensor:
        """Replace texts [B, L] by the empty one where their draws [B], in [0, 1), are below `ucg_rate`.

        The caller says whether it trains: a frozen encoder is in evaluation mode, and its texts are dropped as well.
        """
        return self.nullified(labels, uniform.to(labels.device) < self.ucg_rate)

    def nullified(self, labels: Tensor, drop: Tensor) -> Tensor:
        """Replace texts [B, L] by the empty one where `drop` [B] says so."""
        return torch.where(drop[:, None], self.null_tokens[: labels.shape[1]].to(labels), labels)


class TransformerEmbedder(TextEmbedder):
    """latent-diffusion's transformer over token ids [B, L]: context [B, L, n_embed].

    Args:
        n_embed: width of the context.
        n_layer: pairs of attention and feed-forward.
        vocab_size: rows of the table of tokens.
        max_seq_len: ids of a text at most.
        device: latent-diffusion's argument; the module is where it is put.
        key, ucg_rate, tokenizer: see `TextEmbedder`.
        init_std: standard deviation of the token rows at the start, 0.02 as published; a small encoder that is trained
            from nothing learns its words sooner from 1.
    """

    token_table = "transformer.token_emb.weight"

    def __init__(
        self,
        n_embed: int,
        n_layer: int,
        vocab_size: int,
        max_seq_len: int = 77,
        device: str | None = None,
        key: str = "caption",
        ucg_rate: float = 0.0,
        tokenizer: Any = None,
        init_std: float = START,
    ):
        super().__init__(key, max_seq_len, ucg_rate, tokenizer)
        self.transformer = TokenTransformer(vocab_size, max_seq_len, n_embed, n_layer)
        nn.init.normal_(self.transformer.token_emb.weight, std=init_std)

    def embed(self, tokens: Tensor) -> Tensor:
        if tokens.is_floating_point() or tokens.ndim != 2 or tokens.shape[1] > self.max_length:
            raise ValueError(
                f"expected token ids [B, L] with L up to {self.max_length}, got {tokens.dtype} {list(tokens.shape)}"
            )
        return self.transformer(tokens)


class BERTEmbedder(TransformerEmbedder):
    """latent-diffusion's transformer over BERT's token ids, 77 a text.

    Args:
        use_tokenizer: whether conditions are texts; else they are ids, of coordinates for example, without a null.
        embedding_dropout: on the sums of token and position in training.
        tokenizer: a folder that holds BERT's tokenizer, its name on the hub, or a config of another tokenizer.
        others: see `TransformerEmbedder`.
    """

    def __init__(
        self,
        n_embed: int,
        n_layer: int,
        vocab_size: int = BERT_VOCABULARY,
        max_seq_len: int = 77,
        device: str | None = None,
        use_tokenizer: bool = True,
        embedding_dropout: float = 0.0,
        key: str = "caption",
        ucg_rate: float = 0.0,
        tokenizer: Any = "bert-base-uncased",
        init_std: float = START,
    ):
        given = tokenizer if use_tokenizer else None
        super().__init__(n_embed, n_layer, vocab_size, max_seq_len, device, key, ucg_rate, given, init_std)
        if use_tokenizer and vocab_size == BERT_VOCABULARY:
            self._null = torch.tensor([*BERT_EMPTY, *[0] * (max_seq_len - len(BERT_EMPTY))], device="cpu")
        self.transformer.emb_dropout.p = embedding_dropout

    def _load_tokenizer(self, version: Any) -> Any:
        if version is None:
            return super()._load_tokenizer(version)
        return BERTTokenizer(max_length=self.max_length, version=str(version))


class FrozenCLIPEmbedder(TextEmbedder):
    """CLIP's text transformer as Stable Diffusion v1 reads it: the last hidden state [B, L, D], frozen.

    Its weights come with a checkpoint of the whole model, or from the folder `version`, as transformers saves one.

    Args:
        version: a folder with config.json (and weights, and the tokenizer's files), or the name of ViT-L/14 on the hub,
            from where the tokenizer is read alone.
        device: the published argument; the module is where it is put.
        max_length: ids of a text.
        params: keywords of `ClipTextModel` in place of config.json's.
        key, ucg_rate, tokenizer: see `TextEmbedder`; the tokenizer is that of `version` where None.

    Raises:
        ValueError: for another name than ViT-L/14's that is no folder.
    """

    token_table = "transformer.text_model.embeddings.token_embedding.weight"

    def __init__(
        self,
        version: str | None = CLIP_LARGE,
        device: str | None = None,
        max_length: int = 77,
        params: Mapping[str, Any] | None = None,
        key: str = "txt",
        ucg_rate: float = 0.0,
        tokenizer: Any = None,
    ):
        super().__init__(key, max_length, ucg_rate, version if tokenizer is None else tokenizer)
        version = version or CLIP_LARGE
        folder = Path(version) if Path(version).is_dir() else None
        if folder is None and params is None and version != CLIP_LARGE:
            raise ValueError(f"version {version} is no folder: save the text model there, or give params")
        self.transformer = nn.Module()
        self.transformer.text_model = ClipTextModel(**read_clip_config(folder, params or {}))
        self.has_weights = False
        if folder is not None:
            self._load_folder(folder)
        self.freeze()

    def freeze(self) -> None:
        """Let no parameter train."""
        self.eval().requires_grad_(False)

    def _load_folder(self, folder: Path) -> None:
        """Read the weights of a folder, where it holds any."""
        names = ("model.safetensors", "model.fp16.safetensors", "pytorch_model.bin")
        files = [folder / name for name in names if (folder / name).exists()]
        if files:
            state = self.released_names(load_state_dict(files[0]))
            own = self.state_dict()
            self.load_state_dict({name: value for name, value in state.items() if name in own})

    @staticmethod
    def released_names(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return a state dict under Stable Diffusion's names, with or without a part of these in it.

        transformers from 5 on leaves out `text_model.`; a text model alone has no `transformer.`; old files hold the
        numbers of the positions.
        """
        found = {}
        for name, value in state.items():
            name = name.removeprefix("transformer.").removeprefix("text_model.")
            if not name.endswith("embeddings.position_ids"):
                found[f"transformer.text_model.{name}"] = value
        return found

    def _load_from_state_dict(self, *args: Any, **keywords: Any) -> None:
        super()._load_from_state_dict(*args, **keywords)
        self.has_weights = True

    def embed(self, tokens: Tensor) -> Tensor:
        if not self.has_weights:
            raise ValueError("CLIP's text model has no weights: load a checkpoint that holds it, or name their folder")
        return self.transformer.text_model(tokens)

    def _load_tokenizer(self, version: Any) -> Any:
        return CLIPTextTokenizer(str(version), self.max_length)

    def _make_null(self) -> Tensor:
        if isinstance(self._tokenizer, str) and not Path(self._tokenizer).is_dir():
            first, last = CLIP_EMPTY
            return torch.tensor([first, *[last] * (self.max_length - 1)])
        return super()._make_null()


def read_clip_config(folder: Path | None, params: Mapping[str, Any]) -> dict[str, Any]:
    """Return the keywords of `ClipTextModel` that a folder's config.json and `params` name."""
    names = ClipTextModel.__init__.__code__.co_varnames[1 : ClipTextModel.__init__.__code__.co_argcount]
    content: dict[str, Any] = {}
    if folder is not None and (folder / "config.json").exists():
        content = read_mapping(folder / "config.json", "the config of a text encoder", "fetch its folder again")
        content = content.get("text_config") or content
    return {**{name: content[name] for name in names if name in content}, **params}
