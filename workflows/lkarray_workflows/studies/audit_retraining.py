"""Does an audit tell what matters? Train again without the examples that it names.

LeNet-5 learns Fashion-MNIST (or MNIST), recorded, and the losses of some test images are audited.
Then it learns again, from other initial weights and in other orders, without a share of the
training images: those that lowered the audited losses most, those of least influence either way
(of all, and of each class alike), as many at random, and those that raised the losses most. Every
arm takes equally many steps. What is compared is the mean loss of the audited images, and of others
that the audit never saw.
"""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import torch
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
from matplotlib.figure import Figure
from pydantic import Field
from torch import nn

import lkarray as lk
from lkarray import workflow

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
    dataset: Literal["fashion", "mnist"] = "fashion"
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


def run(config: Config, folder: Path, *, progress: bool = True) -> str:
    """Run the study in ``folder``, or continue it; return what to tell the user."""
    require_files(config, folder / "data.npz")
    with workflow.Run("audit_retraining", config, folder) as state:
        paths = Paths(folder)
        state.stage("data", lambda: make_data(config, paths), [paths.data])
        state.stage("audit", lambda: make_audit(config, paths, progress), [paths.scores])
        for seed in range(config.seed + 1, config.seed + 1 + config.seeds):
            for arm in ARMS:
                out = paths.arm(arm, seed)
                state.stage(f"{arm} {seed}", partial(again, config, paths, arm, seed), [out])
        state.stage("report", lambda: report(config, paths, state), [paths.index])
        if not config.keep:
            lk.discard_trace(paths.store)
    return f"Report  {paths.index}\nStore   {paths.store}"


class Paths:
    """Where the study's files are."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.report = folder, folder / "report"
        self.data, self.scores = folder / "data.npz", folder / "scores.npz"
        self.store = folder / "train.zarr"
        self.index = self.report / "index.html"

    def arm(self, arm: str, seed: int) -> Path:
        """Return the outcome of an arm's run."""
        return self.folder / f"{arm.replace(' ', '_')}_{seed}.json"


def make_data(config: Config, paths: Paths) -> None:
    """Take the training images, the audited ones, and others."""
    train = config.batches * config.batch_size
    np.savez(paths.data, **take(config, train, config.audited, config.held_out, seed=config.seed))


def lenet(seed: int) -> nn.Sequential:
    """Return LeNet-5 as a run begins."""
    found: nn.Sequential = build("lenet", (1, 28), seed)
    return found


def batches(config: Config, n: int, seed: int) -> list[torch.Tensor]:
    """Return the batches of a run: as many for each arm."""
    found: list[torch.Tensor] = plan(n, config.batch_size, config.batches * config.epochs, seed)
    return found


def make_audit(config: Config, paths: Paths, show: bool) -> None:
    """Train, recorded; audit; keep what each training image did to the audited losses."""
    data, audited = data_set(paths.data, "train"), data_set(paths.data, "audited")
    fit(
        lenet(config.seed),
        data,
        batches(config, len(data), config.seed),
        config.learning_rate,
        store=paths.store,
        show=show,
    )
    trace = lk.open_trace(paths.store, lenet(config.seed), data)
    np.savez(paths.scores, **influence(trace, audited, paths.store, show))


def kept_by(config: Config, paths: Paths, arm: str, seed: int) -> np.ndarray:
    """Return the training images that an arm learns from."""
    with np.load(paths.scores) as scores:
        net, gross = scores["net"], scores["gross"]
    if arm == BALANCED:
        labels = data_set(paths.data, "train").tensors[1].numpy()
        counts = [round(config.share * int(size)) for size in np.unique_counts(labels).counts]
        kept = without_of_each(order("least influential", net, gross, seed), labels, counts)
    else:
        count = 0 if arm == "nothing" else round(config.share * len(net))
        kept = without(order(arm, net, gross, seed), count)
    return np.asarray(kept)


def again(config: Config, paths: Paths, arm: str, seed: int) -> None:
    """Train one arm, and measure it."""
    kept = kept_by(config, paths, arm, seed)
    found = retraining.again(
        lenet(seed),
        data_set(paths.data, "train"),
        kept,
        batches(config, len(kept), seed),
        config.learning_rate,
        {name: data_set(paths.data, name) for name in SETS},
    )
    paths.arm(arm, seed).write_text(json.dumps(found))


def claims(config: Config, found: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """Say of each claim what the paired differences of losses are, and whether it holds."""
    out = {}
    for claim, (worse, better) in CLAIMS.items():
        for name in SETS:
            pairs = zip(found[worse], found[better], strict=True)
            gaps = [a[name]["loss"] - b[name]["loss"] for a, b in pairs]
            out[f"{claim}, {name.replace('_', ' ')} images"] = {
                "differences": gaps,
                "mean": float(np.mean(gaps)),
                "holds": min(gaps) > 0,
            }
    return out


def report(config: Config, paths: Paths, state: workflow.Run) -> None:
    """Write the report folder."""
    seeds = range(config.seed + 1, config.seed + 1 + config.seeds)
    found = {arm: [json.loads(paths.arm(arm, s).read_text()) for s in seeds] for arm in ARMS}
    held = claims(config, found)
    rows = [
        (
            f"{arm}: loss of the audited, of others (accuracy)",
            ", ".join(f"{np.mean([one[s]['loss'] for one in runs]):.4f}" for s in SETS)
            + f" ({np.mean([one['held_out']['accuracy'] for one in runs]):.1%})",
            f"{runs[0]['images']:,} images",
        )
        for arm, runs in found.items()
    ] + [
        (
            claim,
            f"{one['mean']:+.4f} nats: {'holds' if one['holds'] else 'does NOT hold'}",
            "by seed: " + ", ".join(f"{gap:+.4f}" for gap in one["differences"]),
        )
        for claim, one in held.items()
    ]
    with np.load(paths.scores) as scores:
        correlation = float(scores["lc"])
    workflow.write_report(
        workflow.Report(
            title="Training again without the examples that an audit names",
            summary=[
                f"{config.share:.0%} of {config.batches * config.batch_size:,} training images "
                f"removed, {config.batches * config.epochs} steps in every arm, {config.seeds} "
                "seeds. A claim holds if the difference has its sign for every seed. Removing "
                "images changes what is left, so an audit of one run need not tell what another "
                "run does: this is the check whether it does."
            ],
            metrics={
                "arms": found,
                "claims": held,
                "lc": correlation,
                "seconds": state.seconds(),
                "config": config.model_dump(mode="json"),
            },
            rows=rows,
            figures=[
                workflow.Figure(
                    "arms",
                    "Loss after training again",
                    "Each dot is a seed, the bar their mean.",
                    draw(found),
                )
            ],
            settings=config.model_dump(mode="json"),
            next_steps=f'audit = lk.open("{paths.store}")["audit"].to_dataset()\n'
            "lk.most_influential(audit, 10)",
        ),
        paths.report,
    )


def draw(found: dict[str, list[dict[str, Any]]]) -> Figure:
    """Draw the losses of each arm."""
    figure = Figure(figsize=(10, 4), layout="constrained")
    for axes, name in zip(figure.subplots(1, 2), SETS, strict=True):
        for y, (arm, runs) in enumerate(found.items()):
            losses = [one[name]["loss"] for one in runs]
            color = "0.5" if arm in ("nothing", "random") else "#3f90da"
            axes.plot(losses, [y] * len(losses), "o", color=color, alpha=0.7, ms=6)
            axes.plot([np.mean(losses)] * 2, [y - 0.3, y + 0.3], color="black", lw=1.5)
        axes.axvline(
            np.mean([one[name]["loss"] for one in found["random"]]),
            color="0.7",
            lw=0.8,
            ls="--",
            zorder=0,
        )
        axes.set_yticks(range(len(found)), list(found))
        axes.invert_yaxis()
        axes.set(xlabel="mean loss (nats)", title=f"{name.replace('_', ' ')} test images")
        axes.grid(axis="x", alpha=0.25)
    figure.axes[0].set_ylabel("removed")
    return figure
