"""Mislabelled images: the losses of labels learned by heart vary more.

A convolutional network learns Fashion-MNIST or MNIST with a share of the labels changed, until it
knows those too. The weights that fit a wrong label are a narrow set, so its loss should vary most
when the weights move: per-sample variance finds the changed labels, and the loss kernel gathers
them (Adam et al. 2025a, appendix D.4, figure 7, there with GoogLeNet and 1,000 ImageNet images).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import torch
import xarray as xr
from matplotlib.figure import Figure
from pydantic import Field
from torch import nn
from torch.utils.data import TensorDataset

import lkarray as lk
from lkarray import plots, progress, store, workflow
from lkarray_workflows.shared.common import (
    Sampling,
    accuracy,
    area,
    convolutional,
    draw_losses,
    fit,
    halves_agree,
    keep_model,
    load_model,
    with_error,
)
from lkarray_workflows.shared.images import FOLDER, data_set, require_files, take_images


class Config(Sampling):
    """Settings; tuned on seed 0, reported on seed 1."""

    presets: ClassVar = {
        # Table 1's row of D.4: of GoogLeNet on ImageNet, not tuned for this network.
        "paper": {
            "train": 60_000,
            "observed": 10_000,
            "chains": 8,
            "draws": 1000,
            "thin": 1,
            "burn_in": 100,
            "step_size": 1e-5,
            "nbeta": 20,
            "gamma": 4000,
        },
        "small": {
            "train": 1500,
            "observed": 600,
            "batch_size": 32,
            "epochs": 100,
            "chains": 3,
            "draws": 60,
            "burn_in": 200,
            "thin": 4,
        },
    }

    seed: int = Field(1, ge=0, description="of the images, the labels, the training, the sampling")
    dataset: Literal["fashion", "mnist"] = "fashion"
    data: Path | None = Field(None, description=FOLDER)
    train: int = Field(10_000, ge=50, le=60_000, description="training images")
    observed: int = Field(4000, ge=50, description="of these, at random")
    test: int = Field(2000, ge=50, le=10_000)
    changed: float = Field(0.1, gt=0, lt=1, description="share of the training labels")
    width: int = Field(16, ge=1, description="channels of the first layer")
    epochs: int = Field(60, ge=1)
    learning_rate: float = Field(1e-3, gt=0)
    batch_size: int = Field(128, ge=1, description="of the training")
    neighbors: int = Field(30, ge=1)
    nbeta: float = Field(100.0, ge=0)
    gamma: float = Field(1000.0, gt=0)
    step_size: float = Field(1e-5, gt=0)
    draws: int = Field(300, ge=2)
    burn_in: int = Field(300, ge=0)
    chains: int = Field(4, ge=3)


Study = workflow.Study[Config]


def run(config: Config, folder: Path, *, progress: bool = True) -> str:
    """Run the study in ``folder``, or continue it; return what to tell the user."""
    require_files(config, folder / "data.npz")
    with workflow.Study("mislabeled_images", config, folder, progress) as study:
        study.stage("data", make_data, "data.npz")
        study.stage("train", train, "model.pt")
        study.stage("sample", sample, "store.zarr")
        study.stage("map", make_map, "store.zarr/derived/map")
        study.stage("measure", measure, "metrics.json")
        study.stage("report", report, "report/index.html")
    return f"Report  {study.index}\nStore   {study.path('store.zarr')}"


def make_data(study: Study) -> None:
    """Take the images; give some training images another label; choose those to observe."""
    config = study.config
    kept = take_images(config, config.train, config.test, seed=config.seed)
    rng = np.random.default_rng(config.seed + 1)
    kept["true_labels"] = kept["train_labels"]
    labels = kept["train_labels"].copy()
    changed = rng.choice(len(labels), round(config.changed * len(labels)), replace=False)
    labels[changed] = (labels[changed] + rng.integers(1, 10, len(changed))) % 10
    kept["train_labels"] = labels
    some = rng.choice(len(labels), min(config.observed, len(labels)), replace=False)
    study.save("data.npz", observed=np.sort(some), **kept)


def observed_set(study: Study) -> tuple[TensorDataset, np.ndarray]:
    """Return the observed training images with the labels learned, and their true labels."""
    with np.load(study.path("data.npz")) as data:
        rows, true = data["observed"], data["true_labels"]
    images, labels = data_set(study.path("data.npz"), "train").tensors
    return TensorDataset(images[rows], labels[rows]), true[rows]


def network(config: Config) -> nn.Module:
    """Return the untrained network."""
    torch.manual_seed(config.seed)
    return convolutional(config.width)


def train(study: Study) -> None:
    """Train until every label is learned, true or not; let the network settle."""
    config = study.config
    data = data_set(study.path("data.npz"), "train")

    def learned(model: nn.Module) -> bool:
        return bool(accuracy(model, data).mean() >= 0.999)

    model = fit(
        network(config),
        data,
        rate=config.learning_rate,
        epochs=config.epochs,
        batch_size=config.batch_size,
        seed=config.seed,
        show=study.show,
        settle=3,
        learned=learned,
    )
    keep_model(model, study.path("model.pt"))


def sample(study: Study) -> None:
    """Sample around the network; observe some of the images that it learned."""
    config = study.config
    observed, true = observed_set(study)
    label = observed.tensors[1].numpy()
    draw_losses(
        config,
        load_model(network(config), study.path("model.pt")),
        data_set(study.path("data.npz"), "train"),
        observed,
        study.path("store.zarr"),
        batch_size=config.sampler_batch,
        seed=config.seed,
        show=study.show,
        coords={"label": label, "true_label": true, "changed": label != true},
    )


def losses_of(study: Study) -> xr.Dataset:
    """Return the losses of the observed images, at the centre too."""
    return lk.open(study.path("store.zarr"))["losses"].to_dataset()


def neighbors_of(study: Study) -> xr.Dataset:
    """Return the stored neighbours."""
    return lk.open(study.path("store.zarr"))["derived/neighbors"].to_dataset()


def make_map(study: Study) -> None:
    """Find neighbours, and embed them at distance 1 - R."""
    with progress.dask_bar("neighbours", show=study.show):
        near = lk.neighbors(losses_of(study)["loss"], study.config.neighbors)
        store.put(study.path("store.zarr"), "neighbors", near)
    near = neighbors_of(study)
    with progress.busy("map (UMAP)", show=study.show):
        store.put(study.path("store.zarr"), "map", lk.embed(near, seed=study.config.seed))


def measure(study: Study) -> None:
    """Compute every number of the report."""
    node = losses_of(study)
    losses, center, changed = node["loss"], node["center_loss"], node["changed"].values
    near = neighbors_of(study)["neighbor"].values

    def variances(some: xr.DataArray) -> np.ndarray:
        return np.asarray(lk.loss_variance(some).values, np.float64)

    def gains(some: xr.DataArray) -> np.ndarray:
        return np.asarray((some.mean(("chain", "draw"), dtype=np.float64) - center).values)

    def area_of_variance(some: xr.DataArray) -> float:
        return area(changed, variances(some))

    def area_of_gain(some: xr.DataArray) -> float:
        return area(changed, gains(some))

    def of_unchanged(some: xr.DataArray) -> float:
        return float(variances(some)[~changed].mean())

    def of_changed(some: xr.DataArray) -> float:
        return float(variances(some)[changed].mean())

    def ratio(some: xr.DataArray) -> float:
        return of_changed(some) / of_unchanged(some)

    metrics = {
        "auroc": {
            "loss variance": with_error(losses, area_of_variance),
            "loss gain": with_error(losses, area_of_gain),
            "loss": {"value": area(changed, center.values)},
        },
        "variance": {
            "unchanged": with_error(losses, of_unchanged),
            "changed": with_error(losses, of_changed),
            "ratio": with_error(losses, ratio),
        },
        "neighbors": {
            "changed": float(changed[near][changed].mean()),
            "chance": float(changed.mean()),
        },
        "accuracy": accuracies(study),
        "agreement_of_halves": halves_agree(losses),
        "verdicts": list(lk.diagnostics(lk.open(study.path("store.zarr"))).attrs["verdicts"]),
    }
    study.write("metrics.json", metrics)


def accuracies(study: Study) -> dict[str, float]:
    """Return how often the network is right of unchanged, of changed labels, of test images."""
    path = study.path("data.npz")
    model = load_model(network(study.config), study.path("model.pt"))
    with np.load(path) as data:
        wrong = data["train_labels"] != data["true_labels"]
    right = accuracy(model, data_set(path, "train"))
    return {
        "unchanged": float(right[~wrong].mean()),
        "changed": float(right[wrong].mean()),
        "test": float(accuracy(model, data_set(path, "test")).mean()),
    }


def figures_of(study: Study) -> list[workflow.Figure]:
    """Return the figures of the report."""
    node = losses_of(study)
    points = lk.open(study.path("store.zarr"))["derived/map"].to_dataset()["embedding"]
    return [
        workflow.Figure(
            "map",
            "Changed labels in the loss kernel",
            "UMAP at distance 1 - R; changed labels marked (figure 7A).",
            plots.neighbor_map(points, by="label", mark="changed"),
        ),
        workflow.Figure(
            "variance",
            "Variance of losses",
            "Over the draws, of labels learned by heart and of others (figure 7B).",
            draw(lk.loss_variance(node["loss"]).values, node["changed"].values),
        ),
        workflow.Figure(
            "gain",
            "Loss gain against loss",
            "At the trained weights.",
            plots.gain_against_loss(node, mark="changed"),
        ),
    ]


def rows_of(m: dict[str, Any]) -> list[tuple[str, str, str]]:
    """Return the table at the top of the report."""
    text = "{value:.3f} +- {error:.3f}".format
    v = m["variance"]
    return [
        *(
            (
                f"AUROC of {name} for changed labels",
                text(**score) if "error" in score else f"{score['value']:.3f}",
                "paper: 0.958" if name == "loss variance" else "",
            )
            for name, score in m["auroc"].items()
        ),
        (
            "Mean self-covariance of unchanged, of changed labels (nats squared)",
            text(**v["unchanged"]) + ", " + text(**v["changed"]),
            "paper: 1.112, 2.138",
        ),
        ("... their ratio", text(**v["ratio"]), "paper: 1.92"),
        (
            "Nearest inputs of changed labels that are changed too",
            f"{m['neighbors']['changed']:.1%}",
            f"chance {m['neighbors']['chance']:.1%}",
        ),
        (
            "Right: unchanged, changed, test",
            "{unchanged:.1%}, {changed:.1%}, {test:.1%}".format(**m["accuracy"]),
            "",
        ),
        ("Agreement of R between halves of the chains", f"{m['agreement_of_halves']:.2f}", ""),
    ]


def report(study: Study) -> None:
    """Write the report folder."""
    config, m = study.config, study.read("metrics.json")
    path, count = study.path("store.zarr"), losses_of(study).sizes["sample"]
    study.report(
        title="Labels learned by heart, found by how their losses vary",
        summary=[
            f"{config.train:,} training images, {config.changed:.0%} of the labels changed; "
            f"{count:,} of them observed, {config.chains} chains of "
            f"{config.draws} draws. Errors are one standard error, from leaving out one chain "
            "at a time. The paper has GoogLeNet on ImageNet, so sizes of variances do not "
            "compare; their ratio does."
        ],
        metrics=m,
        rows=rows_of(m),
        figures=figures_of(study),
        next_steps=f'losses = lk.open("{path}")["losses"]\nlk.loss_variance(losses)',
    )


def draw(variance: np.ndarray, changed: np.ndarray) -> Figure:
    """Draw how the variances of both kinds of labels are distributed."""
    figure = Figure(figsize=(7, 4.4), layout="constrained")
    axes = figure.add_subplot()
    positive = variance[variance > 0]
    edges = np.geomspace(positive.min(), positive.max(), 61).tolist()
    for flag, color, name in ((False, "#3f90da", "unchanged"), (True, "#bd1f01", "changed label")):
        axes.hist(
            variance[changed == flag],
            edges,
            density=False,
            color=color,
            alpha=0.65,
            weights=np.full((changed == flag).sum(), 1 / (changed == flag).sum()),
            label=name,
        )
    axes.set(
        xscale="log",
        xlabel="variance of the loss (nat$^2$)",
        ylabel="share of its kind",
        title="Variance over draws",
    )
    axes.legend(frameon=False)
    return figure
