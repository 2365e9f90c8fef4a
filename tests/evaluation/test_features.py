"""Extractors: what they give and refuse, and their use by torchmetrics."""

import pytest
import torch
from safetensors.torch import save_file
from torchmetrics.image.fid import FrechetInceptionDistance

from ldm.checkpoint import tensors_sha256
from ldm.evaluation import pretrained
from ldm.evaluation.classifier import Architecture, SmallClassifier, save_classifier, signed
from ldm.evaluation.cmmd import kid_subsets
from ldm.evaluation.extractors import make_extractor
from ldm.evaluation.fid import fid
from ldm.evaluation.statistics import moments
from ldm.util import generator
from tests.comparisons import hide, package


def images(count=6, channels=1, side=8, key=0):
    size = (count, channels, side, side)
    return torch.randint(256, size, generator=generator("images", key), dtype=torch.uint8)


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    path = tmp_path_factory.mktemp("classifier") / "a.safetensors"
    save_classifier(SmallClassifier(Architecture(1, 8, 10, width=8, num_features=16), 1), path, {})
    return path


def test_classifier_gives_its_own_layers(weights):
    extractor = make_extractor("classifier", weights)
    found = extractor.activations(images())
    maps, pooled, logits = extractor.network.activations(signed(images()))
    assert torch.equal(found.pooled, pooled) and torch.equal(found.logits, logits)
    assert torch.equal(found.spatial.reshape(6, 7, 8, 8), maps[:, :7])
    assert torch.equal(extractor(images()), pooled) and extractor.num_features == 16


def test_torchmetrics_takes_an_extractor_and_agrees(weights):
    extractor = make_extractor("classifier", weights)
    real, fake = images(80), images(60, key=1) // 2
    metric = FrechetInceptionDistance(feature=extractor)
    metric.update(real, real=True)
    metric.update(fake, real=False)
    own = fid(moments(extractor(real)).statistics(), extractor(fake)).estimate
    assert own == pytest.approx(float(metric.compute()), rel=1e-4)


def test_other_sizes_colours_and_types_are_refused(weights):
    extractor = make_extractor("classifier", weights)
    with pytest.raises(ValueError, match="8 x 8 pixels, got 9 x 9"):
        extractor(images(side=9))
    with pytest.raises(ValueError, match="grey"):
        extractor(images(channels=3))
    with pytest.raises(ValueError, match="uint8"):
        extractor(images().float())


def test_the_channels_of_a_known_network_are_its_own(weights):
    with pytest.raises(ValueError, match="--channels is of dotted targets"):
        make_extractor("classifier", weights, channels=1)


def test_a_dotted_target_gets_signed_images_and_maps_are_averaged(tmp_path):
    extractor = make_extractor("torch.nn.Conv2d", None, {"in_channels": 3, "out_channels": 4, "kernel_size": 3})
    grey = images(2)
    maps = extractor.network(signed(grey).expand(-1, 3, -1, -1))
    torch.testing.assert_close(extractor(grey), maps.mean((2, 3)))
    save_file({name: value + 1 for name, value in extractor.network.state_dict().items()}, tmp_path / "w.safetensors")
    params = {"in_channels": 3, "out_channels": 4, "kernel_size": 3}
    other = make_extractor("torch.nn.Conv2d", tmp_path / "w.safetensors", params)
    torch.testing.assert_close(other.network.bias, extractor.network.bias + 1)
    assert other.describe()["sha256"] != extractor.describe()["sha256"]
    flat = make_extractor("torch.nn.Flatten", channels=1)
    torch.testing.assert_close(flat(grey), signed(grey).flatten(1))


def test_names_and_weights_that_are_missing_say_what_to_do(weights):
    with pytest.raises(ValueError, match="unknown features 'resnet'"):
        make_extractor("resnet")
    with pytest.raises(ValueError, match=r"cannot be made of .* takes no 'sides'"):
        make_extractor("torch.nn.Flatten", params={"sides": 2})
    with pytest.raises(ValueError, match="a file of weights goes to --weights"):
        make_extractor("models/digits.safetensors")
    with pytest.raises(ValueError, match="decu evaluate classifier"):
        make_extractor("classifier")


def test_digest_sees_every_parameter():
    a, b = torch.nn.BatchNorm1d(2), torch.nn.BatchNorm1d(2)
    b.load_state_dict(a.state_dict())
    assert tensors_sha256(a.state_dict()) == tensors_sha256(b.state_dict())
    with torch.no_grad():
        b.bias[1] += 1e-3
    assert tensors_sha256(a.state_dict()) != tensors_sha256(b.state_dict())


def test_inception_names_its_extra_where_it_is_missing(monkeypatch):
    hide(monkeypatch, "torch_fidelity")
    with pytest.raises(ValueError, match=r"pip install 'decu-uncertainty\[metrics\]'"):
        make_extractor("inception")


def test_clip_names_its_extra_where_it_is_missing(monkeypatch):
    hide(monkeypatch, "transformers")
    with pytest.raises(ValueError, match=r"pip install 'decu-uncertainty\[clip\]'"):
        make_extractor("clip")


@pytest.fixture(scope="module")
def inception():
    with package("torch_fidelity.feature_extractor_inceptionv3", imports_torchvision=True) as module:
        yield module


@pytest.fixture(scope="module")
def inception_weights(inception, tmp_path_factory):
    """Random weights of torch-fidelity's network, saved as its own are."""
    module = inception
    path = tmp_path_factory.mktemp("inception") / "weights.pth"
    blank = module.FeatureExtractorInceptionV3.__new__(module.FeatureExtractorInceptionV3)
    source, state = generator("inception"), {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "load_state_dict_from_url", lambda *_, **__: state)
        patch.setattr(module.FeatureExtractorInceptionV3, "load_state_dict", lambda *_: None)
        blank.__init__("inception", ["2048"])
    for name, value in blank.state_dict().items():
        draw = torch.randn(value.shape, generator=source) if value.is_floating_point() else value
        state[name] = draw / draw[0].numel() ** 0.5 if value.ndim > 1 else draw.abs() if value.ndim else draw
    torch.save(state, path)
    return path


def test_inception_gives_all_three_kinds_of_features(inception_weights):
    extractor = make_extractor("inception", inception_weights)
    found = extractor.activations(images(2, 1, 16))
    assert [tuple(value.shape) for value in found] == [(2, 2048), (2, 1008), (2, 2023)]
    assert float(found.spatial.min()) == 0, "after the ReLU"
    torch.testing.assert_close(found.logits, found.pooled @ extractor.network.fc.weight.T)
    assert torch.equal(extractor(images(2, 1, 16)), found.pooled)


def test_inception_without_weights_says_where_they_belong(inception_weights, monkeypatch, tmp_path):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr("torch.hub.download_url_to_file", _no_network)
    with pytest.raises(ValueError, match="place it in"):
        make_extractor("inception")
    assert pretrained.INCEPTION_FILE in pretrained.INCEPTION_URL


@pytest.mark.slow
@pytest.mark.usefixtures("inception")
def test_published_inception_gives_the_documented_distance():
    """torchmetrics documents 0.0312 +- 0.0025 for noise of these ranges, by subsets of 50 of 100 images."""
    if not (pretrained.hub_folder() / pretrained.INCEPTION_FILE).is_file():
        pytest.skip(f"the published weights are not in {pretrained.hub_folder()}")
    extractor, source = make_extractor("inception"), generator("documented noise")

    def noise(low, high):
        batches = (torch.randint(low, high, (20, 3, 299, 299), generator=source, dtype=torch.uint8) for _ in range(5))
        return torch.cat([extractor(batch) for batch in batches]).numpy()

    subsets = kid_subsets(noise(0, 200), noise(100, 255), subset_size=50)
    assert subsets.mean() == pytest.approx(0.0312, abs=0.0075) and subsets.std() == pytest.approx(0.0025, abs=0.0015)


def _no_network(*_, **__):
    raise OSError("no network")


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory):
    """A tiny CLIP with random weights, saved as a published one is."""
    with package("transformers") as transformers:
        yield clip_saved(transformers, tmp_path_factory.mktemp("clip"))


def clip_saved(transformers, folder):
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.CLIPVisionConfig(**sizes, image_size=32, patch_size=16, projection_dim=12)
    transformers.CLIPVisionModelWithProjection(config).save_pretrained(folder)
    return folder


def test_clip_gives_embeddings_of_unit_length(clip_folder):
    extractor = make_extractor("clip", clip_folder)
    found = extractor(images(3, 1, 20))
    assert found.shape == (3, 12) == (3, extractor.num_features)
    torch.testing.assert_close(found.norm(dim=1), torch.ones(3))
    pixels = torch.nn.functional.interpolate(images(3, 1, 20).float() / 255, (32, 32), mode="bicubic")
    pixels = (pixels - extractor.mean) / extractor.std
    embeds = extractor.network(pixel_values=pixels).image_embeds
    torch.testing.assert_close(found, embeds / embeds.norm(dim=1, keepdim=True))


def test_clip_without_weights_says_what_to_copy(clip_folder, tmp_path):
    with pytest.raises(ValueError, match="--weights FOLDER"):
        make_extractor("clip", tmp_path / "none")
