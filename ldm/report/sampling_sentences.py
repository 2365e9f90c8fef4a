"""What tables of exposure, posteriors and their use say in sentences."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ldm.records import Row
from ldm.report.wording import is_known, list_names, name_class, number, write_ends, write_interval
from ldm.stats import mean_interval
from ldm.wording import count_noun

# Adjusted p values up to this are said to be other than chance.
MOST_P = 0.05
# Numbers of a fit's record.
_OF_FITS = ("images", "draws", "data_size", "visits", "entries", "prior_precision")


def describe_norms(rows: Sequence[Row]) -> list[str]:
    """Say how the length of the predicted noise differs in sampling, by rows of norms.csv."""
    found = []
    mark = "_over_training"
    for name in [column.removesuffix(mark) for column in rows[0] if column.endswith(mark)]:
        scaled = f"{name}_corrected" in rows[0]
        ratios = [row[f"{name}_corrected" if scaled else name] / row["training"] for row in rows]
        worst = max(range(len(rows)), key=lambda place: abs(ratios[place] - 1))
        mean = sum(ratios) / len(ratios)
        error = rows[worst].get(f"{name}_over_training_se")
        known = f" (± {200 * error:.2g}, two standard errors)" if is_known(error) else ""
        where = "With epsilon scaling, noise as it is used" if scaled else "Predicted noise"
        found.append(
            f"{where} is on average {_differs(mean)} in sampling than in training, and differs most in step "
            f"{worst + 1} of {len(rows)}, where it is {_differs(ratios[worst])}{known}; 0 % would be no exposure bias."
        )
    return found


def _differs(ratio: float) -> str:
    """Return how a length differs from 1, in percent."""
    return f"{100 * abs(ratio - 1):.2g} % {'longer' if ratio >= 1 else 'shorter'}"


def describe_states(rows: Sequence[Row]) -> list[str]:
    """Say how far states drift, by rows of states.csv."""
    last, found = rows[-1], []
    for name in [column.removesuffix("_delta") for column in rows[0] if column.endswith("_delta")]:
        where = "With epsilon scaling" if name == "scaled" else "Without scaling"
        found.append(
            f"{where}, delta_t after the last step is {number(last[f'{name}_delta'])}, and a perfect sampler's "
            f"{number(last['floor'])}; the squared distance of an element of x_t from the true one is "
            f"{number(last[f'{name}_w2'])}."
        )
    return found


def describe_choice(rows: Sequence[Row]) -> list[str]:
    """Say which epsilon scaling was chosen, by rows of choice.csv."""
    if "b" in rows[0]:
        metric = next(name for name in rows[0] if name != "b")
        best = min(rows, key=lambda row: row[metric])
        plain = next((row[metric] for row in rows if row["b"] == 1), None)
        beside = "" if plain is None else f"; b = 1, which scales nothing, has {number(plain)}"
        if best["b"] == 1:
            return [
                f"None of {len(rows)} values of b has less {metric} than b = 1, which scales nothing: {number(plain)}."
            ]
        edge = best["b"] in (min(row["b"] for row in rows), max(row["b"] for row in rows)) and len(rows) > 1
        found = [
            f"Of {len(rows)} values of b, {number(best['b'])} has the least {metric}, {number(best[metric])}{beside}."
        ]
        return (
            [*found, "The best b lies at the edge of what was tried: a better one may lie beyond."] if edge else found
        )
    rounds = [name for name in rows[0] if name.startswith("lambda_")]
    if not rounds:
        return []
    values = [row[rounds[-1]] for row in rows]
    return [
        f"Lambda, which predicted noise is divided by, lies between {number(min(values))} and {number(max(values))} "
        f"over {len(rows)} steps after {len(rounds)} rounds; 1 leaves the noise as it is."
    ]


def describe_scores(rows: Sequence[Row]) -> list[str]:
    """Say how large the variances of samples are, and of which class, by rows of scores.csv."""
    sums = [row["sum"] for row in rows]
    found = [
        f"The variance of a sample, summed over its pixels, is {write_interval(mean_interval(sums))} on average over "
        f"{len(rows)} samples, from {number(min(sums))} to {number(max(sums))}."
    ]
    groups: dict[str, list[float]] = {}
    for row in rows:
        if row.get("class") is not None:
            groups.setdefault(name_class(row), []).append(row["sum"])
    if len(groups) < 2:
        return found
    means = {name: mean_interval(values) for name, values in groups.items()}
    most, least = (choose(means, key=lambda name: means[name].estimate) for choose in (max, min))
    apart = means[most].low > means[least].high
    beside = "" if apart else "; their intervals do not lie apart"
    largest, smallest = (
        f"{name} ({write_interval(means[name])}, {count_noun(len(groups[name]), 'sample')})" for name in (most, least)
    )
    found.append(f"It is largest for {largest} and least for {smallest}{beside}.")
    return found


def describe_removals(rows: Sequence[Row]) -> list[str]:
    """Say which scores remove better than chance, by rows of table.csv of a filter."""
    found, untold = [], []
    ways = [row for row in rows if row["removed by"] != "none" and not str(row["removed by"]).startswith("random")]
    for metric in [name.removeprefix("p_") for name in rows[0] if name.startswith("p_")]:
        told = [row for row in ways if is_known(row[f"p_{metric}"]) and row[f"p_{metric}"] <= MOST_P]
        names = {
            word: [str(row["removed by"]) for row in told if (row[f"z_{metric}"] > 0) == better]
            for word, better in (("better", True), ("worse", False))
        }
        words = " and ".join(f"{word} than random removal by {list_names(own)}" for word, own in names.items() if own)
        if words:
            scores = count_noun(len(ways), "score")
            found.append(f"{metric} of what is kept is {words} (p at most {MOST_P:g} by Holm), of {scores}.")
        else:
            untold.append(metric)
    if untold:
        verb = "is" if len(untold) == 1 else "are"
        found.append(
            f"{list_names(untold)} of what is kept {verb} told from random removal by none of "
            f"{count_noun(len(ways), 'score')} (p at most {MOST_P:g} by Holm)."
        )
    return found


def describe_promises(rows: Sequence[Row]) -> list[str]:
    """Say which scores keep a promise, by rows of promise.csv."""
    kept = [row for row in rows if row["promised"]]
    if not kept:
        return [f"Nothing can be promised of {len(rows)} scores and groups; the table says how many samples would do."]
    if any(row["of"] != "all" for row in rows):
        return [" ".join(_count_classes(score, rows) for score in dict.fromkeys(row["score"] for row in rows))]
    best = max(kept, key=lambda row: row["accepted share"])
    control = next((row for row in rows if row["score"] == "random"), None)
    beside = ""
    if control is not None:
        beside = (
            f"; random, which knows nothing, by {100 * control['accepted share'] if control['promised'] else 0:.0f} %"
        )
    return [
        f"The promise is kept by {len(kept)} of {count_noun(len(rows), 'score')}, with most samples accepted by "
        f"{best['score']}: {100 * best['accepted share']:.0f} %, of which {best['bad']} of {best['accepted']} are bad"
        f"{beside}."
    ]


def _count_classes(score: str, rows: Sequence[Row]) -> str:
    """Say for how many classes a score keeps a promise."""
    own = [row for row in rows if row["score"] == score]
    kept = [str(row["of"]) for row in own if row["promised"]]
    named = f": {list_names(kept)}" if kept and len(kept) < len(own) else ""
    beside = ", which knows nothing," if score == "random" else ""
    return f"{score}{beside} keeps the promise in {len(kept)} of {count_noun(len(own), 'class', 'classes')}{named}."


def describe_accepted(rows: Sequence[Row]) -> list[str]:
    """Say what is accepted, by rows of accepted.csv."""
    words = [f"{row['score']} {row['accepted']} of {row['images']}" for row in rows]
    return [f"Accepted by the thresholds of the promise: {list_names(words)}."]


def describe_restored(rows: Sequence[Row]) -> list[str]:
    """Say which map gives the shortest intervals, by rows of intervals.csv."""
    best = min(rows, key=lambda row: row["mean length"])
    return [
        f"The shortest intervals that keep the promise are those of the map {best['map']}: "
        f"{number(best['mean length'])} long on average, {number(best['over unscaled'])} of unscaled ones, holding "
        f"{best['coverage']:.3g}{write_ends(best['low'], best['high'], '.3g')} of the pixels."
    ]


def describe_posterior(found: Any) -> list[str]:
    """Return what `decu laplace fit` found in sentences, none where it is something else.

    Args:
        found: of the record of the fit.
    """
    if not isinstance(found, Mapping) or not all(is_known(found.get(name)) for name in _OF_FITS):
        return []
    words = [
        f"The posterior of the layer {found.get('layer')} (curvature {found.get('curvature')}) stands on "
        f"{found['images']:,} images with {count_noun(found['draws'], 'draw')} of noise each; they stand for "
        f"{found['data_size']:,}, which the training saw {number(found['visits'])} times."
    ]
    if is_known(found.get("parameters_determined")):
        words.append(
            f"The data determine {found['parameters_determined']:.3g} of the {found['entries']:,} weights of each "
            f"output; the others are left to the prior, of precision {number(found['prior_precision'])}."
        )
    return words
