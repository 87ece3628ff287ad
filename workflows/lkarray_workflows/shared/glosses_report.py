"""What the glosses study says: lifts as numbers, what training adds to them, tables and figures."""

from __future__ import annotations

from typing import Any

import numpy as np
import xarray as xr

import lkarray as lk
from lkarray import plots, workflow
from lkarray.analysis.hierarchy.intervals import interval
from lkarray_workflows.shared.common import plain_numbers

#: Kernel that the report is about, and its store.
HEADLINE = "trained"
STORE = f"{HEADLINE}.zarr"
_VARIANTS = ("early", "free head", "trained label component removed")


def curve(lift: xr.Dataset) -> dict[str, list[float | None]]:
    """Return a pooled curve with its interval, as plain numbers."""
    names = {"lift": "pooled_lift", "low": "pooled_low", "high": "pooled_high"}
    return {name: plain_numbers(lift[variable].values) for name, variable in names.items()}


def untrained_of(lifts: dict[str, xr.Dataset]) -> list[xr.Dataset]:
    """Return the lifts of the untrained networks."""
    return [lift for name, lift in lifts.items() if name.startswith("untrained")]


def differences(trained: xr.Dataset, plain: list[xr.Dataset]) -> list[dict[str, Any]]:
    """Return pooled lift of the trained network minus the mean of a control's, by depth.

    Errors: of labels, replicate by replicate, since both were resampled alike; of the trained
    network's chains; and of which untrained networks there were, their own chains included.
    """
    by_depth = []
    for depth in trained["depth"].values:
        place = {"depth": depth}
        values = np.array([float(lift["pooled_lift"].sel(place)) for lift in plain])
        value = float(trained["pooled_lift"].sel(place)) - values.mean()
        if not np.isfinite(value):
            continue
        mean = sum(lift["pooled_replicate"].sel(place).values for lift in plain) / len(plain)
        labels = np.nanstd(trained["pooled_replicate"].sel(place).values - mean, ddof=1)
        chains = float(trained["pooled_standard_error_chains"].sel(place))
        seeds = values.std(ddof=1) / np.sqrt(len(values)) if len(values) > 1 else 0.0
        errors = [
            (np.array(labels), int(trained["labels"].sum()) - 1),
            (np.array(chains), max(trained.attrs["chains_deleted"] - 1, 1)),
            (np.array(seeds), max(len(values) - 1, 1)),
        ]
        low, high = interval(np.array(value), errors, 0.95)
        shared = float((trained["pairs"] * trained["base_rate"].fillna(0)).sel(place).sum())
        by_depth.append(
            {
                "depth": int(depth),
                "trained": float(trained["pooled_lift"].sel(place)),
                "control": float(values.mean()),
                "difference": value,
                "low": float(low),
                "high": float(high),
                "pairs_expected_to_share": shared,
            }
        )
    return by_depth


def stored_lifts(study: workflow.Study[Any]) -> dict[str, xr.Dataset]:
    """Return every lift that the study keeps, by what it is of."""
    derived = lk.open(study.path(STORE))["derived"]
    return {
        name.removeprefix("lift_").replace("_", " "): node.to_dataset().compute()
        for name, node in derived.children.items()
        if name.startswith("lift_")
    }


def figures_of(study: workflow.Study[Any]) -> list[workflow.Figure]:
    """Return the figures of the report."""
    lifts = stored_lifts(study)
    by_distance = lk.open(study.path(STORE))["derived/by_distance"].to_dataset().compute()
    compared = {
        "trained": lifts["trained"],
        **{f"untrained ({i})": lift for i, lift in enumerate(untrained_of(lifts))},
        "inputs": lifts["inputs"],
        "random": lifts["random"],
    }
    settings = {
        "trained": lifts["trained"],
        **{n: lift for n, lift in lifts.items() if n in _VARIANTS or n.startswith("gamma")},
    }
    return [
        workflow.Figure(
            "controls",
            "Trained, and the controls",
            "Pooled lift under the matched base rate, pairs of one label excluded. Bars are 95% "
            "intervals: labels resampled, chains deleted.",
            plots.lift_curves(compared, title="Taxonomic lift of held-out definitions"),
        ),
        workflow.Figure(
            "by_depth",
            "By query depth",
            "The trained network, one curve for each query depth.",
            plots.lift_by_depth(lifts["trained"]),
        ),
        workflow.Figure(
            "settings",
            "Settings",
            "The trained network under other localizations, with the "
            "head free, after one epoch, and without each label's shared component.",
            plots.lift_curves(settings, title="What the lift depends on"),
        ),
        workflow.Figure(
            "by_distance",
            "Correlation against distance",
            "Mean correlation of losses by distance of the labels in WordNet.",
            plots.correlation_against_distance({"trained": by_distance}),
        ),
        workflow.Figure(
            "matrix",
            "By label",
            "Mean correlation between classes, in the hierarchy's order, beside their distance.",
            plots.hierarchy_matrices(by_distance),
        ),
    ]


def rows_of(metrics: dict[str, Any]) -> list[tuple[str, str, str]]:
    """Return the table at the top of the report."""
    lifts = [
        (
            f"Pooled lift at depth {d['depth']}: trained minus {name}",
            f"{d['difference']:+.2f} ({d['low']:+.2f} to {d['high']:+.2f})",
            f"{d['trained']:.2f} against {d['control']:.2f}",
        )
        for name in ("untrained", "inputs")
        for d in metrics[f"trained_minus_{name}"]
        if d["depth"] >= 1 and d["pairs_expected_to_share"] >= 100
    ]
    kernels = [
        (
            f"{name}: accuracy, loss, agreement of half kernels",
            f"{k['held_out_accuracy']:.1%}, {k['held_out_loss']:.2f}, "
            f"{k['agreement_of_half_kernels']:.2f}",
            "",
        )
        for name, k in metrics["kernels"].items()
    ]
    return lifts + kernels


def report(study: workflow.Study[Any]) -> None:
    """Write figures, numbers and page."""
    metrics, taxonomy = study.read("lifts.json"), study.path("taxonomy.json")
    study.report(
        title="Glosses: what of WordNet does a definition classifier's loss kernel see?",
        summary=f"{metrics['held_out']:,} held-out definitions, {metrics['classes']} classes, "
        f"{metrics['draws']:,} draws. Lift above 1 means that the inputs whose losses move "
        "together share ancestors more often than chance. Only what exceeds the controls can be "
        "owed to what the network learned.",
        metrics=metrics,
        rows=rows_of(metrics),
        figures=figures_of(study),
        next_steps="import lkarray as lk\n"
        f'losses = lk.open("{study.path(STORE)}")["losses"]\n'
        f'taxonomy = lk.Taxonomy.from_json("{taxonomy}")\n'
        "lk.taxonomic_lift(losses, taxonomy)",
    )
