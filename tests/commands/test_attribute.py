"""Attribution as a user asks for it, against posteriors that are fitted again without a picture."""

from dataclasses import replace

import numpy as np
import pytest

from ldm.commands.attribute import Attribute
from ldm.commands.laplace_fit import FitLaplace
from ldm.commands.laplace_sample import SampleLaplace
from ldm.commands.shared import PosteriorSource
from ldm.data.digits import Digits
from ldm.laplace import LastLayerLaplace, Observation
from ldm.pipelines.attribution import FittedImages, walk_samples
from ldm.settings import Sampling
from tests.posteriors import CPU, table, write_model


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A guided model, a posterior of 12 digits, and four samples of three steps."""
    folder = tmp_path_factory.mktemp("attribute")
    model = write_model(folder, guidance_scale=2.0)
    FitLaplace(model, str(folder / "fit"), n=12, draws=2, prior_precision=50.0, place=CPU).run()
    given = {"posterior": PosteriorSource(str(folder / "fit"), draws=2), "sampling": Sampling(steps=3), "place": CPU}
    SampleLaplace(model, out=str(folder / "samples"), method="path", n=4, shown=1, **given).run()
    return Attribute(model, samples=str(folder / "samples"), out=str(folder / "out"), n=2, top=3, **given)


def test_removal_of_a_picture_is_a_fit_without_it(place):
    rows = place.run()
    assert len(rows) == 2 * 2 * 3 and {row["by"] for row in rows} == {"certainty", "mean"}
    content = np.load(f"{place.out}/attribution.npz")
    first = next(row for row in rows if row["sample"] == 1 and row["by"] == "certainty")
    assert first["certainty"] == content["certainty"][:, 1].max() > 0
    posterior = place.posterior.load(place.source.load(place.sampling, device="cpu"))
    fitted = FittedImages.read(place.posterior.posterior, posterior.laplace)
    removed = list(content["positions"]).index(first["image"])
    before, after = (
        path_variance(posterior, posterior.laplace),
        path_variance(posterior, fit_without(posterior, fitted, removed)),
    )
    assert (after - before) / before == pytest.approx(first["certainty"], rel=1e-5)
    by_group = table(f"{place.out}/groups.csv")
    classes = [Digits()[position]["class_label"] for position in content["positions"]]
    alone = [label for label in set(classes) if classes.count(label) == 1]
    for label in alone:  # a class of one picture carries what the picture does
        (row,) = [row for row in by_group if row["group"] == str(label) and row["sample"] == "0"]
        assert float(row["certainty"]) == pytest.approx(content["certainty"][classes.index(label), 0], rel=1e-9)
    assert alone


def path_variance(posterior, laplace):
    """The variance of sample 1 by the method path, of one channel."""
    *_, last = replace(posterior, laplace=laplace).steps("path", [0, 1], [0, 1])
    return float(last.var[1].double().sum()) / last.var.shape[1]


def fit_without(posterior, fitted, removed):
    """A posterior of the same hyperparameters, fitted to all pictures but one."""
    draws = posterior.laplace.repeats
    whole = next(iter(fitted.observe(posterior, fitted.positions, 12)))
    kept = [row for row in range(len(whole.x)) if row // draws != removed]
    rows = Observation(*(None if part is None else part[kept] for part in whole))
    laplace = posterior.laplace
    options = {
        "prior_precision": laplace.prior_precision,
        "sigma_noise": laplace.sigma_noise,
        "visits": laplace.visits,
        "example": laplace.arrangement,
    }
    other = LastLayerLaplace(posterior.pipeline.model.network, laplace.name, outputs=1, **options)
    size = round(laplace.data_size * (len(fitted.positions) - 1) / len(fitted.positions), 6)
    other.fit([rows], draws=draws)
    other.state = replace(other.state, data_size=size)
    return other


def test_maps_add_up_to_what_a_picture_carries(place):
    posterior = place.posterior.load(place.source.load(place.sampling, device="cpu"))
    fitted = FittedImages.read(place.posterior.posterior, posterior.laplace)
    (walk,) = walk_samples(posterior, [0], [0])
    images, _ = fitted.attribute(posterior, [walk.question()], {}, 4)
    moved, risen = fitted.map_image(posterior, walk, fitted.positions[5])
    assert moved.shape == risen.shape == walk.end.shape  # float32 passes of other batches differ by 1e-6
    assert float(risen[0].sum()) == pytest.approx(float(images.certainty[5, 0]), rel=1e-4)
    assert float(moved.square().sum()) == pytest.approx(float(images.mean[5, 0]), rel=1e-4)
    pixels = [walk.question(walk.find_place(posterior.laplace.layer, (y, x))) for y in range(8) for x in range(8)]
    each, _ = fitted.attribute(posterior, pixels, {}, 4)
    assert each.certainty[5].tolist() == pytest.approx(risen[0].flatten().tolist(), rel=1e-4)
    assert each.mean[5].tolist() == pytest.approx(moved.square().sum(0).flatten().tolist(), rel=1e-4)


def test_groups_of_a_file_and_single_steps(place, tmp_path):
    posterior = place.posterior.load(place.source.load(place.sampling, device="cpu"))
    positions = FittedImages.read(place.posterior.posterior, posterior.laplace).positions
    lines = [f"{position},{'a' if number < 3 else 'b'}" for number, position in enumerate(positions)]
    (tmp_path / "groups.csv").write_text("\n".join(["image,group", *lines]) + "\n")
    command = replace(place, groups=str(tmp_path / "groups.csv"), step=(1,), out=str(tmp_path / "out"))
    command.run()
    rows = table(tmp_path / "out" / "groups.csv")
    assert [row["group"] for row in rows] == ["a", "a", "b", "b"]
    assert float(rows[2]["certainty"]) > float(rows[0]["certainty"])  # nine pictures carry more than three


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sampling": Sampling(steps=2)}, "do not draw the samples"),
        ({"step": (3,)}, "the trajectory has steps 0 to 2"),
        ({"pixel": (0, 8)}, "--pixel 0 8: the model's outputs have rows 0 to 7 and columns 0 to 7"),
        ({"n": 9}, "holds 4 samples"),
        ({"data": ("target=ldm.data.digits.Digits", "params.split=test")}, "not those that the posterior was fitted"),
        ({"data": ("nothing",)}, "--data needs target"),
        ({"posterior": "diag"}, "see it through --curvature full"),
    ],
)
def test_what_does_not_fit_is_refused(place, change, message, tmp_path):
    if change.get("posterior") == "diag":
        change = {"posterior": replace(place.posterior, curvature="diag")}
    with pytest.raises(ValueError, match=message):
        replace(place, out=str(tmp_path / "no"), **change).run()
