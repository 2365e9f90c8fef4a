"""What a page says of uncertainty per class: sentences, a ranked table, and a card for each class."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ldm.arguments import check_value
from ldm.files import read_arrays, read_mapping, reading
from ldm.records import Row
from ldm.report.mistakes import MISTAKES_FOLDER, describe_mistakes, read_mistakes, summarise_mistakes
from ldm.report.page import Cards, Code, PageTable, Picture, Section, Text
from ldm.report.tables import REMEDY, check_numbers, read_comments, read_csv
from ldm.report.wording import name_class, write_ends, write_sentence
from ldm.stats import spearman_interval
from ldm.wording import count_noun

# Cards are shown of so many classes: the most and the least uncertain ones.
MOST_CARDS = 40
COLUMNS = {
    "name": "class",
    "bin": "training images",
    "mi_mean": "mutual information (nats)",
    "mi_low": "from",
    "mi_high": "to",
    "n": "noises",
    "saturation": "saturation",
    "ssim": "similarity of members (SSIM)",
    "epistemic_variance": "variance between members",
    "residual_p": "p of standing out",
    "recognised": "samples recognised",
    "real_recognised": "real pictures recognised",
}


# What a summary beside a table of classes may hold that a page reads; what other keys hold is not looked at.
_SUMMARY = {
    "meaning": str,
    "silent": str,
    "bins": list[dict],
    "spearman": dict,
    "spearman.estimate": float | None,
    "spearman.low": float | None,
    "spearman.high": float | None,
    "spearman.ceiling": float,
    "auroc": dict,
    "auroc.estimate": float | None,
    "auroc.low": float | None,
    "auroc.high": float | None,
    "auroc.positives": list[float],
    "standing_out": dict,
    "standing_out.rate": float,
    "standing_out.classes": list[str],
}


def _interval(row: Row) -> str:
    return f"{row['mi_mean']:.3g}{write_ends(row.get('mi_low'), row.get('mi_high'), '.3g')}"


def read_classes(path: Path) -> list[Row]:
    """Read a table of classes, the most uncertain first.

    Raises:
        ValueError: if it is none.
    """
    rows = read_csv(path, ("class", "mi_mean"))
    check_numbers(path, rows, ("mi_mean",), nan=True)
    return rank_rows(rows)


def read_summary(path: Path) -> dict[str, Any]:
    """Return the summary beside a table of classes, empty where there is none.

    Raises:
        ValueError: if there is one that holds anything else than a report writes.
    """
    summary = path.with_name("summary.json")
    if not summary.exists():
        return {}
    found = read_mapping(summary, "a summary of classes", REMEDY)
    with reading(summary, "a summary of classes", REMEDY):
        for key, hint in _SUMMARY.items():
            first, *rest = key.split(".")
            inside = found.get(first, {}) if rest else found
            name = rest[0] if rest else first
            if name in inside:
                check_value(inside[name], hint, key)
    return found


def rank_rows(rows: Sequence[Row]) -> list[Row]:
    """Return rows of a table of classes, the most uncertain first."""
    return sorted(rows, key=lambda row: -float(row["mi_mean"]))


def summarise_table(path: Path, folder: Path | None = None) -> list[str]:
    """Return what a table of classes says in sentences: the most and the least uncertain, and its summary.

    Args:
        path: uncertainty.csv.
        folder: where it is looked for what the classes' samples are taken for, if at all.
    """
    rows = read_classes(path)
    first, last = rows[0], rows[-1]
    found = read_summary(path)
    meaning = [write_sentence(found["meaning"])] if "meaning" in found else []
    if "silent" in found:
        return [write_sentence(found["silent"]), *meaning]
    if len(rows) == 1:
        return [
            f"There is one class, {name_class(first)}, and nothing to rank: {_interval(first)} nats{_images(first)}.",
            *meaning,
        ]
    words = [
        f"The members disagree most about {name_class(first)} ({_interval(first)} nats"
        f"{_images(first)}) and least about {name_class(last)} ({_interval(last)} nats{_images(last)})."
    ]
    if "spearman" in found and found["spearman"].get("estimate") is not None:
        value = found["spearman"]
        known = write_ends(value.get("low"), value.get("high"), ".2f")
        words.append(
            f"Rank correlation of mutual information with the number of training images: {value['estimate']:.2f}"
            f"{known} over {len(rows)} classes; -1 would mean that fewer images always go with more disagreement."
        )
    outstanding = found.get("standing_out")
    if outstanding is not None:
        words.append(_describe_outstanding(outstanding))
    wrong = [] if folder is None else _summarise_wrong(rows, folder)
    return [*words, *wrong, *meaning]


def _summarise_wrong(rows: Sequence[Row], folder: Path) -> list[str]:
    """Return what samples are taken for, and whether that goes with what the members disagree about."""
    found = read_mistakes(folder)
    if not found:
        return []
    words = [summarise_mistakes(list(found.values()))]
    both = [row for row in rows if row["class"] in found]
    shares = [found[row["class"]]["recognised"] / found[row["class"]]["samples"] for row in both]
    if len(both) > 3 and len(set(shares)) > 1:
        value = spearman_interval([row["mi_mean"] for row in both], shares)
        words.append(
            f"Rank correlation of mutual information with the share of samples that are recognised: "
            f"{value.estimate:.2f}{write_ends(value.low, value.high, '.2f')} over {len(both)} classes; below 0, "
            "samples of classes that the members disagree about are recognised less often."
        )
    return words


def _describe_outstanding(found: Mapping[str, Any]) -> str:
    names, rate = found.get("classes", []), found.get("rate", 0.1)
    if not names:
        return f"No class is more uncertain than its number of images explains (false discovery rate {rate:g})."
    known = ", ".join(names)
    return f"More uncertain than their number of images explains, at a false discovery rate of {rate:g}: {known}."


def _images(row: Row) -> str:
    size = row.get("bin")
    return f", {count_noun(int(str(size)), 'training image')}" if str(size).isdigit() else ""


def class_sections(path: Path, folder: Path, alone: bool = True) -> tuple[list[Section], set[Path]]:
    """Return the sections of a table of classes, and the pictures that they show.

    Args:
        path: uncertainty.csv.
        folder: the folder of the page; maps and rollouts are looked for in it.
        alone: whether the page has no other table of classes, from which titles would tell it.
    """
    rows = _join_mistakes(read_classes(path), folder)
    where = "" if alone else f" ({path.parent.name})"
    used: set[Path] = set()
    blocks: list[Any] = []
    for name in ("uncertainty.png", "by_images.png", "distributions.png"):
        if (path.parent / name).exists():
            used.add(path.parent / name)
            blocks.append(Picture(path.parent / name, _CAPTIONS[name]))
    columns = {name: title for name, title in COLUMNS.items() if any(row.get(name) is not None for row in rows)}
    renamed = [{title: row.get(name) for name, title in columns.items()} for row in rows]
    blocks.append(PageTable(list(columns.values()), renamed, "Every class, the most uncertain first; a click sorts"))
    blocks.append(Code("What the columns are, and what the numbers depend on", "\n".join(read_comments(path))))
    sections = [Section(f"Which classes it does not know{where}", blocks)]
    cards, shown = _cards(rows, folder)
    if cards:
        sections.append(Section(f"Class by class{where}", cards))
    bins = read_summary(path).get("bins", [])
    natural = any(row.get("images") is not None for row in rows)
    if len(bins) > 1 and not natural:
        text = Text("Means over the classes with one number of training images, and their standard deviations (_sd).")
        sections.append(Section(f"By number of training images{where}", [text, PageTable(list(bins[0]), bins)]))
    curve = path.with_name("curve.png")
    if curve.exists():
        used.add(curve)
        sections.append(
            Section(f"By step{where}", [Picture(curve, "Mutual information of every step after the branch")])
        )
    return sections, used | shown


def _join_mistakes(rows: Sequence[Row], folder: Path) -> list[Row]:
    """Return rows of classes with the shares of their samples, and of real pictures, that are recognised."""
    found = read_mistakes(folder)
    joined = []
    for row in rows:
        own = found.get(row["class"], {})
        shares = {
            "recognised": own["recognised"] / own["samples"] if own else None,
            "real_recognised": own["real_recognised"] / own["real"] if own.get("real") else None,
        }
        joined.append({**row, **shares})
    return joined


_CAPTIONS = {
    "uncertainty.png": "The value of every class",
    "by_images.png": "Mutual information against the number of training images",
    "distributions.png": "Distribution over classes",
}


def _cards(rows: Sequence[Row], folder: Path) -> tuple[list[Any], set[Path]]:
    """Return a card for each class that has a rollout or a map, and the pictures in them."""
    maps, mistakes = _read_maps(folder), read_mistakes(folder)
    chosen = list(rows)
    blocks: list[Any] = []
    if len(chosen) > MOST_CARDS:
        half = MOST_CARDS // 2
        chosen = [*chosen[:half], *chosen[-half:]]
        blocks.append(Text(f"The {half} most and the {half} least uncertain of {len(rows)} classes."))
    cards, used = [], set()
    for row in chosen:
        pictures: list[Any] = [
            Picture(path, "before and after the members branch") for path in _find_rollouts(folder, row)[:1]
        ]
        used |= {one.path for one in pictures}
        if row["class"] in maps:
            pictures.append(
                Picture(maps[row["class"]], "a sample, and where in it the members disagree (brighter: more)")
            )
        near = folder / MISTAKES_FOLDER / f"nearest_{row['class']}.png"
        if near.exists():
            used.add(near)
            pictures.append(Picture(near, "a sample of each member, and the training picture nearest to it"))
        if pictures:
            facts = Text(f"{_interval(row)} nats{_images(row)}.{_describe_wrong(mistakes.get(row['class']))}")
            cards.append(Section(name_class(row), [facts, *pictures]))
    return ([*blocks, Cards(cards)] if cards else []), used


def _describe_wrong(row: Row | None) -> str:
    """Return what a card says of the samples of its class, beside real pictures of it."""
    if row is None:
        return ""
    control = f"; of its real pictures {row['real_recognised']} of {row['real']}" if row.get("real") else ""
    return f" Of its samples {describe_mistakes(row)}{control}."


def _find_rollouts(folder: Path, row: Row) -> list[Path]:
    return sorted(folder.glob(f"*/rollout_sample/rollout_bin*_{row['class']}_*.png"))


def _read_maps(folder: Path) -> dict[int, Image.Image]:
    """Return {class: its first sample beside its map} of the maps in a folder, all on one scale."""
    files = sorted(folder.glob("pixel_unc/pixel_unc_branch*.npz"))
    if not files:
        return {}
    found = read_arrays(files[0], ["images", "mi", "classes"], "maps of classes", REMEDY)
    images, maps, classes = found["images"][:, 0], found["mi"][:, 0], found["classes"].tolist()
    limit = float(np.percentile(maps, 99.5)) or 1.0
    return {label: draw_map(images[place], maps[place], limit) for place, label in enumerate(classes)}


def draw_map(image: np.ndarray, values: np.ndarray, limit: float) -> Image.Image:
    """Return a sample [C, H, W] in [-1, 1] beside its map [H, W], enlarged; the brightest colour stands for `limit`."""
    from matplotlib import colormaps

    pixels = np.clip((np.moveaxis(image, 0, -1) + 1) * 127.5, 0, 255).astype(np.uint8)
    pixels = np.repeat(pixels, 3, axis=-1) if pixels.shape[-1] == 1 else pixels
    heat = (colormaps["cividis"](np.clip(values / limit, 0, 1))[..., :3] * 255).astype(np.uint8)
    both = Image.fromarray(np.concatenate([pixels, np.full_like(pixels[:, :1], 255), heat], axis=1))
    factor = max(1, math.ceil(128 / pixels.shape[0]))
    return both.resize((both.width * factor, both.height * factor), Image.Resampling.NEAREST)
