"""Mislabelled images: the losses of labels learned by heart vary more.

A convolutional network learns Fashion-MNIST or MNIST with a share of the labels changed, until it
knows those too. The weights that fit a wrong label are a narrow set, so its loss should vary most
when the weights move: per-sample variance finds the changed labels, and the loss kernel gathers
them (loss-kernel appendix D.4, figure 7, there with GoogLeNet and 1,000 ImageNet images).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import torch
import xarray as xr
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
    without_chain,
)
from lkarray_workflows.shared.images import FOLDER, data_set, require_files, take_images
from matplotlib.figure import Figure
from pydantic import Field
from torch import nn
from torch.utils.data import TensorDataset

import lkarray as lk
from lkarray import plots, progress, store, workflow


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


def run(config: Config, folder: Path, *, progress: bool = True) -> str:
    """Run the study in ``folder``, or continue it; return what to tell the user."""
    require_files(config, folder / "data.npz")
    with workflow.Run("mislabeled_images", config, folder) as state:
        paths = Paths(folder)
        state.stage("data", lambda: make_data(config, paths), [paths.data])
        state.stage("train", lambda: train(config, paths, progress), [paths.model])
        state.stage("sample", lambda: sample(config, paths, progress), [paths.store])
        state.stage("map", lambda: make_map(config, paths, progress), [paths.map])
        state.stage("measure", lambda: measure(config, paths), [paths.metrics])
        state.stage("report", lambda: report(config, paths, state), [paths.index])
    return f"Report  {paths.index}\nStore   {paths.store}"


class Paths:
    """Where the study's files are."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.data, self.model = folder, folder / "data.npz", folder / "model.pt"
        self.store = folder / "store.zarr"
        self.map = self.store / "derived" / "map"
        self.metrics = folder / "metrics.json"
        self.report = folder / "report"
        self.index = self.report / "index.html"


def make_data(config: Config, paths: Paths) -> None:
    """Take the images; give some training images another label; choose those to observe."""
    kept = take_images(config, config.train, config.test, seed=config.seed)
    rng = np.random.default_rng(config.seed + 1)
    kept["true_labels"] = kept["train_labels"]
    labels = kept["train_labels"].copy()
    changed = rng.choice(len(labels), round(config.changed * len(labels)), replace=False)
    labels[changed] = (labels[changed] + rng.integers(1, 10, len(changed))) % 10
    kept["train_labels"] = labels
    some = rng.choice(len(labels), min(config.observed, len(labels)), replace=False)
    np.savez(paths.data, observed=np.sort(some), **kept)


def observed_set(paths: Paths) -> tuple[TensorDataset, np.ndarray]:
    """Return the observed training images with the labels learned, and their true labels."""
    with np.load(paths.data) as data:
        rows, true = data["observed"], data["true_labels"]
    images, labels = data_set(paths.data, "train").tensors
    return TensorDataset(images[rows], labels[rows]), true[rows]


def network(config: Config) -> nn.Module:
    """Return the untrained network."""
    torch.manual_seed(config.seed)
    model: nn.Module = convolutional(config.width)
    return model


def train(config: Config, paths: Paths, show: bool) -> None:
    """Train until every label is learned, true or not; let the network settle."""
    data = data_set(paths.data, "train")
    model = fit(
        network(config),
        data,
        rate=config.learning_rate,
        epochs=config.epochs,
        batch_size=config.batch_size,
        seed=config.seed,
        show=show,
        settle=3,
        learned=lambda model: bool(accuracy(model, data).mean() >= 0.999),
    )
    keep_model(model, paths.model)


def sample(config: Config, paths: Paths, show: bool) -> None:
    """Sample around the network; observe some of the images that it learned."""
    observed, true = observed_set(paths)
    label = observed.tensors[1].numpy()
    draw_losses(
        config,
        load_model(network(config), paths.model),
        data_set(paths.data, "train"),
        observed,
        paths.store,
        seed=config.seed,
        show=show,
        coords={"label": label, "true_label": true, "changed": label != true},
    )


def losses_of(paths: Paths) -> xr.Dataset:
    """Return the losses of the observed images, at the centre too."""
    return lk.open(paths.store)["losses"].to_dataset()


def make_map(config: Config, paths: Paths, show: bool) -> None:
    """Find neighbours, and embed them at distance 1 - R."""
    with progress.dask_bar("neighbours", show=show):
        near = lk.neighbors(losses_of(paths)["loss"], config.neighbors)
        store.put(paths.store, "neighbors", near)
    near = lk.open(paths.store)["derived/neighbors"].to_dataset()
    with progress.busy("map (UMAP)", show=show):
        store.put(paths.store, "map", lk.embed(near, seed=config.seed))


def measure(config: Config, paths: Paths) -> None:
    """Compute every number of the report."""
    tree = lk.open(paths.store)
    node = losses_of(paths)
    losses, center, changed = node["loss"], node["center_loss"], node["changed"].values
    near = tree["derived/neighbors"].to_dataset()["neighbor"].values

    def variances(x: xr.DataArray) -> np.ndarray:
        return np.asarray(lk.loss_variance(x).values, np.float64)

    def gains(x: xr.DataArray) -> np.ndarray:
        return np.asarray((x.mean(("chain", "draw"), dtype=np.float64) - center).values)

    def pair(value: Any) -> dict[str, float]:
        return dict(zip(("value", "error"), without_chain(losses, value), strict=True))

    model = load_model(network(config), paths.model)
    with np.load(paths.data) as data:
        wrong = data["train_labels"] != data["true_labels"]
    right = accuracy(model, data_set(paths.data, "train"))
    metrics = {
        "auroc": {
            "loss variance": pair(lambda x: area(changed, variances(x))),
            "loss gain": pair(lambda x: area(changed, gains(x))),
            "loss": {"value": area(changed, center.values)},
        },
        "variance": {
            "unchanged": pair(lambda x: variances(x)[~changed].mean()),
            "changed": pair(lambda x: variances(x)[changed].mean()),
            "ratio": pair(lambda x: variances(x)[changed].mean() / variances(x)[~changed].mean()),
        },
        "neighbors": {
            "changed": float(changed[near][changed].mean()),
            "chance": float(changed.mean()),
        },
        "accuracy": {
            "unchanged": float(right[~wrong].mean()),
            "changed": float(right[wrong].mean()),
            "test": float(accuracy(model, data_set(paths.data, "test")).mean()),
        },
        "agreement_of_halves": halves_agree(losses),
        "verdicts": list(lk.diagnostics(tree).attrs["verdicts"]),
    }
    paths.metrics.write_text(json.dumps(metrics, indent=2, allow_nan=False))


def report(config: Config, paths: Paths, state: workflow.Run) -> None:
    """Write the report folder."""
    m = json.loads(paths.metrics.read_text())
    node = losses_of(paths)
    points = lk.open(paths.store)["derived/map"].to_dataset()["embedding"]
    text = "{value:.3f} +- {error:.3f}".format
    figures = [
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
    v = m["variance"]
    rows = [
        *(
            (
                f"AUROC of {name} for changed labels",
                text(**found) if "error" in found else f"{found['value']:.3f}",
                "paper: 0.958" if name == "loss variance" else "",
            )
            for name, found in m["auroc"].items()
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
    workflow.write_report(
        workflow.Report(
            title="Labels learned by heart, found by how their losses vary",
            summary=[
                f"{config.train:,} training images, {config.changed:.0%} of the labels changed; "
                f"{node.sizes['sample']:,} of them observed, {config.chains} chains of "
                f"{config.draws} draws. Errors are one standard error, from leaving out one chain "
                "at a time. The paper has GoogLeNet on ImageNet, so sizes of variances do not "
                "compare; their ratio does."
            ],
            metrics={**m, "seconds": state.seconds(), "config": config.model_dump(mode="json")},
            rows=rows,
            figures=figures,
            settings=config.model_dump(mode="json"),
            next_steps=f'losses = lk.open("{paths.store}")["losses"]\nlk.loss_variance(losses)',
        ),
        paths.report,
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
