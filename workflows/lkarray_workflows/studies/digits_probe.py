"""Loss gain and loss kernel of a digit classifier: what is hard, and what was memorised.

A network 784-512-10 learns MNIST or Fashion-MNIST; its loss gain is computed for every training
image. Then it learns again with a tenth of the labels changed, until it knows those by heart; the
changed ones should have about ten times the loss gain of the others, and lie together in a map of
the covariance kernel (Bayesian probes, section 4, figure 1, appendices A.3 and A.4).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
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
from lkarray import plots, progress, workflow
from lkarray_workflows.shared.common import (
    Sampling,
    accuracy,
    area,
    draw_losses,
    fit,
    halves_agree,
    keep_model,
    load_model,
    with_error,
)
from lkarray_workflows.shared.images import FOLDER, NAMES, require_files, take_images

KINDS = ("clean", "relabelled")


class Config(Sampling):
    """Settings: the paper's posterior; draws further apart instead of more of them."""

    presets: ClassVar = {
        "paper": {"draws": 500, "thin": 1, "burn_in": 10},
        "small": {
            "train": 2000,
            "test": 1000,
            "epochs": 8,
            "relabelled_epochs": 60,
            "chains": 3,
            "draws": 40,
            "burn_in": 50,
            "thin": 2,
            "mapped": 600,
        },
    }

    seed: int = Field(1, ge=0, description="of the images, the labels, the training, the sampling")
    dataset: Literal["mnist", "fashion"] = "mnist"
    data: Path | None = Field(None, description=FOLDER)
    train: int = Field(60_000, ge=50, le=60_000, description="training images, all observed")
    test: int = Field(10_000, ge=50, le=10_000)
    width: int = Field(512, ge=2)
    relabelled: float = Field(0.1, gt=0, lt=1, description="share of changed labels")
    epochs: int = Field(20, ge=1)
    relabelled_epochs: int = Field(100, ge=1, description="of the network with changed labels")
    learning_rate: float = Field(1e-3, gt=0)
    batch_size: int = Field(128, ge=1, description="of the training")
    mapped: int = Field(10_000, ge=50, description="images of the map")
    nbeta: float = Field(10.0, ge=0)
    gamma: float = Field(30.0, gt=0)
    step_size: float = Field(5e-3, gt=0)
    sampler_batch: int = Field(64, ge=1)
    chains: int = Field(5, ge=3)
    draws: int = Field(100, ge=2)
    burn_in: int = Field(100, ge=0)
    thin: int = Field(5, ge=1)


Study = workflow.Study[Config]


def run(config: Config, folder: Path, *, progress: bool = True) -> str:
    """Run the study in ``folder``, or continue it; return what to tell the user."""
    require_files(config, folder / "data.npz")
    with workflow.Study("digits_probe", config, folder, progress) as study:
        study.stage("data", make_data, "data.npz")
        for kind in KINDS:
            study.stage(f"train {kind}", train, f"{kind}.pt", kind)
            study.stage(f"sample {kind}", sample, f"{kind}.zarr", kind)
        study.stage("map", make_map, "map.npz")
        study.stage("measure", measure, "metrics.json")
        study.stage("report", report, "report/index.html")
    stores = ", ".join(str(folder / f"{kind}.zarr") for kind in KINDS)
    return f"Report  {study.index}\nStores  {stores}"


def make_data(study: Study) -> None:
    """Take the images; give some training images another label at random."""
    config = study.config
    kept = take_images(config, config.train, config.test, seed=config.seed)
    rng = np.random.default_rng(config.seed + 1)
    labels = kept["train_labels"].copy()
    changed = rng.choice(len(labels), round(config.relabelled * len(labels)), replace=False)
    labels[changed] = (labels[changed] + rng.integers(1, 10, len(changed))) % 10
    study.save("data.npz", relabelled_labels=labels, **kept)


def data_set(study: Study, kind: str, split: str = "train") -> TensorDataset:
    """Return images as rows of 0 to 1, and the labels that a network learns."""
    with np.load(study.path("data.npz")) as data:
        images = torch.from_numpy(data[f"{split}_images"]).float().flatten(1) / 255
        relabelled = kind == "relabelled" and split == "train"
        labels = data["relabelled_labels" if relabelled else f"{split}_labels"]
        return TensorDataset(images, torch.from_numpy(labels).long())


def network(config: Config) -> nn.Module:
    """Return the untrained network."""
    torch.manual_seed(config.seed)
    return nn.Sequential(nn.Linear(784, config.width), nn.ReLU(), nn.Linear(config.width, 10))


def train(study: Study, kind: str) -> None:
    """Train with Adam."""
    config = study.config
    epochs = config.epochs if kind == "clean" else config.relabelled_epochs
    model = fit(
        network(config),
        data_set(study, kind),
        rate=config.learning_rate,
        epochs=epochs,
        batch_size=config.batch_size,
        seed=config.seed,
        show=study.show,
    )
    keep_model(model, study.path(f"{kind}.pt"))


def trained(study: Study, kind: str) -> nn.Module:
    """Return one of the trained networks."""
    return load_model(network(study.config), study.path(f"{kind}.pt"))


def sample(study: Study, kind: str) -> None:
    """Sample around a network; observe all its training images."""
    data = data_set(study, kind)
    with np.load(study.path("data.npz")) as arrays:
        true = arrays["train_labels"]
    coords = {"label": data.tensors[1].numpy(), "true_label": true}
    coords["relabelled"] = coords["label"] != true
    draw_losses(
        study.config,
        trained(study, kind),
        data,
        data,
        study.path(f"{kind}.zarr"),
        batch_size=study.config.sampler_batch,
        seed=study.config.seed,
        coords=coords,
        show=study.show,
    )


def make_map(study: Study) -> None:
    """Map some images by t-SNE of the covariance kernel's leading features."""
    config = study.config
    from sklearn.manifold import TSNE

    losses = lk.open(study.path("relabelled.zarr"))["losses"].to_dataset()["loss"]
    n = losses.sizes["sample"]
    chosen = np.sort(
        np.random.default_rng(config.seed).choice(n, min(config.mapped, n), replace=False)
    )
    with progress.busy("map (t-SNE)", show=study.show):
        features = lk.svd(losses.isel(sample=chosen), 50, over=("chain", "draw"), center="pooled")
        weighted = (features["u"] * features["singular_value"]).transpose("sample", "mode").values
        points = TSNE(random_state=config.seed, init="pca").fit_transform(weighted)
    study.save("map.npz", points=points, samples=chosen)


def kind_numbers(study: Study, kind: str) -> dict[str, Any]:
    """Return every number of one network."""
    from scipy.stats import spearmanr

    tree = lk.open(study.path(f"{kind}.zarr"))
    node = tree["losses"].to_dataset()
    losses, loss = node["loss"], node["center_loss"].values.astype(np.float64)
    gains = gains_by_chain(losses, node["center_loss"])
    gain = gains.mean("chain").values
    model = trained(study, kind)
    right = accuracy(model, data_set(study, kind))

    def pearson(gain: np.ndarray) -> float:
        return float(np.corrcoef(loss, gain)[0, 1])

    numbers: dict[str, Any] = {
        "accuracy": {
            "training": float(right.mean()),
            "test": float(accuracy(model, data_set(study, kind, "test")).mean()),
        },
        "mean_gain": float(gain.mean()),
        "pearson": pair(gains, pearson),
        "spearman": float(spearmanr(loss, gain).statistic),
        "llc": float(lk.llc(node)),
        "agreement_of_halves": halves_agree(losses),
        "verdicts": list(lk.diagnostics(tree).attrs["verdicts"]),
    }
    if kind == "relabelled":
        changed = node["relabelled"].values
        numbers["accuracy"] |= {
            "unchanged": float(right[~changed].mean()),
            "changed": float(right[changed].mean()),
        }
        numbers |= changed_numbers(gains, changed, lk.loss_variance(losses).values, loss)
    return numbers


def changed_numbers(
    gains: xr.DataArray, changed: np.ndarray, variance: np.ndarray, loss: np.ndarray
) -> dict[str, Any]:
    """Return how loss gain, loss variance and loss tell changed labels from the others."""
    gain = gains.mean("chain").values

    def ratio(gain: np.ndarray) -> float:
        return float(gain[changed].mean() / gain[~changed].mean())

    return {
        "gain_changed": float(gain[changed].mean()),
        "gain_unchanged": float(gain[~changed].mean()),
        "ratio": pair(gains, ratio),
        "auroc": {
            "loss gain": pair(gains, partial(area, changed)),
            "loss variance": {"value": area(changed, variance)},
            "loss": {"value": area(changed, loss)},
        },
    }


def measure(study: Study) -> None:
    """Compute every number of the report."""
    study.write("metrics.json", {kind: kind_numbers(study, kind) for kind in KINDS})


def gains_by_chain(losses: xr.DataArray, center: xr.DataArray) -> xr.DataArray:
    """Return the loss gain of each chain's draws, ``(chain, sample)``."""
    gains: xr.DataArray = (losses.mean("draw", dtype=np.float64) - center).compute()
    return gains.transpose("chain", "sample")


def pair(gains: xr.DataArray, value: Callable[[np.ndarray], float]) -> dict[str, float]:
    """Return a number of the gains, and its standard error over chains."""

    def of_chains(some: xr.DataArray) -> float:
        return value(some.mean("chain").values)

    return with_error(gains, of_chains)


def figures_of(study: Study) -> list[workflow.Figure]:
    """Return the figures of the report."""
    nodes = {kind: lk.open(study.path(f"{kind}.zarr"))["losses"].to_dataset() for kind in KINDS}
    with np.load(study.path("data.npz")) as data:
        images = data["train_images"]
    with np.load(study.path("map.npz")) as mapped:
        points, chosen = mapped["points"], mapped["samples"]
    gain = {kind: lk.loss_gain(node).values for kind, node in nodes.items()}
    some = np.random.default_rng(study.config.seed).permutation(len(images))[:10_000]
    return [
        workflow.Figure(
            "gallery",
            "Loss gain: lowest, middle, highest",
            "Of the network trained on true labels; the label and the gain in nats above each.",
            gallery(
                images, nodes["clean"]["label"].values, gain["clean"], NAMES[study.config.dataset]
            ),
        ),
        workflow.Figure(
            "gain_against_loss",
            "Loss gain against loss",
            f"{len(some):,} training images, true labels.",
            plots.gain_against_loss(nodes["clean"].isel(sample=np.sort(some))),
        ),
        workflow.Figure(
            "relabelled",
            "Changed labels",
            "Loss gain against loss where a tenth of the labels was changed.",
            plots.gain_against_loss(
                nodes["relabelled"].isel(sample=np.sort(some)), mark="relabelled"
            ),
        ),
        workflow.Figure(
            "map",
            "The covariance kernel's map",
            "t-SNE of its leading 50 features.",
            draw_map(points, nodes["relabelled"]["relabelled"].values[chosen]),
        ),
    ]


def rows_of(m: dict[str, Any]) -> list[tuple[str, str, str]]:
    """Return the table at the top of the report."""
    clean, changed = m["clean"], m["relabelled"]
    text = "{value:.3f} +- {error:.3f}".format
    return [
        ("Pearson r of loss and loss gain", text(**clean["pearson"]), "paper: -0.030"),
        ("... Spearman's", f"{clean['spearman']:.3f}", ""),
        ("Mean loss gain of changed over unchanged labels", text(**changed["ratio"]), "paper: 10"),
        (
            "Mean loss gain of changed, of unchanged labels (nats)",
            f"{changed['gain_changed']:.2f}, {changed['gain_unchanged']:.2f}",
            "paper: 23, 2.31",
        ),
        *(
            (
                f"AUROC of {name} for changed labels",
                text(**score) if "error" in score else f"{score['value']:.3f}",
                "",
            )
            for name, score in changed["auroc"].items()
        ),
        (
            "Right after training on changed labels: unchanged, changed, test",
            "{unchanged:.1%}, {changed:.1%}, {test:.1%}".format(**changed["accuracy"]),
            "paper: 99%, 98%",
        ),
        (
            "Right after training on true labels: training, test",
            "{training:.1%}, {test:.1%}".format(**clean["accuracy"]),
            "",
        ),
        (
            "Agreement of R between halves of the chains: true, changed labels",
            f"{clean['agreement_of_halves']:.2f}, {changed['agreement_of_halves']:.2f}",
            "",
        ),
    ]


def report(study: Study) -> None:
    """Write the report folder."""
    config, m = study.config, study.read("metrics.json")
    count = len(data_set(study, "clean"))
    study.report(
        title="What is hard, and what was memorised",
        summary=[
            f"{count:,} training images, a network 784-{config.width}-10, "
            f"{config.chains} chains of {config.draws} draws, {config.thin} steps apart. "
            "Errors are one standard error, from leaving out one chain at a time. The paper "
            "has MNIST."
        ],
        metrics=m,
        rows=rows_of(m),
        figures=figures_of(study),
        next_steps=f'losses = lk.open("{study.path("relabelled.zarr")}")["losses"]\n'
        "lk.loss_gain(losses)",
    )


def gallery(
    images: np.ndarray, labels: np.ndarray, gain: np.ndarray, names: tuple[str, ...]
) -> Figure:
    """Draw images of lowest, middle and highest loss gain, with their labels."""
    order = np.argsort(gain)
    middle = (len(order) - 10) // 2
    lines = {
        "lowest": order[:10],
        "middle": order[middle : middle + 10],
        "highest": order[::-1][:10],
    }
    figure = Figure(figsize=(12, 4.9), layout="constrained")
    for line, (name, chosen) in zip(figure.subplots(3, 10), lines.items(), strict=True):
        for axes, i in zip(line, chosen, strict=True):
            axes.imshow(images[i], cmap="gray")
            axes.set(xticks=[], yticks=[])
            axes.set_title(f"{names[labels[i]]}\n{gain[i]:+.3g}", fontsize=8)
        line[0].set_ylabel(name)
    return figure


def draw_map(points: np.ndarray, changed: np.ndarray) -> Figure:
    """Draw the map, changed labels on top."""
    figure = Figure(figsize=(7.4, 6.4), layout="constrained")
    axes = figure.add_subplot()
    size = float(np.clip(20_000 / len(points), 2, 20))
    for flag, color, name in ((False, "#3f90da", "unchanged"), (True, "#bd1f01", "changed label")):
        own = points[changed == flag]
        axes.scatter(own[:, 0], own[:, 1], s=size, color=color, lw=0, alpha=0.7, label=name)
    axes.set(
        xticks=[],
        yticks=[],
        xlabel="t-SNE 1",
        ylabel="t-SNE 2",
        title="Covariance kernel of training losses",
    )
    axes.legend(frameon=False, markerscale=3)
    return figure
