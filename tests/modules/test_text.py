"""Text encoders against outputs and keys of the published implementations, and CLIP's against transformers."""

from __future__ import annotations

import json

import pytest
import torch
from torch.func import functional_call, jvp, vmap

from ldm.checkpoint import save_tensors
from ldm.modules.encoders.modules import BERTEmbedder, FrozenCLIPEmbedder, TransformerEmbedder, WordTokenizer
from tests.comparisons import package
from tests.conftest import assert_near, golden_json, golden_tensors, listed_weights

SPEC = golden_json("text_small")
CLASSES = {"transformer": TransformerEmbedder, "bert": BERTEmbedder}
CLIP = {
    "vocab_size": 60,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 12,
}
WORDS = ["a", "three", "two", "small", "sevens"]


def golden_embedder(variant: str):
    embedder = CLASSES[variant](**SPEC["config"][variant]["params"])
    weights = listed_weights(SPEC["weights"][variant])
    assert list(weights) == [name for name, _ in embedder.named_parameters()]
    embedder.load_state_dict(weights)
    return embedder.eval()


def golden_io(variant: str) -> dict[str, torch.Tensor]:
    tensors = golden_tensors("text_small_io")
    return {name.removeprefix(f"{variant}/"): t for name, t in tensors.items() if name.startswith(f"{variant}/")}


def small_clip(**more) -> FrozenCLIPEmbedder:
    embedder = FrozenCLIPEmbedder(params=CLIP, max_length=12, **more)
    source = torch.Generator().manual_seed(3)
    weights = {name: torch.randn(v.shape, generator=source) / 4 for name, v in embedder.state_dict().items()}
    embedder.load_state_dict(weights)
    return embedder


@pytest.mark.parametrize("variant", CLASSES)
def test_contexts_layers_and_gradients_are_the_published_ones(variant):
    embedder, io = golden_embedder(variant), golden_io(variant)
    z = embedder(io["tokens"])
    assert_near(z, io["z"])
    z.square().mean().backward()
    rows = embedder.transformer.token_emb.weight.grad[io["tokens"][0, :3]]
    assert_near(rows, io["grad_token_emb_rows"])
    hidden = []
    for _, block in embedder.transformer.attn_layers.layers:
        block.register_forward_hook(lambda module, inputs, output: hidden.append(output))
    assert_near(embedder.encode(io["tokens_short"]), io["z_short"])
    start = embedder.transformer.token_emb(io["tokens_short"]) + embedder.transformer.pos_emb(io["z_short"].shape[1])
    assert_near(start + torch.stack(hidden).cumsum(0), io["hidden"])


@torch.no_grad()
def test_members_and_tangents_pass_through_it():
    embedder, io = golden_embedder("bert"), golden_io("bert")
    name = embedder.token_table
    rows = embedder.get_parameter(name)
    run = vmap(lambda table: functional_call(embedder, {name: table}, (io["tokens"],)))
    assert_near(run(torch.stack([2 * rows, rows]))[1], io["z"])
    double = embedder.double()
    direction = torch.randn(rows.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    call = lambda table: functional_call(double, {name: table}, (io["tokens"],))  # noqa: E731
    slope = jvp(call, (rows.double(),), (direction,))[1]
    step = 1e-4
    numeric = (call(rows.double() + step * direction) - call(rows.double() - step * direction)) / (2 * step)
    assert_near(slope, numeric, 1e-4)


@torch.no_grad()
def test_dropout_acts_on_sums_of_token_and_position_in_training():
    """With all of them dropped, what is left of a text is nothing: every token comes out alike, and no text matters."""
    embedder = BERTEmbedder(8, 1, 20, 6, use_tokenizer=False, embedding_dropout=1.0)
    assert not any("dropout" in name for name in embedder.state_dict())
    tokens = torch.tensor([[1, 2, 3], [4, 5, 6]])
    assert embedder.eval()(tokens).std(dim=1).min() > 0
    out = embedder.train()(tokens)
    torch.testing.assert_close(out, out[:1, :1].expand_as(out))
    torch.testing.assert_close(out.mean(-1), torch.zeros(2, 3), atol=1e-6, rtol=0)  # the last norm is there


@torch.no_grad()
def test_clip_is_that_of_transformers(tmp_path):
    embedder = small_clip()
    with package("transformers") as transformers:
        _compare_with(transformers, embedder, tmp_path)


def _compare_with(transformers, embedder, tmp_path):
    theirs = transformers.CLIPTextModel(transformers.CLIPTextConfig(**CLIP, eos_token_id=59, bos_token_id=58)).eval()
    prefix = "" if next(iter(theirs.state_dict())).startswith("embeddings") else "text_model."
    state = {name.removeprefix("transformer.text_model."): v for name, v in embedder.state_dict().items()}
    theirs.load_state_dict({f"{prefix}{name}": value for name, value in state.items()})
    tokens = torch.randint(60, (3, 12), generator=torch.Generator().manual_seed(0))
    expected = theirs(tokens).last_hidden_state
    assert_near(embedder.embed(tokens), expected)
    theirs.save_pretrained(tmp_path)
    assert_near(FrozenCLIPEmbedder(str(tmp_path)).embed(tokens), expected)


def test_clip_reads_older_and_newer_names_and_says_that_it_has_no_weights(tmp_path):
    embedder = small_clip()
    state = embedder.state_dict()
    tokens = torch.zeros(1, 12, dtype=torch.long)
    (tmp_path / "config.json").write_text(json.dumps({"text_config": CLIP}))
    for old, new in (("transformer.", ""), ("transformer.text_model.", "")):
        renamed = {name.replace(old, new): value for name, value in state.items()}
        position = {"vision_model.x": torch.zeros(1), f"{old}embeddings.position_ids": torch.arange(12)[None]}
        save_tensors(renamed | position, tmp_path / "model.safetensors", overwrite=True)
        assert torch.equal(FrozenCLIPEmbedder(str(tmp_path)).embed(tokens), embedder.embed(tokens))
    assert not any(parameter.requires_grad for parameter in embedder.parameters())
    with pytest.raises(ValueError, match="has no weights"):
        FrozenCLIPEmbedder(params=CLIP).embed(tokens)
    with pytest.raises(ValueError, match="is no folder"):
        FrozenCLIPEmbedder("openai/another")


def test_texts_become_ids_and_the_empty_text_is_the_null_condition():
    tokenizer = WordTokenizer(WORDS, max_length=6)
    embedder = BERTEmbedder(8, 1, len(tokenizer), 6, tokenizer=tokenizer, ucg_rate=0.5)
    tokens = embedder.tokenize(["Two small sevens!", "a nine"])
    assert tokens.tolist() == [[4, 5, 6, 0, 0, 0], [2, 1, 0, 0, 0, 0]]
    assert torch.equal(embedder(["a nine"]), embedder.embed(tokens[1:]))
    assert torch.equal(embedder({"caption": ["a nine"]}), embedder({"caption": tokens[1:]}))
    assert embedder.null_tokens.tolist() == [0] * 6
    dropped = embedder.drop_labels(tokens, torch.tensor([0.4, 0.6]))
    assert dropped.tolist() == [[0] * 6, tokens[1].tolist()]


def test_without_a_tokenizer_ids_are_taken_and_texts_are_refused(tmp_path):
    bert = BERTEmbedder(8, 1, tokenizer=str(tmp_path))
    assert bert.null_tokens.tolist() == [101, 102, *[0] * 75]
    assert bert(torch.zeros(2, 5, dtype=torch.long)).shape == (2, 5, 8)
    with package("transformers"), pytest.raises(ValueError, match="no tokenizer at"):
        bert(["a three"])
    coordinates = BERTEmbedder(8, 1, 50, 9, use_tokenizer=False)
    with pytest.raises(ValueError, match="built without a tokenizer"):
        coordinates(["a three"])
    with pytest.raises(ValueError, match="with L up to 9"):
        coordinates(torch.zeros(1, 10, dtype=torch.long))
    assert small_clip().null_tokens.tolist() == [49406, *[49407] * 11]


def test_berts_tokenizer_is_read_from_a_folder(tmp_path):
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]
    (tmp_path / "vocab.txt").write_text("\n".join(vocabulary) + "\n")
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "BertTokenizer", "do_lower_case": true}')
    embedder = BERTEmbedder(8, 1, len(vocabulary), 6, tokenizer=str(tmp_path))
    with package("transformers"):
        assert embedder.tokenize(["two small SEVENS"]).tolist() == [[2, 7, 8, 9, 3, 0]]
        assert embedder.null_tokens.tolist() == [2, 3, 0, 0, 0, 0]
