"""Real images in place of pictures: what methods are given."""

import torch

from ldm.benchmark.aleatoric import NearestNeighbour
from ldm.benchmark.images import LEFT_OUT_CLASS
from ldm.benchmark.problem import RENOISED_TIME


def test_real_images_are_asked_for_in_the_class_of_their_neighbour(problem):
    reals = problem.of_reals()
    assert 0 not in reals.labels.tolist()  # the class that these networks never saw
    assert reals.sets.count(LEFT_OUT_CLASS) == problem.settings.reals
    assert int(reals.is_known.sum()) == problem.settings.reals
    images, labels = problem.data
    nearest = labels[torch.cdist(reals.images.flatten(1), images).argmin(1)]
    assert torch.equal(nearest, reals.labels)


def test_trajectories_begin_at_the_noised_image(problem):
    reals = problem.of_reals()
    first = next(iter(reals.walk(reals.build()(reals.base))))
    assert float(reals.times[0]) == RENOISED_TIME
    alpha = 0.5**0.5
    torch.testing.assert_close((first.x - alpha * reals.images).var(), torch.tensor(0.5), rtol=0.05, atol=0)
    torch.testing.assert_close(reals.pictures, reals.images)


def test_methods_answer_for_every_real_image(problem):
    reals = problem.of_reals()
    scored = NearestNeighbour().score(reals)
    exact = torch.cdist(reals.images.flatten(1), problem.data[0]).amin(1)
    torch.testing.assert_close(scored.values, exact.double())
