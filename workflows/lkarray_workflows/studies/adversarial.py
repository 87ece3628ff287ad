"""Do adversarial inputs fool a network by influences that cancel? (PLGK 6.3, A.8 to A.10, A.14).

A network learns, recorded. Images that it gets right are attacked until it does not; beside them
stand as much random noise, and natural errors of equal loss. Their losses and predictions are
audited by layer and epoch, their mode coefficients followed through training, and corrected by
algorithm 2, label-free, with its controls. The claims are decided over several networks.
"""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np
import torch
import xarray as xr
from lkarray_workflows.shared.adversarial_modes import SENSITIVE, by_modes, cure, over_time
from lkarray_workflows.shared.adversarial_report import report
from lkarray_workflows.shared.attacks import KINDS, Attack, Pairs, make_pairs, require_foolbox
from lkarray_workflows.shared.recorded import (
    Trained,
    Training,
    check,
    discard,
    layers,
    require_enough,
    train,
)
from pydantic import Field, model_validator
from torch.utils.data import TensorDataset

import lkarray as lk
from lkarray import store, workflow


class Config(Training):
    """Settings; of the training the paper's, on Fashion-MNIST."""

    presets: ClassVar = {
        "paper": {"dataset": "mnist", "pairs": 32, "features": 5000, "times": 51},
        "small": {
            "batches": 10,
            "batch_size": 64,
            "epochs": 6,
            "learning_rate": 2e-3,
            "pairs": 8,
            "detailed": 3,
            "predicted": 2,
            "features": 150,
            "modes": 60,
            "times": 4,
            "tried": 600,
            "correction_steps": 10,
            "seeds": 2,
            "radius": 0.2,
        },
    }

    attack: Attack = "pgd"
    radius: float = Field(0.1, gt=0, description="of the attack, in its norm, pixels 0 to 1")
    tried: int = Field(4000, ge=10, description="training images that are candidates")
    pairs: int = Field(40, ge=2, description="images attacked, and natural errors beside them")
    detailed: int = Field(12, ge=1, description="pairs audited by layer too")
    predicted: int = Field(2, ge=1, description="pairs of which every output is audited")
    features: int = Field(1000, ge=100, description="training images whose gradients give modes")
    modes: int = Field(125, ge=SENSITIVE)
    leading: int = Field(10, ge=1, description="modes that the correction shifts")
    times: int = Field(26, ge=3, description="epochs, evenly spaced, of what is asked over time")
    shift: float = Field(100.0, gt=0, description="of each coefficient: tau of algorithm 2")
    correction: float = Field(0.1, gt=0, description="radius of the correction, norm as attack's")
    correction_steps: int = Field(40, ge=1)
    seeds: int = Field(3, ge=1, description="networks that decide the claims")

    @model_validator(mode="after")
    def _fits(self) -> Self:
        images = self.batches * self.batch_size
        require_enough(
            self,
            {
                "leading": self.modes,
                "modes": self.features,
                "pairs": self.tried,
                "detailed": self.pairs,
                "predicted": self.pairs,
                "features": images,
                "tried": images,
            },
        )
        return self


def run(config: Config, folder: Path, *, progress: bool = True) -> str:
    """Run the study in ``folder``, or continue it; return what to tell the user."""
    check(config, config.seeds)
    require_foolbox()
    with workflow.Run("adversarial", config, folder) as state:
        every: list[Paths] = []
        for seed in range(config.seed, config.seed + config.seeds):
            first = seed == config.seed
            home = folder if first else folder / f"seed_{seed}"
            kept = 1 if first else config.batches  # later networks are asked at epochs only
            run_ = train(state, config, home, progress, seed=seed, every=kept)
            paths = Paths(home, run_)
            every.append(paths)
            stages = {"pairs": make_inputs, "modes": by_modes, "cure": cure}
            if first:
                stages |= {"audit": audit, "layers": by_layer, "outputs": outputs}
                stages |= {"time": over_time}
            for name, work in stages.items():
                do = partial(work, config, paths, progress)
                state.stage(f"{name} {seed}", do, [getattr(paths, name)])
        index = folder / "report" / "index.html"
        write = partial(report, config, every, state)
        state.stage("report", write, [index])
        discard(config, *(paths.run for paths in every))
        for paths in every:
            if not config.keep:
                lk.discard_gradients(paths.store)
    return f"Report  {index}\nStore   {every[0].store}"


class Paths:
    """Where the files about one network are."""

    def __init__(self, folder: Path, run: Trained) -> None:
        self.folder, self.run = folder, run
        self.store = folder / "analysis.zarr"
        self.pairs, self.cured = folder / "pairs.npz", folder / "cured.npz"
        self.modes, self.cure, self.audit, self.layers, self.outputs, self.time = (
            folder / f"{name}.json"
            for name in ("modes", "cure", "audit", "layers", "outputs", "time")
        )

    def epochs(self, count: int | None = None) -> tuple[list[int], np.ndarray]:
        """Return steps, and the epochs that begin there."""
        steps = self.run.epochs(count)
        return steps, np.searchsorted(self.run.epochs(), steps)


# --- inputs -----------------------------------------------------------------------------------


def make_inputs(config: Config, paths: Paths, show: bool) -> None:
    """Attack training images, and take what stands beside them."""
    found = make_pairs(
        paths.run.final(),
        paths.run.images("train", config.tried),
        config.pairs,
        kind=config.attack,
        radius=config.radius,
        seed=paths.run.seed,
    )
    found.save(paths.pairs)


def path_of(pairs: Pairs, points: int = 11) -> tuple[TensorDataset, dict[str, Any]]:
    """Return the first clean image on its way to the adversarial and the random one."""
    at = torch.linspace(0, 1, points)
    clean = pairs.images["clean"][:1]
    rows = [
        clean + at.view(-1, 1, 1, 1) * (pairs.images[kind][:1] - clean)
        for kind in ("adversarial", "random")
    ]
    labels = pairs.labels["clean"][:1].repeat(2 * points)
    return TensorDataset(torch.cat(rows), labels), {
        "kind": np.repeat(["path adversarial", "path random"], points),
        "position": np.tile(at.numpy(), 2),
    }


# --- audits -----------------------------------------------------------------------------------


def audit(config: Config, paths: Paths, show: bool) -> None:
    """Audit the losses of all inputs, and of the way to two of them, by epoch."""
    pairs = Pairs.load(paths.pairs)
    (images, labels), coords = pairs.data().tensors, pairs.coords()
    way, between = path_of(pairs)
    both = TensorDataset(*(torch.cat(of) for of in zip((images, labels), way.tensors, strict=True)))
    coords = {
        "kind": np.concatenate([coords["kind"], between["kind"]]),
        "pair": np.concatenate([coords["pair"], np.zeros(len(way), int)]),
        "position": np.concatenate([np.full(len(images), np.nan), between["position"]]),
    }
    found = lk.audit(
        paths.run.trace(),
        both,
        groups={"time": "epoch"},
        coords=coords,
        store=paths.store,
        progress=show,
    )
    kept = {}
    for name, make in (("net", lk.net_influence), ("gross", lk.gross_influence)):
        for cumulative in (False, True):
            kept[name + " so far" * cumulative] = make(found, cumulative=cumulative).compute()
    store.put(paths.store, "influence_sums", xr.Dataset(_plain(kept)))
    whole = found["influence"].sum("epoch").transpose("example", ...).values
    kinds, n = found["kind"].values, config.pairs
    parts = {kind: whole[:, kinds == kind] for kind in KINDS}
    of = {
        kind: [float(np.corrcoef(parts["clean"][:, i], parts[kind][:, i])[0, 1]) for i in range(n)]
        for kind in ("adversarial", "random")
    }
    slope = {
        kind: [
            float(parts["clean"][:, i] @ parts[kind][:, i] / np.square(parts["clean"][:, i]).sum())
            for i in range(n)
        ]
        for kind in of
    }
    first = {kind: parts[kind][:, 0] for kind in ("clean", *of)}
    store.put(paths.store, "first_pair", xr.Dataset({k: ("example", v) for k, v in first.items()}))
    gross = kept["gross so far"].isel(epoch=-1).values
    net = kept["net so far"].isel(epoch=-1).values
    metrics = {
        **{key: found.attrs[key] for key in ("mre", "lc", "closure")},
        "correlation": of,
        "slope": slope,
        "gross": {kind: float(gross[kinds == kind].mean()) for kind in KINDS},
        "net": {kind: float(net[kinds == kind].mean()) for kind in KINDS},
        "net_over_gross": {
            kind: float(np.mean(np.abs(net) / gross, where=kinds == kind)) for kind in KINDS
        },
    }
    paths.audit.write_text(json.dumps(metrics))


def by_layer(config: Config, paths: Paths, show: bool) -> None:
    """Audit some by layer and epoch, each training image apart for as long as that takes."""
    pairs, count = Pairs.load(paths.pairs), config.detailed
    found = lk.audit(
        paths.run.trace(),
        pairs.data(count=count),
        groups={"param": layers(paths.run.untrained()), "time": "epoch"},
        coords=pairs.coords(count=count),
        store=paths.store,
        name="layers",
        progress=show,
    )
    sums = {"net": lk.net_influence(found).compute(), "gross": lk.gross_influence(found).compute()}
    store.put(paths.store, "layer_sums", xr.Dataset(_plain(sums)))
    gross = sums["gross"].groupby("kind").mean().sum("epoch")
    largest = {
        str(kind): str(gross["layer"].values[int(gross.sel(kind=kind).argmax("layer"))])
        for kind in gross["kind"].values
    }
    numbers = {key: found.attrs[key] for key in ("mre", "lc", "closure")}
    paths.layers.write_text(json.dumps({**numbers, "largest_layer": largest}))


def outputs(config: Config, paths: Paths, show: bool) -> None:
    """Audit every output of the network for some: the prediction audit."""
    pairs, count = Pairs.load(paths.pairs), config.predicted
    kinds = KINDS[:3]
    found = lk.audit(
        paths.run.trace(),
        pairs.data(kinds, count),
        target="prediction",
        coords=pairs.coords(kinds, count),
        store=paths.store,
        name="outputs",
        progress=show,
    )
    paths.outputs.write_text(
        json.dumps({key: found.attrs[key] for key in ("mre", "lc", "closure")})
    )


def _plain(parts: dict[str, xr.DataArray]) -> dict[str, xr.DataArray]:
    return {name: part.rename(None).drop_attrs() for name, part in parts.items()}
