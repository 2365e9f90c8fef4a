"""Alignment of tokens with features of a frozen extractor: its value, its gradients, and a training with it."""

import csv

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf

from ldm import Sampling, load_model
from ldm.checkpoint import load_state_dict
from ldm.commands.export import Export
from ldm.data.digits import Digits
from ldm.evaluation.classifier import Architecture, SmallClassifier, save_classifier
from ldm.evaluation.features import ClassifierFeatures
from ldm.models.diffusion.alignment import (
    Alignment,
    AlignmentOptions,
    Projector,
    check_images,
    lay_out,
    read_alignment,
)
from ldm.modules.dit import DiT
from ldm.modules.uvit import UViT
from ldm.training.config_keys import check_config
from ldm.training.runs import RunDirectory
from tests.training.runs import assert_same_end, end_state, losses, resume, run_training
from tests.training.test_blocks import transformer_config
from tests.training.test_parallel import SAME, call

PLACE = "model.params.alignment_config"
WIDTH = 12


def draws(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    path = tmp_path_factory.mktemp("classifier") / "classifier.safetensors"
    save_classifier(SmallClassifier(Architecture(1, 8, 10, width=4, num_features=8), 1), path, {})
    return path


@pytest.fixture
def network():
    made = DiT(8, 4, 1, 16, 3, 2, num_classes=10, learn_sigma=False)
    with torch.no_grad():
        for number, parameter in enumerate(made.parameters()):
            parameter += 0.1 * draws(*parameter.shape, seed=number)
    return made


def make(network, weights, **options):
    given = {"tap": "layer-1", "features": "classifier", "weights": str(weights), "width": WIDTH, **options}
    return Alignment(network, AlignmentOptions(**given), 0)


def test_the_term_is_the_cosine_of_each_place(network, weights):
    """By loops over images and places; features of the projection itself give -1, whatever their length."""
    aligned = make(network, weights)
    aligned.projector = Projector(16, WIDTH, 5, 3)
    tokens, features = draws(2, 16, 2, 3), draws(2, 5, 2, 3, seed=1)
    with torch.no_grad():
        found = float(aligned.compare(tokens, features))
        cosines = []
        for image in range(2):
            for row in range(2):
                for column in range(3):
                    h = aligned.projector(tokens[image, :, row, column]).double().numpy()
                    y = features[image, :, row, column].double().numpy()
                    cosines.append(h @ y / np.sqrt((h @ h) * (y @ y)))
        assert found == pytest.approx(-np.mean(cosines), abs=1e-6)
        own = aligned.projector(tokens.movedim(1, -1)).movedim(-1, 1)
        assert float(aligned.compare(tokens, 3 * own)) == pytest.approx(-1, abs=1e-6)
        assert float(aligned.compare(tokens, -0.1 * own)) == pytest.approx(1, abs=1e-6)


def test_features_of_another_grid_are_interpolated(network, weights):
    """A field that is the same everywhere stays so; one of halves keeps each half's direction."""
    aligned = make(network, weights)
    aligned.projector = Projector(16, WIDTH, 5, 3)
    tokens, vector = draws(1, 16, 2, 2), draws(1, 5, 1, 1, seed=1)
    same, finer = vector.expand(1, 5, 2, 2), vector.expand(1, 5, 8, 8)
    torch.testing.assert_close(aligned.compare(tokens, finer), aligned.compare(tokens, same))
    halves = torch.cat([vector.expand(1, 5, 8, 4), -vector.expand(1, 5, 8, 4)], dim=3)
    coarse = torch.cat([vector.expand(1, 5, 2, 1), -vector.expand(1, 5, 2, 1)], dim=3)
    torch.testing.assert_close(aligned.compare(tokens, halves), aligned.compare(tokens, coarse))


def test_tokens_lie_where_their_patches_do():
    """U-ViT's label and time are left out, rows come first: its patch embedding of an image with one bright patch."""
    network = UViT([4, 6], 2, 1, 8, 2, 2, num_classes=3)
    x = torch.zeros(1, 1, 4, 6)
    plain = network.patch_embed(x)
    x[0, 0, 2:, 2:4] = 1.0  # row 1, column 1 of the 2 x 3 patches
    tokens = torch.cat([torch.zeros(1, 2, 8), network.patch_embed(x) - plain], dim=1)
    moved = lay_out(tokens, network.extras, network.grid, "it").abs().sum(1)[0]
    assert moved.nonzero().tolist() == [[1, 1]]
    with pytest.raises(ValueError, match="tokens of a grid, and it gives 8 behind 0 others: set"):
        lay_out(tokens, 0, None, "it")


def test_gradients_reach_what_comes_before_the_block_alone(network, weights):
    aligned = make(network, weights)
    aligned.projector = Projector(16, WIDTH, 4, 3)
    tokens = []
    handle = network.blocks[1].register_forward_hook(lambda _module, _given, output: tokens.append(output))
    network(draws(2, 1, 8, 8), torch.tensor([3.0, 9.0]), torch.tensor([1, 2]))
    handle.remove()
    aligned.compare(lay_out(tokens[0], 0, network.grid, "it"), draws(2, 4, 1, 1)).backward()
    touched = {name for name, value in network.named_parameters() if value.grad is not None and value.grad.abs().sum()}
    assert {name.split(".")[0] for name in touched} == {"x_embedder", "t_embedder", "y_embedder", "blocks"}
    assert {name.split(".")[1] for name in touched if name.startswith("blocks")} == {"0", "1"}
    assert all(value.grad.abs().sum() > 0 for value in aligned.parameters())
    assert {name.split(".")[0] for name in aligned.state_dict()} == {"projector"}, "the extractor is no part of it"


def test_the_projector_moves_no_other_draw():
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    first = Projector(4, 5, 6, 0)
    assert torch.equal(torch.rand(2), expected)
    assert torch.equal(first[0].weight, Projector(4, 5, 6, 0)[0].weight)
    assert not torch.equal(first[0].weight, Projector(4, 5, 6, 1)[0].weight)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"tap": "layer-1", "weigth": 1}, "did you mean 'weight'"),
        ({"tap": "layer-1", "features": "inception"}, "name the layer of inception"),
        ({"tap": "layer-1", "features": "classifier", "weight": -1}, "weight"),
        ({"features": "classifier"}, "needs tap"),
        ("layer-1", "must be a mapping"),
    ],
)
def test_what_cannot_be_is_refused(given, message):
    with pytest.raises(ValueError, match=message):
        check_config({"model": {"params": {"alignment_config": given}}}, build=())


def test_layers_that_are_not_there(network, weights):
    with pytest.raises(ValueError, match="no layers"):
        make(network, weights, tap="layer-9")
    with pytest.raises(ValueError, match="classifier has no layer"):
        make(network, weights, layer="network.maps.99")
    assert read_alignment(None) is None


def words(weights, **options):
    given = {"tap": "layer-1", "features": "classifier", "weights": weights, "width": WIDTH, **options}
    return [f"{PLACE}.{name}={value}" for name, value in given.items()]


def test_a_training_logs_keeps_and_resumes_it(weights, tmp_path):
    """Its first step by hand; the samples of its weights need neither the extractor nor the perceptron."""
    config = transformer_config(tmp_path)
    run = run_training(config, tmp_path / "whole", *words(weights))
    plain = run_training(config, tmp_path / "plain", max_steps=1)
    with open(run / "csv" / "metrics.csv") as rows:
        logged = [row for row in csv.DictReader(rows) if row.get("train/loss_alignment")]
    first = logged[0]
    term = float(first["train/loss_alignment"])
    assert len(logged) == 8 and -1 <= term <= 1
    assert float(first["train/loss"]) == pytest.approx(losses(plain)[0] + 0.5 * term, rel=1e-5)
    assert float(first["train/loss_simple"]) == pytest.approx(losses(plain)[0], rel=1e-5)
    state = end_state(run)
    assert {name for name in state if name.startswith("alignment.")} == {
        f"alignment.projector.{layer}.{kind}" for layer in (0, 2, 4) for kind in ("weight", "bias")
    }
    half = run_training(config, tmp_path / "half", *words(weights), max_steps=4)
    resume(half, max_steps=8)
    assert_same_end(run, half)

    saved = OmegaConf.load(next((run / "configs").glob("*project.yaml")))
    saved.model.params.alignment_config.weights = "nowhere.safetensors"
    (tmp_path / "base.yaml").write_text(OmegaConf.to_yaml(saved))
    out = Export(str(run), str(tmp_path / "base.ckpt")).run()
    assert not any(name.startswith("alignment.") for name in load_state_dict(out))
    sampling = Sampling(steps=2, scale=1.0)
    images = [
        load_model(base=tmp_path / "base.yaml", ckpt=file, sampling=sampling, device="cpu").sample([1], 1)
        for file in (out, RunDirectory(run).checkpoints / "last.ckpt")
    ]
    assert torch.equal(images[0], images[1])


def test_cached_latents_are_refused():
    """An item of a latent cache says that it is encoded; the image is no longer there."""
    check_images({"image": torch.zeros(1, 4, 4, 3)})
    with pytest.raises(ValueError, match="needs the training images, and the data give cached latents"):
        check_images({"image": torch.zeros(1, 4, 4, 3), "encoded": torch.ones(1, dtype=torch.bool)})


def test_features_are_those_of_the_clean_image(network, weights):
    """The extractor's last maps of the bytes that its own pictures are."""
    aligned = make(network, weights)
    images = torch.stack([torch.as_tensor(Digits(split="test")[place]["image"]) for place in range(3)])
    pixels = ((images + 1) * 127.5).round().to(torch.uint8).movedim(-1, 1)
    expected = ClassifierFeatures(weights).network.activations(pixels.float() / 127.5 - 1)[0]
    torch.testing.assert_close(aligned.read_features(images), expected)


@pytest.mark.slow
def test_two_processes_align_as_one_does(weights, tmp_path):
    config = transformer_config(tmp_path)
    given = [word for word in words(weights) if "width" not in word]
    given += [f"{PLACE}.width={WIDTH}", *[word for word in SAME if "dropout" not in word], "--strategy", "ddp"]
    runs = []
    for name, cpus, size in (("one", "1", 16), ("two", "2", 8)):
        run, code, printed = call(config, tmp_path, name, "--cpus", cpus, *given, f"data.params.batch_size={size}")
        assert code == 0, printed
        runs.append(run)
    one, two = (losses(run) for run in runs)
    assert len(one) == 8 and list(two.values()) == pytest.approx(list(one.values()), rel=1e-9)
    ends = [end_state(run) for run in runs]
    for name, value in ends[0].items():
        torch.testing.assert_close(ends[1][name], value, rtol=0, atol=1e-9)
