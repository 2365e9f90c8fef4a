"""Pictures with captions: lists and text files, and digits in styles."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from PIL import Image

from ldm.data.bins import assign_masks
from ldm.data.captions import CaptionedDigits, CaptionedFolder

CAPTIONS = {"a.png": "a cat", "b/c.png": "two dogs", "b/d.png": "a cat"}


def write_pictures(folder):
    for number, name in enumerate(CAPTIONS):
        (folder / name).parent.mkdir(exist_ok=True)
        Image.fromarray(np.full((8, 8, 3), 40 * number, np.uint8)).save(folder / name)


@pytest.mark.parametrize("layout", ["captions.csv", "metadata.jsonl", "texts"])
def test_captions_are_read_from_a_list_or_from_files_beside_the_pictures(tmp_path, layout):
    write_pictures(tmp_path)
    if layout == "texts":
        for name, caption in CAPTIONS.items():
            (tmp_path / name).with_suffix(".txt").write_text(f"{caption}\n")
    elif layout == "captions.csv":
        rows = [f'{name},"{caption}"' for name, caption in CAPTIONS.items()]
        (tmp_path / layout).write_text("\n".join(["file,caption", *rows]))
    else:
        rows = [json.dumps({"file_name": name, "text": caption}) for name, caption in CAPTIONS.items()]
        (tmp_path / layout).write_text("\n".join(rows))
    data = CaptionedFolder(str(tmp_path), image_size=8)
    assert data.class_names == ["a cat", "two dogs"]
    assert [data[place]["caption"] for place in range(3)] == list(CAPTIONS.values())
    assert [data[place]["class_label"] for place in range(3)] == [0, 1, 0]
    assert data[1]["image"].unique().tolist() == pytest.approx([40 / 127.5 - 1])


def test_captions_that_do_not_fit_are_refused(tmp_path):
    write_pictures(tmp_path)
    (tmp_path / "a.txt").write_text("a cat")
    with pytest.raises(ValueError, match="2 pictures without a caption"):
        CaptionedFolder(str(tmp_path))
    (tmp_path / "captions.csv").write_text("file,caption\nmissing.png,a cat\n")
    with pytest.raises(ValueError, match="names 1 of 1 pictures that are not in"):
        CaptionedFolder(str(tmp_path))
    (tmp_path / "captions.csv").write_text("name,words\na.png,a cat\n")
    with pytest.raises(ValueError, match=r"captions\.csv needs"):
        CaptionedFolder(str(tmp_path))


def test_digits_come_in_every_style_with_its_caption():
    words, captions = CaptionedDigits("test"), CaptionedDigits("test", classes="captions")
    plain = words.data
    assert len(words) == 4 * len(plain) and captions.n_classes == 40
    for place in (0, 1, 2, 3, 41):
        image, style = divmod(place, 4)
        digit = int(plain.labels[image])
        assert words[place]["class_label"] == digit and captions[place]["class_label"] == 4 * digit + style
        assert words[place]["caption"] == captions.class_names[4 * digit + style]
    light = [(words[style]["image"] + 1) / 2 for style in range(4)]
    assert torch.allclose(light[0] + light[3], torch.ones(8, 8, 1))
    assert torch.allclose(light[2], 0.45 * light[0]) and (light[1] >= light[0]).all()
    assert words[3]["caption"].startswith("an inverted")


def test_chosen_classes_are_hidden_and_all_members_see_the_others():
    sees = assign_masks(6, 4, 3, seed=0, only=[1, 4])
    for label in range(6):
        seen = [member for member, classes in sees.items() if label in classes]
        assert len(seen) == (1 if label in (1, 4) else 4)
