"""Does an audit find wrong labels? Self-influence and harm, beside TracIn, the loss gain, the loss.

LeNet-5 learns MNIST (or Fashion-MNIST) with a share of the labels changed to another class, until
it begins to learn those by heart, recorded at every step. Each score says of every training image
how suspicious its label is; each is measured by how well it ranks the changed ones first (AUROC).
An image whose label is wrong must lower its own loss by itself (self-influence), and raises the
losses of clean test images (summed harmful influence).
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from matplotlib.figure import Figure
from pydantic import Field
from torch import nn
from torch.nn import functional as F

import lkarray as lk
from lkarray import workflow
from lkarray.training import Trace
from lkarray_workflows.shared.common import accuracy, area, draw_losses, keep_model, load_model
from lkarray_workflows.shared.images import FOLDER, NAMES, data_set, require_files, take_images
from lkarray_workflows.shared.recorded import build, fit, plan

SCORES = (
    "self-influence",
    "harmful influence",
    "net influence",
    "TracIn self-influence",
    "TracIn harmful influence",
    "TracInCP self-influence",
    "loss gain",
    "loss variance",
    "loss",
)


class Config(workflow.Config):
    """Settings; tuned on seed 0, reported on others."""

    presets: ClassVar = {
        "small": {
            "train": 200,
            "epochs": 10,
            "audited": 60,
            "seeds": 1,
            "chains": 2,
            "draws": 40,
            "burn_in": 20,
        },
    }

    seed: int = Field(1, ge=0, description="the first")
    seeds: int = Field(3, ge=1, description="of data, labels, training and sampling")
    dataset: Literal["mnist", "fashion"] = "mnist"
    data: Path | None = Field(None, description=FOLDER)
    train: int = Field(2560, ge=20, description="training images")
    flipped: float = Field(0.1, gt=0, lt=1, description="share of changed labels")
    audited: int = Field(512, ge=2, description="test images")
    batch_size: int = Field(64, ge=1)
    epochs: int = Field(15, ge=1)
    learning_rate: float = Field(2e-3, gt=0)
    nbeta: float = Field(1000.0, ge=0)
    gamma: float = Field(1000.0, gt=0)
    step_size: float = Field(1e-4, gt=0)
    chains: int = Field(4, ge=2)
    draws: int = Field(200, ge=2)
    burn_in: int = Field(200, ge=0)
    thin: int = Field(5, ge=1)
    keep: bool = Field(False, description="keep the recorded runs after the report")


Study = workflow.Study[Config]


def run(config: Config, folder: Path, *, progress: bool = True) -> str:
    """Run the study in ``folder``, or continue it; return what to tell the user."""
    seeds = seeds_of(config)
    require_files(config)
    with workflow.Study("audit_flips", config, folder, progress) as study:
        for seed in seeds:
            home = study.within(f"seed-{seed}")
            for name, (work, makes) in STAGES.items():
                home.stage(f"{name} {seed}", work, makes, seed)
        study.stage("report", report, "report/index.html")
        if not config.keep:
            for seed in seeds:
                lk.discard_trace(study.path(f"seed-{seed}/train.zarr"))
    return f"Report  {study.index}\nStore   {study.path(f'seed-{config.seed}/train.zarr')}"


def seeds_of(config: Config) -> range:
    """Return the seeds, each with a network and a folder of its own."""
    return range(config.seed, config.seed + config.seeds)


def make_data(study: Study, seed: int) -> None:
    """Take images, and change some labels to any of the other nine."""
    config = study.config
    kept = take_images(config, config.train, config.audited, seed=seed)
    rng = np.random.default_rng(seed + 1000)
    n = len(kept["train_labels"])
    changed = rng.choice(n, round(config.flipped * n), replace=False)
    kept["true_labels"] = kept["train_labels"].copy()
    labels = kept["train_labels"]
    labels[changed] = (labels[changed] + rng.integers(1, 10, len(changed))) % 10
    study.save("data.npz", **kept)


def train(study: Study, seed: int) -> None:
    """Train, recorded."""
    config = study.config
    data = data_set(study.path("data.npz"), "train")
    steps = -(-len(data) // config.batch_size) * config.epochs
    batches = plan(len(data), config.batch_size, steps, seed)
    model = fit(
        untrained(seed),
        data,
        batches,
        config.learning_rate,
        store=study.path("train.zarr"),
        show=study.show,
    )
    keep_model(model, study.path("model.pt"))


def untrained(seed: int) -> nn.Sequential:
    """Return LeNet-5 as it begins."""
    return build("lenet", (1, 28), seed)


def open_trace(study: Study, seed: int) -> Trace:
    """Open the recorded run."""
    return lk.open_trace(
        study.path("train.zarr"), untrained(seed), data_set(study.path("data.npz"), "train")
    )


def harm(influence: Any) -> np.ndarray:
    """Return of each training image what it raised audited losses by, ``(example,)`` in nats."""
    return np.asarray(influence.clip(min=0).astype(np.float64).sum("audit").values)


def own(influence: Any) -> np.ndarray:
    """Return of each training image what it lowered its own loss by, ``(example,)`` in nats."""
    return -np.asarray(np.diagonal(influence.values))


def make_audit(study: Study, seed: int) -> None:
    """Audit the training images themselves, and clean test images."""
    trace = open_trace(study, seed)
    store, test = study.path("train.zarr"), data_set(study.path("data.npz"), "test")
    everything = np.arange(trace.train.n)
    on_itself = lk.audit(trace, everything, store=store, name="itself", progress=study.show)
    clean = lk.audit(trace, test, store=store, progress=study.show)
    scores: dict[str, Any] = {
        "self-influence": own(on_itself["influence"]),
        "harmful influence": harm(clean["influence"]),
        "net influence": clean["influence"].sum("audit").values,
    }
    study.save("audit.npz", lc=[on_itself.attrs["lc"], clean.attrs["lc"]], **scores)


def make_tracin(study: Study, seed: int) -> None:
    """Attribute by TracIn: over every step, and at the checkpoints of epochs."""
    trace = open_trace(study, seed)
    everything, test = np.arange(trace.train.n), data_set(study.path("data.npz"), "test")
    scores: dict[str, Any] = {
        "TracIn self-influence": own(lk.tracin_in_run(trace, everything, progress=study.show)),
        "TracIn harmful influence": harm(lk.tracin_in_run(trace, test, progress=study.show)),
        "TracInCP self-influence": own(lk.tracin(trace, everything, progress=study.show)),
    }
    study.save("tracin.npz", **scores)


def make_sample(study: Study, seed: int) -> None:
    """Sample the local posterior: loss gains; and the losses themselves."""
    path = study.path("data.npz")
    data, test = data_set(path, "train"), data_set(path, "test")
    model = load_model(untrained(seed), study.path("model.pt"))
    tree = draw_losses(
        study.config,
        model,
        data,
        data,
        study.path("samples.zarr"),
        batch_size=256,
        seed=seed,
        coords={},
        show=study.show,
    )
    images, labels = data.tensors
    with torch.inference_mode():
        output = model(images)
    with np.load(path) as arrays:
        flipped = arrays["true_labels"] != labels.numpy()
    right = accuracy(model, data)
    facts = {
        "right on clean labels": mean_of(right[~flipped]),
        "changed labels learned": mean_of(right[flipped]),
        "test accuracy": mean_of(accuracy(model, test)),
        "verdicts": list(lk.diagnostics(tree).attrs["verdicts"]),
    }
    scores: dict[str, Any] = {
        "loss gain": lk.loss_gain(tree["losses"]).values,
        "loss variance": lk.loss_variance(tree["losses"]).values,
        "loss": F.cross_entropy(output, labels, reduction="none").numpy(),
    }
    study.save("gain.npz", facts=json.dumps(facts), flipped=flipped, **scores)


def mean_of(right: np.ndarray) -> float:
    """Return the share that is right, as a mean in float32."""
    return float(torch.from_numpy(right).float().mean())


#: What is done with each seed, in this order, and the file that each leaves.
STAGES: dict[str, tuple[Callable[[Study, int], None], str]] = {
    "data": (make_data, "data.npz"),
    "train": (train, "model.pt"),
    "audit": (make_audit, "audit.npz"),
    "TracIn": (make_tracin, "tracin.npz"),
    "sample": (make_sample, "gain.npz"),
}


def scores_of(study: Study, seed: int) -> tuple[dict[str, np.ndarray], np.ndarray, dict[str, Any]]:
    """Return each score of the training images, which are flipped, and facts of the run."""
    arrays: dict[str, np.ndarray] = {}
    for name in ("audit", "tracin", "gain"):
        arrays |= study.load(f"seed-{seed}/{name}.npz")
    facts = json.loads(str(arrays["facts"])) | {"lc": arrays["lc"].tolist()}
    return {name: arrays[name] for name in SCORES}, arrays["flipped"], facts


def report(study: Study) -> None:
    """Write the report folder."""
    config = study.config
    first = study.path(f"seed-{config.seed}/train.zarr")
    by_seed = {seed: scores_of(study, seed) for seed in seeds_of(config)}
    areas = {
        name: [area(flipped, scores[name]) for scores, flipped, _ in by_seed.values()]
        for name in SCORES
    }
    scores, flipped, _ = by_seed[config.seed]
    rows = [
        (
            f"AUROC of {name}",
            f"{np.mean(values):.3f}",
            "by seed: " + ", ".join(f"{value:.3f}" for value in values),
        )
        for name, values in areas.items()
    ]
    for fact in ("right on clean labels", "changed labels learned", "test accuracy"):
        values = [facts[fact] for _, _, facts in by_seed.values()]
        rows.append((fact.capitalize(), f"{np.mean(values):.1%}", ""))
    study.report(
        title="Wrong labels, found by audit",
        summary=[
            f"{config.flipped:.0%} of {config.train:,} labels changed; {config.epochs} epochs, "
            f"Adam {config.learning_rate:g}; {config.audited} clean test images; "
            f"{config.seeds} seeds. Chance is 0.5. TracIn follows the batches of every step; "
            "TracInCP takes the states that epochs begin with."
        ],
        metrics={
            "auroc": areas,
            "facts": {str(s): facts for s, (_, _, facts) in by_seed.items()},
        },
        rows=rows,
        figures=[
            workflow.Figure(
                "scores",
                "Scores of clean and of changed labels",
                f"Seed {config.seed}, each kind of label with its own area.",
                draw(scores, flipped, areas),
            ),
            workflow.Figure(
                "suspects",
                "Most suspicious by self-influence",
                "The label that it was given; red where that was changed.",
                gallery(study, scores, flipped),
            ),
        ],
        next_steps=f'audit = lk.open("{first}")["audit_itself"]\ninfluence = audit["influence"]',
    )


def draw(
    scores: dict[str, np.ndarray], flipped: np.ndarray, areas: dict[str, list[float]]
) -> Figure:
    """Draw how each score is distributed over ranks, of clean and of changed labels."""
    figure = Figure(figsize=(11, 8.5), layout="constrained")
    clean: dict[str, Any] = {"histtype": "stepfilled", "color": "#3f90da", "alpha": 0.5}
    changed: dict[str, Any] = {"histtype": "step", "color": "#bd1f01", "lw": 1.8}
    for axes, (name, values) in zip(figure.subplots(3, 3).flat, scores.items(), strict=True):
        rank = values.argsort().argsort() / (len(values) - 1)
        edges = np.linspace(0, 1, 21)
        axes.hist(rank[~flipped], edges, density=True, label="clean", **clean)
        axes.hist(rank[flipped], edges, density=True, label="changed", **changed)
        axes.set(
            title=f"{name}\nAUROC {areas[name][0]:.3f}",
            xlabel="rank of the score",
            ylabel="density",
        )
        axes.title.set_fontsize(10)
    figure.axes[0].legend(frameon=False)
    return figure


def gallery(study: Study, scores: dict[str, np.ndarray], flipped: np.ndarray) -> Figure:
    """Draw the images of highest self-influence with their given labels."""
    names = NAMES[study.config.dataset]
    with np.load(study.path(f"seed-{study.config.seed}/data.npz")) as arrays:
        images, labels = arrays["train_images"], arrays["train_labels"]
    figure = Figure(figsize=(11, 4.6), layout="constrained")
    order = np.argsort(-scores["self-influence"])
    for axes, i in zip(figure.subplots(3, 10).flat, order, strict=False):
        axes.imshow(images[i], cmap="gray")
        axes.set_axis_off()
        changed = bool(flipped[i])
        axes.set_title(
            names[labels[i]] + ("*" if changed else ""),
            fontsize=9,
            color="#bd1f01" if changed else "black",
        )
    return figure
