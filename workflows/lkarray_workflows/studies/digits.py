"""Digits: the whole job on real images, in under three minutes on two cores.

A small network memorises scikit-learn's 1,797 handwritten digits, a tenth of its training
labels deliberately flipped. The local posterior around it is sampled, and the loss
correlation kernel, its neighbours and its map computed; then the study asks how well a
sample's loss variance and loss gain find the flipped labels (Adam et al. 2025b, section 4 and
Adam et al. 2025a, D.4, on other data).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
import xarray as xr
from pydantic import Field
from torch import nn
from torch.utils.data import TensorDataset

import lkarray as lk
from lkarray import plots, progress, store, workflow
from lkarray_workflows.shared.common import draw_losses, fit, keep_model, load_model


class Config(workflow.Config):
    """Settings; tuned on seed 0, reported on others."""

    presets: ClassVar = {"quick": {"epochs": 200, "chains": 2, "draws": 150, "burn_in": 100}}

    seed: int = Field(1, ge=0, description="of the split, the flips, the training, the sampling")
    held_out: int = Field(297, ge=1, le=1000, description="images kept from training")
    flipped: float = Field(0.1, gt=0, lt=0.5, description="share of training labels flipped")
    width: int = Field(256, ge=1, description="hidden units")
    epochs: int = Field(500, ge=1)
    learning_rate: float = Field(1e-3, gt=0)
    weight_decay: float = Field(1e-4, ge=0)
    batch_size: int = Field(64, ge=1, description="of the training and of the sampler")
    nbeta: float = Field(100.0, ge=0)
    gamma: float = Field(300.0, ge=0)
    step_size: float = Field(1e-3, gt=0)
    chains: int = Field(8, ge=2)
    draws: int = Field(600, ge=2)
    burn_in: int = Field(200, ge=0)
    thin: int = Field(5, ge=1)
    neighbors: int = Field(30, ge=1, le=200)


Study = workflow.Study[Config]


def run(config: Config, folder: Path, *, progress: bool = True) -> str:
    """Run the study in ``folder``, or continue it; return what to tell the user."""
    with workflow.Study("digits", config, folder, progress) as study:
        study.stage("data", make_data, "data.npz")
        study.stage("train", train, "model.pt")
        study.stage("sample", sample, "store.zarr")
        study.stage("kernel", kernels, "store.zarr/derived/neighbors")
        study.stage("map", make_map, "store.zarr/derived/map")
        study.stage("report", report, "report/index.html")
        reused = "sample" in study.reused
    return closing_words(study, reused)


def make_data(study: Study) -> None:
    """Split the digits, flip some training labels, and keep both kinds of labels."""
    from sklearn.datasets import load_digits

    config = study.config
    digits = load_digits()
    rng = np.random.default_rng(config.seed)
    order = rng.permutation(len(digits.target))
    kept, out = np.sort(order[config.held_out :]), np.sort(order[: config.held_out])
    true = digits.target[kept]
    flipped = np.zeros(len(true), bool)
    flipped[rng.choice(len(true), round(config.flipped * len(true)), replace=False)] = True
    label = np.where(flipped, (true + rng.integers(1, 10, len(true))) % 10, true)
    study.save(
        "data.npz",
        images=digits.images[kept] / 16,
        label=label,
        true_label=true,
        flipped=flipped,
        held_out_images=digits.images[out] / 16,
        held_out_label=digits.target[out],
    )


def train_set(study: Study) -> TensorDataset:
    """Return the training images and their labels, flips and all."""
    with np.load(study.path("data.npz")) as data:
        images = torch.from_numpy(data["images"]).float().flatten(1)
        return TensorDataset(images, torch.from_numpy(data["label"]))


def network(config: Config) -> nn.Module:
    """Return the untrained network: one hidden layer."""
    return nn.Sequential(nn.Linear(64, config.width), nn.ReLU(), nn.Linear(config.width, 10))


def train(study: Study) -> None:
    """Train with Adam until the flipped labels are memorised."""
    config = study.config
    torch.manual_seed(config.seed)
    model = network(config)
    fit(
        model,
        train_set(study),
        rate=config.learning_rate,
        batch_size=config.batch_size,
        epochs=config.epochs,
        seed=config.seed,
        show=study.show,
        optimizer=torch.optim.Adam(
            model.parameters(), lr=config.learning_rate, weight_decay=config.weight_decay
        ),
    )
    keep_model(model, study.path("model.pt"))


def trained(study: Study) -> nn.Module:
    """Return the trained network."""
    return load_model(network(study.config), study.path("model.pt"))


def sample(study: Study) -> None:
    """Sample the local posterior and observe every training image."""
    config = study.config
    data = train_set(study)
    with np.load(study.path("data.npz")) as arrays:
        coords = {name: arrays[name] for name in ("label", "true_label", "flipped")}
    draw_losses(
        config,
        trained(study),
        data,
        data,
        study.path("store.zarr"),
        batch_size=config.batch_size,
        seed=config.seed,
        coords=coords,
        show=study.show,
    )


def kernels(study: Study) -> None:
    """Compute the correlation kernel and both neighbour tables; keep them in the store."""
    path, k = study.path("store.zarr"), study.config.neighbors
    losses = lk.open(path)["losses"]
    with progress.dask_bar("correlation kernel", show=study.show):
        store.put(path, "correlation", lk.correlation(losses))
        store.put(path, "neighbors_any_label", lk.neighbors(losses, k))
        store.put(path, "neighbors", lk.neighbors(losses, k, exclude="label"))


def make_map(study: Study) -> None:
    """Embed the neighbour graph, edges within a label removed before the search."""
    near = lk.open(study.path("store.zarr"))["derived/neighbors"].to_dataset()
    with progress.busy("map (UMAP)", show=study.show):
        store.put(study.path("store.zarr"), "map", lk.embed(near, seed=study.config.seed))


def measure(study: Study) -> dict[str, Any]:
    """Return every number of the report."""
    from sklearn.metrics import roc_auc_score

    tree = lk.open(study.path("store.zarr"))
    losses = tree["losses"].to_dataset()
    flipped = losses["flipped"].values
    gain, variance = lk.loss_gain(losses).values, lk.loss_variance(losses).values
    center = losses["center_loss"].values
    nearest = tree["derived/neighbors_any_label"].to_dataset()["neighbor"].isel(rank=0).values
    images, labels = train_set(study).tensors
    with np.load(study.path("data.npz")) as data, torch.inference_mode():
        model = trained(study)
        held_out = torch.from_numpy(data["held_out_images"]).float().flatten(1)
        right = (model(images).argmax(1) == labels).numpy()
        tested = (model(held_out).argmax(1).numpy() == data["held_out_label"]).mean()
    sizes = losses["loss"].sizes
    return {
        "samples": sizes["sample"],
        "flipped": int(flipped.sum()),
        "chains": sizes["chain"],
        "draws": sizes["draw"],
        "accuracy": {
            "clean": float(right[~flipped].mean()),
            "flipped": float(right[flipped].mean()),
            "held_out": float(tested),
        },
        "auroc_flipped": {
            "loss_variance": float(roc_auc_score(flipped, variance)),
            "loss_gain": float(roc_auc_score(flipped, gain)),
            "loss_at_center": float(roc_auc_score(flipped, center)),
            "chance": 0.5,
        },
        "loss_gain_ratio_flipped_to_clean": float(gain[flipped].mean() / gain[~flipped].mean()),
        "loss_gain_mean_nats": float(gain.mean()),
        "pearson_loss_and_loss_gain": float(np.corrcoef(center, gain)[0, 1]),
        "nearest_neighbor": {
            "same_label": _agreement(losses["label"].values, nearest),
            "same_true_class": _agreement(losses["true_label"].values, nearest),
            "chance_same_label": _chance(losses["label"].values),
            "chance_same_true_class": _chance(losses["true_label"].values),
        },
        "flipped_nearest_of_another_label": _flipped_neighbors(tree),
        "agreement_of_half_kernels": _half_kernels(losses),
        "llc": float(lk.llc(losses)),
        "singular_fluctuation": float(lk.singular_fluctuation(losses)),
    }


def _agreement(labels: np.ndarray, nearest: np.ndarray) -> float:
    return float((labels[nearest] == labels).mean())


def _chance(labels: np.ndarray) -> float:
    """Return the share of ordered pairs of different samples that share a label."""
    counts = np.unique(labels, return_counts=True)[1]
    return float((counts * (counts - 1)).sum() / (len(labels) * (len(labels) - 1)))


def _flipped_neighbors(tree: xr.DataTree) -> dict[str, float]:
    """Return how often a flip's nearest input of another label shows the same digit."""
    near = tree["derived/neighbors"].to_dataset().compute()
    label, true = near["label"].values, near["true_label"].values
    flips = np.flatnonzero(near["flipped"].values)
    nearest = near["neighbor"].isel(rank=0).values[flips]
    allowed = label[flips, None] != label
    same = (true[flips, None] == true) & allowed
    return {
        "same_true_class": float((true[nearest] == true[flips]).mean()),
        "chance_same_true_class": float((same.sum(1) / allowed.sum(1)).mean()),
    }


def _half_kernels(losses: xr.Dataset) -> float:
    """Return the correlation, over pairs of other labels, of R from each half of the chains."""
    label = losses["label"].values
    pairs = np.triu(label[:, None] != label, 1)
    halves = (losses["loss"].isel(chain=slice(first, None, 2)) for first in (0, 1))
    first, second = (lk.correlation(half).values[pairs] for half in halves)
    return float(np.corrcoef(first, second)[0, 1])


def figures_of(study: Study) -> list[workflow.Figure]:
    """Return the figures of the report."""
    tree = lk.open(study.path("store.zarr"))
    near = tree["derived/neighbors"].to_dataset().compute()
    with np.load(study.path("data.npz")) as data:
        images = data["images"]
    flipped = near["flipped"].values
    references = [*np.flatnonzero(~flipped)[:3], *np.flatnonzero(flipped)[:3]]
    return [
        workflow.Figure(
            "map",
            "The map",
            "UMAP at distance 1 - R of the loss correlation kernel, edges within a label removed "
            "before the search. Colour is the digit shown, rings are images trained with a wrong "
            "label.",
            plots.neighbor_map(
                tree["derived/map"].to_dataset()["embedding"], by="true_label", mark="flipped"
            ),
        ),
        workflow.Figure(
            "correlation",
            "The kernel",
            "The loss correlation kernel, inputs sorted by the label they were trained with.",
            plots.kernel_matrix(
                tree["derived/correlation"].to_dataset()["correlation"], by="label"
            ),
        ),
        workflow.Figure(
            "top_correlated",
            "Most correlated inputs",
            "Three clean and three flipped references, each with the inputs of a different label "
            "whose losses move most with its own.",
            plots.top_correlated(near, images, references, by="label", mark="flipped"),
        ),
        workflow.Figure(
            "gain_against_loss",
            "Loss gain against loss",
            "How much a sample's loss rises when the weights are perturbed, against its loss at "
            "the trained weights.",
            plots.gain_against_loss(tree, mark="flipped"),
        ),
    ]


def report(study: Study) -> None:
    """Write figures, numbers and page."""
    metrics = measure(study)
    study.report(
        title="Digits: what the loss kernel sees in a network that memorised wrong labels",
        summary=[
            f"A network was trained on {metrics['samples']:,} images of handwritten digits, "
            f"{metrics['flipped']} of them with a wrong label, which it memorised. Its weights "
            "were then perturbed without losing its low loss, and every image's loss was "
            "recorded at every perturbation. Two images whose losses rise and fall together "
            "are treated alike by the network.",
        ],
        metrics=metrics,
        rows=_rows(metrics),
        figures=figures_of(study),
        next_steps=_next_steps(study),
    )


def _rows(m: dict[str, Any]) -> list[tuple[str, str, str]]:
    auroc, near, accuracy = m["auroc_flipped"], m["nearest_neighbor"], m["accuracy"]
    loss = f"the loss itself {auroc['loss_at_center']:.3f}, chance 0.5"
    return [
        ("Flipped labels found by loss variance (AUROC)", f"{auroc['loss_variance']:.3f}", loss),
        ("Flipped labels found by loss gain (AUROC)", f"{auroc['loss_gain']:.3f}", loss),
        (
            "Mean loss gain of flipped over clean",
            f"{m['loss_gain_ratio_flipped_to_clean']:.1f} x",
            "about 10 x in the Bayesian-probes paper (MNIST)",
        ),
        (
            "Nearest neighbour has the same label (labels not excluded)",
            f"{near['same_label']:.1%}",
            f"chance {near['chance_same_label']:.1%}",
        ),
        (
            "Nearest neighbour shows the same digit (labels not excluded)",
            f"{near['same_true_class']:.1%}",
            f"chance {near['chance_same_true_class']:.1%}",
        ),
        (
            "Nearest input of another label shows the same digit, for flipped images",
            f"{m['flipped_nearest_of_another_label']['same_true_class']:.1%}",
            f"chance {m['flipped_nearest_of_another_label']['chance_same_true_class']:.1%}",
        ),
        (
            "Agreement of R between two halves of the chains, other labels (correlation)",
            f"{m['agreement_of_half_kernels']:.2f}",
            "1 without Monte-Carlo error",
        ),
        (
            "Accuracy on clean / flipped training labels / held-out images",
            f"{accuracy['clean']:.1%} / {accuracy['flipped']:.1%} / {accuracy['held_out']:.1%}",
            "flips are memorised",
        ),
        ("Local learning coefficient", f"{m['llc']:.1f}", ""),
        ("Singular fluctuation", f"{m['singular_fluctuation']:.1f}", ""),
    ]


def _next_steps(study: Study) -> str:
    return (
        "import lkarray as lk\n"
        f"tree = lk.open({_shown(study.path('store.zarr'))!r})\n"
        'R = lk.correlation(tree["losses"])\n'
        "R.sel(sample=3, sample_2=17).compute()"
    )


def closing_words(study: Study, reused: bool) -> str:
    """Return the last lines of the run: where things are and what to try next."""
    first = "The store was complete and was reused.\n" if reused else ""
    steps = "\n".join(f"    {line}" for line in _next_steps(study).splitlines())
    return (
        f"{first}Report  {_shown(study.index)}\nStore   {_shown(study.path('store.zarr'))}\n\n"
        f"Next, in Python:\n{steps}\n\n"
        f"Or look into the store:\n    lkarray info {_shown(study.path('store.zarr'))}"
    )


def _shown(path: Path) -> str:
    """Return a path as the user would type it."""
    here = Path.cwd()
    path = path.absolute()
    return str(path.relative_to(here) if path.is_relative_to(here) else path)
