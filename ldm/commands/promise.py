"""A promise beside a rejection: how much is promised, who judges, and the table of what came of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from ldm.options import option

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from ldm.evaluation.filtering import Positions
    from ldm.evaluation.promises import Promise
    from ldm.records import Row

# The score that knows nothing, as a control beside the others.
CHANCE = "random"
# Settings of samples in which those of a promise and those that it is applied to may differ.
FREE = ("seed",)


@dataclass(frozen=True)
class RiskOptions:
    """Which share of bad samples is promised at most, and who says which are bad."""

    acts_with: ClassVar[Mapping[str, str]] = {"judge": "risk", "confidence": "risk"}

    risk: Annotated[float | None, option(metavar="SHARE", default="no promise: keep a share")] = None
    """Promise that at most this share of the accepted samples is bad, in place of keeping a share."""
    confidence: float = 0.95
    """The probability with which all promises hold together, those of every score and class."""
    judge: Annotated[str | None, option(metavar="FILE", default="none; needed with --risk")] = None
    """Who says which samples are bad: NAME.safetensors of `decu evaluate classifier`, to which a sample is bad whose
    class it does not recognise, or a .csv with columns image and bad (0 or 1), of some of the samples or all."""
    promised: Annotated[str | None, option(metavar="DIR", default="none")] = None
    """Accept these samples, which nobody judged, by the thresholds of an earlier promise of samples made alike."""

    def __post_init__(self) -> None:
        if self.risk is not None and self.judge is None:
            raise ValueError(
                "--risk needs a --judge: a classifier's .safetensors, or a .csv with columns image and bad"
            )
        if self.risk is not None and self.promised is not None:
            raise ValueError("--promised takes the risk of an earlier promise: leave out --risk")

    @property
    def asked(self) -> bool:
        """Whether samples are accepted under a promise, a new one or an earlier one."""
        return self.risk is not None or self.promised is not None


@dataclass(frozen=True)
class Verdicts:
    """What a judge says: `positions` of the judged samples [N], ascending, and whether they are `bad` [N], 0 or 1."""

    positions: NDArray
    bad: NDArray


def ask_judge(judge: str, samples: Path, classes: Sequence[Any] | None, device: str) -> Verdicts:
    """Return the verdicts on samples: those of a file, or of a classifier, to which a wrong class is bad.

    Args:
        judge: a file with columns image and bad, or the weights of a classifier.
        samples: the folder of samples.npz.
        classes: of all samples, None for those of an unconditional model.

    Raises:
        ValueError: if the judge cannot judge these samples, with the reason.
    """
    return read_verdicts(judge, samples) if judge.endswith(".csv") else recognise(judge, samples, classes, device)


def read_verdicts(judge: str, samples: Path) -> Verdicts:
    """Read verdicts from a table with columns image (a position) and bad (0 or 1, or True and False)."""
    import numpy as np

    from ldm.report.tables import read_csv
    from ldm.report.variance import read_scores

    rows = read_csv(judge, ("image", "bad"), "give a row for each judged image: its position, and 0 or 1")
    verdicts: dict[int, int] = {}
    total = len(read_scores(samples))
    for number, row in enumerate(rows, 1):
        image = row["image"]
        if row["bad"] not in (0, 1) or isinstance(image, bool) or not isinstance(image, int):
            raise ValueError(f"{judge}, row {number}: expected a position and 0 or 1, got {image} and {row['bad']}")
        if not 0 <= image < total:
            raise ValueError(f"{judge}, row {number}: there is no image {image} among {total}")
        if image in verdicts:
            raise ValueError(f"{judge}, row {number}: image {image} is judged twice")
        verdicts[image] = int(row["bad"])  # type: ignore[arg-type]  # 0 or 1, checked above
    positions = np.array(sorted(verdicts))
    return Verdicts(positions, np.array([verdicts[position] for position in positions]))


def recognise(judge: str, samples: Path, classes: Sequence[Any] | None, device: str) -> Verdicts:
    """Judge samples by a classifier: bad is what it takes for another class than the one asked for."""
    import numpy as np
    import torch

    from ldm.evaluation.features import ClassifierFeatures
    from ldm.jobs import pick_device
    from ldm.pipelines.images import load_images

    if classes is None:
        raise ValueError("a classifier judges by the class, and these samples have none: give a .csv of verdicts")
    extractor = ClassifierFeatures(judge).to(pick_device(device))
    source = load_images(samples / "samples.npz", extractor.channels)
    known = extractor.sizes.n_classes
    wanted = np.array([int(each) for each in classes])
    if wanted.max() >= known:
        raise ValueError(f"{judge} knows {known} classes, and the samples are of class {wanted.max()} too")
    found = []
    with torch.no_grad():
        for start in range(0, len(source), 500):
            images = source.read(start, min(start + 500, len(source))).to(pick_device(device))
            logits = extractor.activations(images).logits
            assert logits is not None  # a classifier has them
            found.append(logits.argmax(1).cpu().numpy())
    return Verdicts(np.arange(len(source)), (np.concatenate(found) != wanted).astype(int))


@dataclass(frozen=True)
class Promises:
    """Promises by score and group of samples.

    Attributes:
        names: of the groups: class names, or `all`.
        groups: positions of each group among all samples.
        found: {score: the promise for each group}, the control `random` among them.
    """

    names: Sequence[str]
    groups: Sequence[Positions]
    found: Mapping[str, Sequence[Promise]]

    def rows(self) -> list[Row]:
        """Return a row for each score and group."""
        return [
            {
                "score": score,
                "of": name,
                "promised": each.holds,
                "threshold": each.threshold if each.holds else None,
                "accepted share": each.share,
                "accepted": each.accepted,
                "bad": each.bad,
                "bound": each.bound,
                "judged": each.judged,
                "bad without": each.all_bad / each.judged,
                "needed": each.needed,
            }
            for score, own in self.found.items()
            for name, each in zip(self.names, own, strict=True)
        ]

    def describe(self) -> str:
        """Say in words what each score promises, the control left out."""
        said = []
        for score, own in self.found.items():
            if score == CHANCE:
                continue
            first, more, kept = own[0], own[0].needed, sum(each.holds for each in own)
            if len(own) > 1:
                said.append(f"{score} promises something of {kept} of {len(own)} classes")
            elif kept:
                said.append(f"{score} accepts {first.share:.0%}, of which at most {first.bound:.2g} are bad")
            else:
                remedy = "the bad share is above the risk" if more is None else f"about {more} judged samples would do"
                said.append(f"{score} promises nothing: {remedy}")
        return "; ".join(said)

    def accepted(self, score: str, values: NDArray) -> Positions:
        """Return the positions of all samples, judged or not, that a score's promises accept, ascending."""
        import numpy as np

        kept = [group[each.accepts(values[group])] for group, each in zip(self.groups, self.found[score], strict=True)]
        return np.sort(np.concatenate(kept))


def make_promises(
    options: RiskOptions,
    scores: Mapping[str, NDArray],
    verdicts: Verdicts,
    groups: Mapping[str, Positions],
    seed: int,
) -> Promises:
    """Find for every score and group of samples the threshold under which the risk is promised.

    All thresholds of all scores and groups share the error; the control, a random score, is held to the same.

    Args:
        scores: {name: values [N]} of all samples.
        groups: {name: positions}, all samples or those of each class.
        seed: of the random score.

    Raises:
        ValueError: where a group has too few judged samples for any promise, with the number needed.
    """
    import numpy as np
    import torch

    from ldm.evaluation.promises import SHARES, RiskLevel, describe_shortage, promise_risk
    from ldm.util import generator

    assert options.risk is not None  # the caller asks for a promise
    level = RiskLevel(options.risk, options.confidence, len(SHARES) * len(scores) * len(groups))
    total = len(next(iter(scores.values())))
    bad = np.full(total, -1)
    bad[verdicts.positions] = verdicts.bad
    judged = {name: group[bad[group] >= 0] for name, group in groups.items()}
    scarce = {name: len(own) for name, own in judged.items() if len(own) < level.fewest}
    if scarce:
        name = min(scarce, key=lambda each: scarce[each])
        of = "" if list(groups) == ["all"] else f"class {name}: "
        raise ValueError(of + describe_shortage(scarce[name], level))
    chance = torch.rand(total, generator=generator("random score", seed), dtype=torch.float64).numpy()
    found = {
        score: [promise_risk(values[own], bad[own], level) for own in judged.values()]
        for score, values in {**scores, CHANCE: chance}.items()
    }
    return Promises(list(groups), list(groups.values()), found)


def sampling_settings(samples: Path) -> dict[str, Any]:
    """Return what the samples of a folder depend on, as their record says; empty without one."""
    from ldm.files import read_mapping

    file = samples / "record.json"
    found = read_mapping(file, "a command's record", "sample again").get("settings") if file.is_file() else None
    return dict(found or {})


def check_made_alike(promised: Path, samples: Path) -> None:
    """Make sure that samples are of the law that a promise is about.

    Raises:
        ValueError: naming the settings that differ.
    """
    from ldm.files import read_mapping

    file = promised / "record.json"
    before = read_mapping(file, "a command's record", "promise again").get("samples") if file.is_file() else None
    now = sampling_settings(samples)
    before = dict(before or {})
    changed = sorted(key for key in {*before, *now} - set(FREE) if before.get(key) != now.get(key))
    if changed:
        differences = ", ".join(f"{key}: {before.get(key)} -> {now.get(key)}" for key in changed)
        raise ValueError(f"the promise is about samples of other settings ({differences}): judge some of these")


def read_promised(folder: Path, scores: Sequence[str] | None) -> list[dict[str, Any]]:
    """Read the rows of a folder's promise.csv that promise something of some scores, all where None.

    Raises:
        ValueError: if there is none.
    """
    from ldm.report.tables import check_numbers, read_csv

    file = folder / "promise.csv"
    read = read_csv(file, ("promised", "score", "of", "threshold"))
    rows = [row for row in read if row["promised"] and row["score"] != CHANCE]
    check_numbers(file, rows, ("threshold",))
    found = [row for row in rows if scores is None or row["score"] in scores]
    if not found:
        raise ValueError(f"{folder} promises nothing of these scores: see its promise.csv")
    return found


def accept_rows(
    promised: Sequence[Mapping[str, Any]], rows: Sequence[Mapping[str, Any]]
) -> tuple[list[Row], dict[str, Positions]]:
    """Accept samples by thresholds.

    Args:
        promised: rows of a promise.
        rows: scores of the samples, a row an image.

    Returns:
        A row of counts for each threshold, and {score: accepted positions, ascending}.
    """
    import numpy as np

    table: list[Row] = []
    parts: dict[str, list[Positions]] = {}
    for row in promised:
        name = row["score"]
        if name not in rows[0]:
            raise ValueError(f"scores.csv has no {name}, which the promise is about: sample with the same measures")
        inside = np.array([row["of"] == "all" or each.get("class") == row["of"] for each in rows])
        below = np.array([float(each[name]) < float(row["threshold"]) for each in rows])
        accepted = np.flatnonzero(inside & below)
        parts.setdefault(name, []).append(accepted)
        counts = {"images": int(inside.sum()), "accepted": len(accepted)}
        table.append({"score": name, "of": row["of"], "threshold": row["threshold"], **counts})
    return table, {name: np.sort(np.concatenate(own)) for name, own in parts.items()}
