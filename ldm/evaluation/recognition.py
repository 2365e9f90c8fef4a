"""Recognition rate: does a classifier trained on real images see the class that a sample was made for?"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike
from sklearn.svm import SVC


class PixelClassifier:
    """A support vector machine on pixels (scikit-learn's defaults, RBF kernel): the right size for digits.

    Args:
        images: [N, ...] in [-1, 1]; labels: [N].
    """

    def __init__(self, images: ArrayLike, labels: ArrayLike):
        self.model = SVC().fit(self._flat(images), np.asarray(labels))

    @staticmethod
    def _flat(images: ArrayLike) -> np.ndarray:
        images = np.asarray(images, dtype=np.float64)
        return images.reshape(len(images), -1)

    def predict(self, images: ArrayLike) -> np.ndarray:
        """The most likely class of each image [N]."""
        return self.model.predict(self._flat(images))

    def recognised(self, images: ArrayLike, labels: ArrayLike) -> np.ndarray:
        """Whether each image [N, ...] is taken for its label [N]."""
        return self.predict(images) == np.asarray(labels)
