"""What samples are taken for: against scikit-learn's classifier and a search by hand, and what is written of it."""

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.svm import SVC

from ldm.commands.shared import EnsembleSource, Placement
from ldm.commands.uncertainty_mistakes import UncertaintyMistakes
from ldm.data.digits import Digits
from ldm.evaluation.recognition import PixelClassifier, nearest_images
from ldm.experiments.mistakes import find_mistakes, read_real_pictures
from ldm.pipelines import load_ensemble
from ldm.report.mistakes import describe_mistakes, read_mistakes, summarise_mistakes
from ldm.settings import Branching, Sampling
from tests.conftest import tiny_config
from tests.ensembles import write_ensemble

DATA = {
    split: {"target": "ldm.data.digits.Digits", "params": {"split": part}}
    for split, part in (("train", "train"), ("validation", "test"))
}


@pytest.fixture
def folder(tmp_path):
    config = {"model": tiny_config(guidance_scale=1.0), "data": {"params": DATA}}
    write_ensemble(tmp_path, members=2, config=config)
    return tmp_path


def test_samples_are_held_against_the_training_pictures(folder):
    pipeline = load_ensemble(folder, Sampling(steps=2), Branching(at=0.0), device="cpu")
    real = read_real_pictures(DATA, 200, 0)
    assert real.images.shape == (200, 8, 8, 1) and sum(count for count, _ in real.known.values()) == 200
    assert real.accuracy > 0.8, "real digits are known by two hundred of them"
    (found,) = find_mistakes(pipeline, real, [3], 2)
    samples = pipeline.sample([3], n=2).permute(0, 1, 3, 4, 2).reshape(4, -1).double().numpy()
    flat = real.images.reshape(200, -1).astype(float)
    taken = SVC(class_weight="balanced").fit(flat, real.labels).predict(samples)
    assert found.taken.tolist() == taken.tolist()
    distances = np.sqrt(((samples[:, None] - flat) ** 2).mean(2))
    np.testing.assert_allclose(found.distances, distances.min(1), rtol=1e-6)
    first = distances.argmin(1)[[0, 2]]
    assert found.nearest_labels == tuple(real.labels[first])
    torch.testing.assert_close(found.nearest[1], torch.from_numpy(real.images[first[1]]).permute(2, 0, 1))


def test_without_validation_pictures_there_is_no_control(tmp_path):
    for place, name in enumerate(("a/1.png", "a/2.png", "b/1.png", "b/2.png")):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.new("RGB", (8, 8), (60 * place,) * 3).save(tmp_path / name)
    params = {"root": str(tmp_path), "image_size": 8, "test_fraction": 0.1}
    target = "ldm.data.folder.ImageFolder"
    data = {
        split: {"target": target, "params": {**params, "split": part}}
        for split, part in (("train", "train"), ("validation", "test"))
    }
    real = read_real_pictures(data, 100, 0)
    assert len(real.images) == 4 and real.known == {} and real.accuracy is None


def test_a_training_picture_is_its_own_neighbour():
    images = torch.stack([Digits()[place]["image"] for place in range(5)]).numpy()
    places, distances = nearest_images(images[2:], images)
    assert places.tolist() == [2, 3, 4] and distances.max() == 0


def test_captions_stand_for_classes_by_name():
    names = [str(number) for number in (7, 2)]
    data = {"train": {"target": "ldm.data.digits.Digits", "params": {"split": "train"}}}
    known = [Digits().class_names[int(name)] for name in names]
    real = read_real_pictures(data, 100, 0, known)
    whole = read_real_pictures(data, 100, 0)
    assert set(real.labels.tolist()) == {0, 1} and real.accuracy is None, "no validation pictures"
    assert (real.labels == 0).sum() == (whole.labels == 7).sum()
    with pytest.raises(ValueError, match="'a whale' is no caption"):
        read_real_pictures(data, 100, 0, ["a whale"])


def test_the_table_says_what_samples_are_taken_for(folder, capsys):
    command = UncertaintyMistakes(
        EnsembleSource(str(folder)), ("name3", 4), 2, 100, sampling=Sampling(steps=2), place=Placement("cpu")
    )
    rows = command.run()
    assert [row["name"] for row in rows] == ["name3", "name4"] and all(row["samples"] == 4 for row in rows)
    written = read_mistakes(folder)
    assert list(written) == [3, 4] and written[3]["recognised"] == rows[0]["recognised"]
    assert all(row["low"] <= row["recognised"] / 4 <= row["high"] for row in rows)
    assert (folder / "mistakes" / "nearest_4.png").exists()
    assert summarise_mistakes(rows) in capsys.readouterr().out
    with pytest.raises(FileExistsError):
        command.run()


def test_words_on_mistakes():
    row = {"name": "ship", "samples": 80, "recognised": 3, "taken_for": "truck", "taken": 60, "real": 5}
    row["real_recognised"] = 4
    assert describe_mistakes(row) == "3 of 80 are recognised, 60 are taken for truck"
    said = summarise_mistakes([row, {**row, "name": "cat", "recognised": 77}])
    assert "50% of 160 samples" in said and "80%" in said and "the fewest of ship" in said
    assert "fewest" not in summarise_mistakes([{**row, "recognised": 80}]), "nothing is behind where all are recognised"


def test_principal_components_know_as_much_as_all_pixels():
    data = Digits()
    images = torch.stack([data[place]["image"] for place in range(600)]).numpy()
    labels = data.labels[:600].numpy()
    whole = PixelClassifier(images[:400], labels[:400]).recognised(images[400:], labels[400:]).mean()
    few = PixelClassifier(images[:400], labels[:400], components=40)
    assert few.model[0].n_components_ == 40
    assert few.recognised(images[400:], labels[400:]).mean() > whole - 0.02
    with_all = PixelClassifier(images[:400], labels[:400], components=64)
    assert len(with_all.model) == 1, "no more pixels than components"
