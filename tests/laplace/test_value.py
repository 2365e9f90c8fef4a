"""What more images would bring, against regressions that are fitted again with them."""

import pytest
import torch

from ldm.laplace import LastLayerLaplace, Observation
from ldm.laplace.attribution import Refit
from ldm.laplace.value import value_images
from tests.laplace.laplace_cases import LAYERS, make_batch, make_network

DRAWS, TRAINED, HELD = 2, 6, 8
LABELS = torch.tensor([0, 1, 0, 1, 0, 1, 0, 1])
OPTIONS = {
    "prior_precision": 2.0,
    "prior_mean": 0.1,
    "sigma_noise": [0.5, 0.8],
    "time_edges": [400.0],
    "temperature": 1.3,
    "visits": 2.0,
}


def rows_of(batch, images):
    """The rows of some images of a batch."""
    chosen = torch.tensor([image * DRAWS + draw for image in images for draw in range(DRAWS)])
    return Observation(*(part[chosen] for part in batch))


def make_case(kind="convolution", **changes):
    """A fit of six images and eight held-out ones of two classes."""
    network = make_network(kind)
    trained = make_batch(network, TRAINED * DRAWS)
    held = make_batch(network, HELD * DRAWS, seed=5)
    laplace = LastLayerLaplace(network, **OPTIONS | changes).fit([trained], draws=DRAWS)
    return laplace, trained, held


def weighted(laplace, batch):
    """Patches [n, K] and targets [n, C] of all rows, times the root of their weight, by hand."""
    features = laplace.features(batch.x, batch.t, batch.cond)
    patches = laplace.layer.patches(features).double().detach()
    targets = laplace.layer.by_position(batch.target)
    sigma = torch.where(batch.t <= 400, 0.5, 0.8).double()
    root = (laplace.visits / DRAWS / (sigma**2 * OPTIONS["temperature"])).sqrt()[:, None, None]
    weight = (root**2).expand(targets.shape)
    return (root * patches).flatten(0, 1), (root * targets).flatten(0, 1), weight.flatten(0, 1)


def solve(*parts):
    """The optimum [K, C] and the precision [K, K] of the regression on weighted patches and targets."""
    gram = sum(patches.T @ patches for patches, _, _ in parts)
    cross = sum(patches.T @ targets for patches, targets, _ in parts)
    precision = gram + OPTIONS["prior_precision"] * torch.eye(len(gram), dtype=gram.dtype)
    return torch.linalg.solve(precision, cross + OPTIONS["prior_precision"] * OPTIONS["prior_mean"]), precision


@pytest.mark.parametrize("kind", LAYERS)
def test_adding_the_other_fold_is_a_refit_with_it(kind):
    """With k the number of images in the other fold, the mean of the new optimum is the regression with them."""
    laplace, trained, held = make_case(kind)
    (found,) = value_images(Refit.of(laplace), lambda: [held], LABELS, [2], folds=2)
    assert found.classes == [0, 1] and found.fall.shape == (2, HELD)
    own = weighted(laplace, trained)
    before, precision = solve(own)
    total = sum(float(weighted(laplace, rows_of(held, [image]))[2].sum()) for image in range(HELD)) / HELD
    for image in range(HELD):
        patches, targets, _ = weighted(laplace, rows_of(held, [image]))
        loss = (targets - patches @ before).square().sum()
        assert float(found.loss[image]) == pytest.approx(float(loss) / total, rel=1e-6)
        for label in (0, 1):
            # images of a class lie in folds in turn: places 0, 2 of it in fold 0
            places = (label == LABELS).nonzero().flatten().tolist()
            fold = (LABELS[:image] == LABELS[image]).sum() % 2
            others = [place for number, place in enumerate(places) if number % 2 != fold]
            added = [weighted(laplace, rows_of(held, [place])) for place in others]
            after, new = solve(own, *added)
            pulls = torch.stack([a.T @ (b - a @ before) for a, b, _ in added])
            apart = pulls - pulls.mean(0)
            spread = torch.einsum("ikc,ilc->kl", apart, apart) / (len(others) - 1)
            inverse = torch.linalg.inv(new)
            by_choice = len(others) * ((patches @ inverse @ spread) * (patches @ inverse)).sum()
            fall = loss - (targets - patches @ after).square().sum() - by_choice
            assert float(found.fall[label, image]) == pytest.approx(float(fall) / total, rel=1e-5, abs=1e-9)
            first = patches[: len(patches) // DRAWS] / (laplace.visits / DRAWS / OPTIONS["temperature"]) ** 0.5
            open_ = [((first @ torch.linalg.inv(each)) * first).sum(1).log1p().mean() / 2 for each in (precision, new)]
            assert float(found.information[image]) == pytest.approx(float(open_[0]), rel=1e-6)
            assert float(found.learned[label, image]) == pytest.approx(float(open_[0] - open_[1]), rel=1e-5)


def test_the_fall_is_that_of_drawn_images_on_average():
    """Images drawn from the other fold and really added: a regression each, averaged."""
    laplace, trained, held = make_case()
    (found,) = value_images(Refit.of(laplace), lambda: [held], LABELS, [3], folds=2)
    own = weighted(laplace, trained)
    before, _ = solve(own)
    image, label = 0, 1
    patches, targets, _ = weighted(laplace, rows_of(held, [image]))
    total = sum(float(weighted(laplace, rows_of(held, [each]))[2].sum()) for each in range(HELD)) / HELD
    others = [weighted(laplace, rows_of(held, [place])) for place in (3, 7)]
    falls = []
    for number in range(8):  # all triples of two images
        drawn = [others[number >> bit & 1] for bit in range(3)]
        after, _ = solve(own, *drawn)
        errors = targets - patches @ after
        falls.append(float((targets - patches @ before).square().sum() - errors.square().sum()) / total)
    weightless = sum(falls) / 8
    assert weightless == pytest.approx(float(found.fall[label, image]), abs=0.35 * max(map(abs, falls)))


def test_a_training_that_sees_more_noises_has_less_chance_in_its_pull():
    """At visits equal to the draws nothing is corrected; beyond, part of the chance of the draws is taken out."""
    few, _, held = make_case()
    many, _, _ = make_case(visits=200.0)
    plain = value_images(Refit.of(few), lambda: [held], LABELS, [1], folds=2)[0]
    assert torch.isfinite(plain.fall).all() and (plain.learned > 0).all()
    assert (value_images(Refit.of(many), lambda: [held], LABELS, [1], folds=2)[0].learned > 0).all()


def test_more_images_leave_less_open():
    laplace, _, held = make_case()
    one, ten, many = value_images(Refit.of(laplace), lambda: [held], LABELS, [1, 10, 1000], folds=2)
    assert (one.learned > 0).all() and (ten.learned > one.learned).all() and (many.learned > ten.learned).all()
    assert (many.learned < many.information).all()


def test_classes_of_two_held_out_images_are_refused():
    laplace, _, held = make_case()
    with pytest.raises(ValueError, match="class 1 has 2 held-out images"):
        value_images(Refit.of(laplace), lambda: [held], torch.tensor([0, 0, 0, 0, 0, 0, 1, 1]), [1])
