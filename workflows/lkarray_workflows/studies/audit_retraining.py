"""Does an audit tell what matters? Train again without the examples that it names.

LeNet-5 learns MNIST (or Fashion-MNIST), recorded, and the losses of some test images are audited.
Then it learns again, from other initial weights and in other orders, without a share of the
training images: those that lowered the audited losses most, those of least influence either way
(of all, and of each class alike), as many at random, and those that raised the losses most. Every
arm takes equally many steps. What is compared is the mean loss of the audited images, and of others
that the audit never saw.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from matplotlib.figure import Figure
from pydantic import Field
from torch import nn

import lkarray as lk
from lkarray import workflow
from lkarray_workflows.shared import retraining
from lkarray_workflows.shared.images import FOLDER, data_set, require_files
from lkarray_workflows.shared.recorded import build, fit, plan
from lkarray_workflows.shared.retraining import (
    SETS,
    influence,
    order,
    take,
    without,
    without_of_each,
)

BALANCED = "least influential of each class"
ARMS = ("nothing", "random", "most helpful", "least influential", BALANCED, "most harmful")
#: One arm, another, and whether the first has the higher loss.
CLAIMS = {
    "removing the most helpful hurts more than random": ("most helpful", "random"),
    "removing the least influential hurts less than random": ("random", "least influential"),
    "removing the least influential of each class hurts less than random": ("random", BALANCED),
}


class Config(workflow.Config):
    """Settings."""

    presets: ClassVar = {
        "small": {
            "batches": 8,
            "batch_size": 64,
            "epochs": 6,
            "learning_rate": 1e-3,
            "audited": 64,
            "held_out": 200,
            "seeds": 2,
        },
    }

    seed: int = Field(1, ge=0, description="of the audited run; the arms have the seeds after it")
    dataset: Literal["mnist", "fashion"] = "mnist"
    data: Path | None = Field(None, description=FOLDER)
    batches: int = Field(20, ge=1, description="of an epoch")
    batch_size: int = Field(256, ge=1)
    epochs: int = Field(50, ge=1)
    learning_rate: float = Field(1e-3, gt=0)
    audited: int = Field(512, ge=2, description="test images")
    held_out: int = Field(4000, ge=2, description="other test images")
    share: float = Field(0.2, gt=0, lt=1, description="of the training images, removed")
    seeds: int = Field(3, ge=1, description="runs of each arm")
    keep: bool = Field(False, description="keep the recorded run after the report")


Study = workflow.Study[Config]


def run(config: Config, folder: Path, *, progress: bool = True) -> str:
    """Run the study in ``folder``, or continue it; return what to tell the user."""
    require_files(config, folder / "data.npz")
    with workflow.Study("audit_retraining", config, folder, progress) as study:
        study.stage("data", make_data, "data.npz")
        study.stage("audit", make_audit, "scores.npz")
        for seed in range(config.seed + 1, config.seed + 1 + config.seeds):
            for arm in ARMS:
                study.stage(f"{arm} {seed}", again, file_of(arm, seed), arm, seed)
        study.stage("report", report, "report/index.html")
        if not config.keep:
            lk.discard_trace(study.path("train.zarr"))
    return f"Report  {study.index}\nStore   {study.path('train.zarr')}"


def file_of(arm: str, seed: int) -> str:
    """Return the name of the file with the outcome of an arm's run."""
    return f"{arm.replace(' ', '_')}_{seed}.json"


def make_data(study: Study) -> None:
    """Take the training images, the audited ones, and others."""
    config = study.config
    train = config.batches * config.batch_size
    study.save("data.npz", **take(config, train, config.audited, config.held_out, seed=config.seed))


def lenet(seed: int) -> nn.Sequential:
    """Return LeNet-5 as a run begins."""
    return build("lenet", (1, 28), seed)


def batches(config: Config, n: int, seed: int) -> list[torch.Tensor]:
    """Return the batches of a run: as many for each arm."""
    return plan(n, config.batch_size, config.batches * config.epochs, seed)


def make_audit(study: Study) -> None:
    """Train, recorded; audit; keep what each training image did to the audited losses."""
    config = study.config
    path = study.path("data.npz")
    data, audited = data_set(path, "train"), data_set(path, "audited")
    fit(
        lenet(config.seed),
        data,
        batches(config, len(data), config.seed),
        config.learning_rate,
        store=study.path("train.zarr"),
        show=study.show,
    )
    trace = lk.open_trace(study.path("train.zarr"), lenet(config.seed), data)
    study.save("scores.npz", **influence(trace, audited, study.path("train.zarr"), study.show))


def kept_by(study: Study, arm: str, seed: int) -> np.ndarray:
    """Return the training images that an arm learns from."""
    with np.load(study.path("scores.npz")) as scores:
        net, gross = scores["net"], scores["gross"]
    if arm == BALANCED:
        labels = data_set(study.path("data.npz"), "train").tensors[1].numpy()
        counts = [round(study.config.share * int(size)) for size in np.unique_counts(labels).counts]
        kept = without_of_each(order("least influential", net, gross, seed), labels, counts)
    else:
        count = 0 if arm == "nothing" else round(study.config.share * len(net))
        kept = without(order(arm, net, gross, seed), count)
    return np.asarray(kept)


def again(study: Study, arm: str, seed: int) -> None:
    """Train one arm, and measure it."""
    kept = kept_by(study, arm, seed)
    outcome = retraining.again(
        lenet(seed),
        data_set(study.path("data.npz"), "train"),
        kept,
        batches(study.config, len(kept), seed),
        study.config.learning_rate,
        {name: data_set(study.path("data.npz"), name) for name in SETS},
    )
    study.write(file_of(arm, seed), outcome)


def claims(outcomes: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """Say of each claim what the paired differences of losses are, and whether it holds."""
    held = {}
    for claim, (worse, better) in CLAIMS.items():
        for name in SETS:
            pairs = zip(outcomes[worse], outcomes[better], strict=True)
            gaps = [a[name]["loss"] - b[name]["loss"] for a, b in pairs]
            held[f"{claim}, {name.replace('_', ' ')} images"] = {
                "differences": gaps,
                "mean": float(np.mean(gaps)),
                "holds": min(gaps) > 0,
            }
    return held


def report(study: Study) -> None:
    """Write the report folder."""
    config = study.config
    seeds = range(config.seed + 1, config.seed + 1 + config.seeds)
    outcomes = {arm: [study.read(file_of(arm, s)) for s in seeds] for arm in ARMS}
    held = claims(outcomes)
    rows = [
        (
            f"{arm}: loss of the audited, of others (accuracy)",
            ", ".join(f"{np.mean([run[s]['loss'] for run in runs]):.4f}" for s in SETS)
            + f" ({np.mean([run['held_out']['accuracy'] for run in runs]):.1%})",
            f"{runs[0]['images']:,} images",
        )
        for arm, runs in outcomes.items()
    ] + [
        (
            claim,
            f"{gap['mean']:+.4f} nats: {'holds' if gap['holds'] else 'does NOT hold'}",
            "by seed: " + ", ".join(f"{value:+.4f}" for value in gap["differences"]),
        )
        for claim, gap in held.items()
    ]
    with np.load(study.path("scores.npz")) as scores:
        correlation = float(scores["lc"])
    study.report(
        title="Training again without the examples that an audit names",
        summary=[
            f"{config.share:.0%} of {config.batches * config.batch_size:,} training images "
            f"removed, {config.batches * config.epochs} steps in every arm, {config.seeds} "
            "seeds. A claim holds if the difference has its sign for every seed. Removing "
            "images changes what is left, so an audit of one run need not tell what another "
            "run does: this is the check whether it does."
        ],
        metrics={
            "arms": outcomes,
            "claims": held,
            "lc": correlation,
        },
        rows=rows,
        figures=[
            workflow.Figure(
                "arms",
                "Loss after training again",
                "Each dot is a seed, the bar their mean.",
                draw(outcomes),
            )
        ],
        next_steps=f'audit = lk.open("{study.path("train.zarr")}")["audit"].to_dataset()\n'
        "lk.most_influential(audit, 10)",
    )


def draw(outcomes: dict[str, list[dict[str, Any]]]) -> Figure:
    """Draw the losses of each arm."""
    figure = Figure(figsize=(10, 4), layout="constrained")
    for axes, name in zip(figure.subplots(1, 2), SETS, strict=True):
        for y, (arm, runs) in enumerate(outcomes.items()):
            losses = [run[name]["loss"] for run in runs]
            color = "0.5" if arm in ("nothing", "random") else "#3f90da"
            axes.plot(losses, [y] * len(losses), "o", color=color, alpha=0.7, ms=6)
            axes.plot([np.mean(losses)] * 2, [y - 0.3, y + 0.3], color="black", lw=1.5)
        axes.axvline(
            np.mean([run[name]["loss"] for run in outcomes["random"]]),
            color="0.7",
            lw=0.8,
            ls="--",
            zorder=0,
        )
        axes.set_yticks(range(len(outcomes)), list(outcomes))
        axes.invert_yaxis()
        axes.set(xlabel="mean loss (nats)", title=f"{name.replace('_', ' ')} test images")
        axes.grid(axis="x", alpha=0.25)
    figure.axes[0].set_ylabel("removed")
    return figure
