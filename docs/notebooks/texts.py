# %% [markdown]
# # Texts: which words does the model not know?
#
# A model of texts is asked as a model of classes is: prompts are its classes. The ensemble is that of
# [captioned digits](../text.md#captioned-digits), three members of a small transformer's token table, four
# words of which were hidden from two members each. Its commands, given there, take about eight minutes on one
# CPU core and leave it in `logs/masked/masked_captions_3`.

# %%
from pathlib import Path

from ldm import Branching, Sampling, load_ensemble
from ldm.images import save_image, tile_images

RESULTS = Path("results/texts")
PROMPTS = ["a handwritten three", "a bold three", "a handwritten seven", "a bold seven"]

ensemble = load_ensemble("logs/masked/masked_captions_3", Sampling(steps=20)).with_prompts(PROMPTS)

# %% [markdown]
# ## What members draw of a prompt
#
# A row a member, a column a prompt. *three* was hidden from two members, *seven* from none.

# %%
pictures = ensemble.sample(n=1)
save_image(tile_images(pictures.flatten(0, 1), columns=len(PROMPTS), zoom=4), RESULTS / "members.png", overwrite=True)

# %% [markdown]
# ## How much they disagree
#
# Nats, at most ln 3 = 1.10 with three members.

# %%
info = ensemble.information(n=8, branching=Branching(at=0.0))
for name, found in zip(info.names, info.interval, strict=True):
    print(f"{name:>20}: {found.estimate:.4f} nats, 95 % [{found.low:.4f}, {found.high:.4f}]")

# %% [markdown]
# Words differ by themselves, hidden or not: compare with members that saw all words before you believe a
# difference ([the control](../text.md#captioned-digits)).
