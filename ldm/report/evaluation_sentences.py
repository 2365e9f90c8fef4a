"""What tables of probes, metrics and scores of pictures say in sentences."""

from __future__ import annotations

from collections.abc import Sequence

from ldm.records import Row
from ldm.report.wording import is_known, name_class, number, write_ends

PROBED = {
    "trained": "the trained network's features",
    "untrained": "an untrained network's features",
    "pixels": "the pixels themselves",
    "fine-tuned": "the network fine-tuned there",
}

# The metrics that a page's first sentences say, and how; its table has all.
SAID_METRICS = {
    "fid": "FID",
    "is": "Inception score",
    "kid": "KID",
    "cmmd": "CMMD",
    "precision": "precision",
    "recall": "recall",
}


def describe_probes(rows: Sequence[Row]) -> list[str]:
    """Say what probes recognise, by rows of results.csv."""
    found = []
    for row in rows:
        name = PROBED.get(str(row["features"]), str(row["features"]))
        spread = f" ± {row['deviation']:.2g} (s.d. of {row['seeds']} seeds)" if row["seeds"] > 1 else ""
        where = f" at {row['layer']}, t = {number(row['t'])}" if row["features"] in ("trained", "untrained") else ""
        found.append(f"{row['test']:.1f} %{spread} of test images by {name}{where}")
    return [f"A linear probe recognises {'; '.join(found)}. Places were chosen on validation images."]


def describe_errors(rows: Sequence[Row]) -> list[str]:
    """Say which class a probe mistakes most, by rows of errors.csv."""
    own = [row for row in rows if row["features"] == "trained" and is_known(row["error"])]
    if len(own) < 2:
        return []
    most, least = (choose(own, key=lambda row: row["error"]) for choose in (max, min))
    return [
        f"The trained features' probe mistakes {name_class(most)} most, {most['error']:.1f} % of its test images, and "
        f"{name_class(least)} least, {least['error']:.1f} %."
    ]


def describe_recognition(rows: Sequence[Row]) -> list[str]:
    """Say at which noise what is recognised, by rows of recognition.csv."""
    best, worst = (choose(rows, key=lambda row: row["recognised"]) for choose in (max, min))
    return [
        f"Of test images {best['recognised']:.1f} % are recognised at a log signal-to-noise ratio of "
        f"{number(best['log_snr'])}, and {worst['recognised']:.1f} % at {number(worst['log_snr'])}."
    ]


def _say_metrics(rows: Sequence[Row], key: str) -> list[str]:
    """Return the metrics that a page says with their intervals; all where none of them is there.

    Args:
        rows: of a table of metrics.
        key: of the value.
    """
    said = [row for row in rows if row["metric"] in SAID_METRICS] or rows
    return [
        f"{SAID_METRICS.get(row['metric'], row['metric'])} {number(row[key])}{write_ends(row['low'], row['high'])}"
        for row in said
    ]


def describe_metrics(rows: Sequence[Row]) -> list[str]:
    """Say the metrics of images with their intervals, by rows of metrics.csv."""
    words = _say_metrics(rows, "value")
    beside = f", against {rows[0]['n_reference']:,} of the reference" if rows[0].get("n_reference") else ""
    more = "; the table has more of them" if len(words) < len(rows) else ""
    found = [f"Of {rows[0]['n']:,} images{beside}: {'; '.join(words)} (95 % intervals in brackets{more})."]
    few = [row for row in rows if row["metric"] in ("fid", "sfid") and row["n"] < 10_000]
    if few:
        found.append("FID is biased upwards by few images: compare it only with FID of as many.")
    return found


def describe_trainings(rows: Sequence[Row]) -> list[str]:
    """Say the metrics over trainings, by rows of trainings.csv."""
    words = _say_metrics(rows, "mean")
    return [f"Mean over {rows[0]['trainings']} trainings, with its 95 % interval: {'; '.join(words)}."]


def describe_ood(rows: Sequence[Row]) -> list[str]:
    """Say which score tells other pictures best, by rows of ood.csv."""
    found = []
    for name in dict.fromkeys(row["pictures"] for row in rows):
        own = [row for row in rows if row["pictures"] == name]
        best = max(own, key=lambda row: row["auroc"])
        asked = [row for row in own if row["evaluations"] == 0]
        free = max(asked, key=lambda row: row["auroc"]) if asked and best not in asked else None
        beside = f"; of those that ask no network, by {free['score']}, {_auroc(free)}" if free else ""
        found.append(f"{name} is told from known pictures best by {best['score']}, AUROC {_auroc(best)}{beside}.")
    return found


def _auroc(row: Row) -> str:
    return f"{row['auroc']:.2f}{write_ends(row['low'], row['high'], '.2f')}"


def describe_values(rows: Sequence[Row]) -> list[str]:
    """Say of which class more pictures would bring most, by rows of value.csv."""
    most, least = (choose(rows, key=lambda row: row["fall of loss"]) for choose in (max, min))
    each = [
        f"{name_class(row)} ({number(row['fall of loss'])}{write_ends(row['low'], row['high'])})"
        for row in (most, least)
    ]
    return [f"More pictures lower the held-out loss most where they are of {each[0]}, and least of {each[1]}."]


def describe_quality(rows: Sequence[Row]) -> list[str]:
    """Say what is recognised of models' samples, by rows of quality.csv."""
    last = {row["model"]: row for row in sorted(rows, key=lambda row: row["steps"])}
    words = [f"{100 * row['recognised']:.0f} % of {name}'s at {row['steps']} steps" for name, row in last.items()]
    return [f"Of samples are recognised {', '.join(words)}."]
