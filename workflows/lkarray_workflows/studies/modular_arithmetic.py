"""Modular arithmetic: the loss kernel of two tasks that share nothing but weights.

A two-layer transformer (Power et al. 2022, with a vocabulary for each task) learns addition and
division modulo 97. The loss kernel of 10,000 inputs should fall apart into the two tasks, and a
small cluster of the trivial divisions 0 / b (Adam et al. 2025a, section 3, figure 3, appendix C).
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
import xarray as xr
from pydantic import Field
from torch import nn
from torch.utils.data import TensorDataset

import lkarray as lk
from lkarray import progress, store, workflow
from lkarray.errors import SettingsError
from lkarray_workflows.shared.common import (
    Block,
    Sampling,
    accuracy,
    draw_losses,
    fit,
    halves_agree,
    keep_model,
    load_model,
    with_error,
    without_chain,
)
from lkarray_workflows.shared.modular_arithmetic_report import (
    TASKS,
    first_component,
    folded,
    moments,
    report,
)

#: Kinds of inputs: those of each task, and the trivial divisions.
KINDS = (*TASKS, "0 / b")


class Config(Sampling):
    """Settings: the paper's posterior; 15 x 100 draws, eight steps apart, instead of 30 x 800."""

    presets: ClassVar = {
        "paper": {"chains": 30, "draws": 800, "thin": 1},
        "small": {
            "modulus": 31,
            "observed": 600,
            "chains": 4,
            "draws": 100,
            "thin": 8,
            "burn_in": 100,
            "train_share": 0.8,
            "batch_size": 128,
            "sampler_batch": 128,
            "width": 64,
        },
    }

    seed: int = Field(1, ge=0, description="of the split, the training, the sampling")
    modulus: int = Field(97, ge=5, description="a prime")
    train_share: float = Field(0.6, gt=0, lt=1, description="of all pairs, trained on")
    observed: int = Field(5000, ge=20, description="inputs of each task, at random from all pairs")
    width: int = Field(128, ge=8, multiple_of=8)
    layers: int = Field(2, ge=1)
    heads: int = Field(4, ge=1)
    epochs: int = Field(1000, ge=1, description="at most")
    generalize: float = Field(0.99, ge=0, le=1, description="share of held-out pairs to get right")
    settle: int = Field(20, ge=0, description="epochs after that, the rate falling to 0")
    learning_rate: float = Field(1e-3, gt=0)
    weight_decay: float = Field(1.0, ge=0, description="decoupled, as in Power et al.")
    batch_size: int = Field(512, ge=1, description="of the training")
    neighbors: int = Field(30, ge=1)
    nbeta: float = Field(500.0, ge=0)
    gamma: float = Field(30_000.0, gt=0)
    step_size: float = Field(2e-7, gt=0)
    sampler_batch: int = Field(512, ge=1)
    chains: int = Field(15, ge=3)
    draws: int = Field(100, ge=2)
    burn_in: int = Field(200, ge=0)
    thin: int = Field(8, ge=1)


Study = workflow.Study[Config]


class Transformer(nn.Module):
    """The result of two tokens, as logits over the vocabularies of both tasks."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        torch.manual_seed(config.seed)
        self.tokens = nn.Embedding(2 * config.modulus, config.width)
        self.blocks = nn.Sequential(
            *(Block(config.width, config.heads) for _ in range(config.layers))
        )
        self.head = nn.Linear(config.width, 2 * config.modulus, bias=False)
        place = torch.arange(2)[:, None] / 10_000 ** (
            torch.arange(0, config.width, 2) / config.width
        )
        self.register_buffer("places", torch.stack((place.sin(), place.cos()), -1).flatten(1))

    def forward(self, pairs: torch.Tensor) -> torch.Tensor:
        """Take ``(input, 2)`` and return ``(input, token)``."""
        return self.head(self.blocks(self.tokens(pairs) + self.places)[..., -1, :])


def run(config: Config, folder: Path, *, progress: bool = True) -> str:
    """Run the study in ``folder``, or continue it; return what to tell the user."""
    with workflow.Study("modular_arithmetic", config, folder, progress) as study:
        study.stage("data", make_data, "data.npz")
        study.stage("train", train, "model.pt")
        study.stage("sample", sample, "store.zarr")
        study.stage("map", make_map, "store.zarr/derived/map")
        study.stage("measure", measure, "metrics.json")
        study.stage("report", report, "report/index.html")
    return f"Report  {study.index}\nStore   {study.path('store.zarr')}"


def all_pairs(modulus: int) -> dict[str, np.ndarray]:
    """Return every input of both tasks, additions first: ``a``, ``b``, ``result``, ``task``.

    Raises
    ------
    SettingsError
        The modulus is not a prime, so that some numbers have no inverse.
    """
    if any(modulus % n == 0 for n in range(2, int(modulus**0.5) + 1)):
        raise SettingsError(f"modulus must be a prime, not {modulus}: division needs inverses")
    a, b = (x.ravel() for x in np.meshgrid(np.arange(modulus), np.arange(modulus), indexing="ij"))
    inverse = np.array([pow(int(n), modulus - 2, modulus) for n in range(modulus)])
    return {
        "a": np.concatenate((a, a[b > 0])),
        "b": np.concatenate((b, b[b > 0])),
        "result": np.concatenate(((a + b) % modulus, (a * inverse[b] % modulus)[b > 0])),
        "task": np.repeat([0, 1], [len(a), (b > 0).sum()]),
    }


def make_data(study: Study) -> None:
    """Split all pairs at random; choose those to observe, additions first."""
    config = study.config
    pairs = all_pairs(config.modulus)
    rng = np.random.default_rng(config.seed)
    n = len(pairs["task"])
    trained = np.zeros(n, bool)
    trained[rng.choice(n, round(config.train_share * n), replace=False)] = True
    chosen = []
    for task in (0, 1):
        (own,) = np.nonzero(pairs["task"] == task)
        chosen.append(np.sort(rng.choice(own, min(config.observed, len(own)), replace=False)))
    kept: dict[str, Any] = {"trained": trained, "observed": np.concatenate(chosen), **pairs}
    study.save("data.npz", **kept)


def data_set(study: Study, which: str) -> TensorDataset:
    """Return ``trained``, ``held_out`` or ``observed`` pairs of tokens, and their results."""
    with np.load(study.path("data.npz")) as data:
        rows = {"trained": data["trained"], "held_out": ~data["trained"]}.get(
            which, data["observed"]
        )
        size = data["a"].max() + 1
        tokens = np.stack((data["a"], data["b"], data["result"]), 1) + size * data["task"][:, None]
    chosen = torch.from_numpy(tokens[rows])
    return TensorDataset(chosen[:, :2].contiguous(), chosen[:, 2].contiguous())


def train(study: Study) -> None:
    """Train until every training pair is right and most others are; let the network settle."""
    config = study.config
    data, other = data_set(study, "trained"), data_set(study, "held_out")

    def learned(model: nn.Module) -> bool:
        return bool(
            accuracy(model, data).all() and accuracy(model, other).mean() >= config.generalize
        )

    model = fit(
        Transformer(config),
        data,
        rate=config.learning_rate,
        weight_decay=config.weight_decay,
        batch_size=config.batch_size,
        epochs=config.epochs,
        seed=config.seed,
        show=study.show,
        settle=config.settle,
        learned=learned,
    )
    keep_model(model, study.path("model.pt"))


def sample(study: Study) -> None:
    """Sample the local posterior and observe inputs of both tasks."""
    config = study.config
    with np.load(study.path("data.npz")) as data:
        rows = data["observed"]
        coords = {name: data[name][rows] for name in ("a", "b", "result", "trained")}
        task = np.array(TASKS)[data["task"][rows]]
    coords["task"] = task
    coords["kind"] = np.where((task == "division") & (coords["a"] == 0), "0 / b", task)
    draw_losses(
        config,
        load_model(Transformer(config), study.path("model.pt")),
        data_set(study, "trained"),
        data_set(study, "observed"),
        study.path("store.zarr"),
        batch_size=config.sampler_batch,
        seed=config.seed,
        coords=coords,
        show=study.show,
    )


def losses_of(study: Study) -> xr.DataArray:
    """Return the losses of the observed inputs."""
    return lk.open(study.path("store.zarr"))["losses"].to_dataset()["loss"]


def make_map(study: Study) -> None:
    """Find neighbours, and embed them at distance 1 - R."""
    with progress.dask_bar("neighbours", show=study.show):
        near = lk.neighbors(losses_of(study), study.config.neighbors)
        store.put(study.path("store.zarr"), "neighbors", near)
    near = lk.open(study.path("store.zarr"))["derived/neighbors"].to_dataset()
    with progress.busy("map (UMAP)", show=study.show):
        store.put(study.path("store.zarr"), "map", lk.embed(near, seed=study.config.seed))


def kind_means(losses: xr.DataArray) -> np.ndarray:
    """Return the mean of R between kinds of inputs."""
    means = lk.group_mean(losses, "kind", self_pairs=False)
    return np.asarray(means.sel(kind=list(KINDS), kind_2=list(KINDS)).values)


def nearest_numbers(near: np.ndarray, task: np.ndarray, kind: np.ndarray) -> dict[str, Any]:
    """Return how often neighbours are of the same task, or trivial divisions too."""
    zero = kind == "0 / b"
    return {
        "neighbors_of_same_task": float((task[near] == task[:, None]).mean()),
        "chance_same_task": float(np.mean([(task == name).mean() ** 2 for name in TASKS]) * 2),
        "zero": {
            "inputs": int(zero.sum()),
            "neighbors_that_are": float(zero[near][zero].mean()),
            "chance": float(zero.mean()),
        },
    }


def measure(study: Study) -> None:
    """Compute every number of the report."""
    with progress.busy("numbers", show=study.show):
        study.write("metrics.json", numbers_of(study))


def numbers_of(study: Study) -> dict[str, Any]:
    """Return every number of the report; keep the distribution of covariances."""
    tree = lk.open(study.path("store.zarr"))
    node = tree["losses"].to_dataset()
    losses, center = node["loss"], node["center_loss"]
    task, kind = node["task"].values, node["kind"].values
    division = task == "division"

    def first_axis(scaled: str, some: xr.DataArray) -> float:
        return folded(division, first_component(some, center, of=scaled))

    mean, error = without_chain(losses, kind_means)
    axes = {of: with_error(losses, partial(first_axis, of)) for of in ("chain", "sample")}
    leading = lk.svd(losses, 1, over=("chain", "draw"), center="pooled", normalize="cosine")
    spread = moments(losses, int((~division).sum()))
    bound = 4 * max(block["deviation"] for block in spread.values())
    counts = lk.histogram(losses, "task", bins=161, bounds=(-bound, bound), kernel="covariance")
    store.put(study.path("store.zarr"), "covariances", counts)
    model = load_model(Transformer(study.config), study.path("model.pt"))
    return {
        "accuracy": {
            split: float(accuracy(model, data_set(study, split)).mean())
            for split in ("trained", "held_out")
        },
        "pc1_auroc": axes["chain"],
        "pc1_of_unit_vectors_auroc": axes["sample"],
        "center_loss_auroc": folded(division, center.values),
        "leading_mode_auroc": folded(division, leading["u"].isel(mode=0).values),
        "mean_correlation": {
            f"{first}, {second}": {"value": mean[i, j], "error": error[i, j]}
            for i, first in enumerate(KINDS)
            for j, second in enumerate(KINDS)
            if i <= j
        },
        "covariance": spread,
        **nearest_numbers(tree["derived/neighbors"].to_dataset()["neighbor"].values, task, kind),
        "agreement_of_halves": halves_agree(losses),
        "verdicts": list(lk.diagnostics(tree).attrs["verdicts"]),
    }
