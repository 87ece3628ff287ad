"""Calls of functions of gradients."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

import lkarray as lk
from tests.helpers.fuzzing.world import Case, World


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
