"""What the calls need, made once, and a call as it is written down."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xarray as xr

import lkarray as lk
from tests.helpers.audited_runs import audited, recorded
from tests.helpers.networks import classification, small_network

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
        self._record(folder)
        self._analyse()

    def _record(self, folder: Path) -> None:
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

    def _analyse(self) -> None:
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
