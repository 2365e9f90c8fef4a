"""Exposure bias in tables and figures: norms of eps, delta_t with its floor, and the distance of x_t."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from ldm.checkpoint import save_tensors
from ldm.diffusion.epsilon_scaling import noise_level
from ldm.diffusion.schedule import Schedule
from ldm.evaluation.exposure import delta, state_distance
from ldm.experiments.exposure import Chains, MomentsByName, compute_factors
from ldm.report.plots import Curve, curve_plot
from ldm.report.tables import write_csv

Table = list[dict[str, float]]


def norm_table(schedule: Schedule, times: Tensor, moments: MomentsByName, factors: Mapping[str, Tensor]) -> Table:
    """A row for each step: time, -log SNR, mean norm of the network's eps in `training` and in each chain with its
    standard error, their ratio, and under a scaling lambda and the corrected norm.

    Args:
        factors: chain -> lambda [S]; 1 for an unscaled one.
    """
    rows = []
    for step, (u, level) in enumerate(
        zip(times[:-1].tolist(), noise_level(schedule, times[:-1]).tolist(), strict=True)
    ):
        row = {"step": step, "u": u, "minus_log_snr": level}
        training = moments.get("training")
        if training is not None:
            row |= {"training": float(training.mean[step]), "training_se": float(training.standard_error[step])}
        for name, factor in factors.items():
            norms, divisor = moments[name], float(factor[step])
            row |= {name: float(norms.mean[step]), f"{name}_se": float(norms.standard_error[step])}
            if training is not None:
                row[f"{name}_over_training"] = float(norms.mean[step] / training.mean[step])
                longer = moments.get(f"{name}/longer")
                if longer is not None:
                    row[f"{name}_over_training_se"] = float(longer.standard_error[step] / training.mean[step])
            if bool((factor != 1).any()):
                row |= {f"{name}_lambda": divisor, f"{name}_corrected": row[name] / divisor}
        rows.append(row)
    return rows


def state_table(schedule: Schedule, times: Tensor, moments: MomentsByName, chains: list[str]) -> Table:
    """A row for each step with the time it leads to: delta_t, its floor, its excess, and the distance of x_t."""
    data, within = moments["data"].pooled(), moments["data"].within
    rows = [{"step": step, "u": u} for step, u in enumerate(times[1:].tolist())]
    for name in chains:
        found = delta(schedule, times, moments[f"{name}/residuals"], within)
        distance = state_distance(schedule, times, moments[f"{name}/states"], data)
        for row, value, floor, far in zip(rows, found.delta, found.floor, distance, strict=True):
            row["floor"] = float(floor)
            row |= {f"{name}_delta": float(value), f"{name}_excess": float(value - floor), f"{name}_w2": float(far)}
    return rows


def norm_plot(rows: Table, file: str | Path, chains: list[str], dimensions: int, title: str = "") -> None:
    """Norms of eps against -log SNR: in training, in sampling, corrected; and sqrt(D), the length of true noise."""
    x = [row["minus_log_snr"] for row in rows]
    named = {"training": "training"} if "training" in rows[0] else {}
    for name in chains:
        named[name] = "sampling" if name == "sampling" else f"{name}: the network's own"
        if f"{name}_corrected" in rows[0]:
            named[f"{name}_corrected"] = f"{name}: corrected"
    curves = {}
    for key, label in named.items():
        y = [row[key] for row in rows]
        errors = [row.get(f"{key}_se", 0.0) for row in rows]
        low, high = ([value + sign * 2 * error for value, error in zip(y, errors, strict=True)] for sign in (-1, 1))
        curves[label] = Curve(*_finite(x, y, low, high))
    curve_plot(
        curves,
        file,
        "-log SNR = 2 ln(sigma / alpha)",
        "L2 norm of the predicted noise",
        title,
        f"sqrt(D) = {math.sqrt(dimensions):.2f}; bands: 2 standard errors",
        invert_x=True,
        overwrite=True,
    )


def ratio_plot(rows: Table, file: str | Path, chains: list[str], title: str = "") -> None:
    """Norms over training's, step by step: 1 is no exposure bias."""
    x, curves = [row["minus_log_snr"] for row in rows], {}
    for name in chains:
        for key, label in ((name, f"{name}: the network's own"), (f"{name}_corrected", f"{name}: corrected")):
            if key in rows[0]:
                curves[label] = Curve(*_finite(x, [row[key] / row["training"] for row in rows]))
    words = ("-log SNR = 2 ln(sigma / alpha)", "norm of eps over training's", title)
    curve_plot(curves, file, *words, invert_x=True, overwrite=True)


def delta_plot(rows: Table, file: str | Path, chains: list[str], title: str = "") -> None:
    """delta_t of each chain above its floor after each step; a perfect sampler's lies at 0, and below 0 is too sure.

    Both grow over decades along the chain, so that what lies between them, of either sign, is drawn itself.
    """
    steps = [row["step"] + 1 for row in rows]
    curves = {"a perfect sampler": Curve(steps, [0.0] * len(steps))}
    curves |= {name: Curve(steps, [row[f"{name}_excess"] for row in rows]) for name in chains}
    label = "delta_t above its floor (units squared)"
    curve_plot(curves, file, "steps taken", label, title, overwrite=True)


def distance_plot(rows: Table, file: str | Path, chains: list[str], title: str = "") -> None:
    """Squared distance of x_t in sampling from the true x_t after each step."""
    steps = [row["step"] + 1 for row in rows]
    curves = {name: Curve(steps, [row[f"{name}_w2"] for row in rows]) for name in chains}
    label = "squared W2 of an element of x_t"
    curve_plot(curves, file, "steps taken", label, title, log=True, overwrite=True)


def _finite(x: list[float], *columns: list[float]) -> list[list[float]]:
    """Only the points with a finite x (a flow's first and EDM's last level are infinite)."""
    kept = [place for place, value in enumerate(x) if math.isfinite(value)]
    return [[column[place] for place in kept] for column in (x, *columns)]


def write_exposure(out: Path, chains: Chains, moments: MomentsByName) -> Table:
    """Write the tables norms.csv and states.csv, their figures and the moments themselves; return the norms."""
    schedule = chains.pipeline.model.schedule
    times = chains.pipeline.times
    names = list(chains.scalings)
    factors = {name: compute_factors(schedule, times, scaling) for name, scaling in chains.scalings.items()}
    norms = norm_table(schedule, times, moments, factors)
    states = state_table(schedule, times, moments, names)
    write_csv(out / "norms.csv", norms, overwrite=True)
    write_csv(out / "states.csv", states, overwrite=True)
    title = f"{chains.pipeline.sampling.sampler}, {len(times) - 1} steps"
    norm_plot(norms, out / "norms.png", names, moments["data"].mean[0].numel(), title)
    ratio_plot(norms, out / "ratios.png", names, title)
    delta_plot(states, out / "delta.png", names, title)
    distance_plot(states, out / "distance.png", names, title)
    tensors = {}
    for name, found in moments.items():
        tensors |= {f"{name}.{kind}": value for kind, value in found.tensors().items()}
    save_tensors(tensors, out / "moments.safetensors", overwrite=True)
    return norms
