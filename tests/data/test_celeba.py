"""CelebA in its published layout: which pixels, which parts, which labels; fetched from a local server."""

from __future__ import annotations

import io

import numpy as np
import pytest
import torch
from PIL import Image

from ldm.commands.data_prepare import PrepareData
from ldm.data.celeba import FACE, CelebA
from ldm.data.pictures import decode
from ldm.data.prepare import sources
from tests.data.archives import md5, packed

COUNT = 5
ATTRIBUTES = [[1, -1], [-1, -1], [1, 1], [-1, 1], [1, -1]]  # of Smiling and Young
PERSONS = [7, 9, 7, 2, 9]


def published() -> dict[str, bytes]:
    """CelebA's files with five images of 218x178 pixels, the first three for training."""
    pictures = {}
    for number in range(COUNT):
        pixels = np.full((218, 178, 3), 20 * number, np.uint8)
        pixels[FACE[0] : FACE[0] + FACE[2], FACE[1] : FACE[1] + FACE[3]] = 200
        content = io.BytesIO()
        Image.fromarray(pixels).save(content, "png")
        pictures[f"img_align_celeba/{number + 1:06d}.jpg"] = content.getvalue()
    names = [f"{number + 1:06d}.jpg" for number in range(COUNT)]
    rows = zip(names, ATTRIBUTES, strict=True)
    attributes = "".join(f"{name} {'  '.join(map(str, row))}\n" for name, row in rows)
    persons = "".join(f"{name} {person}\n" for name, person in zip(names, PERSONS, strict=True))
    parts = "".join(f"{name} {part}\n" for name, part in zip(names, (0, 0, 0, 1, 2), strict=True))
    return {
        "list_attr_celeba.txt": f"{COUNT}\nSmiling Young \n{attributes}".encode(),
        "identity_CelebA.txt": persons.encode(),
        "list_eval_partition.txt": parts.encode(),
        "pictures": pictures,
    }


@pytest.fixture
def root(tmp_path):
    files = published()
    packed(tmp_path / "img_align_celeba.zip", files.pop("pictures"))
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    return tmp_path


def test_parts_labels_and_pixels(root):
    smiling = CelebA(str(root), label="Smiling")
    assert smiling.labels.tolist() == [1, 0, 1] and smiling.class_names == ["not Smiling", "Smiling"]
    assert smiling[0]["relpath"] == "img_align_celeba/000001.jpg" and smiling[0]["human_label"] == "Smiling"
    assert CelebA(str(root), "all", label="Young").labels.tolist() == [0, 0, 1, 1, 0]
    persons = CelebA(str(root), "all", label="identity")
    assert persons.labels.tolist() == [1, 2, 1, 0, 2] and persons.class_names == ["person 2", "person 7", "person 9"]
    assert [len(CelebA(str(root), part)) for part in ("train", "valid", "test")] == [3, 1, 1]
    face = CelebA(str(root), "valid")
    assert face.n_classes == 1 and face[0]["image"].shape == (64, 64, 3)
    assert bool((face[0]["image"] == 200 / 127.5 - 1).all()), "the pixels around the face, and no others"
    whole = CelebA(str(root), "test", crop="center", image_size=32)[0]["image"]
    assert float(whole[0, 0, 0]) == pytest.approx(80 / 127.5 - 1) and whole.shape == (32, 32, 3)


def test_what_is_absent_is_named(root):
    with pytest.raises(ValueError, match=r"attribute of CelebA \(Smiling, Young\), got 'Bald'"):
        CelebA(str(root), label="Bald")
    (root / "identity_CelebA.txt").unlink()
    with pytest.raises(ValueError, match=r"lacks identity_CelebA\.txt"):
        CelebA(str(root), label="identity")
    (root / "img_align_celeba.zip").unlink()
    with pytest.raises(ValueError, match=r"decu data prepare --dataset celeba"):
        CelebA(str(root))
    small = io.BytesIO()
    Image.new("RGB", (8, 8)).save(small, "png")
    with pytest.raises(ValueError, match=r"\[8, 8\] pixels has no part"):
        decode(small.getvalue(), 3, box=FACE)
    assert decode(small.getvalue(), 3, box=(1, 2, 3, 4)).shape == (3, 4, 3)


def test_it_is_fetched_and_its_terms_are_told(server, tmp_path, monkeypatch, capsys):
    files = published()
    archive = packed(tmp_path / "served.zip", files.pop("pictures")).read_bytes()
    files["img_align_celeba.zip"] = archive
    server.files = {f"/{name}": content for name, content in files.items()}
    command = PrepareData("celeba", root=str(tmp_path), url=server.url)
    with pytest.raises(ValueError, match="expected md5 d32c9cbf5e040fd4025c592c306e6668"):
        command.run()
    (tmp_path / "celeba" / "list_eval_partition.txt.rejected").unlink()
    known = [sources.PublishedFile("", name, md5=md5(files[name])) for name in sources.CELEBA_FILES]
    monkeypatch.setitem(sources.SOURCES, "celeba", known)
    command.run()
    assert "non-commercial research only" in capsys.readouterr().out
    data = CelebA(str(tmp_path / "celeba"))
    assert len(data) == 3 and torch.isfinite(data[2]["image"]).all()
    assert not (tmp_path / "celeba" / "img_align_celeba").exists(), "its zip is read as it is"
