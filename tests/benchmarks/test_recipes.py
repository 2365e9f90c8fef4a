"""The study of recipes: its tables have a row for each case, differences are paired, and bad options are refused."""

import pytest
import torch

from benchmarks.recipes import SMALL_DATA, WEIGHTS, WIDTHS, RecipeStudy, contrast, describe
from ldm.report.tables import read_csv
from ldm.util import generator
from tests.data.test_idx import write


@pytest.mark.slow
def test_a_small_study_writes_every_table(tmp_path):
    small = {"seeds": 2, "steps": 20, "per_class": (5, 0), "n": 20, "sampler_steps": 4}
    tables = RecipeStudy(str(tmp_path), **small, transformer_seeds=2, transformer_steps=4).run()
    assert len(tables["small_data"]) == 2 * (len(SMALL_DATA) + 1)
    assert len(tables["averages"]) == 2 * (len(WIDTHS) + 1) and len(tables["weights"]) == 2 * len(WEIGHTS)
    assert [row["training"] for row in tables["alignment"]] == ["plain", "aligned"]
    for name, rows in tables.items():
        assert len(read_csv(tmp_path / f"{name}.csv")) == len(rows)
    assert {path.name for path in tmp_path.glob("*.png")} == {"averages.png", "weights.png", "guidance.png"}
    plain = next(row for row in tables["small_data"] if row["recipe"] == "plain")
    assert plain["FD"] == tables["averages"][WIDTHS.index(0.1) + 1]["FD"], "one network in two tables"


@pytest.mark.slow
def test_mnist_takes_the_place_of_the_digits(tmp_path):
    """The images that are drawn and compared with, their number, and the trainings of the transformer are MNIST's."""
    source = generator("images")
    for split, count in {"train": 60, "test": 40}.items():
        pixels = torch.randint(256, (count, 28, 28), generator=source, dtype=torch.uint8).numpy()
        write(tmp_path, split if split == "train" else "t10k", pixels, [place % 10 for place in range(count)])
    small = {"seeds": 2, "steps": 8, "per_class": (0,), "n": 20, "sampler_steps": 4, "recipes": ("plain",), "width": 16}
    parts = ("averages", "alignment")
    study = RecipeStudy(str(tmp_path / "out"), mnist=str(tmp_path), parts=parts, **small, transformer_seeds=2,
                        transformer_steps=2)  # fmt: skip
    tables = study.run()
    assert {row["images"] for row in tables["averages"]} == {"60"}
    assert study.study.judge.features.shape == (40, 128) and study.study.real[0].shape == (60, 256)
    config = next((tmp_path / "out" / "runs").glob("*_aligned_seed1")) / "configs"
    assert any("ldm.data.idx.MNIST" in path.read_text() for path in config.iterdir())
    with pytest.raises(ValueError, match="no augmented versions"):
        RecipeStudy("o", mnist=str(tmp_path), recipes=("plain", "augmented"), parts=("small_data",))


def test_differences_are_paired():
    """The same shift of every seed has an interval of no width, however far the seeds are apart."""
    found = contrast("FD", [11.0, 21.0, 1.0], [10.0, 20.0, 0.0])
    assert list(found.values()) == pytest.approx([1.0, 1.0, 1.0])
    assert set(contrast("FD", [1.0, 2.0], [1.0, 2.0]).values()) == {None}
    assert describe("FD", [1.0, 3.0])["FD"] == 2.0


def test_one_seed_is_refused():
    with pytest.raises(ValueError, match="2 seeds or more"):
        RecipeStudy("o", seeds=1)


@pytest.mark.parametrize("given", [{"parts": ("weight",)}, {"recipes": ("plain", "drop")}, {"recipes": ("augmented",)}])
def test_what_is_not_known_is_refused(given):
    with pytest.raises(ValueError, match="--parts takes small_data"):
        RecipeStudy("o", **given)
