"""One recorded training run, for the studies that ask of it: LeNet-5, or a small CNN.

LeNet-5 learns Fashion-MNIST (or MNIST, or SVHN) as in PLGK A.3 (200 batches of 256, 50 epochs,
Adam 1.5e-5), recorded at every step. Studies take it by ``--trained``, so that it is trained once.
"""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import xarray as xr
from lkarray_workflows.images import CLASSES
from lkarray_workflows.recorded import Trained, Training, layers, logits_of, train

from lkarray import plots, workflow


class Config(Training):
    """Settings; the defaults are the paper's, on Fashion-MNIST."""

    presets: ClassVar = {
        "paper": {"dataset": "mnist"},
        "small": {"batches": 10, "batch_size": 64, "epochs": 4, "learning_rate": 1e-3},
    }


def run(config: Config, folder: Path, *, progress: bool = True) -> str:
    """Train in ``folder``, or go on; return what to tell the user."""
    if config.trained is not None:
        raise ValueError("lenet_training trains: --trained is a setting of the studies that use it")
    with workflow.Run("lenet_training", config, folder) as state:
        trained: Trained = train(state, config, folder, progress)
        index = folder / "report" / "index.html"
        state.stage("report", lambda: report(trained, index.parent, state), [index])
    return f"Report  {index}\nStore   {trained.store}\nUse it with --trained {folder}"


def report(trained: Trained, folder: Path, state: workflow.Run) -> None:
    """Write the report folder."""
    config, trace = trained.config, trained.trace()
    model = trained.final()
    right = {}
    for part in ("train", "test"):
        inputs, labels = trained.images(part).tensors
        right[part] = float((logits_of(model, inputs).argmax(1) == labels).double().mean())
    starts = np.append(trace.epochs, trace.steps)
    means = [float(trace.losses[a:b].mean()) for a, b in pairwise(starts)]
    sizes = {
        name: sum(p.numel() for p in model.get_submodule(module).parameters())
        for name, module in layers(model).items()
    }
    rows = [
        *((f"Right: {part} images", f"{share:.1%}", "") for part, share in right.items()),
        ("Mean loss, first epoch and last", f"{means[0]:.3f}, {means[-1]:.3f} nats", ""),
        ("Steps", f"{trace.steps:,}", ""),
        (
            "Parameters",
            f"{sum(sizes.values()):,}",
            ", ".join(f"{k} {v:,}" for k, v in sizes.items()),
        ),
    ]
    metrics: dict[str, Any] = {
        "accuracy": right, "losses": means, "parameters": sizes, "seconds": state.seconds(),
        "config": config.model_dump(mode="json"),
    }  # fmt: skip
    curve = xr.DataArray(means, dims="time")
    workflow.write_report(
        workflow.Report(
            title="A recorded training run",
            summary=[
                f"{len(trained.images('train')):,} training images of "
                f"{CLASSES[config.dataset][0]}, {config.epochs} epochs, Adam "
                f"{config.learning_rate:g}."
            ],
            metrics=metrics,
            rows=rows,
            figures=[
                workflow.Figure("loss", "Loss over training", "Mean of the batches of each epoch, "
                                "before their steps.",
                                plots.over_training({"mean loss": curve}, ylabel="loss (nats)",
                                                    title="Training", labels=np.arange(len(means))))
            ],
            settings=config.model_dump(mode="json"),
            next_steps=f"lkarray run lenet_audit --trained {trained.folder}",
        ),
        folder,
    )  # fmt: skip
