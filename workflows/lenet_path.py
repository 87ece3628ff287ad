"""LeNet-5's path through training: when gradients change, and which inputs look alike.

LeNet-5 learns Fashion-MNIST as in PLGK A.3 (200 batches of 256, 50 epochs, Adam 1.5e-5), recorded.
From the trace: the temporal kernel and the participation ratio over training (A.7), the three
kernel-regime metrics (figure 14), the IPS map of test images (figure 5) with what its axes show
within one class (figure 7), and IPS as a score of difficulty (table 1).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
import xarray as xr
from lkarray_workflows.fashion import read_fashion
from pydantic import Field
from torch import nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset

import lkarray as lk
from lkarray import plots, progress, store, workflow
from lkarray.training import Trace

_NAMES = (
    "T-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "boot",
)  # fmt: skip
_LAST_HIDDEN = "10"  # the ReLU before the output layer
SCORES = ("IPS norm", "IPS class margin", "hidden top-k similarity", "max-softmax", "logit margin")


class Config(workflow.Config):
    """Settings; the defaults are the paper's, on Fashion-MNIST."""

    presets: ClassVar = {
        "small": {
            "batches": 20, "epochs": 8, "learning_rate": 1e-3, "features": 200, "observed": 300,
            "score_test": 300, "score_train": 500,
        },
    }  # fmt: skip

    seed: int = Field(1, ge=0)
    data: Path | None = Field(None, description="folder of the four idx files; else torchvision's")
    batches: int = Field(200, ge=1, description="of an epoch")
    batch_size: int = Field(256, ge=1)
    epochs: int = Field(50, ge=2)
    learning_rate: float = Field(1.5e-5, gt=0)
    features: int = Field(500, ge=20, description="training images of the gradient tensor")
    observed: int = Field(2000, ge=50, le=10000, description="test images of the map")
    score_test: int = Field(2000, ge=50, le=10000, description="test images of table 1")
    score_train: int = Field(5000, ge=50, description="training images of table 1")
    score_epochs: int = Field(10, ge=1, description="epochs, evenly spaced, of table 1")
    neighbors: int = Field(30, ge=2)


def run(config: Config, folder: Path, *, progress: bool = True) -> str:
    """Run the study in ``folder``, or continue it; return what to tell the user."""
    with workflow.Run("lenet_path", config, folder) as state:
        paths = Paths(folder)
        state.stage("data", lambda: make_data(config, paths), [paths.data])
        state.stage("train", lambda: train(config, paths, progress), [paths.model])
        state.stage("gradients", lambda: gradients(config, paths, progress), [paths.made])
        state.stage("time", lambda: over_time(config, paths), [paths.time])
        state.stage("map", lambda: make_map(config, paths), [paths.map])
        state.stage("scores", lambda: scores(config, paths), [paths.scores])
        state.stage("report", lambda: report(config, paths, state), [paths.index])
    return f"Report  {paths.index}\nStore   {paths.store}"


class Paths:
    """Where the study's files are."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.report = folder, folder / "report"
        self.data, self.model = folder / "data.npz", folder / "model.pt"
        self.store, self.made = folder / "train.zarr", folder / "gradients.json"
        self.time, self.map, self.scores = (
            folder / f"{name}.json" for name in ("time", "map", "scores")
        )
        self.index = self.report / "index.html"


def make_data(config: Config, paths: Paths) -> None:
    """Take the training images of an epoch, and the test images."""
    rng = np.random.default_rng(config.seed)
    kept: dict[str, Any] = {}
    wanted = {"train": config.batches * config.batch_size, "t10k": 10_000}
    for part, name in (("train", "train"), ("t10k", "test")):
        images, labels = read_fashion(config.data, paths.folder / "torchvision", part)
        chosen = rng.choice(len(labels), min(wanted[part], len(labels)), replace=False)
        kept |= {f"{name}_images": images[chosen], f"{name}_labels": labels[chosen]}
    np.savez(paths.data, **kept)


def data_set(paths: Paths, part: str, count: int | None = None) -> TensorDataset:
    """Return images ``(n, 1, 28, 28)`` of 0 to 1, and their classes."""
    with np.load(paths.data) as data:
        images = torch.from_numpy(data[f"{part}_images"][:count]).float().unsqueeze(1) / 255
        return TensorDataset(images, torch.from_numpy(data[f"{part}_labels"][:count]).long())


def network(seed: int) -> nn.Sequential:
    """Return LeNet-5 with ReLU and max pooling: 61,706 parameters."""
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(1, 6, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(6, 16, 5), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(),
        nn.Linear(400, 120), nn.ReLU(), nn.Linear(120, 84), nn.ReLU(), nn.Linear(84, 10),
    )  # fmt: skip


def train(config: Config, paths: Paths, show: bool) -> None:
    """Train with Adam, recorded: one state an epoch is kept, the others can be taken again."""
    data = data_set(paths, "train")
    images, labels = data.tensors
    model = network(config.seed)
    optimizer = torch.optim.Adam(model.parameters(), lr=config.learning_rate)
    shuffle = torch.Generator().manual_seed(config.seed)
    orders = (torch.randperm(len(labels), generator=shuffle) for _ in range(config.epochs))
    plan = [batch for order in orders for batch in order.split(config.batch_size)]
    with (
        lk.record(
            model, optimizer, data, store=paths.store, every=-(-len(labels) // config.batch_size)
        ) as trace,
        progress.bar("training", total=len(plan), unit="step", show=show) as bar,
    ):
        for batch in trace.remaining(plan):
            with trace.step(batch):
                optimizer.zero_grad()
                F.cross_entropy(model(images[batch]), labels[batch]).backward()
                optimizer.step()
            bar.update()
    torch.save(model.state_dict(), paths.model)


def open_trace(config: Config, paths: Paths) -> Trace:
    """Open the recorded run."""
    return lk.open_trace(paths.store, network(config.seed), data_set(paths, "train"))


def score_steps(config: Config, trace: Trace) -> list[int]:
    """Return the steps of the epochs that table 1 uses."""
    chosen = np.linspace(0, len(trace.epochs) - 1, config.score_epochs).round().astype(int)
    return [int(step) for step in trace.epochs[np.unique(chosen)]]


def gradients(config: Config, paths: Paths, show: bool) -> None:
    """Store gradients of training images, and factors of those that kernels alone are taken of."""
    trace = open_trace(config, paths)
    labels = data_set(paths, "train").tensors[1].numpy()
    options: dict[str, Any] = {"store": paths.store, "progress": show}
    found = lk.gradient_features(
        trace, np.arange(config.features), [*trace.epochs, trace.steps],
        coords={"label": labels[: config.features]}, **options,
    )  # fmt: skip
    test = data_set(paths, "test", config.observed)
    lk.gradient_factors(
        trace, test, name="test", coords={"label": test.tensors[1].numpy()}, **options
    )
    steps = score_steps(config, trace)
    lk.gradient_factors(
        trace, data_set(paths, "test", config.score_test), steps, name="score_test", **options
    )
    lk.gradient_factors(
        trace, np.arange(config.score_train), steps, name="score_train",
        coords={"label": labels[: config.score_train]}, **options,
    )  # fmt: skip
    paths.made.write_text(json.dumps({"bytes": int(found["gradient"].nbytes)}))


def over_time(config: Config, paths: Paths) -> None:
    """Temporal kernel and modes, participation ratio, and the kernel-regime metrics."""
    G = lk.open(paths.store)["gradients"].to_dataset()
    before = G.isel(time=slice(-1))  # the last state has no step, and so no learning rate
    kernel = lk.temporal_kernel(before).compute()
    store.put(paths.store, "temporal_kernel", kernel)
    store.put(paths.store, "temporal_modes", lk.temporal_modes(kernel).compute())
    ratios = []
    for t in range(G.sizes["time"]):
        square = np.linalg.eigvalsh(lk.lgk(G.isel(time=t)).values.astype(np.float64))
        ratios.append(float(lk.participation_ratio(np.sqrt(np.maximum(square, 0)))))
    trace = open_trace(config, paths)
    hidden = lk.activations(
        trace, np.arange(config.features), G["time"].values.tolist(), module=_LAST_HIDDEN
    )
    metrics = {
        "participation_ratio": ratios,
        "feature_overlap": lk.feature_overlap(G).values.tolist(),
        "subspace_overlap": lk.subspace_overlap(G, 10).values.tolist(),
        "activation_overlap": lk.activation_overlap(hidden).values.tolist(),
    }
    paths.time.write_text(json.dumps(metrics))


def predictions(config: Config, paths: Paths, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the final logits of test images, and their classes."""
    model = network(config.seed)
    model.load_state_dict(torch.load(paths.model, weights_only=True))
    images, labels = data_set(paths, "test", count).tensors
    with torch.inference_mode():
        return model.eval()(images).double().numpy(), labels.numpy()


def make_map(config: Config, paths: Paths) -> None:
    """Embed test images by IPS, misclassified ones marked."""
    F_ = lk.open(paths.store)["gradients_test"].to_dataset()
    similarity = lk.ips(F_).compute()
    logits, labels = predictions(config, paths, config.observed)
    points = lk.embed(similarity, seed=config.seed, k=config.neighbors)
    wrong = logits.argmax(1) != labels
    store.put(paths.store, "map", points.assign_coords(misclassified=(points.dims[0], wrong)))
    same = labels[:, None] == labels
    np.fill_diagonal(same, False)
    values = similarity.values
    off = ~np.eye(len(labels), dtype=bool)
    xy = points.values
    centers = np.stack([np.median(xy[labels == c], axis=0) for c in range(10)])
    far = np.linalg.norm(xy - centers[labels], axis=1)
    metrics = {
        "within": float(values[same].mean()),
        "between": float(values[off & ~same].mean()),
        "between_negative": float((values[off & ~same] < 0).mean()),
        "distance_from_class_center": {
            name: float(np.median(far[at])) if at.any() else float("nan")
            for name, at in (("wrong", wrong), ("right", ~wrong))
        },
        "accuracy": float((~wrong).mean()),
    }  # fmt: skip
    paths.map.write_text(json.dumps(metrics))


def scores(config: Config, paths: Paths) -> None:
    """Table 1: scores of difficulty, against misclassification and loss."""
    tree = lk.open(paths.store)
    similarity = lk.ips(
        tree["gradients_score_test"].to_dataset(), tree["gradients_score_train"].to_dataset()
    )
    logits, labels = predictions(config, paths, config.score_test)
    predicted = logits.argmax(1)
    found = lk.ips_scores(similarity, "label_2", predicted).compute()
    trace = open_trace(config, paths)
    train_labels = data_set(paths, "train").tensors[1].numpy()[: config.score_train]
    test, known = (
        lk.activations(trace, examples, [trace.steps], module=_LAST_HIDDEN).isel(time=0)
        for examples in (
            data_set(paths, "test", config.score_test), np.arange(config.score_train),
        )
    )  # fmt: skip
    near = lk.hidden_similarity(test, known, train_labels, predicted).compute()
    shifted = logits - logits.max(1, keepdims=True)
    logp = shifted - np.log(np.exp(shifted).sum(1, keepdims=True))
    top = np.sort(logits, axis=1)
    values = (
        found["norm"].values, found["margin"].values, near.values,
        np.exp(logp.max(1)), top[:, -1] - top[:, -2],
    )  # fmt: skip
    loss = -logp[np.arange(len(labels)), labels]
    table = lk.difficulty_table(dict(zip(SCORES, values, strict=True)), predicted != labels, loss)
    store.put(paths.store, "difficulty", table)
    rows = {
        name: {key: float(table[key].sel(score=name)) for key in ("auroc", "aupr", "spearman")}
        for name in SCORES
    }
    share = float((predicted != labels).mean())
    paths.scores.write_text(json.dumps({"table": rows, "share_wrong": share}))


def report(config: Config, paths: Paths, state: workflow.Run) -> None:
    """Write the report folder."""
    tree = lk.open(paths.store)
    time_, map_, table = (
        json.loads(path.read_text()) for path in (paths.time, paths.map, paths.scores)
    )
    kernel = xr.DataArray(tree["derived/temporal_kernel"]["temporal_kernel"]).load()
    modes = tree["derived/temporal_modes"].to_dataset().load()
    points = xr.DataArray(tree["derived/map"]["embedding"]).load()
    epochs = np.arange(len(time_["participation_ratio"]))
    along = xr.DataArray(epochs, dims="time")
    curves = {
        name: along.copy(data=time_[name])
        for name in ("feature_overlap", "subspace_overlap", "activation_overlap")
    }
    ratio = {"participation ratio": along.copy(data=time_["participation_ratio"])}
    named = points.assign_coords(
        garment=("example", [_NAMES[c] for c in points["label"].values.tolist()])
    )
    drawn = plots.neighbor_map(named, by="garment", mark="misclassified")
    drawn.axes[0].set_title(f"IPS map of {len(points)} test images")
    with np.load(paths.data) as data:
        images = data["test_images"][: config.observed]
    figures = [
        workflow.Figure("temporal", "Gradients over training", "All training images' gradients, "
                        "epoch against epoch, and the temporal modes.",
                        plots.temporal_structure(kernel, modes, labels=epochs[:-1])),
        workflow.Figure("participation", "Participation ratio", "Of the spectrum of the training "
                        "images' gradients at each epoch.",
                        plots.over_training(ratio, ylabel="modes", title="Effective modes",
                                            labels=epochs)),
        workflow.Figure("regime", "Kernel-regime metrics", "Each epoch compared with the end.",
                        plots.over_training(curves, ylabel="overlap with the end",
                                            title="Approach to the kernel regime", labels=epochs)),
        workflow.Figure("map", "IPS map", "By class; misclassified images are ringed.", drawn),
    ]  # fmt: skip
    for c in (1, 9):
        at = points["label"].values == c
        figures.append(workflow.Figure(
            f"axes_{c}", f"Axes of the map within class {_NAMES[c]}", "Images at the ends of each "
            "axis.", plots.axis_extremes(points[at], images[at]),
        ))  # fmt: skip
    half = [int(np.argmax(np.asarray(time_[name]) > 0.5)) for name in curves]
    rows = [
        ("Accuracy on test images", f"{map_['accuracy']:.1%}", ""),
        ("IPS within / between classes", f"{map_['within']:.3f} / {map_['between']:.3f}",
         "paper: positive / negative"),
        ("Distance from the class's center on the map, wrong / right",
         "{wrong:.2f} / {right:.2f}".format(**map_["distance_from_class_center"]),
         "paper: errors at the edges"),
        ("Energy of the first temporal mode", f"{float(modes['share'][0]):.1%}", ""),
        ("Participation ratio, first epoch / last",
         f"{time_['participation_ratio'][0]:.1f} / {time_['participation_ratio'][-1]:.1f}",
         "paper: falls"),
        ("First epoch with half the final overlap (features, subspace, activations)",
         " / ".join(map(str, half)), "paper: epochs 5 to 10"),
    ] + [
        (f"{name}: AUROC, AUPR, Spearman",
         "{auroc:.3f}, {aupr:.3f}, {spearman:.3f}".format(**row), PAPER[name])
        for name, row in table["table"].items()
    ]  # fmt: skip
    workflow.write_report(
        workflow.Report(
            title="LeNet-5's path through training",
            summary=[
                f"{config.batches * config.batch_size:,} training images of Fashion-MNIST, "
                f"{config.epochs} epochs, Adam {config.learning_rate:g}. The paper's numbers are "
                "of MNIST."
            ],
            metrics={"time": time_, "map": map_, **table, "seconds": state.seconds(),
                     "temporal_share": modes["share"].values.tolist(),
                     "config": config.model_dump(mode="json")},
            rows=rows,
            figures=figures,
            settings=config.model_dump(mode="json"),
            next_steps=f'G = lk.open("{paths.store}")["gradients"]\nlk.modes(G.isel(time=-1), 50)',
        ),
        paths.report,
    )  # fmt: skip


#: Table 1 of the paper, of MNIST.
PAPER = {
    "IPS norm": "paper (MNIST): 0.901, 0.501, 0.267",
    "IPS class margin": "paper (MNIST): 1.000, 1.000, 0.805",
    "hidden top-k similarity": "paper (MNIST): 0.863, 0.393, 0.625",
    "max-softmax": "paper (MNIST): 0.905, 0.496, 0.982",
    "logit margin": "paper (MNIST): 0.902, 0.479, 0.973",
}
