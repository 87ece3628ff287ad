"""Calls that sample, store or connect."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

import numpy as np
import xarray as xr
from zarr.storage import MemoryStore

import lkarray as lk
from tests.helpers.fuzzing.traces import _of_traces
from tests.helpers.fuzzing.world import LABEL, Case, World, weight_norm
from tests.helpers.networks import classification, small_network


def _of_runs(w: World) -> Iterator[Case]:
    yield Case("SGLD", lk.SGLD, {"step_size": 1e-3, "schedule": None})
    yield Case("Laplace", lk.Laplace, {"step_size": 0.0, "schedule": None, "rank": 3})
    yield Case(
        "InformedLangevin", lk.InformedLangevin, {"step_size": 0.5, "schedule": None, "rank": 3}
    )
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

    yield Case(
        "Outcome",
        lk.Outcome,
        {"name": "margin", "of_logits": weight_norm, "link": "softplus", "units": "1"},
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
            "start": None,
            "control": "laplace",
            "batch_size": 16,
            "coords": {"label": LABEL},
            "seed": 0,
            "observables": {"norm": weight_norm},
            "outcomes": ("loss", "log_odds"),
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
        also={"observed": ("coords",)},  # labels of another number of samples
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
    yield Case(
        "laplace",
        lk.laplace,
        {
            "posterior": w.posterior,
            "observed": w.data,
            "outcome": "log_odds",
            "rank": 2,
            "step_size": 1e-3,
            "sketch": None,
            "smooth": 2,
            "seed": 0,
            "coords": {"label": LABEL},
            "store": None,
            "memory": "64 MiB",
            "device": "cpu",
            "num_workers": 0,
            "progress": False,
        },
        fast=False,
        kept=("store",),  # whose errors name the place, as those of sample do
        also={"observed": ("coords",)},  # labels of another number of samples
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
            "outcomes": ("loss", "log_odds"),
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
        {
            "store": w.path,
            "posterior": w.posterior,
            "observed": w.data,
            "outcomes": ("loss",),
            "progress": False,
        },
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


def _defaults(name: str) -> Iterator[tuple[str, Any]]:
    made = {"PolynomialDecay": {"a": 1.0, "b": 10.0}}
    for key, parameter in inspect.signature(getattr(lk.schedules, name)).parameters.items():
        has = parameter.default is not inspect.Parameter.empty
        yield key, parameter.default if has else made.get(name, {}).get(key, 4)
