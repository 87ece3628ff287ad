"""Whether adversarial inputs fool a network by influences that cancel.

See Anonymous 2026, 6.3, A.8 to A.10, A.14.

A network learns, recorded. Images that it gets right are attacked until it does not; beside them
stand as much random noise, and natural errors of equal loss. Their losses and predictions are
audited by layer and epoch, their mode coefficients followed through training, and corrected by
algorithm 2, label-free, with its controls. The claims are decided over several networks.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np
import torch
import xarray as xr
from pydantic import Field, model_validator
from torch.utils.data import TensorDataset

import lkarray as lk
from lkarray import store, workflow
from lkarray_workflows.shared.adversarial_cure import cure
from lkarray_workflows.shared.adversarial_modes import SENSITIVE, by_modes, over_time
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


class Config(Training):
    """Settings; of the training the paper's."""

    presets: ClassVar = {
        "paper": {"pairs": 32, "features": 5000, "times": 51},
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


Study = workflow.Study[Config]


def run(config: Config, folder: Path, *, progress: bool = True) -> str:
    """Run the study in ``folder``, or continue it; return what to tell the user."""
    check(config, config.seeds)
    require_foolbox()
    with workflow.Study("adversarial", config, folder, progress) as study:
        networks: list[tuple[Study, Trained]] = []
        for seed in range(config.seed, config.seed + config.seeds):
            first = seed == config.seed
            home = study if first else study.within(f"seed_{seed}")
            # Later networks are asked at epochs only.
            recorded = train(home, seed=seed, every=1 if first else config.batches)
            networks.append((home, recorded))
            for name, (work, makes) in (STAGES if first else LATER).items():
                home.stage(f"{name} {seed}", work, makes, recorded)
        study.stage("report", report, "report/index.html", networks)
        discard(config, *(recorded for _, recorded in networks))
        if not config.keep:
            for home, _ in networks:
                lk.discard_gradients(home.path("analysis.zarr"))
    return f"Report  {study.index}\nStore   {study.path('analysis.zarr')}"


# --- inputs -----------------------------------------------------------------------------------


def make_inputs(study: Study, run: Trained) -> None:
    """Attack training images, and take what stands beside them."""
    config = study.config
    pairs = make_pairs(
        run.final(),
        run.images("train", config.tried),
        config.pairs,
        kind=config.attack,
        radius=config.radius,
        seed=run.seed,
    )
    pairs.save(study.path("pairs.npz"))


def path_of(pairs: Pairs, points: int = 11) -> tuple[TensorDataset, dict[str, Any]]:
    """Return the first clean image on its way to the adversarial and the random one."""
    positions = torch.linspace(0, 1, points)
    clean = pairs.images["clean"][:1]
    images = [
        clean + positions.view(-1, 1, 1, 1) * (pairs.images[kind][:1] - clean)
        for kind in ("adversarial", "random")
    ]
    labels = pairs.labels["clean"][:1].repeat(2 * points)
    return TensorDataset(torch.cat(images), labels), {
        "kind": np.repeat(["path adversarial", "path random"], points),
        "position": np.tile(positions.numpy(), 2),
    }


# --- audits -----------------------------------------------------------------------------------


def with_way(pairs: Pairs) -> tuple[TensorDataset, dict[str, Any]]:
    """Return all inputs, and those on the way to two of them, with what each is."""
    (images, labels), coords = pairs.data().tensors, pairs.coords()
    way, between = path_of(pairs)
    both = zip((images, labels), way.tensors, strict=True)
    return TensorDataset(*(torch.cat(tensors) for tensors in both)), {
        "kind": np.concatenate([coords["kind"], between["kind"]]),
        "pair": np.concatenate([coords["pair"], np.zeros(len(way), int)]),
        "position": np.concatenate([np.full(len(images), np.nan), between["position"]]),
    }


def audit(study: Study, run: Trained) -> None:
    """Audit the losses of all inputs, and of the way to two of them, by epoch."""
    path = study.path("analysis.zarr")
    inputs, coords = with_way(Pairs.load(study.path("pairs.npz")))
    audited = lk.audit(
        run.trace(),
        inputs,
        groups={"time": "epoch"},
        coords=coords,
        store=path,
        progress=study.show,
    )
    sums = {}
    for name, make in (("net", lk.net_influence), ("gross", lk.gross_influence)):
        for cumulative in (False, True):
            sums[name + " so far" * cumulative] = make(audited, cumulative=cumulative).compute()
    store.put(path, "influence_sums", xr.Dataset(_plain(sums)))
    whole = audited["influence"].sum("epoch").transpose("example", ...).values
    kinds = audited["kind"].values
    influence = {kind: whole[:, kinds == kind] for kind in KINDS}
    first = {kind: influence[kind][:, 0] for kind in KINDS[:3]}
    store.put(path, "first_pair", xr.Dataset({k: ("example", v) for k, v in first.items()}))
    gross, net = (sums[f"{name} so far"].isel(epoch=-1).values for name in ("gross", "net"))
    metrics = {
        **{key: audited.attrs[key] for key in ("mre", "lc", "closure")},
        **against_clean(influence, study.config.pairs),
        "gross": {kind: float(gross[kinds == kind].mean()) for kind in KINDS},
        "net": {kind: float(net[kinds == kind].mean()) for kind in KINDS},
        "net_over_gross": {
            kind: float(np.mean(np.abs(net) / gross, where=kinds == kind)) for kind in KINDS
        },
    }
    study.write("audit.json", metrics)


def against_clean(influence: dict[str, np.ndarray], count: int) -> dict[str, Any]:
    """Return correlation and slope of influence on perturbed images with that on clean ones."""
    clean, perturbed = influence["clean"], ("adversarial", "random")
    return {
        "correlation": {
            kind: [
                float(np.corrcoef(clean[:, i], influence[kind][:, i])[0, 1]) for i in range(count)
            ]
            for kind in perturbed
        },
        "slope": {
            kind: [
                float(clean[:, i] @ influence[kind][:, i] / np.square(clean[:, i]).sum())
                for i in range(count)
            ]
            for kind in perturbed
        },
    }


def by_layer(study: Study, run: Trained) -> None:
    """Audit some by layer and epoch, each training image apart for as long as that takes."""
    pairs, count = Pairs.load(study.path("pairs.npz")), study.config.detailed
    audited = lk.audit(
        run.trace(),
        pairs.data(count=count),
        groups={"param": layers(run.untrained()), "time": "epoch"},
        coords=pairs.coords(count=count),
        store=study.path("analysis.zarr"),
        name="layers",
        progress=study.show,
    )
    sums = {
        "net": lk.net_influence(audited).compute(),
        "gross": lk.gross_influence(audited).compute(),
    }
    store.put(study.path("analysis.zarr"), "layer_sums", xr.Dataset(_plain(sums)))
    gross = sums["gross"].groupby("kind").mean().sum("epoch")
    largest = {
        str(kind): str(gross["layer"].values[int(gross.sel(kind=kind).argmax("layer"))])
        for kind in gross["kind"].values
    }
    numbers = {key: audited.attrs[key] for key in ("mre", "lc", "closure")}
    study.write("layers.json", {**numbers, "largest_layer": largest})


def outputs(study: Study, run: Trained) -> None:
    """Audit every output of the network for some: the prediction audit."""
    pairs, count = Pairs.load(study.path("pairs.npz")), study.config.predicted
    kinds = KINDS[:3]
    audited = lk.audit(
        run.trace(),
        pairs.data(kinds, count),
        target="prediction",
        coords=pairs.coords(kinds, count),
        store=study.path("analysis.zarr"),
        name="outputs",
        progress=study.show,
    )
    study.write("outputs.json", {key: audited.attrs[key] for key in ("mre", "lc", "closure")})


def _plain(sums: dict[str, xr.DataArray]) -> dict[str, xr.DataArray]:
    return {name: values.rename(None).drop_attrs() for name, values in sums.items()}


#: What is done with every network, in this order, and the file that each leaves.
LATER: dict[str, tuple[Callable[[Study, Trained], None], str]] = {
    "pairs": (make_inputs, "pairs.npz"),
    "modes": (by_modes, "modes.json"),
    "cure": (cure, "cure.json"),
}
#: What is done with the first.
STAGES = {
    **LATER,
    "audit": (audit, "audit.json"),
    "layers": (by_layer, "layers.json"),
    "outputs": (outputs, "outputs.json"),
    "time": (over_time, "time.json"),
}
