"""Real small arguments for every public function, and what is put in their places."""

from __future__ import annotations

import inspect
import os
import re
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import dask
import numpy as np
import torch
import xarray as xr
from matplotlib.figure import Figure
from torch.utils.data import TensorDataset
from zarr.storage import MemoryStore

import lkarray as lk
from lkarray import plots
from lkarray.errors import LkarrayError
from tests.helpers.audited_runs import audited, recorded
from tests.helpers.networks import classification, small_network
from tests.helpers.recorded_runs import cross_entropy

PACKAGE = str(Path(lk.__file__).parent)
LABEL = np.array([0, 1, 2] * 14)[:40]


@dataclass(frozen=True)
class Case:
    """A public function with arguments that it takes.

    ``fast`` calls take some milliseconds. ``kept`` names arguments that are not replaced, with
    reasons beside them. ``also`` are words by which an error may name an argument instead.
    """

    name: str
    call: Callable[..., Any]
    arguments: Mapping[str, Any]
    fast: bool = True
    kept: tuple[str, ...] = ()
    also: Mapping[str, tuple[str, ...]] = field(default_factory=dict)


class World:
    """What the calls need, made once: a sampled store, a recorded run, its gradients, an audit."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.data = classification()
        self.posterior = lk.LocalPosterior(small_network(), self.data, nbeta=10.0, gamma=50.0)
        self.path = folder / "run.zarr"
        self.tree = lk.sample(
            self.posterior,
            self.data,
            sampler=lk.SGLD(step_size=1e-3),
            store=self.path,
            chains=2,
            draws=9,
            burn_in=3,
            batch_size=16,
            progress=False,
            coords={"label": LABEL},
            observables={"norm": weight_norm},
        )
        self.losses = self.tree["losses"].to_dataset().load()
        self.loss = self.losses["loss"]
        self.trace_path = folder / "trace.zarr"
        self.trace = recorded(lambda p: torch.optim.SGD(p, 0.1), store=self.trace_path, steps=8)
        labels = {"label": np.arange(12) % 3}
        store = self.trace_path
        times = [0, 3, 6]
        options: dict[str, Any] = {"coords": labels, "store": store}
        self.gradients = lk.gradient_features(self.trace, range(12), times, **options).load()
        self.outputs = lk.gradient_features(
            self.trace, range(4), times, of="output", store=store, name="outputs"
        ).load()
        self.factors = lk.gradient_factors(self.trace, range(12), times, **options).load()
        self.now = self.gradients.isel(time=-1)
        self.audit = lk.audit(
            self.trace,
            audited(),
            coords={"label": np.arange(7) % 3},
            example_coords={"kind": np.arange(50) % 3},
            groups={"param": "module", "time": "epoch"},
        )
        self.activations = lk.activations(self.trace, range(12), times, module="1").load()
        self.modes = lk.modes(self.now, 4).compute()
        self.coefficients = lk.mode_coefficients(self.modes, self.now).compute()
        self.near = lk.neighbors(self.losses, 5).compute()
        self.kernel = lk.correlation(self.losses).compute()
        self.taxonomy = lk.Taxonomy({1: ["a"], 2: ["a"], 0: ["root"], "a": ["root"], "root": []})
        self.lift = lk.taxonomic_lift(self.near, self.taxonomy, replicates=10)
        self.by_distance = lk.correlation_by_distance(self.losses, self.taxonomy, replicates=5)
        self.attribute = lk.attribute_lift(self.near, LABEL % 2)
        self.points = lk.embed(self.near, seed=1)
        self.images = np.random.default_rng(0).random((40, 6, 6))
        self.ips = lk.ips(self.gradients).compute()
        self.similar = xr.DataArray(
            self.ips.values[:5],
            dims=("test", "example"),
            coords={
                "predicted": ("test", np.arange(5) % 3),
                "label": ("example", np.arange(12) % 3),
            },
        )
        self.scores = lk.ips_scores(self.similar, "label", "predicted").compute()
        self.shifts = lk.mode_shifts(self.modes, self.coefficients, self.coefficients + 0.1)
        self.cross = xr.DataArray(
            self.ips.values[:, :5],
            dims=("example", "example_2"),
            coords={"example": self.ips["example"]},
        )
        self.numbered = audited()
        self.trained = lk.audit_modes(lk.lgk(self.now).compute(), 3, scale=0.1)


def weight_norm(model: torch.nn.Module) -> torch.Tensor:
    """An observable."""
    return next(model.parameters()).norm()


def cases(w: World) -> Iterator[Case]:
    """Yield every public callable with arguments."""
    yield from _of_losses(w)
    yield from _of_gradients(w)
    yield from _of_audits(w)
    yield from _of_hierarchies(w)
    yield from _of_figures(w)
    yield from _of_runs(w)


def _of_losses(w: World) -> Iterator[Case]:
    two = {"losses": w.losses, "y": w.losses, "center": "pooled", "memory": "64 MiB"}
    precise = two | {"precision": "float32"}
    yield Case("covariance", lk.covariance, precise | {"shrinkage": None})
    yield Case("covariance", lk.covariance, {"losses": w.tree, "shrinkage": 0.5})
    yield Case("correlation", lk.correlation, precise)
    yield Case(
        "influence",
        lk.influence,
        {"losses": w.losses, "query": w.loss, "precision": "float32", "memory": "64 MiB"},
    )
    yield Case(
        "gram",
        lk.gram,
        {
            "x": w.loss,
            "y": w.loss,
            "over": ("chain", "draw"),
            "each": (),
            "center": "pooled",
            "normalize": "count",
            "precision": "float32",
            "scale": 1.0,
            "memory": "64 MiB",
        },
    )
    own = {"losses": w.losses, "center": "pooled", "memory": "64 MiB"}
    yield Case(
        "neighbors",
        lk.neighbors,
        own | {"k": 3, "exclude": "label", "largest": True, "precision": "auto"},
    )
    yield Case("ledoit_wolf", lk.ledoit_wolf, own)
    yield Case("linear_operator", lk.linear_operator, own | {"kernel": "covariance"})
    yield Case(
        "group_mean",
        lk.group_mean,
        own | {"groups": "label", "kernel": "correlation", "self_pairs": True},
    )
    yield Case(
        "histogram",
        lk.histogram,
        own | {"groups": "label", "bins": 7, "bounds": (-1.0, 1.0), "kernel": "correlation"},
    )
    yield Case("residualize", lk.residualize, {"losses": w.losses, "groups": "label"})
    pair = {
        "a": w.losses,
        "b": w.losses,
        "center": "pooled",
        "normalize": "count",
        "memory": "64 MiB",
    }
    yield Case("frobenius", lk.frobenius, pair)
    yield Case("cka", lk.cka, pair | {"debiased": "samples"})
    yield Case("cka", lk.cka, pair | {"debiased": "draws"})
    yield Case("cka_curve", lk.cka_curve, {"losses": w.losses, "draws": 3, "memory": "64 MiB"})
    yield Case("cka_curve", lk.cka_curve, {"losses": w.losses, "draws": [2, 5]})
    yield Case(
        "mcse", lk.mcse, {"losses": w.losses, "y": w.loss, "blocks": None, "memory": "64 MiB"}
    )
    yield Case("mcse", lk.mcse, {"losses": w.losses, "blocks": 3})
    yield Case("loss_gain", lk.loss_gain, {"tree": w.losses})
    yield Case("loss_variance", lk.loss_variance, {"tree": w.losses})
    yield Case("singular_fluctuation", lk.singular_fluctuation, {"tree": w.losses, "nbeta": 10.0})
    yield Case("llc", lk.llc, {"tree": w.losses, "nbeta": 10.0})
    yield Case("llc", lk.llc, {"tree": w.tree})
    yield Case(
        "diagnostics",
        lk.diagnostics,
        {"tree": w.losses, "pairs": 5, "seed": 0, "memory": "64 MiB"},
    )
    matrix = {
        "x": w.loss,
        "over": ("chain", "draw"),
        "center": "pooled",
        "normalize": "count",
        "memory": "64 MiB",
    }
    yield Case("svd", lk.svd, matrix | {"k": 3, "tolerance": 1e-3, "max_passes": 4})
    yield Case("eigh", lk.eigh, matrix)
    values = np.array([3.0, 2.0, 1.0])
    yield Case("energy_rank", lk.energy_rank, {"s": values, "share": 0.9})
    yield Case("participation_ratio", lk.participation_ratio, {"s": values})
    yield Case("plan", lk.plan, {"kernel": lk.correlation(w.losses)})
    yield Case("to_arviz", lk.to_arviz, {"tree": w.tree})
    yield Case(
        "embed",
        lk.embed,
        {
            "neighbors_or_kernel": w.near,
            "method": "umap",
            "n_components": 2,
            "seed": 0,
            "k": 5,
            "min_dist": 0.1,
        },
        fast=False,
    )
    yield Case("embed", lk.embed, {"neighbors_or_kernel": w.kernel, "k": 5}, fast=False)
    yield Case(
        "similarity_by_distance",
        lk.similarity_by_distance,
        {"kernel": w.kernel, "points": w.points, "groups": "label", "bins": 4},
    )
    yield Case("preset", lk.preset, {"name": sorted(lk.PRESETS)[0]})


def _of_gradients(w: World) -> Iterator[Case]:
    both = {"G": w.gradients, "y": w.gradients, "precision": "float32", "memory": "64 MiB"}
    yield Case("lgk", lk.lgk, both)
    yield Case("lgk", lk.lgk, {"G": w.factors})
    for name in ("plgk", "ips"):
        yield Case(name, getattr(lk, name), both | {"weight": "lr"})
        yield Case(name, getattr(lk, name), {"G": w.factors, "y": w.factors, "weight": "lr"})
    yield Case(
        "temporal_kernel",
        lk.temporal_kernel,
        {"G": w.gradients, "weight": "lr2", "precision": "float32", "memory": "64 MiB"},
    )
    sides = {
        "loss_G": w.gradients,
        "output_G": w.outputs,
        "precision": "float32",
        "memory": "64 MiB",
    }
    yield Case("lntk", lk.lntk, sides)
    yield Case("pntk", lk.pntk, sides | {"weight": "lr"})
    yield Case("chord_distance", lk.chord_distance, {"k": w.ips})
    yield Case("angle_distance", lk.angle_distance, {"k": w.ips})
    yield Case("modes", lk.modes, {"G": w.now, "k": 3, "memory": "64 MiB"})
    yield Case(
        "online_modes",
        lk.online_modes,
        {"G": w.gradients, "k": 3, "learning_rate": 0.1, "batch_size": 8, "seed": 0},
    )
    yield Case(
        "parameter_modes",
        lk.parameter_modes,
        {"G": w.gradients, "k": 3, "weight": "lr", "memory": "64 MiB"},
    )
    yield Case(
        "temporal_modes",
        lk.temporal_modes,
        {"K_or_G": w.gradients, "k": 2, "weight": "lr2", "memory": "64 MiB"},
    )
    yield Case(
        "temporal_modes",
        lk.temporal_modes,
        {"K_or_G": lk.temporal_kernel(w.gradients).compute(), "k": 2},
    )
    yield Case(
        "mode_coefficients",
        lk.mode_coefficients,
        {"modes": w.modes, "gradients": w.now, "memory": "64 MiB"},
    )
    yield Case(
        "cancellation_ratio",
        lk.cancellation_ratio,
        {"modes": w.modes, "coefficients": w.coefficients},
    )
    yield Case(
        "mode_shifts",
        lk.mode_shifts,
        {
            "modes": w.modes,
            "before": w.coefficients,
            "after": w.coefficients + 0.1,
            "sensitivity": abs(w.coefficients),
        },
    )
    yield Case("feature_overlap", lk.feature_overlap, {"G": w.gradients, "reference": -1})
    yield Case(
        "activation_overlap",
        lk.activation_overlap,
        {"activations": w.activations, "reference": -1},
    )
    yield Case(
        "subspace_overlap",
        lk.subspace_overlap,
        {"G": w.gradients, "k": 2, "reference": -1, "memory": "64 MiB"},
    )
    yield Case(
        "influence_over_time",
        lk.influence_over_time,
        {"train_G": w.gradients, "audit_G": w.gradients, "weight": "lr", "memory": "64 MiB"},
    )
    yield Case("unfold", lk.unfold, {"G": w.gradients, "keep": ("time", "example")})
    yield Case("params", lk.params, {"G": w.gradients, "pattern": "0.*"})
    yield Case(
        "ips_scores",
        lk.ips_scores,
        {"similarity": w.similar, "train_labels": "label", "predicted": "predicted"},
    )
    test = w.activations.isel(time=-1, example=slice(5))
    train = w.activations.isel(time=-1)
    yield Case(
        "hidden_similarity",
        lk.hidden_similarity,
        {
            "test_activations": test,
            "train_activations": train,
            "train_labels": np.arange(12) % 3,
            "predicted": np.arange(5) % 3,
            "k": 2,
            "memory": "64 MiB",
        },
    )
    yield Case(
        "difficulty_table",
        lk.difficulty_table,
        {
            "scores": {"a": np.arange(8.0), "b": np.arange(8.0)[::-1].copy()},
            "wrong": np.arange(8) % 2 == 0,
            "loss": np.arange(8.0) ** 2,
            "replicates": 3,
            "seed": 0,
        },
    )


def _of_audits(w: World) -> Iterator[Case]:
    yield Case("completeness", lk.completeness, {"audit": w.audit})
    yield Case("concentration", lk.concentration, {"audit": w.audit})
    yield Case("net_influence", lk.net_influence, {"audit": w.audit, "cumulative": True})
    yield Case("gross_influence", lk.gross_influence, {"audit": w.audit, "cumulative": False})
    yield Case("most_influential", lk.most_influential, {"audit": w.audit, "k": 3, "by": "kind"})
    kernel = lk.lgk(w.now).compute()
    yield Case(
        "audit_modes", lk.audit_modes, {"kernel": kernel, "k": 3, "scale": 0.1, "memory": "64 MiB"}
    )
    yield Case(
        "extend_audit",
        lk.extend_audit,
        {"modes": w.trained, "cross": w.cross, "training": "example"},
    )


def _of_hierarchies(w: World) -> Iterator[Case]:
    parents = {1: ["a"], 2: ["a"], 0: ["root"], "a": ["root"], "root": []}
    yield Case(
        "Taxonomy",
        lk.Taxonomy,
        {"parents": parents, "labels": [0, 1, 2], "aliases": {"zero": 0}, "roots": ["root"]},
    )
    yield Case(
        "Taxonomy.from_edges",
        lk.Taxonomy.from_edges,
        {"edges": [("root", "a"), ("a", 1)], "labels": [1]},
    )
    yield Case(
        "Taxonomy.from_parents", lk.Taxonomy.from_parents, {"parents": parents, "labels": [1]}
    )
    file = w.folder / "taxonomy.json"
    w.taxonomy.to_json(file)
    yield Case("Taxonomy.from_json", lk.Taxonomy.from_json, {"path": file})
    table = w.folder / "edges.csv"
    table.write_text("parent,child\nroot,a\na,b\n")
    yield Case("Taxonomy.from_csv", lk.Taxonomy.from_csv, {"path": table, "labels": ["b"]})
    yield Case("Taxonomy.subset", w.taxonomy.subset, {"labels": [0, 1]})
    yield Case("Taxonomy.node", w.taxonomy.node, {"label": 1})
    yield Case("Taxonomy.ancestors", w.taxonomy.ancestors, {"label": 1, "at_depth": 1})
    yield Case("Taxonomy.depth", w.taxonomy.depth, {"label": 1, "depth": "longest"})
    yield Case("Taxonomy.distance", w.taxonomy.distance, {"a": 1, "b": 2})
    yield Case(
        "Taxonomy.lowest_common_ancestors", w.taxonomy.lowest_common_ancestors, {"a": 1, "b": 2}
    )
    yield Case(
        "taxonomy_distance", lk.taxonomy_distance, {"taxonomy": w.taxonomy, "labels": [0, 1, 2]}
    )
    yield Case(
        "taxonomic_lift",
        lk.taxonomic_lift,
        {
            "neighbors": w.losses,
            "taxonomy": w.taxonomy,
            "label": "label",
            "base": "matched",
            "depth": "shortest",
            "k": 4,
            "largest": True,
            "delete_chains": True,
            "replicates": 5,
            "level": 0.9,
            "seed": 0,
            "keep_replicates": False,
            "memory": "64 MiB",
        },
    )
    yield Case(
        "taxonomic_lift",
        lk.taxonomic_lift,
        {"neighbors": w.near, "taxonomy": w.taxonomy, "replicates": 5},
    )
    yield Case(
        "attribute_lift",
        lk.attribute_lift,
        {
            "neighbors": w.near,
            "attribute": LABEL % 2,
            "exclude": "label",
            "blocks": 4,
            "level": 0.9,
            "seed": 0,
        },
    )
    yield Case(
        "correlation_by_distance",
        lk.correlation_by_distance,
        {
            "losses": w.losses,
            "taxonomy": w.taxonomy,
            "label": "label",
            "within": None,
            "kernel": "correlation",
            "center": "pooled",
            "replicates": 5,
            "level": 0.9,
            "seed": 0,
            "memory": "64 MiB",
        },
    )
    yield Case(
        "color_groups",
        lk.color_groups,
        {"images": np.random.default_rng(0).random((9, 4, 4, 3)), "k": 2},
    )


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


def _of_runs(w: World) -> Iterator[Case]:
    yield Case("SGLD", lk.SGLD, {"step_size": 1e-3, "schedule": None})
    yield Case("SGHMC", lk.SGHMC, {"step_size": 1e-3, "friction": 0.1})
    yield Case(
        "RMSpropSGLD",
        lk.RMSpropSGLD,
        {"step_size": 1e-3, "decay": 0.9, "damping": 0.1, "drift_correction": False},
    )
    yield Case(
        "schedules.PolynomialDecay",
        lk.schedules.PolynomialDecay,
        dict(_defaults("PolynomialDecay")),
    )
    yield Case("schedules.Warmup", lk.schedules.Warmup, dict(_defaults("Warmup")))
    yield Case("schedules.Cyclical", lk.schedules.Cyclical, dict(_defaults("Cyclical")))
    yield Case(
        "LocalPosterior",
        lk.LocalPosterior,
        {
            "model": small_network(),
            "train_set": w.data,
            "loss": "cross_entropy",
            "nbeta": 10.0,
            "gamma": 50.0,
            "trainable": None,
        },
    )

    def sample(**options: Any) -> xr.DataTree:
        return lk.sample(**({"store": MemoryStore()} | options))

    sampler = lk.SGLD(step_size=1e-3)
    yield Case(
        "sample",
        sample,
        {
            "posterior": w.posterior,
            "observed": w.data,
            "sampler": sampler,
            "chains": 1,
            "draws": 2,
            "burn_in": 1,
            "thin": 1,
            "batch_size": 16,
            "coords": {"label": LABEL},
            "seed": 0,
            "observables": {"norm": weight_norm},
            "components": None,
            "checkpoints": None,
            "chains_per_device": 1,
            "autocast": None,
            "compile": False,
            "resume": True,
            "device": "cpu",
            "client": None,
            "progress": False,
        },
        fast=False,
        kept=("client",),
    )
    yield Case(
        "sample",
        lk.sample,
        {
            "posterior": w.posterior,
            "observed": w.data,
            "sampler": sampler,
            "chains": 1,
            "draws": 2,
            "burn_in": 1,
            "batch_size": 16,
            "store": w.folder / "again.zarr",
            "progress": False,
        },
        fast=False,
        kept=(
            "observed",
            "posterior",
            "sampler",
            "chains",
            "draws",
            "burn_in",
            "batch_size",
            "progress",
        ),
    )
    few = {"chains": 1, "draws": 6, "progress": False}
    yield Case(
        "suggest",
        lk.suggest,
        {
            "posterior": w.posterior,
            "observed": w.data,
            "sampler": sampler,
            "step_sizes": [1e-4],
            "gammas": [50.0],
            "nbetas": [10.0],
            "burn_in": 0,
            "thin": 1,
            "batch_size": 16,
            "samples": 4,
            "seed": 0,
            "device": "cpu",
            **few,
        },
        fast=False,
    )
    yield Case(
        "observe",
        lk.observe,
        {
            "tree": w.tree,
            "new_set": classification(5),
            "posterior": w.posterior,
            "sampler": lk.SGLD(step_size=1e-3),
            "store": w.path,
            "coords": {"label": np.arange(5)},
            "observables": None,
            "autocast": None,
            "compile": False,
            "device": "cpu",
            "client": None,
            "progress": False,
        },
        fast=False,
        kept=("client",),
    )
    yield from _of_traces(w)
    yield Case("open", lk.open, {"path": w.path}, fast=False)
    yield Case("verify", lk.verify, {"path": w.path}, fast=False)
    yield Case(
        "repair",
        lk.repair,
        {"store": w.path, "posterior": w.posterior, "observed": w.data, "progress": False},
        fast=False,
    )
    yield Case("discard_trace", lk.discard_trace, {"path": w.folder / "no.zarr"}, fast=False)
    yield Case(
        "discard_gradients", lk.discard_gradients, {"path": w.folder / "no.zarr"}, fast=False
    )
    yield Case("from_devinterp", lk.from_devinterp, {"path": w.folder / "no.zarr"}, fast=False)
    yield Case(
        "save",
        lk.save,
        {
            "kernel": w.kernel.chunk(),
            "store": w.folder / "saved.zarr",
            "group": "kernel",
            "upper": False,
            "progress": False,
        },
        fast=False,
    )
    yield Case(
        "cluster.connect",
        lk.cluster.connect,
        {
            "target": "junk",
            "workers": 1,
            "threads": 1,
            "memory": "1 GiB",
            "tls": None,
            "dashboard": None,
            "timeout": 1.0,
        },
        fast=False,
    )
    yield Case("cluster.check", lk.cluster.check, {"client": None, "shared": None}, fast=False)
    yield Case("cluster.refuse_mismatch", lk.cluster.refuse_mismatch, {"client": None}, fast=False)


def _of_traces(w: World) -> Iterator[Case]:
    def case(call: Callable[..., Any], /, **arguments: Any) -> Case:
        return Case(call.__name__, call, {"trace": w.trace} | arguments, fast=False)

    to = w.numbered
    labels = {"label": np.arange(7) % 3}
    common: dict[str, Any] = {
        "examples": [0, 1, 2],
        "params": "0.*",
        "coords": labels,
        "unlike": False,
        "memory": "64 MiB",
        "progress": False,
    }
    yield case(
        lk.audit,
        audit_set=to,
        target="loss",
        module=None,
        groups={"time": "epoch"},
        overlap=False,
        credit="seen",
        rule="trapezoid",
        supersample=1,
        stride=1,
        steps=(0, 3),
        example_coords={"train_label": [0, 1, 2]},
        store=None,
        name=None,
        **common,
    )
    yield case(
        lk.audit,
        audit_set=[1, 2],
        store=w.folder / "audits.zarr",
        name="a",
        groups={"example": np.arange(50) % 2},
    )
    yield case(
        lk.reconstruction,
        audit_set=to,
        target="loss",
        module=None,
        rule="euler",
        supersample=1,
        stride=1,
        steps=(0, 3),
        unlike=False,
        memory="64 MiB",
        progress=False,
    )
    yield case(lk.tracin, audit_set=to, target="loss", checkpoints="epoch", **common)
    yield case(lk.tracin_in_run, audit_set=to, target="loss", **common)
    yield case(
        lk.trak,
        audit_set=to,
        target="margin",
        checkpoints=[3],
        size=8,
        seed=0,
        regularization=0.1,
        **common,
    )
    yield case(lk.gradient_similarity, audit_set=to, at=-1, cosine=True, **common)
    yield case(
        lk.influence_functions,
        audit_set=to,
        target="loss",
        at=-1,
        damping=0.1,
        max_params=500,
        **common,
    )
    yield case(
        lk.activations, examples=range(3), times=[0, 2], module="1", coords=None, memory="64 MiB"
    )

    def features(**options: Any) -> xr.Dataset:
        return lk.gradient_features(**({"store": MemoryStore()} | options))

    def factors(**options: Any) -> xr.Dataset:
        return lk.gradient_factors(**({"store": MemoryStore()} | options))

    kept = {
        "examples": range(3),
        "times": [0, 2],
        "params": "0.*",
        "coords": {"a": [1, 2, 3]},
        "name": None,
        "dtype": "float32",
        "memory": "64 MiB",
        "progress": False,
    }
    yield Case(
        "gradient_features",
        features,
        {"trace": w.trace, "of": "loss", "project": 8, "seed": 0, "preconditioned": False, **kept},
        fast=False,
    )
    yield Case(
        "gradient_features",
        lk.gradient_features,
        {"trace": w.trace, "examples": [0], "store": w.folder / "features.zarr"},
        fast=False,
    )
    yield Case("gradient_factors", factors, {"trace": w.trace, **kept}, fast=False)
    yield case(lk.gradient_plan, params="0.*")
    yield case(lk.mean_gradient, times=[0, 2], examples=range(3), progress=False)
    step = 3
    modes = lk.modes(w.now, 2).compute()
    yield case(lk.mode_sensitivity, modes=modes, examples=range(3), step=step, whole=False)
    yield case(
        lk.shift_modes,
        modes=modes,
        examples=range(3),
        step=step,
        shift=0.1,
        radius=0.1,
        norm="linf",
        steps=2,
        step_size=0.01,
        labels="own",
        away_from=None,
        match=1.0,
        ortho=1.0,
        loss=0.0,
        bounds=(-9.0, 9.0),
    )
    model, data = w.trace.model if hasattr(w.trace, "model") else small_network(), w.trace.train_set
    yield Case(
        "open_trace",
        lk.open_trace,
        {"path": w.trace_path, "model": model, "train_set": data, "loss": cross_entropy},
        fast=False,
    )

    def record(**options: Any) -> object:
        return lk.record(**({"store": MemoryStore()} | options))

    net = small_network()
    yield Case(
        "record",
        record,
        {
            "model": net,
            "optimizer": torch.optim.SGD(net.parameters(), 0.1),
            "train_set": w.data,
            "loss": "cross_entropy",
            "scheduler": None,
            "every": 1,
            "check_every": 5,
        },
        fast=False,
    )

    def snapshot(**options: Any) -> object:
        return lk.snapshot(**({"store": MemoryStore()} | options))

    yield Case(
        "snapshot",
        snapshot,
        {"model": net, "train_set": w.data, "loss": "cross_entropy"},
        fast=False,
    )


def _defaults(name: str) -> Iterator[tuple[str, Any]]:
    made = {"PolynomialDecay": {"a": 1.0, "b": 10.0}}
    for key, parameter in inspect.signature(getattr(lk.schedules, name)).parameters.items():
        has = parameter.default is not inspect.Parameter.empty
        yield key, parameter.default if has else made.get(name, {}).get(key, 4)


#: Arguments that are places.
PATHS = ("path", "store", "shared", "tls")

#: Put in the place of any argument.
ODD: dict[str, Any] = {
    "none": None,
    "empty": "",
    "junk": "junk",
    "nul": "a\0b",
    "bytes": b"loss",
    "zero": 0,
    "minus one": -1,
    "half": 0.5,
    "fraction": 1.5,
    "true": True,
    "nan": float("nan"),
    "infinity": float("inf"),
    "huge": 10**30,
    "large": 10**7,
    "complex": 1j,
    "numpy integer": np.int64(2),
    "numpy float": np.float32(0.5),
    "numpy bool": np.bool_(True),
    "0-d": np.array(2),
    "array": np.array([1.0, 2.0]),
    "empty array": np.array([]),
    "matrix": np.eye(3),
    "object array": np.array([None, "a"], dtype=object),
    "date": np.datetime64("2020-01-01"),
    "list": [1, "a"],
    "list of none": [None],
    "nested": [[1, 2], [3]],
    "empty list": [],
    "empty tuple": (),
    "tuple": (5, 1),
    "dict": {"a": 1},
    "empty dict": {},
    "mixed dict": {None: "a", ("b",): [1]},
    "set": {"a", "b"},
    "function": lambda *a, **k: "junk",
    "object": object(),
    "type": int,
    "tensor": torch.zeros(3),
    "DataArray": xr.DataArray(3.0),
    "other DataArray": xr.DataArray(np.zeros((2, 3)), dims=("p", "q"), name="other"),
    "Dataset": xr.Dataset({"other": ("p", [1.0, 2.0])}),
    "empty Dataset": xr.Dataset(),
    "DataTree": xr.DataTree(),
    "module": torch.nn.Linear(2, 2),
    "dataset": TensorDataset(torch.zeros(3, 2)),
}


def contents(store: Path) -> dict[str, bytes]:
    """Return every file of a store but its locks."""
    files = (path for path in sorted(store.rglob("*")) if path.is_file())
    return {str(path): path.read_bytes() for path in files if "lock" not in path.name}


def variants(base: Any) -> Iterator[tuple[str, Any]]:
    """Yield labelled data with what may be wrong about it."""
    if isinstance(base, xr.DataTree):
        for name in base.children:
            rest = base.copy()
            del rest[name]
            yield f"without {name}", rest
            yield f"only {name}", base[name]
        return
    if not isinstance(base, xr.DataArray | xr.Dataset):
        return
    for dim, size in base.sizes.items():
        yield f"one of {dim}", base.isel({dim: 0})
        yield f"no {dim}", base.isel({dim: slice(0)})
        yield f"a single {dim}", base.isel({dim: slice(1)})
        yield f"two of {dim}", base.isel({dim: slice(2)})
        yield f"another name for {dim}", base.rename({dim: "elsewhere"})
        yield f"{dim} not indexed", base.drop_vars(dim, errors="ignore")
        yield f"{dim} twice the same", base.assign_coords({dim: np.zeros(size, int)})
        yield f"{dim} by strings", base.assign_coords({dim: [f"x{i}" for i in range(size)]})
        yield f"{dim} backwards", base.isel({dim: slice(None, None, -1)})
    yield "one dim more", base.expand_dims("more")
    yield "dims reversed", base.transpose(*reversed(list(base.sizes)))
    yield "in chunks", base.chunk()
    yield "no coordinates", base.drop_vars(list(base.coords))
    yield "no attributes", base.drop_attrs()
    if isinstance(base, xr.Dataset):
        for name in base.data_vars:
            yield f"without {name}", base.drop_vars(name)
            yield f"{name} complex", base.assign({name: base[name].astype(complex)})
            yield f"{name} of objects", base.assign({name: base[name].astype(object)})
            if base[name].ndim:
                yield (
                    f"{name} fewer dims",
                    base.assign({name: base[name].isel({base[name].dims[0]: 0})}),
                )
            if base[name].dtype.kind == "f":
                yield f"{name} nan", base.assign({name: base[name] * np.nan})
        return
    kinds = ("complex64", "object", "datetime64[s]", "str", "float16", "int16", "bool")
    for kind in kinds:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield kind, base.astype(kind)
    if base.ndim > 1:
        shape = dict.fromkeys(base.dims, 2)
        small = base.isel({dim: slice(2) for dim in base.dims})
        if all(small.sizes[dim] == 2 for dim in shape):
            first = base.dims[0]
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                yield "a dim twice", xr.DataArray(small.values, dims=(first,) * base.ndim)
    yield "nan", base * np.nan
    yield "one nan", base.where(np.arange(base.size).reshape(base.shape) != 1)
    yield "infinite", base * np.inf
    yield "constant", xr.ones_like(base)
    yield "zeros", xr.zeros_like(base)
    yield "as a Dataset", base.to_dataset(name="anything")


def same_as(base: Any) -> Iterator[tuple[str, Any]]:
    """Yield other spellings of a number, which must give what it gives or be refused."""
    if type(base) is int:
        yield "numpy integer", np.int64(base)
        yield "numpy int8", np.int8(base)
        yield "0-d integer", np.array(base)
        yield "tensor", torch.tensor(base)
    if type(base) is float:
        yield "numpy float", np.float64(base)
        yield "0-d float", np.array(base)
        if base == int(base):
            yield "int", int(base)
    if type(base) is bool:
        yield "numpy bool", np.bool_(base)
    if type(base) is str:
        yield "numpy str", np.str_(base)


#: What an annotation of plain kinds allows, by the classes of values.
_PLAIN: dict[str, tuple[type, ...]] = {
    "int": (int, np.integer),
    "float": (float, int, np.floating, np.integer),
    "bool": (bool, np.bool_),
    "str": (str,),
    "None": (type(None),),
}


def allowed(case: Case, argument: str, value: object) -> bool:
    """Say whether a value may be taken by what the argument's annotation says of plain kinds."""
    parameter = inspect.signature(case.call).parameters.get(argument)
    words = str(parameter.annotation).split(" | ") if parameter else []
    if not words or not set(words) <= set(_PLAIN):
        return True
    if isinstance(value, np.ndarray | xr.DataArray | torch.Tensor) and value.ndim == 0:
        value = value.item()
    if isinstance(value, int | np.integer) and "bool" in words and value in (0, 1):
        return True
    if isinstance(value, bool | np.bool_) and "bool" not in words:
        return False
    return isinstance(value, tuple(kind for word in words for kind in _PLAIN[word]))


def outcome(case: Case, arguments: Mapping[str, Any]) -> Any:
    """Call, and compute what is lazy; what comes back is comparable."""
    with dask.config.set(scheduler="synchronous"), warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", "`torch.jit.script` is deprecated")
        got = case.call(**arguments)
        if isinstance(got, xr.DataArray | xr.Dataset):
            got = got.compute()
        elif isinstance(got, xr.DataTree):
            got = xr.DataTree.from_dict({n.path: n.to_dataset().compute() for n in got.subtree})
        elif isinstance(got, Figure):
            got.draw_without_rendering()
            got = None
    return got


def fault(case: Case, argument: str, value: object) -> str | None:
    """Return what is wrong with how a call with an odd argument ends, or ``None``."""
    arguments = dict(case.arguments) | {argument: value}
    try:
        outcome(case, arguments)
    except (ValueError, TypeError, LkarrayError) as error:
        return _unnamed(case, argument, value, error)
    except Exception as error:
        return f"raises {type(error).__name__}: {str(error)[:200]}"
    if not allowed(case, argument, value):
        return "is taken"
    return None


def _unnamed(case: Case, argument: str, value: object, error: Exception) -> str | None:
    """Return what is wrong with an error: it is another's, or does not name the argument."""
    last = error.__traceback__
    while last is not None and last.tb_next is not None:
        last = last.tb_next
    where = last.tb_frame.f_code.co_filename if last else ""
    text = f"{type(error).__name__}: {str(error)[:200]}"
    if not where.startswith(PACKAGE):
        return f"is not refused by lkarray: {text} ({Path(where).name})"
    words = [argument, *_words(case.arguments.get(argument)), *case.also.get(argument, ())]
    if isinstance(value, str | Path) and argument in PATHS:
        words += [str(value)]
    if isinstance(value, xr.DataArray | xr.Dataset | xr.DataTree):
        words += list(case.arguments)  # two that do not fit each other
    if not any(re.search(rf"(?<!\w){re.escape(str(word))}s?(?!\w)", str(error)) for word in words):
        return f"does not name it: {text}"
    return None


def _words(base: Any) -> Iterator[str]:
    """Yield the names of what is in labelled data, by which an error may name its place."""
    if isinstance(base, xr.DataTree):
        for name, child in base.children.items():
            yield str(name)
            yield from _words(child.to_dataset())
    if isinstance(base, xr.Dataset):
        yield from map(str, base.variables)
    if isinstance(base, xr.DataArray):
        yield from map(str, (base.name, *base.coords))
    if isinstance(base, xr.DataArray | xr.Dataset):
        yield from map(str, base.sizes)
    if isinstance(base, Path):
        yield str(base)


def values_for(case: Case, argument: str, folder: Path) -> Iterator[tuple[str, Any]]:
    """Yield what is put in the place of an argument."""
    yield from ODD.items()
    yield from variants(case.arguments[argument])
    if argument in PATHS:
        yield from strange_paths(folder)


def strange_paths(folder: Path) -> Iterator[tuple[str, Any]]:
    """Yield what is no place of a store."""
    file, fifo, other = folder / "a file", folder / "a fifo", folder / "other"
    file.write_text("{}")
    if not fifo.exists():
        os.mkfifo(fifo)
    other.mkdir(exist_ok=True)
    (other / "notes.txt").write_text("of something else")
    broken = folder / "broken"
    broken.mkdir(exist_ok=True)
    (broken / "zarr.json").write_text('{"zarr_format": 3,')
    for path in (file, fifo, other, broken, folder / "a file" / "below"):
        yield path.name, path
    yield "a device", "/dev/null"
    yield "a long name", "x" * 5000
    yield "bytes of a path", os.fsencode(file)
    for url in (
        "foo://x",
        "http://127.0.0.1:1/x",
        "memory://nowhere",
        "s3://",
        "gs:///x",
        "file://",
        "://",
        "foo://",
        "~nobody-of-this-name/x",
    ):
        yield url, url
