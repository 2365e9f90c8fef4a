"""`decu data latents`: the latents of a training's images, encoded before it starts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from ldm.commands.train import add_training_words
from ldm.settings import Training


@dataclass(frozen=True)
class EncodeLatents:
    """Encode the images of a training once, before it starts, in any number of processes: its latent cache.

    Examples:
      decu data latents --base configs/latent-diffusion/digits-vq.yaml data.params.latent_cache=data/latents
      torchrun --nproc_per_node 8 -m -- ldm data latents --base configs/latent-diffusion/cin256-v2.yaml \\
          --start_from_pretrained --component all --members 5 --ensemble_name b data.params.latent_cache=data/latents

    Takes the options of the training's own command (`decu train --help`); the training with the same options finds the
    latents, and encodes what is missing. Processes of torchrun and of SLURM arrays take shares; what was stopped
    continues.
    """

    training: Training

    def add_words(self, words: Sequence[str]) -> EncodeLatents:
        """Return the command with further words: options of Lightning's Trainer, and a.b=c over the config."""
        return replace(self, training=add_training_words(self.training, words))

    def run(self) -> bool:
        """Encode this process's share; return whether all latents are there.

        Raises:
            ValueError: if no folder of latents is named.
        """
        from ldm.jobs import pick_device
        from ldm.training.latent_cache import find_cached_modules, prepare_latents
        from ldm.training.logs import start_logging
        from ldm.training.session import prepare_data, prepare_model, read_training_config

        start_logging()
        config = read_training_config(self.training)
        model = prepare_model(config, self.training)
        data = prepare_data(config, self.training)
        if not find_cached_modules(data):
            raise ValueError("name the folder of the latents: data.params.latent_cache=DIR")
        complete = prepare_latents(model, config, data, pick_device(), finish=False)
        print("complete" if complete else "this process's share is done")
        return complete
