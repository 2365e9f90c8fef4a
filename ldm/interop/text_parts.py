"""Text encoders of ours in transformers' words and back, with the tokenizer's files and the pipeline that reads them.

| here | there | pipeline |
| --- | --- | --- |
| `FrozenCLIPEmbedder` | `CLIPTextModel`, `CLIPTokenizer` | `StableDiffusionPipeline` |
| `BERTEmbedder` of 77 ids | `LDMBertModel`, `BertTokenizer` | `LDMTextToImagePipeline` |
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ldm.checkpoint import load_into, load_state_dict
from ldm.files import read_mapping
from ldm.interop.converted import Converted, tensors_below
from ldm.models.diffusion.ddpm import LatentDiffusion
from ldm.modules.encoders.modules import BERTEmbedder, FrozenCLIPEmbedder
from ldm.modules.encoders.text import TextEmbedder

# Files of a tokenizer's folder that are taken along; its tokenizer_config.json is written anew.
TOKENIZER_PARTS = ("tokenizer.json", "vocab.txt", "vocab.json", "merges.txt", "special_tokens_map.json")
# Sizes of latent-diffusion's text encoder that its constructor does not name, and the files of its weights.
BERT_SIZES = {"encoder_attention_heads": 8, "head_dim": 64, "activation_function": "gelu"}
BERT_FILES = ("model.safetensors", "pytorch_model.bin")
LDM_LENGTH, LDM_FACTOR = 77, 8  # ids of a text, and pixels of a latent one, in `LDMTextToImagePipeline`


@dataclass(frozen=True)
class TextParts:
    """A text encoder and its tokenizer as a pipeline of diffusers takes them.

    Args:
        pipeline: class name of the pipeline.
        encoder: config and weights of the encoder; folder: its name in the pipeline; library: where its class is.
        stage: name of the first stage in the pipeline.
        tokenizer: folder of the tokenizer's files.
        tokenizer_config: what its tokenizer_config.json says.
        further: entries of model_index.json besides.
    """

    pipeline: str
    encoder: Converted
    folder: str
    library: str
    stage: str
    tokenizer: Path
    tokenizer_config: Mapping[str, Any]
    further: Mapping[str, Any]

    @property
    def index(self) -> dict[str, Any]:
        """Entries of model_index.json for the encoder and the tokenizer."""
        tokenizer = ["transformers", self.tokenizer_config["tokenizer_class"]]
        encoder = [self.library, self.encoder.class_name]
        return {self.folder: encoder, "tokenizer": tokenizer, **self.further}

    @property
    def tokenizer_files(self) -> list[Path]:
        """The files that go along as they are."""
        return [self.tokenizer / name for name in TOKENIZER_PARTS if (self.tokenizer / name).is_file()]


def convert_text(model: LatentDiffusion, stage: Converted | None) -> TextParts | None:
    """Return the text encoder of a model in another library's words; None where it has none of ours.

    Args:
        stage: its first stage, converted.

    Raises:
        ValueError: for an encoder, a tokenizer or a first stage that no pipeline of diffusers takes, saying which.
    """
    embedder = model.cond_stage_model
    if not isinstance(embedder, TextEmbedder):
        return None
    kind = None if stage is None else stage.class_name
    if isinstance(embedder, FrozenCLIPEmbedder):
        if kind != "AutoencoderKL":
            raise ValueError(
                f"StableDiffusionPipeline decodes by AutoencoderKL; the first stage here is {kind or 'none'}"
            )
        further: dict[str, Any] = {"requires_safety_checker": False}
        for name in ("safety_checker", "feature_extractor", "image_encoder"):
            further[name] = [None, None]
        return TextParts(
            "StableDiffusionPipeline",
            _convert_clip(embedder),
            "text_encoder",
            "transformers",
            "vae",
            *_find_tokenizer(embedder, "CLIPTokenizer"),
            further,
        )
    if not isinstance(embedder, BERTEmbedder):
        raise ValueError(f"diffusers has no class for the text encoder {type(embedder).__name__}")
    found = _find_tokenizer(embedder, "BertTokenizer")
    factor = None if kind is None else model.first_stage_model.encoder.factor
    if embedder.max_length != LDM_LENGTH or factor != LDM_FACTOR:
        raise ValueError(
            f"LDMTextToImagePipeline takes {LDM_LENGTH} ids a text and latents of {LDM_FACTOR} x {LDM_FACTOR} pixels; "
            f"this model has {embedder.max_length} ids and {factor or 'no first stage'}"
        )
    bert = _convert_bert(embedder)
    return TextParts("LDMTextToImagePipeline", bert, "bert", "latent_diffusion", "vqvae", *found, {})


def _find_tokenizer(embedder: TextEmbedder, name: str) -> tuple[Path, dict[str, Any]]:
    """Return the folder of an embedder's tokenizer and its config.

    Raises:
        ValueError: if the tokenizer is none of transformers', or does not lie in a folder.
    """
    source = embedder.tokenizer_source
    if source is None:
        raise ValueError(f"transformers has no class for this model's tokenizer: {name} was expected")
    folder = Path(source)
    if not any((folder / part).is_file() for part in TOKENIZER_PARTS):
        raise ValueError(
            f"the tokenizer {source} is no folder with its files, which the export takes along: name one, "
            "model.params.cond_stage_config.params.tokenizer=FOLDER"
        )
    config = folder / "tokenizer_config.json"
    known = read_mapping(config, "a tokenizer's config", "fetch its folder again") if config.is_file() else {}
    return folder, {**known, "tokenizer_class": name, "model_max_length": embedder.max_length}


def _convert_clip(embedder: FrozenCLIPEmbedder) -> Converted:
    text = embedder.transformer.text_model
    layer = text.encoder.layers[0]
    config = {
        "model_type": "clip_text_model",
        "vocab_size": text.embeddings.token_embedding.num_embeddings,
        "hidden_size": text.embeddings.token_embedding.embedding_dim,
        "intermediate_size": layer.mlp.fc1.out_features,
        "num_hidden_layers": len(text.encoder.layers),
        "num_attention_heads": layer.self_attn.heads,
        "max_position_embeddings": text.embeddings.position_embedding.num_embeddings,
        "hidden_act": "quick_gelu" if layer.mlp.quick else "gelu",
        "layer_norm_eps": text.final_layer_norm.eps,
    }
    return Converted("CLIPTextModel", config, tensors_below(text, "text_model"))


def _convert_bert(embedder: BERTEmbedder) -> Converted:
    text = embedder.transformer
    layers = list(text.attn_layers.layers)
    attention = layers[0][1]
    config = {
        "model_type": "ldmbert",
        "vocab_size": text.token_emb.num_embeddings,
        "max_position_embeddings": embedder.max_length,
        "encoder_layers": len(layers) // 2,
        "encoder_ffn_dim": layers[1][1].net[0][0].out_features,
        "encoder_attention_heads": attention.heads,
        "head_dim": attention.to_q.out_features // attention.heads,
        "d_model": text.token_emb.embedding_dim,
        "activation_function": "gelu",
        "dropout": 0.0,
        "pad_token_id": 0,
    }
    state = {
        **tensors_below(text.token_emb, "model.embed_tokens"),
        **tensors_below(text.pos_emb.emb, "model.embed_positions"),
        **tensors_below(text.norm, "model.layer_norm"),
        **tensors_below(text.to_logits, "to_logits"),
    }
    for place, (attend, forward) in enumerate(zip(layers[::2], layers[1::2], strict=True)):
        state |= _convert_pair(attend, forward, f"model.layers.{place}")
    return Converted("LDMBertModel", config, state)


def read_bert_config(root: Path) -> dict[str, Any] | None:
    """Return the config of the `BERTEmbedder` that is a folder's `bert/`, None where there is none.

    Raises:
        ValueError: for one that ours cannot compute, naming the argument.
    """
    file = root / "bert" / "config.json"
    if not file.is_file() or not (root / "tokenizer").is_dir():
        return None
    found = read_mapping(file, "the config of a text encoder", "fetch the folder again")
    width = int(found["d_model"])
    for name, taken in {**BERT_SIZES, "encoder_ffn_dim": 4 * width}.items():
        if found.get(name, taken) != taken:
            raise ValueError(f"{file}: {name} must be {taken} here, got {found[name]!r}")
    params = {
        "n_embed": width,
        "n_layer": int(found["encoder_layers"]),
        "vocab_size": int(found["vocab_size"]),
        "max_seq_len": int(found["max_position_embeddings"]),
        "tokenizer": str(root / "tokenizer"),
    }
    return {"target": "ldm.modules.encoders.modules.BERTEmbedder", "params": params}


def load_bert(embedder: BERTEmbedder, folder: Path) -> None:
    """Copy the weights of diffusers' `LDMBertModel` into ours, strictly.

    Args:
        folder: `bert/` of a pipeline's folder.
    """
    file = next((folder / name for name in BERT_FILES if (folder / name).is_file()), folder / BERT_FILES[0])
    places = {value.data_ptr(): name for name, value in embedder.state_dict().items()}
    names = {theirs: places[value.data_ptr()] for theirs, value in _convert_bert(embedder).state.items()}
    state = {names.get(name, name): value.float() for name, value in load_state_dict(file).items()}
    load_into(embedder, state, (), folder)


def _convert_pair(attend: nn.Module, forward: nn.Module, name: str) -> dict[str, Tensor]:
    """Attention and feed-forward of a layer, each with its norm, below a name."""
    (first, attention), (second, linear) = attend, forward
    names = {"to_q": "q_proj", "to_k": "k_proj", "to_v": "v_proj", "to_out": "out_proj"}
    state = {
        **tensors_below(first, f"{name}.self_attn_layer_norm"),
        **tensors_below(second, f"{name}.final_layer_norm"),
    }
    for ours, theirs in names.items():
        state |= tensors_below(getattr(attention, ours), f"{name}.self_attn.{theirs}")
    return {**state, **tensors_below(linear.net[0][0], f"{name}.fc1"), **tensors_below(linear.net[2], f"{name}.fc2")}
