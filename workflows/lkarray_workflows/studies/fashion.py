"""Fashion: whether losses of garments move together as WordNet places the garments.

A network learns Fashion-MNIST; the loss correlation kernel of its test images is averaged
within pairs of classes, and compared with the distance of the classes in WordNet
(loss-kernel figures 1B and 6C), beside an untrained network and the images themselves.
"""

from __future__ import annotations

import json
from collections.abc import Hashable
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
import xarray as xr
from lkarray_workflows.shared.images import FOLDER, Dataset, Split, read_images, require_files
from pydantic import Field
from torch import nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset

import lkarray as lk
from lkarray import plots, progress, store, workflow
from lkarray.analysis.hierarchy import sources

#: WordNet's synset of each class.
SYNSETS: dict[Hashable, str] = {
    0: "jersey.n.03",  # "T-shirt/top": a T-shirt is a jersey in WordNet
    1: "trouser.n.01",
    2: "pullover.n.01",
    3: "dress.n.01",
    4: "coat.n.01",
    5: "sandal.n.01",
    6: "shirt.n.01",
    7: "gym_shoe.n.01",  # "Sneaker"
    8: "bag.n.04",
    9: "boot.n.01",  # "Ankle boot"
}
KERNELS = ("trained", "untrained", "images")


class Config(workflow.Config):
    """Settings; tuned on seed 0, reported on others."""

    presets: ClassVar = {
        "paper": {"observed": 10_000, "chains": 8, "draws": 1000},
        "small": {
            "train": 5000,
            "observed": 600,
            "epochs": 5,
            "chains": 3,
            "draws": 60,
            "burn_in": 30,
        },
    }

    seed: int = Field(1, ge=0)
    dataset: ClassVar[Dataset] = "fashion"
    data: Path | None = Field(None, description=FOLDER)
    train: int = Field(60000, ge=100, le=60000, description="training images")
    observed: int = Field(2000, ge=50, le=10000, description="test images")
    width: int = Field(256, ge=2)
    epochs: int = Field(12, ge=1)
    learning_rate: float = Field(1e-3, gt=0)
    batch_size: int = Field(256, ge=1)
    nbeta: float = Field(100.0, ge=0)
    gamma: float = Field(1000.0, gt=0)
    step_size: float = Field(2e-4, gt=0)
    chains: int = Field(4, ge=3)
    draws: int = Field(500, ge=2)
    burn_in: int = Field(200, ge=0)
    thin: int = Field(5, ge=1)
    neighbors: int = Field(30, ge=1)


def run(config: Config, folder: Path, *, progress: bool = True) -> str:
    """Run the study in ``folder``, or continue it; return what to tell the user."""
    require_files(config, folder / "data.npz")
    sources.open_wordnet()  # asked for at the end
    with workflow.Run("fashion", config, folder) as state:
        paths = Paths(folder)
        state.stage("data", lambda: make_data(config, paths), [paths.data])
        state.stage("train", lambda: train(config, paths, progress), [paths.models])
        for name in KERNELS[:2]:
            state.stage(
                f"sample {name}",
                partial(sample, config, paths, name, progress),
                [paths.store(name)],
            )
        state.stage("compare", lambda: compare(config, paths), [paths.metrics])
        state.stage("report", lambda: report(config, paths, state), [paths.index])
    return f"Report  {paths.index}\nStore   {paths.store('trained')}"


class Paths:
    """Where the study's files are."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.data = folder / "data.npz"
        self.models = folder / "models.pt"
        self.metrics = folder / "comparison.json"
        self.report = folder / "report"
        self.index = self.report / "index.html"

    def store(self, name: str) -> Path:
        """Return a kernel's store."""
        return self.folder / f"{name}.zarr"


def make_data(config: Config, paths: Paths) -> None:
    """Take the training images, and observed ones from the test images, at random."""
    rng = np.random.default_rng(config.seed)
    kept: dict[str, Any] = {}
    wanted: dict[Split, int] = {"train": config.train, "test": config.observed}
    for part, count in wanted.items():
        images, labels = read_images(config.data, part)
        chosen = np.sort(rng.choice(len(labels), min(count, len(labels)), replace=False))
        kept |= {f"{part}_images": images[chosen], f"{part}_labels": labels[chosen]}
    np.savez(paths.data, **kept)


def data_set(paths: Paths, part: str) -> TensorDataset:
    """Return images as rows of 0 to 1, and their classes."""
    with np.load(paths.data) as data:
        images = torch.from_numpy(data[f"{part}_images"]).float().flatten(1) / 255
        return TensorDataset(images, torch.from_numpy(data[f"{part}_labels"]).long())


def network(config: Config, seed: int) -> nn.Sequential:
    """Return an untrained network of two hidden layers."""
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Linear(784, config.width),
        nn.ReLU(),
        nn.Linear(config.width, config.width),
        nn.ReLU(),
        nn.Linear(config.width, 10),
    )


def train(config: Config, paths: Paths, show: bool) -> None:
    """Train with Adam; keep the trained network and an untrained one."""
    images, labels = data_set(paths, "train").tensors
    model = network(config, config.seed)
    optimizer = torch.optim.Adam(model.parameters(), lr=config.learning_rate)
    shuffle = torch.Generator().manual_seed(config.seed)
    with progress.bar("training", total=config.epochs, unit="epoch", show=show) as bar:
        for _ in range(config.epochs):
            for batch in torch.randperm(len(labels), generator=shuffle).split(config.batch_size):
                optimizer.zero_grad()
                F.cross_entropy(model(images[batch]), labels[batch]).backward()
                optimizer.step()
            bar.update()
    states = {
        "trained": model.state_dict(),
        "untrained": network(config, 1000 + config.seed).state_dict(),
    }
    with workflow.replacing(paths.models) as part:
        torch.save(states, part)


def load_model(config: Config, paths: Paths, name: str) -> nn.Module:
    """Return one of the networks."""
    model = network(config, 0)
    model.load_state_dict(torch.load(paths.models, weights_only=True)[name])
    return model


def sample(config: Config, paths: Paths, name: str, show: bool) -> None:
    """Sample around one network and observe the test images."""
    observed = data_set(paths, "test")
    posterior = lk.LocalPosterior(
        load_model(config, paths, name),
        data_set(paths, "train"),
        nbeta=config.nbeta,
        gamma=config.gamma,
    )
    lk.sample(
        posterior,
        observed,
        sampler=lk.SGLD(step_size=config.step_size),
        store=paths.store(name),
        chains=config.chains,
        draws=config.draws,
        burn_in=config.burn_in,
        thin=config.thin,
        batch_size=config.batch_size,
        coords={"label": observed.tensors[1]},
        seed=config.seed,
        progress=show,
    )


def losses_of(paths: Paths, name: str) -> xr.DataArray:
    """Return the losses of a kernel; of ``images``, the pixels in the place of draws."""
    if name != "images":
        return lk.open(paths.store(name))["losses"].to_dataset()["loss"]
    images, labels = data_set(paths, "test").tensors
    return xr.DataArray(
        images.numpy().T[None],
        dims=("chain", "draw", "sample"),
        coords={"sample": np.arange(len(labels)), "label": ("sample", labels.numpy())},
        name="loss",
    )


def compare(config: Config, paths: Paths) -> None:
    """Compare each kernel with the hierarchy, by class and by neighbours."""
    taxonomy = lk.Taxonomy.wordnet(SYNSETS)
    taxonomy.to_json(paths.folder / "taxonomy.json")
    metrics: dict[str, Any] = {}
    for name in KERNELS:
        losses = losses_of(paths, name)
        found = lk.correlation_by_distance(losses, taxonomy, seed=config.seed)
        store.put(paths.store("trained"), f"by_distance_{name}", found)
        near = lk.neighbors(losses, config.neighbors, exclude="label")
        lift = lk.taxonomic_lift(near, taxonomy, seed=config.seed)
        metrics[name] = {
            "rank_correlation": [
                float(found[key]) for key in ("rank_correlation", "rank_low", "rank_high")
            ],
            "magnitude": mantel(found, config.seed),
            "pooled_lift": [
                float(v) if np.isfinite(v) else None for v in lift["pooled_lift"].values
            ],
            "same_class": float(found["correlation"].sel(distance=0)),
            "nearest_classes": nearest_classes(found),
        }
    observed = data_set(paths, "test")
    with torch.inference_mode():
        right = load_model(config, paths, "trained")(observed.tensors[0]).argmax(1)
    metrics["accuracy"] = float((right == observed.tensors[1]).float().mean())
    paths.metrics.write_text(json.dumps(metrics, indent=2, allow_nan=False))


def mantel(found: xr.Dataset, seed: int, permutations: int = 2000) -> dict[str, float]:
    """Return the rank correlation of |mean R| with distance, and its permutation p-value.

    Near classes may *anti*-correlate, where inputs of one gain what those of the other lose; the
    magnitude then says what the sign hides. Classes are permuted (Mantel's test, two-sided).
    """
    from scipy.stats import spearmanr

    mean, far = np.abs(found["label_mean"].values), found["label_distance"].values
    pairs = np.triu_indices(len(far), 1)
    rng = np.random.default_rng(seed)
    value = float(spearmanr(mean[pairs], far[pairs]).statistic)
    orders = [rng.permutation(len(far)) for _ in range(permutations)]
    others = [spearmanr(mean[np.ix_(o, o)][pairs], far[pairs]).statistic for o in orders]
    beyond = int((np.abs(others) >= abs(value)).sum())
    return {"rank_correlation": value, "p_value": (1 + beyond) / (1 + permutations)}


def nearest_classes(found: xr.Dataset) -> dict[str, str]:
    """Return, for each class, the other with the highest mean correlation."""
    means = np.array(found["label_mean"].values)
    np.fill_diagonal(means, -np.inf)
    titles = [str(title) for title in found["title"].values]
    return {title: titles[int(row.argmax())] for title, row in zip(titles, means, strict=True)}


def report(config: Config, paths: Paths, state: workflow.Run) -> None:
    """Write figures, numbers and page."""
    metrics = json.loads(paths.metrics.read_text())
    tree = lk.open(paths.store("trained"))
    found = {name: tree[f"derived/by_distance_{name}"].to_dataset().compute() for name in KERNELS}
    figures = [
        workflow.Figure(
            f"matrix_{name}",
            f"By class: {name}",
            "Mean correlation between the classes' images, beside their distance in WordNet.",
            plots.hierarchy_matrices(found[name]),
        )
        for name in KERNELS
    ]
    figures.append(
        workflow.Figure(
            "by_distance",
            "Correlation against distance",
            "Mean correlation by distance of the classes; 0 is images of one class.",
            plots.correlation_against_distance(found),
        )
    )
    rows = [
        (
            f"Rank correlation of mean R with distance: {name}",
            "{:.2f} ({:.2f} to {:.2f})".format(*metrics[name]["rank_correlation"]),
            "negative: near classes correlate",
        )
        for name in KERNELS
    ]
    rows += [
        (
            f"... of its magnitude: {name}",
            f"{metrics[name]['magnitude']['rank_correlation']:.2f}",
            f"permutation p = {metrics[name]['magnitude']['p_value']:.4f}",
        )
        for name in KERNELS
    ]
    rows.append(("Accuracy on the test images", f"{metrics['accuracy']:.1%}", ""))
    workflow.write_report(
        workflow.Report(
            title="Fashion: does the loss kernel place garments as WordNet does?",
            summary=[
                f"{config.observed:,} test images, ten classes mapped to WordNet's synsets. Ten "
                "classes give 45 pairs, so intervals are wide; the untrained network and the "
                "images themselves say how much of it needs no training. Where the network tells "
                "two classes apart, a perturbation that helps one hurts the other, so near "
                "classes can correlate negatively; the magnitude is given beside the sign."
            ],
            metrics={
                **metrics,
                "seconds": state.seconds(),
                "config": config.model_dump(mode="json"),
            },
            rows=rows,
            figures=figures,
            settings=config.model_dump(mode="json"),
            next_steps="import lkarray as lk\n"
            f'losses = lk.open("{paths.store("trained")}")["losses"]\n'
            f'taxonomy = lk.Taxonomy.from_json("{paths.folder / "taxonomy.json"}")\n'
            "lk.correlation_by_distance(losses, taxonomy)",
        ),
        paths.report,
    )
