"""What a checkpoint and an ensemble say of one member: its base, its heads, how they start and how they train."""

from __future__ import annotations

from dataclasses import asdict, dataclass

INITIALISATIONS = ("pretrained", "perturbed", "random", "anchored")
NULL_CLASSES = ("shared", "trained", "random")
ROW_RATES = ("none", "equal")
NOISE_OF_TARGETS = ("plain", "noisy")
# Keys of a member's record in checkpoints where they differ from the names of its fields.
ON_DISK = {"base_path": "trunk_path", "base_sha256": "trunk_sha256"}


@dataclass(frozen=True)
class MemberRecord:
    """Which ensemble member a run trains, on which base checkpoint, how its heads start, and how their rows train.

    Args:
        index: number of the member.
        seed: of its draws.
        base_path: the base checkpoint.
        base_sha256: SHA-256 of that file.
        heads: names or patterns, as they were asked for.
        patterns: state-dict patterns of the heads.
        init: one of `INITIALISATIONS`.
        noise: standard deviation of a perturbed start, in row standard deviations.
        null_class: "shared" (the pretrained row, one for all members, never trained), "trained" (each member's own, by
            label dropout), or "random" (each member's own start, never trained: as published).
        anchor: precision of an anchored member's pull to its start; None for any other.
        row_rates: "none" (AdamW) or "equal" (`RowAdam`).
        row_cap: the largest multiple of the learning rate of "equal".
        layers: patterns of the layers that get low-rank factors, see `ldm.modules.low_rank`; none without.
        rank: of these factors.
        targets: "plain", or "noisy": an anchored member's have noise of their own, see `TargetNoise`.

    Raises:
        ValueError: for a value that is not one of these, or values that do not go together.
    """

    index: int
    seed: int
    base_path: str
    base_sha256: str
    heads: tuple[str, ...]
    patterns: tuple[str, ...]
    init: str = "perturbed"
    noise: float = 0.5
    null_class: str = "shared"
    anchor: float | None = None
    row_rates: str = "none"
    row_cap: float = 2000.0
    layers: tuple[str, ...] = ()
    rank: int = 0
    targets: str = "plain"

    def __post_init__(self) -> None:
        choices = {
            "null_class": NULL_CLASSES,
            "init": INITIALISATIONS,
            "row_rates": ROW_RATES,
            "targets": NOISE_OF_TARGETS,
        }
        for name, known in choices.items():
            if getattr(self, name) not in known:
                raise ValueError(f"heads.{name} must be one of {known}, got '{getattr(self, name)}'")
        if (self.anchor is not None) != (self.init == "anchored"):
            raise ValueError(f"heads.anchor goes with heads.init: anchored, got anchor {self.anchor}, init {self.init}")
        if self.anchor is not None and not self.anchor > 0:
            raise ValueError(f"heads.anchor is a precision and must be positive, got {self.anchor}")
        if self.targets == "noisy" and self.anchor is None:
            raise ValueError(f"heads.targets: noisy goes with heads.init: anchored, got init {self.init}")
        if not self.row_cap >= 1:
            raise ValueError(f"heads.row_cap is the largest multiple of the learning rate, at least 1: {self.row_cap}")

    def as_dict(self) -> dict[str, object]:
        """Return plain containers for checkpoints and YAML, under the keys that these have on disk."""
        values = {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(self).items()}
        if not self.layers:  # records of other members are as they were
            del values["layers"], values["rank"]
        if self.targets == "plain":
            del values["targets"]
        return {ON_DISK.get(name, name): value for name, value in values.items()}
