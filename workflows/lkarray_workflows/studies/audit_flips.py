"""Does an audit find wrong labels? Self-influence and harm, beside TracIn, the loss gain, the loss.

LeNet-5 learns Fashion-MNIST (or MNIST) with a share of the labels changed to another class, until
it begins to learn those by heart, recorded at every step. Each score says of every training image
how suspicious its label is; each is measured by how well it ranks the changed ones first (AUROC).
An image whose label is wrong must lower its own loss by itself (self-influence), and raises the
losses of clean test images (summed harmful influence).
"""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from lkarray_workflows.shared.images import FOLDER, NAMES, data_set, require_files, take_images
from lkarray_workflows.shared.recorded import build, fit, plan
from matplotlib.figure import Figure
from pydantic import Field
from torch import nn
from torch.nn import functional as F

import lkarray as lk
from lkarray import workflow
from lkarray.training import Trace

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
    dataset: Literal["fashion", "mnist"] = "fashion"
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


def run(config: Config, folder: Path, *, progress: bool = True) -> str:
    """Run the study in ``folder``, or continue it; return what to tell the user."""
    seeds = range(config.seed, config.seed + config.seeds)
    require_files(config)
    with workflow.Run("audit_flips", config, folder) as state:
        for seed in seeds:
            paths = Paths(folder, seed)
            for name, work, out in (
                ("data", make_data, paths.data),
                ("train", train, paths.model),
                ("audit", make_audit, paths.audit),
                ("TracIn", make_tracin, paths.tracin),
                ("sample", make_sample, paths.gain),
            ):
                state.stage(f"{name} {seed}", partial(work, config, paths, progress), [out])
        index = folder / "report" / "index.html"
        state.stage("report", lambda: report(config, folder, list(seeds), state), [index])
        if not config.keep:
            for seed in seeds:
                lk.discard_trace(Paths(folder, seed).store)
    return f"Report  {index}\nStore   {Paths(folder, seeds[0]).store}"


class Paths:
    """Where the files of a seed are."""

    def __init__(self, folder: Path, seed: int) -> None:
        self.whole, self.seed = folder, seed
        self.folder = folder / f"seed-{seed}"
        self.data, self.model = self.folder / "data.npz", self.folder / "model.pt"
        self.store, self.samples = self.folder / "train.zarr", self.folder / "samples.zarr"
        self.audit, self.tracin, self.gain = (
            self.folder / f"{name}.npz" for name in ("audit", "tracin", "gain")
        )


def make_data(config: Config, paths: Paths, show: bool) -> None:
    """Take images, and change some labels to any of the other nine."""
    paths.folder.mkdir(parents=True, exist_ok=True)
    kept = take_images(config, config.train, config.audited, seed=paths.seed)
    rng = np.random.default_rng(paths.seed + 1000)
    n = len(kept["train_labels"])
    changed = rng.choice(n, round(config.flipped * n), replace=False)
    kept["true_labels"] = kept["train_labels"].copy()
    labels = kept["train_labels"]
    labels[changed] = (labels[changed] + rng.integers(1, 10, len(changed))) % 10
    np.savez(paths.data, **kept)


def train(config: Config, paths: Paths, show: bool) -> None:
    """Train, recorded."""
    data = data_set(paths.data, "train")
    steps = -(-len(data) // config.batch_size) * config.epochs
    batches = plan(len(data), config.batch_size, steps, paths.seed)
    model = fit(untrained(paths), data, batches, config.learning_rate, store=paths.store, show=show)
    torch.save(model.state_dict(), paths.model)


def untrained(paths: Paths) -> nn.Sequential:
    """Return LeNet-5 as it begins."""
    found: nn.Sequential = build("lenet", (1, 28), paths.seed)
    return found


def open_trace(paths: Paths) -> Trace:
    """Open the recorded run."""
    return lk.open_trace(paths.store, untrained(paths), data_set(paths.data, "train"))


def harm(influence: Any) -> np.ndarray:
    """Return of each training image what it raised audited losses by, ``(example,)`` in nats."""
    return np.asarray(influence.clip(min=0).astype(np.float64).sum("audit").values)


def own(influence: Any) -> np.ndarray:
    """Return of each training image what it lowered its own loss by, ``(example,)`` in nats."""
    return -np.asarray(np.diagonal(influence.values))


def make_audit(config: Config, paths: Paths, show: bool) -> None:
    """Audit the training images themselves, and clean test images."""
    trace = open_trace(paths)
    found: dict[str, Any] = {}
    on_itself = lk.audit(
        trace, np.arange(trace.train.n), store=paths.store, name="itself", progress=show
    )
    clean = lk.audit(trace, data_set(paths.data, "test"), store=paths.store, progress=show)
    found["self-influence"] = own(on_itself["influence"])
    found["harmful influence"] = harm(clean["influence"])
    found["net influence"] = clean["influence"].sum("audit").values
    np.savez(paths.audit, lc=[on_itself.attrs["lc"], clean.attrs["lc"]], **found)


def make_tracin(config: Config, paths: Paths, show: bool) -> None:
    """Attribute by TracIn: over every step, and at the checkpoints of epochs."""
    trace = open_trace(paths)
    everything, test = np.arange(trace.train.n), data_set(paths.data, "test")
    found: dict[str, Any] = {
        "TracIn self-influence": own(lk.tracin_in_run(trace, everything, progress=show)),
        "TracIn harmful influence": harm(lk.tracin_in_run(trace, test, progress=show)),
        "TracInCP self-influence": own(lk.tracin(trace, everything, progress=show)),
    }
    np.savez(paths.tracin, **found)


def make_sample(config: Config, paths: Paths, show: bool) -> None:
    """Sample the local posterior: loss gains; and the losses themselves."""
    data = data_set(paths.data, "train")
    model = untrained(paths)
    model.load_state_dict(torch.load(paths.model, weights_only=True))
    model.eval()
    tree = lk.sample(
        lk.LocalPosterior(model, data, nbeta=config.nbeta, gamma=config.gamma),
        data,
        sampler=lk.SGLD(step_size=config.step_size),
        store=paths.samples,
        chains=config.chains,
        draws=config.draws,
        burn_in=config.burn_in,
        thin=config.thin,
        batch_size=256,
        seed=paths.seed,
        progress=show,
    )
    images, labels = data.tensors
    with np.load(paths.data) as arrays, torch.inference_mode():
        true = torch.from_numpy(arrays["true_labels"]).long()
        output = model(images)
        right = output.argmax(1)
        test = data_set(paths.data, "test").tensors
        on_test = float((model(test[0]).argmax(1) == test[1]).float().mean())
    flipped = true != labels
    verdicts = lk.diagnostics(tree).attrs["verdicts"]
    facts = {
        "right on clean labels": float((right == labels)[~flipped].float().mean()),
        "changed labels learned": float((right == labels)[flipped].float().mean()),
        "test accuracy": on_test,
        "verdicts": list(verdicts),
    }
    found: dict[str, Any] = {
        "loss gain": lk.loss_gain(tree["losses"]).values,
        "loss variance": lk.loss_variance(tree["losses"]).values,
        "loss": F.cross_entropy(output, labels, reduction="none").numpy(),
    }
    np.savez(paths.gain, facts=json.dumps(facts), flipped=flipped.numpy(), **found)


def scores_of(paths: Paths) -> tuple[dict[str, np.ndarray], np.ndarray, dict[str, Any]]:
    """Return each score of the training images, which are flipped, and facts of the run."""
    found: dict[str, np.ndarray] = {}
    for path in (paths.audit, paths.tracin, paths.gain):
        with np.load(path) as arrays:
            found |= dict(arrays)
    facts = json.loads(str(found["facts"])) | {"lc": found["lc"].tolist()}
    return {name: found[name] for name in SCORES}, found["flipped"], facts


def report(config: Config, folder: Path, seeds: list[int], state: workflow.Run) -> None:
    """Write the report folder."""
    from sklearn.metrics import roc_auc_score

    of = {seed: scores_of(Paths(folder, seed)) for seed in seeds}
    areas = {
        name: [float(roc_auc_score(flipped, scores[name])) for scores, flipped, _ in of.values()]
        for name in SCORES
    }
    scores, flipped, _ = of[seeds[0]]
    rows = [
        (
            f"AUROC of {name}",
            f"{np.mean(values):.3f}",
            "by seed: " + ", ".join(f"{value:.3f}" for value in values),
        )
        for name, values in areas.items()
    ]
    for fact in ("right on clean labels", "changed labels learned", "test accuracy"):
        values = [facts[fact] for _, _, facts in of.values()]
        rows.append((fact.capitalize(), f"{np.mean(values):.1%}", ""))
    workflow.write_report(
        workflow.Report(
            title="Wrong labels, found by audit",
            summary=[
                f"{config.flipped:.0%} of {config.train:,} labels changed; {config.epochs} epochs, "
                f"Adam {config.learning_rate:g}; {config.audited} clean test images; "
                f"{config.seeds} seeds. Chance is 0.5. TracIn follows the batches of every step; "
                "TracInCP takes the states that epochs begin with."
            ],
            metrics={
                "auroc": areas,
                "facts": {str(s): one[2] for s, one in of.items()},
                "seconds": state.seconds(),
                "config": config.model_dump(mode="json"),
            },
            rows=rows,
            figures=[
                workflow.Figure(
                    "scores",
                    "Scores of clean and of changed labels",
                    f"Seed {seeds[0]}, each kind of label with its own area.",
                    draw(scores, flipped, areas),
                ),
                workflow.Figure(
                    "suspects",
                    "Most suspicious by self-influence",
                    "The label that it was given; red where that was changed.",
                    gallery(config, Paths(folder, seeds[0]), scores, flipped),
                ),
            ],
            settings=config.model_dump(mode="json"),
            next_steps=f'audit = lk.open("{Paths(folder, seeds[0]).store}")["audit_itself"]\n'
            'influence = audit["influence"]',
        ),
        folder / "report",
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


def gallery(
    config: Config, paths: Paths, scores: dict[str, np.ndarray], flipped: np.ndarray
) -> Figure:
    """Draw the images of highest self-influence with their given labels."""
    names = NAMES[config.dataset]
    with np.load(paths.data) as arrays:
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
