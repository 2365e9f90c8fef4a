"""In which ranges numbers lie, by the names of options and of constructors' arguments: one table for both."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Range:
    """The numbers from `low` to `high`, ends included unless `open_low` or `open_high` says so.

    Args:
        also: further values, which stand for something else, -1 for example.
        infinite: whether infinity is one of them.
    """

    low: float = -math.inf
    high: float = math.inf
    open_low: bool = False
    open_high: bool = False
    also: tuple[float, ...] = ()
    infinite: bool = False

    def holds(self, value: float) -> bool:
        """Whether a number lies in the range; NaN lies in none."""
        if value in self.also:
            return True
        if math.isnan(value) or (math.isinf(value) and not self.infinite):
            return False
        above = value > self.low if self.open_low else value >= self.low
        return above and (value < self.high if self.open_high else value <= self.high)

    def __str__(self) -> str:
        low = "" if math.isinf(self.low) else f"above {self.low:g}" if self.open_low else f"at least {self.low:g}"
        high = "" if math.isinf(self.high) else f"below {self.high:g}" if self.open_high else f"at most {self.high:g}"
        words = " and ".join(word for word in (low, high) if word) or "finite"
        return f"{words} (or {', '.join(map('{:g}'.format, self.also))})" if self.also else words


FINITE = Range()
ANY_SIZE = Range(infinite=True)
COUNT = Range(low=1)
SEVERAL = Range(low=2)
NOT_NEGATIVE = Range(low=0)
POSITIVE = Range(low=0, open_low=True)
UP_TO_ONE = Range(low=0, high=1)
OPEN_SHARE = Range(low=0, high=1, open_low=True, open_high=True)
# Blocks of a network: each is built, so that a slip of the keyboard would fill the memory.
SOME_BLOCKS = Range(low=1, high=1000)
ANY_BLOCKS = Range(low=0, high=1000)
COUNT_OR_UNSET = Range(low=1, also=(-1,))
# Integers that torch holds.
# Sizes of floating-point numbers beyond which 32 bits overflow or vanish once they are squared or multiplied.
_SMALLEST, _LARGEST = 1e-30, 1e18
_LEAST, _GREATEST = -(2**63), 2**63 - 1
SEED = Range(low=_LEAST, high=_GREATEST)


def _name(kinds: Mapping[Range, str]) -> dict[str, Range]:
    return {name: kind for kind, names in kinds.items() for name in names.split()}


# Arguments of constructors, as configs name them. Each number of a list lies in the range.
PARAMETERS: dict[str, Range] = _name(
    {
        COUNT: "image_size img_size img_resolution input_size resolution image_shape channels in_channels in_chans "
        "out_channels out_ch ch model_channels n_channels hidden_size n_embed z_channels "
        "patch_size timesteps num_timesteps_cond batch_size global_batch_size "
        "n_classes max_length max_seq_len vocab_size rank n_labels factor dims ensemble_size "
        "ch_mult ch_mults cycle_lengths max_decay_steps latent_views width num_features "
        "disc_in_channels channel_mult_emb channel_mult_noise attn_channels_per_head context_dim max_images epochs "
        "ddim_steps N",
        COUNT_OR_UNSET: "num_heads num_head_channels num_heads_upsample",
        NOT_NEGATIVE: "num_workers weight_decay kl_weight disc_weight disc_factor codebook_weight perceptual_weight "
        "pixelloss_weight disc_start warm_up_steps f_min f_max f_start lr_min lr_max lr_start batch_frequency noise "
        "component comp_numb embed_dim label_dim n_stages input_perturbation "
        "original_elbo_weight l_simple_weight "
        "lr_g_factor every_n_epochs every_n_steps every_n_train_steps shift init_std "
        "ddim_eta verbosity_interval",
        SOME_BLOCKS: "num_blocks n_blocks n_layer transformer_depth disc_num_layers",
        ANY_BLOCKS: "depth num_res_blocks",
        POSITIVE: "scale_factor cosine_s P_std sigma_data channel_mult mlp_ratio time_scale qk_scale attn_scale "
        "learning_rate base_learning_rate sigma_max",
        OPEN_SHARE: "linear_start linear_end",
        UP_TO_ONE: "dropout label_dropout class_dropout_prob ucg_rate embedding_dropout v_posterior test_fraction "
        "probability smallest largest decay given_betas",
        SEED: "seed",
        ANY_SIZE: "S_max S_tmax sigma_upper",
    }
)
# Options of commands, by their names on the command line.
OPTIONS: dict[str, Range] = _name(
    {
        COUNT: "n n_per_class n_train n_test batch_size draws every shown patches repeats epochs tuning_epochs copies "
        "top rounds points frames columns members components ensemble_comps classes_at_once data_size rank bins "
        "size image_size picture_size width depth quality_n real images_per_pass jobs max_n states map_size by_steps "
        "flow_steps diffusion_steps sample_sizes splits steps cut cpus seeds chunk "
        "deep_every shallow_blocks calibrate tests",
        SEVERAL: "particles random kid_subset_size noise_levels variants compare",
        NOT_NEGATIVE: "resamples fid_resamples kid_subsets probes image shift warm_up hidden_from rotation strength "
        "prior_precision sigma_noise label epoch every_n_epochs every_n_steps gpus map_class component "
        "observations sizes size_observations map_observations unc_branch branch_t index sigma_min pair t step "
        "guide_epoch",
        POSITIVE: "temperature visits sigmas precisions learning_rate tuning_rate limit ci_width sigma low high rho "
        "between sigma_max prior_kappa prior_shape prior_rate",
        UP_TO_ONE: "eta branch_at levels noise_share keep guidance_rescale",
        OPEN_SHARE: "validation risk confidence flag held_out",
        Range(low=0, high=100): "percentile",
        Range(low=0, high=10): "steer_steps",  # a power of a variance
        Range(low=0, infinite=True): "eps_window guidance_interval",
        SEED: "seed interpolate",
    }
)
# Options that mean one thing as a number, and another as a list.
LISTED = {"seeds": SEED}
# Options that name different things, each of which is done once.
DISTINCT = frozenset(
    [
        "metrics",
        "kinds",
        "scores",
        "space",
        "keep_images",
        "distortions",
        "levels",
        "sample_sizes",
        "sigmas",
        "precisions",
        "layers",
        "control_maps",
    ]
)
# Lists that hold at least one number.
FILLED = ("channel_mult", "ch_mult", "ch_mults", "cycle_lengths", "warm_up_steps", "f_min", "f_max", "f_start")


def check_range(name: str, value: Any, ranges: Mapping[str, Range], shown: str) -> None:
    """Make sure that the numbers in a value lie in the range of its name, and are finite where none is given.

    Args:
        name: in `ranges`.
        value: a number, a list of them, or anything else, which is passed over.
        ranges: by name.
        shown: the name that a message gives.

    Raises:
        ValueError: naming the value and the range.
    """
    listed = isinstance(value, Sequence) and name in LISTED
    allowed = LISTED[name] if listed else ranges.get(name, FINITE)
    if name in FILLED and isinstance(value, Sequence) and not value:
        raise ValueError(f"{shown} must hold at least one number, got an empty list")
    for one in _numbers(value):
        if isinstance(one, int) and not _LEAST <= one <= _GREATEST:
            raise ValueError(f"{shown} must fit into 64 bits, got {_shown(value)}")
        if not allowed.holds(one):
            raise ValueError(f"{shown} must be {allowed}, got {_shown(value)}")
        if isinstance(one, float) and math.isfinite(one) and one and not _SMALLEST <= abs(one) <= _LARGEST:
            raise ValueError(f"{shown} must be 0 or of a size from {_SMALLEST:g} to {_LARGEST:g}, got {_shown(value)}")


def _shown(value: Any) -> str:
    words = str(list(value) if isinstance(value, tuple) else value)
    return words if len(words) < 100 else f"{words[:100]} ..."


def _numbers(value: Any) -> Iterable[float]:
    if isinstance(value, bool):
        return
    if isinstance(value, (int, float)):
        yield value
    elif isinstance(value, Sequence) and not isinstance(value, str | bytes):
        for one in value:
            yield from _numbers(one)
