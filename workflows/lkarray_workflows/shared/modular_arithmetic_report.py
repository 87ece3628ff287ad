"""What the study of modular arithmetic says: axes and moments of its kernel, table and figures."""

from __future__ import annotations

from typing import Any

import numpy as np
import xarray as xr
from matplotlib.figure import Figure

import lkarray as lk
from lkarray import plots, workflow
from lkarray_workflows.shared.common import area

TASKS = ("addition", "division")
COLOURS = {"addition": "#3f90da", "division": "#ffa90e", "between": "#717581"}


def first_component(losses: xr.DataArray, center: xr.DataArray, *, of: str = "chain") -> np.ndarray:
    """Return the inputs' places on the first principal component of their expected changes.

    An input's expected changes are its mean loss in each chain less its loss at w*. The paper's
    are "normalized", not saying how: of each chain, to mean 0 and deviation 1 over the inputs, or
    of each input (``of="sample"``), to length 1.
    """
    change = (losses.mean("draw", dtype=np.float64) - center).transpose("sample", "chain").values
    if of == "sample":
        length = np.linalg.norm(change, axis=1, keepdims=True)
        change = np.divide(change, length, out=np.zeros_like(change), where=length > 0)
    x = change - change.mean(0)
    if of == "chain":
        x /= x.std(0)
    u, s, _ = np.linalg.svd(x, full_matrices=False)
    return np.asarray(u[:, 0] * s[0])


def folded(flags: np.ndarray, score: np.ndarray) -> float:
    """Return the AUROC of a score whose sign means nothing."""
    value: float = area(flags, score)
    return max(value, 1 - value)


def moments(losses: xr.DataArray, first: int) -> dict[str, dict[str, float]]:
    """Return mean, deviation, skewness and excess kurtosis of K within and between tasks.

    The ``first`` inputs are additions. Pairs of an input with itself are left out.
    """
    K = lk.covariance(losses).data
    n = losses.sizes["sample"]
    own = lk.loss_variance(losses).values.astype(np.float64)
    blocks = {
        "addition": (slice(0, first),) * 2,
        "division": (slice(first, n),) * 2,
        "between": (slice(0, first), slice(first, n)),
    }
    import dask

    sums = dask.compute(
        {  # all from the same tiles
            name: [(K[block].astype(np.float64) ** power).sum() for power in (1, 2, 3, 4)]
            for name, block in blocks.items()
        }
    )[0]
    table = {}
    for name, (rows, columns) in blocks.items():
        count = (rows.stop - rows.start) * (columns.stop - columns.start)
        total = np.array(sums[name], float)
        if rows == columns:
            count -= rows.stop - rows.start
            total -= [(own[rows] ** power).sum() for power in (1, 2, 3, 4)]
        m1, m2, m3, m4 = total / count
        variance = m2 - m1**2
        third = m3 - 3 * m1 * m2 + 2 * m1**3
        fourth = m4 - 4 * m1 * m3 + 6 * m1**2 * m2 - 3 * m1**4
        table[name] = {
            "mean": m1,
            "deviation": variance**0.5,
            "skewness": third / variance**1.5,
            "excess_kurtosis": fourth / variance**2 - 3,
        }
    return table


def figures_of(study: workflow.Study[Any], m: dict[str, Any]) -> list[workflow.Figure]:
    """Return the figures of the report."""
    tree = lk.open(study.path("store.zarr"))
    node = tree["losses"].to_dataset()
    points = tree["derived/map"].to_dataset()["embedding"]
    counts = tree["derived/covariances"].to_dataset().compute()
    places = first_component(node["loss"], node["center_loss"])
    return [
        workflow.Figure(
            "map",
            "The map by task",
            "UMAP at distance 1 - R (figure 3A).",
            plots.neighbor_map(points, by="kind"),
        ),
        workflow.Figure(
            "map_b", "The same map by b", "Figure 3C.", plots.neighbor_map(points, by="b")
        ),
        workflow.Figure(
            "axis",
            "One axis tells the tasks apart",
            "First principal component of "
            "the inputs' expected loss changes by chain, each chain scaled to "
            "deviation 1 (figure 3B).",
            draw_axis(places, node["task"].values, m),
        ),
        workflow.Figure(
            "covariances",
            "Covariances within and between the tasks",
            "Every pair of different inputs (figure 3D).",
            draw_covariances(counts),
        ),
    ]


def rows_of(m: dict[str, Any]) -> list[tuple[str, str, str]]:
    """Return the table at the top of the report."""
    r, k = m["mean_correlation"], m["covariance"]
    return [
        (
            "AUROC of the first component for the task",
            "{value:.3f} +- {error:.3f}".format(**m["pc1_auroc"]),
            "paper: 0.931",
        ),
        (
            "... inputs scaled to length 1 instead of chains to deviation 1",
            "{value:.3f} +- {error:.3f}".format(**m["pc1_of_unit_vectors_auroc"]),
            "the paper does not say which",
        ),
        ("AUROC of the loss at w* alone", f"{m['center_loss_auroc']:.3f}", "not given"),
        ("AUROC of the leading mode of R", f"{m['leading_mode_auroc']:.3f}", ""),
        *(
            (f"Mean R: {pair}", "{value:+.4f} +- {error:.4f}".format(**entry), "")
            for pair, entry in r.items()
        ),
        *(
            (
                f"K {name}: deviation, skewness, excess kurtosis",
                "{deviation:.2e}, {skewness:.1f}, {excess_kurtosis:.0f}".format(**entry),
                "paper: narrow, about normal" if name == "between" else "paper: heavy tails",
            )
            for name, entry in k.items()
        ),
        (
            "Nearest inputs of the same task",
            f"{m['neighbors_of_same_task']:.1%}",
            f"chance {m['chance_same_task']:.1%}",
        ),
        (
            "Nearest inputs of 0 / b that are 0 / b too",
            f"{m['zero']['neighbors_that_are']:.1%}",
            f"chance {m['zero']['chance']:.1%}",
        ),
        (
            "Right, of trained and of other inputs",
            "{trained:.1%}, {held_out:.1%}".format(**m["accuracy"]),
            "paper: 100% of trained",
        ),
        ("Agreement of R between halves of the chains", f"{m['agreement_of_halves']:.2f}", ""),
    ]


def report(study: workflow.Study[Any]) -> None:
    """Write the report folder."""
    config, m = study.config, study.read("metrics.json")
    path = study.path("store.zarr")
    count = lk.open(path)["losses"].sizes["sample"]
    study.report(
        title="Modular arithmetic: two tasks in one network",
        summary=[
            f"Addition and division modulo {config.modulus} with separate vocabularies; "
            f"{count:,} inputs, {config.chains} chains of {config.draws} draws. "
            "Errors are one standard error, from leaving out one chain at a time."
        ],
        metrics=m,
        rows=rows_of(m),
        figures=figures_of(study, m),
        next_steps=f'losses = lk.open("{path}")["losses"]\n'
        'lk.group_mean(losses, "task", self_pairs=False)',
    )


def draw_axis(places: np.ndarray, task: np.ndarray, m: dict[str, Any]) -> Figure:
    """Draw how the inputs of each task lie along the component."""
    figure = Figure(figsize=(7, 4.4), layout="constrained")
    axes = figure.add_subplot()
    edges = np.linspace(places.min(), places.max(), 81).tolist()
    for name in TASKS:
        axes.hist(places[task == name], edges, label=name, color=COLOURS[name], alpha=0.65)
    axes.set(
        xlabel="first principal component",
        ylabel="inputs",
        title=f"AUROC {m['pc1_auroc']['value']:.3f}",
    )
    axes.legend(frameon=False)
    return figure


def draw_covariances(counts: xr.Dataset) -> Figure:
    """Draw the distribution of K within each task and between them."""
    figure = Figure(figsize=(7.6, 4.6), layout="constrained")
    axes = figure.add_subplot()
    pairs = {"addition": ("addition",) * 2, "division": ("division",) * 2, "between": TASKS}
    width = float(counts["bin_right"][0] - counts["bin_left"][0])
    for name, (first, second) in pairs.items():
        row = counts["count"].sel(task=first, task_2=second).values
        total = row.sum() + sum(
            int(counts[end].sel(task=first, task_2=second)) for end in ("below", "above")
        )
        label = "addition with division" if name == "between" else f"within {name}"
        style = "--" if name == "between" else "-"
        density = np.where(row > 0, row / total / width, np.nan)
        axes.plot(counts["bin"], density, color=COLOURS[name], ls=style, label=label)
    axes.set(
        yscale="log",
        xlabel="covariance of losses (nat$^2$)",
        ylabel="density",
        title="Entries of the loss kernel",
    )
    axes.grid(alpha=0.25)
    axes.legend(frameon=False)
    return figure
