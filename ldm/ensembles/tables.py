"""Which parameters of a model hold something for each class, and which rows of tables the null condition reads."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor

# The factor of an embedder's low-rank correction that has a column a class.
LABEL_FACTOR = "lora_A"


@dataclass(frozen=True)
class ClassTables:
    """Which parameters of a model hold something for each class.

    Args:
        axes: {parameter name: the axis that counts the classes}.
        low_rank: names of low-rank factors A and B and of the table that they correct; None: there are none.
        null_class: the row of classifier-free guidance's null class; None: there is none.
        label_dropout: share of the labels that training replaces by the null class.
        null_tokens: {table of tokens: the rows that the empty text reads}.
    """

    axes: Mapping[str, int] = field(default_factory=dict)
    low_rank: tuple[str, str, str] | None = None
    null_class: int | None = None
    label_dropout: float = 0.0
    null_tokens: Mapping[str, tuple[int, ...]] = field(default_factory=dict)

    @property
    def has_null(self) -> bool:
        """Whether there is a null condition."""
        return self.null_class is not None or bool(self.null_tokens)

    def null_rows(self, parameters: Mapping[str, Tensor]) -> dict[str, tuple[int, tuple[int, ...]]]:
        """Return {table among the parameters: (axis, rows of the null condition)} of the tables that hold such rows."""
        found = {name: (0, rows) for name, rows in self.null_tokens.items() if name in parameters}
        for name, axis in self.axes.items():
            null = self.null_class
            if null is not None and name in parameters and 0 <= null < parameters[name].shape[axis]:
                found[name] = (axis, (null,))
        return found

    @classmethod
    def from_axes(cls, axes: Mapping[str, int], null_class: int | None, label_dropout: float) -> ClassTables:
        """Find the low-rank factors of an embedder's table among the parameters that hold something a class.

        Args:
            axes: see above; `...lora_A` corrects the table `...embedding.weight`, with `...lora_B`.
            null_class: of the model.
            label_dropout: of its training.
        """
        factor = next((name for name in axes if name.endswith(LABEL_FACTOR)), None)
        low_rank = None
        if factor is not None:
            prefix = factor.removesuffix(LABEL_FACTOR)
            low_rank = (factor, f"{prefix}lora_B", f"{prefix}embedding.weight")
        return cls(dict(axes), low_rank, null_class, label_dropout)
