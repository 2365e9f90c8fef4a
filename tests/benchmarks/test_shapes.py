"""The folder of shapes is what its page says: classes from 80 to 5 pictures, as people have them."""

from pathlib import Path

import numpy as np
from PIL import Image

from benchmarks.shapes import Shapes


def test_the_folder_is_a_long_tail_of_mixed_pictures(tmp_path):
    assert Shapes(tmp_path / "a").run() == Shapes(tmp_path / "b").run() == 481
    counts = sorted(len(list(folder.iterdir())) for folder in (tmp_path / "a").iterdir())
    assert counts == [5, 8, 12, 30, 30, 36, 40, 48, 56, 64, 72, 80]
    pictures = {path: Image.open(path) for path in sorted((tmp_path / "a").rglob("*.*"))}
    modes = [image.mode for image in pictures.values()]
    assert (modes.count("RGBA"), modes.count("L")) == (18, 1)
    assert len({image.size for image in pictures.values()}) > 300 and len(modes) == 481
    for path, image in list(pictures.items())[::40]:
        again = Image.open(Path(str(path).replace("/a/", "/b/")))
        assert np.array_equal(np.asarray(image), np.asarray(again)), "the seed alone draws them"
    square = np.asarray(pictures[tmp_path / "a" / "yellow_square" / "yellow_square_000.jpg"]).astype(int)
    assert abs(square[square.shape[0] // 2, square.shape[1] // 2] - [240, 220, 40]).max() < 30
