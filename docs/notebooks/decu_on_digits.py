# %% [markdown]
# # DECU on digits
#
# Five members on one frozen base model of 8 x 8 digits. Some classes had 1 training image, some 10, some 50,
# some all: do the members know less of those with few? The notebook takes the ensemble that `bash
# scripts/quickstart.sh` leaves in `logs/bootstrapped_digits_5`, and trains it where there is none (about five
# minutes on two CPU cores).

# %%
from pathlib import Path

from ldm import Branching, Sampling, load_ensemble
from ldm.commands.study import Study
from ldm.images import heat_maps, save_image, tile_images

ENSEMBLE = Path("logs/bootstrapped_digits_5")
RESULTS = Path("results/decu_on_digits")

if not (ENSEMBLE / "ensemble.yaml").exists():
    Study("configs/latent-diffusion/digits.yaml").run()

# %% [markdown]
# ## What members draw
#
# A row a member, a column a class, the same noise everywhere. Columns where the rows differ are classes that
# the data did not settle.

# %%
ensemble = load_ensemble(ENSEMBLE, Sampling(steps=20))
pictures = ensemble.sample(n=1)  # [members, classes, C, H, W] in [-1, 1]
save_image(
    tile_images(pictures.flatten(0, 1), columns=pictures.shape[1], zoom=4), RESULTS / "members.png", overwrite=True
)

# %% [markdown]
# ## How much they disagree
#
# Mutual information between one step after the branch and the member, in nats: 0 where all members draw the
# same, at most ln 5 = 1.61. The interval is over the sixteen noises. Members branch at the noisiest step
# (`at=0`) and half-way.

# %%
for at in (0.0, 0.5):
    info = ensemble.information(n=16, branching=Branching(at=at))
    order = info.mean.argsort(descending=True).tolist()
    print(f"members branch at {at:g} of the steps; classes from the least known to the best known:")
    for place in order:
        found = info.interval[place]
        print(f"  {info.names[place]:>8}: {found.estimate:.2e} nats, 95 % [{found.low:.2e}, {found.high:.2e}]")

# %% [markdown]
# ## The same in a unit that models share
#
# The numbers above rank the classes of this model. Seen through noise of a tenth of the data's standard
# deviation, they compare with those of other models too.

# %%
shared = ensemble.information(n=8, branching=Branching(at=0.5), noise=0.1)
print(f"mean over classes: {float(shared.mean.mean()):.3f} nats behind noise of 0.1 standard deviations")

# %% [markdown]
# ## Where in the picture
#
# The same for each pixel of the final pictures. Bright pixels are those that members draw differently.

# %%
maps = ensemble.pixel_information(n=1)
found = maps.maps["image"][:, 0]  # [classes, H, W], nats
heat_maps(maps.images[:, 0], found, RESULTS / "pixels.png", "mutual information per pixel (nats)", overwrite=True)
print(*sorted(map(str, RESULTS.glob("*.png"))), sep="\n")

# %% [markdown]
# What the numbers can be trusted for: [how to read the numbers](../reading.md). What came out on digits over
# five assignments of images to classes: [ensembles](../ensembles.md).
