"""How a training's checkpoints are read and written: whole, without code, and compared with what goes on from them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.plugins.io import TorchCheckpointIO

from ldm.checkpoint import check_fit, load_checkpoint, save_checkpoint

# What a checkpoint holds of a training that can go on; Lightning 2 writes `loops`, too, and adds them to earlier ones.
WHOLE: dict[str, Any] = {
    "state_dict": Mapping,
    "optimizer_states": Sequence,
    "lr_schedulers": Sequence,
    "global_step": int,
    "epoch": int,
    "pytorch-lightning_version": str,
}
NOT_FITTING = (
    "{path} does not fit the training that should go on from it ({words}): give another checkpoint of the run by "
    "--resume FILE, or the config that it was trained with"
)


class PlainCheckpointIO(TorchCheckpointIO):
    """Lightning's reading and writing through `ldm.checkpoint`: atomic, and no code in a file is ever run.

    Args:
        model: what is trained, with which a checkpoint is compared before anything of it is taken.
    """

    def __init__(self, model: pl.LightningModule | None = None):
        super().__init__()
        self.model = model
        self.states: tuple[int, int] | None = None  # of optimisers and of schedules, in what was read

    def save_checkpoint(self, checkpoint: Mapping[str, Any], path: str | Path, storage_options: Any = None) -> None:
        save_checkpoint(checkpoint, path, overwrite=True)

    def load_checkpoint(self, path: str | Path, map_location: Any = None, weights_only: bool | None = None) -> Any:
        content = load_checkpoint(path)
        kinds = WHOLE | ({"loops": Mapping} if str(content.get("pytorch-lightning_version", "")) >= "2" else {})
        broken = [name for name, kind in kinds.items() if not isinstance(content.get(name), kind)]
        broken += [name for name in ("global_step", "epoch") if name not in broken and content[name] < 0]
        broken += ["optimizer_states"] if not broken and not all(map(_is_state, content["optimizer_states"])) else []
        broken += ["loops"] if not broken and "loops" in kinds and "fit_loop" not in content["loops"] else []
        if broken:
            raise ValueError(
                f"{path} holds no whole training (it lacks {', '.join(broken)}, or they are damaged), and none can go "
                "on from it: give another checkpoint of the run, or begin a new run with its weights "
                f"(model.params.ckpt_path={path})"
            )
        if self.model is not None and not {"component", "components"} & set(content):
            try:
                check_fit(self.model, content["state_dict"], file=path)
            except ValueError as error:
                words = str(error).removeprefix(f"{path} ")
                raise ValueError(NOT_FITTING.format(path=path, words=words)) from error
        self.states = len(content["optimizer_states"]), len(content["lr_schedulers"])
        return content

    def check_states(self, trainer: pl.Trainer) -> None:
        """Make sure that what was read held the states of all optimisers and schedules.

        Raises:
            ValueError: if it held fewer or more.
        """
        made = len(trainer.optimizers), len(trainer.lr_scheduler_configs)
        if self.states is not None and self.states != made:
            raise ValueError(
                f"the checkpoint holds the states of {self.states[0]} optimisers and {self.states[1]} schedules of the "
                f"learning rate, and this training has {made[0]} and {made[1]}: give another checkpoint of the run"
            )


def _is_state(value: Any) -> bool:
    """Whether a value is laid out as the state of an optimiser is, or as those of members that train together."""
    if not isinstance(value, Mapping):
        return False
    if isinstance(value.get("members"), Sequence):
        return all(map(_is_state, value["members"]))
    return isinstance(value.get("state"), Mapping) and bool(value.get("param_groups"))
