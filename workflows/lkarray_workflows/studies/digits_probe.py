"""Loss gain and loss kernel of a digit classifier: what is hard, and what was memorised.

A network 784-512-10 learns MNIST or Fashion-MNIST; its loss gain is computed for every training
image. Then it learns again with a tenth of the labels changed, until it knows those by heart; the
changed ones should have about ten times the loss gain of the others, and lie together in a map of
the covariance kernel (Bayesian probes, section 4, figure 1, appendices A.3 and A.4).
"""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import torch
import xarray as xr
from lkarray_workflows.shared.common import (
    Sampling,
    accuracy,
    area,
    draw_losses,
    fit,
    halves_agree,
    keep_model,
    load_model,
    without_chain,
)
from lkarray_workflows.shared.images import FOLDER, NAMES, require_files, take_images
from matplotlib.figure import Figure
from pydantic import Field
from torch import nn
from torch.utils.data import TensorDataset

import lkarray as lk
from lkarray import plots, progress, workflow

KINDS = ("clean", "relabelled")


class Config(Sampling):
    """Settings: the paper's posterior; draws further apart instead of more of them."""

    presets: ClassVar = {
        "paper": {"dataset": "mnist", "draws": 500, "thin": 1, "burn_in": 10},
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
    dataset: Literal["fashion", "mnist"] = "fashion"
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


def run(config: Config, folder: Path, *, progress: bool = True) -> str:
    """Run the study in ``folder``, or continue it; return what to tell the user."""
    require_files(config, folder / "data.npz")
    with workflow.Run("digits_probe", config, folder) as state:
        paths = Paths(folder)
        state.stage("data", lambda: make_data(config, paths), [paths.data])
        for kind in KINDS:
            work = partial(train, config, paths, kind, progress)
            state.stage(f"train {kind}", work, [paths.model(kind)])
            work = partial(sample, config, paths, kind, progress)
            state.stage(f"sample {kind}", work, [paths.store(kind)])
        state.stage("map", lambda: make_map(config, paths, progress), [paths.map])
        state.stage("measure", lambda: measure(config, paths, progress), [paths.metrics])
        state.stage("report", lambda: report(config, paths, state), [paths.index])
    return f"Report  {paths.index}\nStores  {paths.store(KINDS[0])}, {paths.store(KINDS[1])}"


class Paths:
    """Where the study's files are."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.data = folder, folder / "data.npz"
        self.map, self.metrics = folder / "map.npz", folder / "metrics.json"
        self.report = folder / "report"
        self.index = self.report / "index.html"

    def model(self, kind: str) -> Path:
        """Return the file of a network's weights."""
        return self.folder / f"{kind}.pt"

    def store(self, kind: str) -> Path:
        """Return a network's store."""
        return self.folder / f"{kind}.zarr"


def make_data(config: Config, paths: Paths) -> None:
    """Take the images; give some training images another label at random."""
    kept = take_images(config, config.train, config.test, seed=config.seed)
    rng = np.random.default_rng(config.seed + 1)
    labels = kept["train_labels"].copy()
    changed = rng.choice(len(labels), round(config.relabelled * len(labels)), replace=False)
    labels[changed] = (labels[changed] + rng.integers(1, 10, len(changed))) % 10
    np.savez(paths.data, relabelled_labels=labels, **kept)


def data_set(paths: Paths, kind: str, part: str = "train") -> TensorDataset:
    """Return images as rows of 0 to 1, and the labels that a network learns."""
    with np.load(paths.data) as data:
        images = torch.from_numpy(data[f"{part}_images"]).float().flatten(1) / 255
        relabelled = kind == "relabelled" and part == "train"
        labels = data["relabelled_labels" if relabelled else f"{part}_labels"]
        return TensorDataset(images, torch.from_numpy(labels).long())


def network(config: Config) -> nn.Module:
    """Return the untrained network."""
    torch.manual_seed(config.seed)
    return nn.Sequential(nn.Linear(784, config.width), nn.ReLU(), nn.Linear(config.width, 10))


def train(config: Config, paths: Paths, kind: str, show: bool) -> None:
    """Train with Adam."""
    epochs = config.epochs if kind == "clean" else config.relabelled_epochs
    model = fit(
        network(config),
        data_set(paths, kind),
        rate=config.learning_rate,
        epochs=epochs,
        batch_size=config.batch_size,
        seed=config.seed,
        show=show,
    )
    keep_model(model, paths.model(kind))


def trained(config: Config, paths: Paths, kind: str) -> nn.Module:
    """Return one of the trained networks."""
    model: nn.Module = load_model(network(config), paths.model(kind))
    return model


def sample(config: Config, paths: Paths, kind: str, show: bool) -> None:
    """Sample around a network; observe all its training images."""
    data = data_set(paths, kind)
    with np.load(paths.data) as arrays:
        true = arrays["train_labels"]
    coords = {"label": data.tensors[1].numpy(), "true_label": true}
    coords["relabelled"] = coords["label"] != true
    draw_losses(
        config,
        trained(config, paths, kind),
        data,
        data,
        paths.store(kind),
        seed=config.seed,
        coords=coords,
        show=show,
    )


def make_map(config: Config, paths: Paths, show: bool) -> None:
    """Map some images by t-SNE of the covariance kernel's leading features."""
    from sklearn.manifold import TSNE

    losses = lk.open(paths.store("relabelled"))["losses"].to_dataset()["loss"]
    n = losses.sizes["sample"]
    chosen = np.sort(
        np.random.default_rng(config.seed).choice(n, min(config.mapped, n), replace=False)
    )
    with progress.busy("map (t-SNE)", show=show):
        found = lk.svd(losses.isel(sample=chosen), 50, over=("chain", "draw"), center="pooled")
        features = (found["u"] * found["singular_value"]).transpose("sample", "mode").values
        points = TSNE(random_state=config.seed, init="pca").fit_transform(features)
    np.savez(paths.map, points=points, samples=chosen)


def measure(config: Config, paths: Paths, show: bool) -> None:
    """Compute every number of the report."""
    from scipy.stats import spearmanr

    out: dict[str, Any] = {}
    for kind in KINDS:
        tree = lk.open(paths.store(kind))
        node = tree["losses"].to_dataset()
        losses, center = node["loss"], node["center_loss"]
        changed, loss = node["relabelled"].values, center.values.astype(np.float64)
        gains = gains_by_chain(losses, center)
        gain = gains.mean("chain").values
        model = trained(config, paths, kind)
        right = accuracy(model, data_set(paths, kind))
        one: dict[str, Any] = {
            "accuracy": {
                "training": float(right.mean()),
                "test": float(accuracy(model, data_set(paths, kind, "test")).mean()),
            },
            "mean_gain": float(gain.mean()),
            "pearson": pair(gains, lambda g, x=loss: np.corrcoef(x, g)[0, 1]),
            "spearman": float(spearmanr(loss, gain).statistic),
            "llc": float(lk.llc(node)),
            "agreement_of_halves": halves_agree(losses),
            "verdicts": list(lk.diagnostics(tree).attrs["verdicts"]),
        }
        if kind == "relabelled":
            variance = lk.loss_variance(losses).values
            one["accuracy"] |= {
                "unchanged": float(right[~changed].mean()),
                "changed": float(right[changed].mean()),
            }
            one |= {
                "gain_changed": float(gain[changed].mean()),
                "gain_unchanged": float(gain[~changed].mean()),
                "ratio": pair(gains, lambda g, at=changed: g[at].mean() / g[~at].mean()),
                "auroc": {
                    "loss gain": pair(gains, lambda g, at=changed: area(at, g)),
                    "loss variance": {"value": area(changed, variance)},
                    "loss": {"value": area(changed, loss)},
                },
            }
        out[kind] = one
    paths.metrics.write_text(json.dumps(out, indent=2, allow_nan=False))


def gains_by_chain(losses: xr.DataArray, center: xr.DataArray) -> xr.DataArray:
    """Return the loss gain of each chain's draws, ``(chain, sample)``."""
    gains: xr.DataArray = (losses.mean("draw", dtype=np.float64) - center).compute()
    return gains.transpose("chain", "sample")


def pair(gains: xr.DataArray, value: Any) -> dict[str, float]:
    """Return a number of the gains, and its standard error over chains."""
    found = without_chain(gains, lambda g: value(g.mean("chain").values))
    return {"value": found[0], "error": found[1]}


def report(config: Config, paths: Paths, state: workflow.Run) -> None:
    """Write the report folder."""
    m = json.loads(paths.metrics.read_text())
    nodes = {kind: lk.open(paths.store(kind))["losses"].to_dataset() for kind in KINDS}
    with np.load(paths.data) as data:
        images = data["train_images"]
    with np.load(paths.map) as found:
        points, chosen = found["points"], found["samples"]
    gain = {kind: lk.loss_gain(node).values for kind, node in nodes.items()}
    some = np.random.default_rng(config.seed).permutation(len(images))[:10_000]
    figures = [
        workflow.Figure(
            "gallery",
            "Loss gain: lowest, middle, highest",
            "Of the network trained on true labels; the label and the gain in nats above each.",
            gallery(images, nodes["clean"]["label"].values, gain["clean"], NAMES[config.dataset]),
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
    clean, changed = m["clean"], m["relabelled"]
    text = "{value:.3f} +- {error:.3f}".format
    rows = [
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
                text(**found) if "error" in found else f"{found['value']:.3f}",
                "",
            )
            for name, found in changed["auroc"].items()
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
    workflow.write_report(
        workflow.Report(
            title="What is hard, and what was memorised",
            summary=[
                f"{len(images):,} training images, a network 784-{config.width}-10, "
                f"{config.chains} chains of {config.draws} draws, {config.thin} steps apart. "
                "Errors are one standard error, from leaving out one chain at a time. The paper "
                "has MNIST."
            ],
            metrics={**m, "seconds": state.seconds(), "config": config.model_dump(mode="json")},
            rows=rows,
            figures=figures,
            settings=config.model_dump(mode="json"),
            next_steps=f'losses = lk.open("{paths.store("relabelled")}")["losses"]\n'
            "lk.loss_gain(losses)",
        ),
        paths.report,
    )


def gallery(
    images: np.ndarray, labels: np.ndarray, gain: np.ndarray, names: tuple[str, ...]
) -> Figure:
    """Draw images of lowest, middle and highest loss gain, with their labels."""
    order = np.argsort(gain)
    middle = (len(order) - 10) // 2
    rows = {
        "lowest": order[:10],
        "middle": order[middle : middle + 10],
        "highest": order[::-1][:10],
    }
    figure = Figure(figsize=(12, 4.9), layout="constrained")
    for line, (name, chosen) in zip(figure.subplots(3, 10), rows.items(), strict=True):
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
        at = changed == flag
        axes.scatter(points[at, 0], points[at, 1], s=size, color=color, lw=0, alpha=0.7, label=name)
    axes.set(
        xticks=[],
        yticks=[],
        xlabel="t-SNE 1",
        ylabel="t-SNE 2",
        title="Covariance kernel of training losses",
    )
    axes.legend(frameon=False, markerscale=3)
    return figure
