# %% [markdown]
# # Your own pictures: which of my classes does the model not know?
#
# From a folder of pictures to a page that ranks its classes by what the model does not know of them. The
# pictures are drawn here, so that nothing is fetched: coloured shapes of 32 x 32 pixels in six classes, of
# which two are rare. With pictures of your own leave out the first two cells and name your folder. On one CPU
# core the whole takes most of an hour.

# %% [markdown]
# ## Pictures
#
# A disc, a ring, a square, a bar, and two rare classes.

# %%
import zlib
from pathlib import Path

import numpy as np
from PIL import Image

COUNTS = {"red_disc": 240, "blue_ring": 240, "green_square": 240, "orange_bar": 240}
COUNTS |= {"purple_cross": 16, "yellow_triangle": 4}
COLOURS = {"red": (214, 58, 52), "blue": (40, 96, 200), "green": (52, 148, 76), "orange": (232, 138, 36)}
COLOURS |= {"purple": (134, 66, 168), "yellow": (228, 196, 48)}
SIDE = 32
CHANGES = ()  # of the config, ("lightning.trainer.max_steps=4000",) for example
PICTURES = Path("pictures")


def draw_mask(shape: str, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Return where a shape of radius 1 around the origin is, of coordinates [H, W]."""
    radius = np.hypot(x, y)
    masks = {
        "disc": radius < 1,
        "ring": (radius < 1) & (radius > 0.55),
        "square": np.maximum(abs(x), abs(y)) < 0.85,
        "bar": (abs(x) < 0.35) & (abs(y) < 1),
        "cross": (np.minimum(abs(x), abs(y)) < 0.3) & (radius < 1),
        "triangle": (y > -0.6) & (abs(x) * 1.6 + y < 0.9),
    }
    return masks[shape]


def draw_picture(name: str, number: int) -> Image.Image:
    """Draw a picture of a class, 32 x 32, its place, size and background by its number."""
    source = np.random.Generator(np.random.PCG64([zlib.crc32(name.encode()), number]))
    colour, _, shape = name.partition("_")
    fine = 4 * SIDE
    y, x = np.mgrid[:fine, :fine] / fine * 2 - 1
    middle, size = source.uniform(-0.25, 0.25, 2), source.uniform(0.45, 0.65)
    mask = draw_mask(shape, (x - middle[0]) / size, (middle[1] - y) / size)
    light = source.uniform(200, 245) + 12 * y
    pixels = np.where(mask[..., None], np.array(COLOURS[colour]) + source.normal(0, 10, 3), light[..., None])
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).resize((SIDE, SIDE), Image.Resampling.BOX)


for name, count in COUNTS.items():
    (PICTURES / name).mkdir(parents=True, exist_ok=True)
    for number in range(count):
        draw_picture(name, number).save(PICTURES / name / f"{number:03}.png")

# %% [markdown]
# ## Look at the folder before anything is trained

# %%
from ldm.commands.new import CheckData, New, Pictures

CheckData(Pictures(str(PICTURES))).run()

# %% [markdown]
# ## Write a config that trains
#
# `decu new --data pictures --size 32 --out shapes.yaml`.

# %%
CONFIG = Path("shapes.yaml")
if not CONFIG.exists():
    New(Pictures(str(PICTURES)), size=SIDE, out=str(CONFIG)).run()

# %% [markdown]
# The config has a comment beside each key; change what you know better. The next command trains a base model
# and five members, gathers them, samples and measures. Every step prints its own command, and a run that was
# stopped goes on.

# %% [markdown]
# ## Train and measure all
#
# `decu uncertainty study --config shapes.yaml`.

# %%
from ldm.commands.study import Study

page = Study(str(CONFIG), members=5, changes=CHANGES).run()
print(page)

# %% [markdown]
# Open the page in a browser. The same numbers are a table, a row a class:

# %% [markdown]
# ## Classes by what is not known of them

# %%
from ldm.report.tables import read_csv

(table,) = page.parent.glob("samps_uncs_branch*/uncertainty.csv")
rows = sorted(read_csv(table), key=lambda row: -row["mi_mean"])
for row in rows:
    count = COUNTS[row["name"]]
    interval = f"[{row['mi_low']:.4f}, {row['mi_high']:.4f}]"
    print(f"{row['name']:>16}: {row['mi_mean']:.4f} nats, 95 % {interval}, {count} pictures")

# %% [markdown]
# Rare classes come first where the model tells them apart. What to make of the numbers: [how to read the
# numbers](../reading.md).
