"""Calls that record training, or take what was recorded."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
import xarray as xr
from zarr.storage import MemoryStore

import lkarray as lk
from tests.helpers.fuzzing.world import Case, World
from tests.helpers.networks import small_network
from tests.helpers.recorded_runs import cross_entropy


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
