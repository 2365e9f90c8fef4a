"""UNets of diffusers, in the stages that networks have here: `condition`, `features`, `readout`.

The classes are diffusers' own with their constructors, modules and key names. Their call is that of a network here,
`(x, timesteps, context, y)`, and gives a tensor.
"""

from __future__ import annotations

from typing import Any

from diffusers import UNet2DConditionModel, UNet2DModel
from torch import Tensor, nn

from ldm.interop.transforms import accept_any_layout, exact_attention
from ldm.modules.parts import Parts

# Arguments that make a UNet another one, and the values of them that are taken.
PLAIN: dict[str, tuple[Any, ...]] = {
    "class_embed_type": (None,),
    "addition_embed_type": (None,),
    "encoder_hid_dim_type": (None, "text_proj"),
    "class_embeddings_concat": (False,),
    "time_embedding_type": ("positional", "learned"),
    "time_cond_proj_dim": (None,),
    "attention_type": ("default",),
}


def refuse_variants(config: Any) -> None:
    """Check that a UNet is one whose only conditions are time, class and context.

    Raises:
        ValueError: naming the argument.
    """
    for name, allowed in PLAIN.items():
        if config.get(name, allowed[0]) not in allowed:
            raise ValueError(
                f"{name} of a UNet of diffusers must be one of {list(allowed)} here (time, class labels and a context "
                f"are its conditions); got '{config[name]}'"
            )
    skips = [name for name in (*config["down_block_types"], *config["up_block_types"]) if "Skip" in name]
    if skips:
        raise ValueError(f"blocks that pass the image on beside the features are not taken here: {skips}")


class _UNetStages:
    """What the two UNets of diffusers share, as stages; mixed in before diffusers' class."""

    in_channels: int
    out_channels: int
    context_dim: int | None

    @property
    def num_classes(self) -> int | None:
        """Rows of the class table; None where there is none."""
        table = self.class_embedding
        return table.num_embeddings if isinstance(table, nn.Embedding) else None

    @property
    def taps(self) -> dict[str, str]:
        """Names of the blocks that features are read from: {tap: submodule}, in the order of computation."""
        down = [
            f"down_blocks.{level}.resnets.{index}"
            for level, block in enumerate(self.down_blocks)
            for index in range(len(block.resnets))
        ]
        up = [
            f"up_blocks.{level}.resnets.{index}"
            for level, block in enumerate(self.up_blocks)
            for index in range(len(block.resnets))
        ]
        middle = {} if self.mid_block is None else {"mid": "mid_block"}
        below = {f"in_{count}": name for count, name in enumerate(["conv_in", *down])}
        return below | middle | {f"out_{count}": name for count, name in enumerate(up, 1)}

    @property
    def parts(self) -> Parts:
        """Where the UNet keeps its parts, by diffusers' names."""
        classes = self.num_classes is not None
        time = ("time_embedding.*", "time_proj.*")
        return Parts(
            class_tables={"class_embedding.weight": 0} if classes else {},
            time_embedding=time,
            condition=(*time, "class_embedding.*") if classes else time,
            output=("conv_norm_out.*", "conv_out.*"),
            last_layer="conv_out",
            taps=self.taps,
        )

    def forward(self, x: Tensor, timesteps: Tensor, context: Tensor | None = None, y: Tensor | None = None) -> Tensor:
        """`[B, out_channels, H, W]` of states `[B, C, H, W]`, times `[B]`, a context `[B, L, D]` and labels `[B]`."""
        return self.readout(self.backbone(x, timesteps, context, y))

    def backbone(self, x: Tensor, timesteps: Tensor, context: Tensor | None = None, y: Tensor | None = None) -> Tensor:
        """The input `[B, F, H, W]` of the last norm; arguments of `forward`."""
        return self.features(x, self.condition(timesteps, y), context)

    def condition(self, timesteps: Tensor, y: Tensor | None = None) -> Tensor:
        """Embedding `[B, E]` of times `[B]` and labels `[B]`.

        Raises:
            ValueError: if there are labels and no class table, or a class table and no labels.
        """
        if (y is None) != (self.num_classes is None):
            raise ValueError(f"labels are needed exactly if the UNet has a class table ({self.num_classes} rows)")
        learned = isinstance(self.time_proj, nn.Embedding)
        t = self.time_proj(timesteps.long() if learned else timesteps)
        embedding = self.time_embedding(t.to(self.dtype))  # [B, E]
        if y is not None:
            embedding = embedding + self.class_embedding(y)
        act = getattr(self, "time_embed_act", None)
        return embedding if act is None else act(embedding)

    def features(self, x: Tensor, emb: Tensor, context: Tensor | None = None) -> Tensor:
        """The input `[B, F, H, W]` of the last norm, for an embedding `[B, E]` and a context `[B, L, D]`.

        Raises:
            ValueError: if the size does not halve as often as the UNet halves it, or a context is missing.
        """
        self._check(x, context)
        with exact_attention():
            return self._torso(x, emb, context)

    def _torso(self, x: Tensor, emb: Tensor, context: Tensor | None) -> Tensor:
        x = 2 * x - 1 if self.config.center_input_sample else x
        if context is not None and self.config.get("encoder_hid_dim_type") == "text_proj":
            context = self.encoder_hid_proj(context)
        h = self.conv_in(x)
        skips = [h]
        for block in self.down_blocks:
            h, passed = block(hidden_states=h, temb=emb, **_context_for(block, context))
            skips.extend(passed)
        if self.mid_block is not None:
            h = self.mid_block(h, emb, **_context_for(self.mid_block, context))
        for block in self.up_blocks:
            count = len(block.resnets)
            passed = tuple(skips[-count:])
            del skips[-count:]
            h = block(hidden_states=h, temb=emb, res_hidden_states_tuple=passed, **_context_for(block, context))
        return h

    def readout(self, h: Tensor) -> Tensor:
        """Output `[B, out_channels, H, W]` of features `[B, F, H, W]`."""
        if self.conv_norm_out is not None:
            h = self.conv_act(self.conv_norm_out(h))
        return self.conv_out(h)

    def _check(self, x: Tensor, context: Tensor | None) -> None:
        factor = 2 ** (len(self.down_blocks) - 1)
        if x.shape[1] != self.in_channels or any(size % factor for size in x.shape[2:]):
            raise ValueError(
                f"x must be [B, {self.in_channels}, H, W] with H and W multiples of {factor}, got {list(x.shape)}"
            )
        if (context is None) != (self.context_dim is None):
            raise ValueError(f"a context [B, L, {self.context_dim}] is needed exactly if the UNet attends to one")


def _context_for(block: nn.Module, context: Tensor | None) -> dict[str, Tensor | None]:
    return {"encoder_hidden_states": context} if getattr(block, "has_cross_attention", False) else {}


class StagedUNet2D(_UNetStages, UNet2DModel):
    """`diffusers.UNet2DModel`: DDPM's UNet, unconditional or with a class table."""

    def __init__(self, **config: Any):
        super().__init__(**config)
        refuse_variants(self.config)
        accept_any_layout(self)
        self.in_channels = self.config.in_channels
        self.out_channels = self.config.out_channels
        self.context_dim = None


class StagedUNet2DCondition(_UNetStages, UNet2DConditionModel):
    """`diffusers.UNet2DConditionModel`: the UNet of Stable Diffusion, which attends to a context."""

    def __init__(self, **config: Any):
        super().__init__(**config)
        refuse_variants(self.config)
        accept_any_layout(self)
        widths = self.config.encoder_hid_dim or self.config.cross_attention_dim
        width, *others = {widths} if isinstance(widths, int) else set(widths)
        if others:
            raise ValueError(f"cross_attention_dim must be one width for all levels, got {widths}")
        self.in_channels = self.config.in_channels
        self.out_channels = self.config.out_channels
        self.context_dim = width
