"""Calls of functions of losses."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

import lkarray as lk
from tests.helpers.fuzzing.world import Case, World


def _of_losses(w: World) -> Iterator[Case]:
    two = {"losses": w.losses, "y": w.losses, "center": "pooled", "memory": "64 MiB"}
    precise = two | {"precision": "float32", "estimator": "sample"}
    yield Case("covariance", lk.covariance, precise | {"shrinkage": None})
    yield Case("covariance", lk.covariance, {"losses": w.tree, "shrinkage": 0.5})
    yield Case("correlation", lk.correlation, precise)
    yield Case(
        "influence",
        lk.influence,
        {
            "losses": w.losses,
            "query": w.loss,
            "estimator": "sample",
            "precision": "float32",
            "memory": "64 MiB",
        },
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
        own
        | {"k": 3, "exclude": "label", "largest": True, "precision": "auto"}
        | {"estimator": "sample"},
    )
    yield Case("neighbors", lk.neighbors, own | {"k": 3, "crossfit": True})
    yield Case(
        "at_equal_reliability",
        lk.at_equal_reliability,
        {
            "losses": {"all": w.losses},
            "statistic": lambda x: lk.neighbors(x, 2)["similarity"].mean(),
            "stretches": 1,
            "splits": 1,
            "level": 0.9,
            "seed": 0,
            "memory": "64 MiB",
        },
        fast=False,
    )
    yield Case(
        "extrapolated",
        lk.extrapolated,
        {
            "losses": w.losses,
            "statistic": lambda x: lk.neighbors(x, 2)["similarity"].mean(),
            "halvings": 1,
            "level": 0.9,
        },
        fast=False,
    )
    yield Case("judge", lk.judge, {"tree": w.tree, "splits": 2, "seed": 0, "memory": "64 MiB"})
    yield Case("reliability", lk.reliability, own | {"splits": 2, "seed": 0})
    yield Case("ledoit_wolf", lk.ledoit_wolf, own)
    yield Case("linear_operator", lk.linear_operator, own | {"kernel": "covariance"})
    yield Case(
        "group_mean",
        lk.group_mean,
        own
        | {"groups": "label", "kernel": "correlation", "self_pairs": True}
        | {"estimator": "sample"},
    )
    yield Case(
        "histogram",
        lk.histogram,
        own
        | {"groups": "label", "bins": 7, "bounds": (-1.0, 1.0), "kernel": "correlation"}
        | {"estimator": "sample"},
    )
    yield Case("residualize", lk.residualize, {"losses": w.losses, "groups": "label"})
    pair = {
        "a": w.losses,
        "b": w.losses,
        "center": "pooled",
        "normalize": "count",
        "estimator": "sample",
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
    yield Case("log_odds", lk.log_odds, {"losses": w.losses})
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
