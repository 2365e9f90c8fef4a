"""Recognition: does a classifier of real images see the class a sample was made for, and is the sample a copy?"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import ArrayLike
from sklearn.decomposition import PCA
from sklearn.neighbors import NearestNeighbors
from sklearn.pipeline import make_pipeline
from sklearn.svm import SVC


class PixelClassifier:
    """A support vector machine on pixels (scikit-learn's defaults, RBF kernel): the right size for digits.

    Args:
        images: [N, ...] in [-1, 1]; labels: [N].
        balanced: give every class the same weight, however many images it has.
        components: look at no more than so many principal components of the pixels, where there are more of both
            pixels and images: for images larger than digits, minutes become seconds.
    """

    def __init__(self, images: ArrayLike, labels: ArrayLike, balanced: bool = False, components: int | None = None):
        flat = _flat(images)
        steps: list[Any] = [SVC(class_weight="balanced" if balanced else None)]
        if components is not None and min(flat.shape) > components:
            steps.insert(0, PCA(components, svd_solver="randomized", random_state=0))
        self.model = make_pipeline(*steps).fit(flat, np.asarray(labels))

    def predict(self, images: ArrayLike) -> np.ndarray:
        """The most likely class of each image [N]."""
        return self.model.predict(_flat(images))

    def recognised(self, images: ArrayLike, labels: ArrayLike) -> np.ndarray:
        """Whether each image [N, ...] is taken for its label [N]."""
        return self.predict(images) == np.asarray(labels)


def nearest_images(images: ArrayLike, references: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
    """Return the place of each image's nearest reference [K, ...], and their root mean square difference: both [N]."""
    flat = _flat(images)
    distances, places = NearestNeighbors(n_neighbors=1).fit(_flat(references)).kneighbors(flat)
    return places[:, 0], distances[:, 0] / flat.shape[1] ** 0.5


def nearest_distances(images: ArrayLike, references: ArrayLike) -> np.ndarray:
    """Root mean square difference of each image [N, ...] from its nearest reference [K, ...]: [N], 0 for a copy."""
    return nearest_images(images, references)[1]


def _flat(images: ArrayLike) -> np.ndarray:
    images = np.asarray(images, dtype=np.float64)
    return images.reshape(len(images), -1)
