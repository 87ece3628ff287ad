"""Calls of figures."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import xarray as xr

import lkarray as lk
from lkarray import plots
from tests.helpers.fuzzing.world import Case, World


def _of_figures(w: World) -> Iterator[Case]:
    def case(name: str, /, **arguments: Any) -> Case:
        return Case(f"plots.{name}", getattr(plots, name), arguments, fast=False)

    along = xr.DataArray(
        np.random.default_rng(0).random((4, 6)),
        dims=("time", "example"),
        coords={"kind": ("example", ["a", "b"] * 3), "time": np.arange(4)},
    )
    metric = along.mean("example")
    yield case("axis_extremes", points=w.points, images=w.images, rows=2)
    yield case("completeness", audit=w.audit)
    yield case("concentration", audit=w.audit)
    yield case("decision", audit=w.audit, at=0, image=np.eye(4))
    yield case("layer_epoch", audit=w.audit)
    yield case(
        "influential_images",
        audit_or_table=w.audit,
        images={i: np.eye(4) for i in range(50)},
        at=0,
        k=3,
        by="kind",
    )
    yield case("correlation_against_distance", curves={"a": w.by_distance})
    yield case("hierarchy_matrices", by_distance=w.by_distance)
    yield case("gain_against_loss", tree=w.losses, mark=None)
    yield case(
        "groups_along",
        panels={"a": along},
        by="kind",
        along="time",
        ylabel="y",
        xlabel="x",
        logy=False,
        logx=False,
        rows=1,
        spread=True,
    )
    yield case("image_rows", rows=[[np.eye(4), np.eye(4)]], columns=["a", "b"])
    yield case(
        "influence_against",
        first=np.arange(4.0),
        others={"a": np.arange(4.0)},
        correlations={"a": np.arange(3) / 3},
    )
    gross = lk.gross_influence(w.audit)
    yield case("influence_along_path", gross=gross, totals={"a": gross})
    yield case("kernel_matrix", kernel=w.kernel, by="label")
    yield case("lift_by_depth", lift=w.lift, least=1)
    yield case("lift_curves", lifts={"a": w.lift}, title="t", least=1)
    yield case("mode_scatter", shifts=w.shifts, other=w.shifts, names=("a", "b"))
    yield case("neighbor_map", points=w.points, by="label", mark=None, hues=None)
    yield case("over_training", curves={"a": metric}, ylabel="y", title="t", labels=np.arange(4))
    yield case(
        "regime",
        metrics={"a": metric},
        panels={"b": along},
        by="kind",
        labels=np.arange(4),
        ylabels=["y"],
    )
    near = w.kernel.isel(sample_2=0, drop=True)
    by = lk.similarity_by_distance(w.kernel, w.points, bins=4)
    yield case(
        "similarity_against_distance",
        points=w.points,
        similarity=near,
        target=0,
        by_distance=by,
        by="label",
    )
    yield case("similarity_to_target", points=w.points, similarity=near, target=0, by="label")
    temporal = lk.temporal_kernel(w.gradients).compute()
    yield case(
        "temporal_structure",
        kernel=temporal,
        modes=lk.temporal_modes(temporal).compute(),
        labels=np.arange(3),
        k=2,
    )
    yield case(
        "top_correlated",
        neighbors=w.near,
        images=w.images,
        references=[0, 1],
        by="label",
        mark=None,
        shown=2,
    )
    yield case("transitions", lifts={"a": w.attribute}, colours=None)
