"""Counted digits: pictures, captions, classes of words, and what the recogniser reads in them."""

from __future__ import annotations

import pytest
import torch

from ldm.data.captions import DIGIT_WORDS
from ldm.data.counted import COUNT_NAMES, CountedDigits
from ldm.ensembles.naming import names_class
from ldm.experiments.counted import CanvasClassifier, Shown
from ldm.models.autoencoder import PixelsAsChannels


@pytest.fixture(scope="module")
def canvases():
    return CountedDigits("test")


def test_a_canvas_holds_as_many_digits_as_its_caption_counts(canvases):
    for index in range(0, 80, 3):
        group, image = canvases.group(index), canvases[index]["image"]
        light = (image if group.style != "inverted" else -image) > -1
        cells = light.reshape(2, 8, 2, 8).any(3).any(1).flatten()
        if group.size == "small":
            assert cells.nonzero()[:, 0].tolist() == sorted(group.cells) and len(set(group.images)) <= group.count
        labels = canvases.data.labels[list(group.images)].tolist()
        assert labels == [group.digit] * group.count
        said = canvases[index]["caption"].split()
        assert said[0] in (("a", "an"), ("two",), ("three",))[group.count - 1]
        assert {group.size, group.style} & set(said) == {getattr(group, word) for word in group.says}


def test_captions_name_the_classes_that_they_are_of(canvases):
    kinds = {kind: CountedDigits("test", kind) for kind in ("digits", "counts", "sizes", "styles")}
    for index in range(0, 200, 7):
        caption = canvases[index]["caption"]
        assert kinds["digits"][index]["caption"] == caption
        for kind, names in (("digits", DIGIT_WORDS), ("counts", COUNT_NAMES)):
            named = [name for name in names if names_class(caption, name)]
            assert named == [names[kinds[kind][index]["class_label"]]], caption
        for kind in ("sizes", "styles"):
            named = [name for name in kinds[kind].class_names if names_class(caption, name)]
            assert named in ([], [kinds[kind].class_names[kinds[kind][index]["class_label"]]])


@pytest.mark.parametrize(
    ("text", "name", "named"),
    [
        ("two small sevens", "two", False),
        ("three handwritten ones", "one", True),
        ("a bold three beside two sevens", "three", True),
        ("a bold three beside two sevens", "two", False),
        ("two golden retrievers", "golden retriever", True),
        ("a retriever, golden", "golden retriever", False),
        ("a busy street", "bus", False),
        ("some ponies", "pony", True),
        ("an inverted two", "a ..", True),
        ("salt and pepper", "salt and pepper", True),
    ],
)
def test_a_number_that_counts_is_no_name(text, name, named):
    assert names_class(text, name) is named


def test_pictures_are_read_as_they_were_drawn(canvases):
    """Three neighbours may outvote a picture's own copy among the references, but for few digits."""
    images = torch.stack([canvases[index]["image"] for index in range(40)]).movedim(-1, 1)
    read = CanvasClassifier(canvases).read(images)
    groups = [canvases.group(index) for index in range(40)]
    pairs = list(zip(read, groups, strict=True))
    assert all(own.agrees(Shown(None, group.count, group.size, group.style)) for own, group in pairs)
    assert sum(own.digit == group.digit for own, group in pairs) >= 36
    assert not read[0].agrees(Shown(None, read[0].count + 1, None, None))


def test_pixels_as_channels_lose_nothing():
    stage = PixelsAsChannels(2)
    x = torch.arange(2 * 3 * 4 * 6.0).reshape(2, 3, 4, 6)
    z = stage.encode(x)
    assert z.shape == (2, 12, 2, 3) and torch.equal(stage.decode(z), x)
    assert z[0, :4, 0, 0].tolist() == x[0, 0, :2, :2].flatten().tolist()
