"""The classes of a model as its members know them: names, images per class, and who saw which class."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from numbers import Integral
from typing import Any, NamedTuple

from ldm.ensembles.naming import names_class

MASKED = "masked_classes"
# Pictures of no more classes than this show all of them where none are named.
SHOW_ALL = 20


class Groups(NamedTuple):
    """The members that saw a class in training, and those that it was hidden from."""

    certain: tuple[int, ...]
    uncertain: tuple[int, ...]


def class_size_order(size: Any) -> float:
    """A number of images per class as a sort key; "all" comes last."""
    return float("inf") if size == "all" else float(size)


@dataclass(frozen=True)
class Classes:
    """The real classes of a model, without the null class of guidance.

    Attributes:
        count: number of classes.
        names: one name a class; numbers stand for names where none are known.
        sizes: {class: training images, or "all"}; empty where none are recorded.
        masked: whether classes were hidden from members.
        sees: {member: classes that it saw}; of masked classes only.
        members: number of members.
        natural: whether the sizes are the classes' own numbers of images, and not chosen.
    """

    count: int
    names: tuple[str, ...] = ()
    sizes: Mapping[int, Any] = field(default_factory=dict)
    masked: bool = False
    sees: Mapping[int, frozenset[int]] = field(default_factory=dict)
    members: int = 1
    natural: bool = False

    @classmethod
    def from_record(cls, spec: Mapping[str, Any], count: int, members: int) -> Classes:
        """Read what an ensemble's record says of its classes."""
        sees = {int(member): frozenset(labels) for member, labels in (spec.get("sees") or {}).items()}
        sizes = {int(label): size for label, size in (spec.get("bins") or {}).items()}
        names = tuple(spec.get("class_names") or ())
        natural = bool(spec.get("natural"))
        return cls(count, names, sizes, spec.get("split") == MASKED, sees, members, natural)

    @classmethod
    def of_choices(cls, names: Sequence[str], spec: Mapping[str, Any], members: int) -> Classes:
        """Describe prompts by what an ensemble's record says of the classes that they name.

        "two small sevens" names seven (`ldm.ensembles.naming`). A prompt has the least number of training images of
        its classes, and those members saw it that saw all of them. What names no class has neither.
        """
        every = cls.from_record(spec, len(spec.get("class_names") or ()), members)
        named = [every.named_in(name) for name in names]
        sizes = {
            prompt: min((every.sizes[label] for label in labels), key=class_size_order)
            for prompt, labels in enumerate(named)
            if labels and all(label in every.sizes for label in labels)
        }
        masked = every.masked and bool(every.sees)
        sees = {member: frozenset(prompt for prompt, labels in enumerate(named) if seen.issuperset(labels))
                for member, seen in every.sees.items()}  # fmt: skip
        natural = every.natural and len(sizes) == len(names)
        return cls(len(names), tuple(names), sizes, masked, sees if masked else {}, members, natural)

    def named_in(self, text: str) -> list[int]:
        """Return the classes that a text names (`names_class`); the class that is called as the text goes first."""
        if text in self.names:
            return [self.names.index(text)]
        return [label for label, name in enumerate(self.names) if names_class(text, name)]

    def name(self, label: int) -> str:
        """Return the name of a class."""
        return self.names[label] if self.names else str(label)

    def groups(self, label: int) -> Groups | None:
        """Return the members that saw class `label` and those that did not; None where no class is hidden.

        Raises:
            ValueError: if classes were hidden and the record does not say which classes each member saw.
        """
        if not self.masked:
            return None
        if not self.sees:
            raise ValueError(
                f"the ensemble's record has split {MASKED} but no key 'sees' ({{member: [classes]}}): "
                "gather the ensemble again with save_ensemble.py"
            )
        certain = tuple(member for member in range(self.members) if label in self.sees.get(member, ()))
        return Groups(certain, tuple(member for member in range(self.members) if member not in certain))

    def describe(self, label: int) -> str:
        """Return the name of a class and its number of images, for a picture."""
        size = None if self.masked else self.sizes.get(label)
        return self.name(label) + ("" if size is None else f"\n{size} image{'s' * (size != 1)}")

    def member_names(self, label: int | None = None) -> list[str]:
        """Return names of the members for a picture; of masked classes with what each knows of class `label`."""
        groups = None if label is None else self.groups(label)
        knows = [""] * self.members
        if groups is not None:
            knows = [" (saw it)" if member in groups.certain else " (hidden)" for member in range(self.members)]
        return [f"member {member}{known}" for member, known in enumerate(knows)]

    def spread(self, count: int = 10) -> list[int]:
        """Return up to `count` classes, evenly over their numbers of images, else evenly over the labels."""
        if len(set(self.sizes.values())) < 2:
            last = self.count - 1
            chosen = min(count, self.count)
            return sorted({round(place * last / max(1, count - 1)) for place in range(chosen)})
        by_size: dict[Any, list[int]] = {}
        for label in self._by_size(self.sizes):
            by_size.setdefault(self.sizes[label], []).append(label)
        found = []
        for place in range(max(map(len, by_size.values()))):
            for labels in by_size.values():
                found += labels[place : place + 1]
        return self._by_size(found[:count])

    def _by_size(self, labels: Any) -> list[int]:
        return sorted(labels, key=lambda label: (class_size_order(self.sizes[label]), label))

    def choose(self, given: Sequence[int | str] | None, count: int | None = 10) -> list[int]:
        """Return the classes given, by number or by name; where there are none, all of up to 20, else some.

        Args:
            given: numbers or names.
            count: how many of more than 20 are taken, evenly spread; None takes all.

        Raises:
            ValueError: for a class that the model does not have, or that comes twice.
        """
        if isinstance(given, str):
            raise ValueError(f"classes are a list of numbers or names, got '{given}' alone: put it into a list")
        if given is None or not len(given):
            every = self.count if self.count <= SHOW_ALL else count
            return list(range(self.count)) if count is None else self.spread(every or self.count)
        labels = [self.number(one) for one in given]
        if len(set(labels)) != len(labels):
            raise ValueError(f"--classes takes different classes of 0..{self.count - 1}, got {list(given)}")
        return labels

    def left_out(self, labels: Sequence[int]) -> str:
        """Return how many classes of how many a picture shows, for its title; nothing where it shows all."""
        return f"; {len(labels)} of {self.count} classes" if len(labels) < self.count else ""

    def number(self, given: int | str) -> int:
        """Return the number of a class that is given by number or by name.

        Raises:
            ValueError: if there is no such class, or several have this name.
        """
        if isinstance(given, bool) or not isinstance(given, (str, Integral)):
            raise ValueError(f"a class is given by its number or its name, got {given!r}")
        if isinstance(given, Integral) or (given.isdigit() and given not in self.names):
            if not 0 <= int(given) < self.count:
                raise ValueError(f"--classes takes different classes of 0..{self.count - 1}, got {given}")
            return int(given)
        found = [label for label, name in enumerate(self.names) if name == given]
        if len(found) != 1:
            known = ", ".join(self.names[:12]) + (", .." if len(self.names) > 12 else "")
            how = "there is no class" if not found else "several classes are"
            names = f"the names are {known}" if self.names else "this model's record has no names of classes"
            raise ValueError(f"--classes: {how} named '{given}'; {names}; numbers 0..{self.count - 1} do as well")
        return found[0]
