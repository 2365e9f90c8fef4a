# %% [markdown]
# # Reading a report
#
# `decu uncertainty classes` leaves a table, a summary and a page. This notebook reads the table of the
# digits' ensemble, and asks of it what one should ask of any: is there an order, is it known, is it due to
# the number of images, is there room left?

# %%
import itertools
from pathlib import Path

from ldm import Branching
from ldm.commands.shared import EnsembleSource
from ldm.commands.uncertainty_classes import UncertaintyClasses
from ldm.report.tables import read_comments, read_csv

ENSEMBLE = Path("logs/bootstrapped_digits_5")
FOLDER = ENSEMBLE / "samps_uncs_branch0"

if not (FOLDER / "uncertainty.csv").exists():
    UncertaintyClasses(EnsembleSource(str(ENSEMBLE)), branching=Branching(step=0)).run()

# %% [markdown]
# ## How it was made
#
# The first lines of a table say how it was made, down to the hashes of the weights: two tables compare where
# these lines agree.

# %%
print("\n".join(line for line in read_comments(FOLDER / "uncertainty.csv") if "sha256" not in line))

# %% [markdown]
# ## Is there an order, and is it known?
#
# Classes whose intervals do not overlap have a known order. The interval is over noises, for these members:
# it says nothing of other trainings.

# %%
rows = sorted(read_csv(FOLDER / "uncertainty.csv"), key=lambda row: -row["mi_mean"])
for one, other in itertools.pairwise(rows):
    known = "above" if one["mi_low"] > other["mi_high"] else "not told from"
    print(f"{one['name']} ({one['mi_mean']:.2e} nats, {one['bin']} images) is {known} {other['name']}")

# %% [markdown]
# ## Is it due to the number of images?
#
# The last comments hold Spearman's correlation with the images per class, its ceiling and interval. Within a
# bin all classes have as many images, so that what differs there is something else.

# %%
for name in dict.fromkeys(row["bin"] for row in rows):
    values = [row["mi_mean"] for row in rows if row["bin"] == name]
    print(f"{name} images: {len(values)} classes, {min(values):.2e} to {max(values):.2e} nats")

# %% [markdown]
# ## Is there room left?
#
# `saturation` is the share of noises at which the information lies above 0.95 ln M. Above 0 the members
# cannot show more, and the order near the top is not to be trusted: branch later, or train more members.

# %%
print(f"greatest saturation: {max(row['saturation'] for row in rows):.2f}")

# %% [markdown]
# [How to read the numbers](../reading.md) has the same in words, and which method answers which question.
