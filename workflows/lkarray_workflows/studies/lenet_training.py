"""One recorded training run, for the studies that ask of it: LeNet-5, or a small CNN.

LeNet-5 learns Fashion-MNIST (or MNIST, or SVHN) as in PLGK A.3 (200 batches of 256, 50 epochs,
Adam 1.5e-5), recorded at every step. Studies take it by ``--trained``, so that it is trained once.
The report has how gradients change over training: the temporal kernel and the participation ratio
(A.7), and the three kernel-regime metrics (figure 14).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import xarray as xr
from lkarray_workflows.shared.images import CLASSES
from lkarray_workflows.shared.recorded import (
    Trained,
    Training,
    check,
    last_hidden,
    layers,
    logits_of,
    train,
)
from pydantic import Field

import lkarray as lk
from lkarray import plots, store, workflow
from lkarray.errors import SettingsError

OVERLAPS = ("feature_overlap", "subspace_overlap", "activation_overlap")


class Config(Training):
    """Settings; the defaults are the paper's, on Fashion-MNIST."""

    presets: ClassVar = {
        "paper": {"dataset": "mnist"},
        "small": {
            "batches": 10,
            "batch_size": 64,
            "epochs": 4,
            "learning_rate": 1e-3,
            "features": 200,
        },
    }

    features: int = Field(500, ge=20, description="training images whose gradients are stored")


def run(config: Config, folder: Path, *, progress: bool = True) -> str:
    """Train in ``folder``, or go on; return what to tell the user."""
    if config.trained is not None:
        raise SettingsError(
            "lenet_training trains: --trained is a setting of the studies that use it"
        )
    check(config)
    with workflow.Run("lenet_training", config, folder) as state:
        trained: Trained = train(state, config, folder, progress)
        over, index = folder / "time.json", folder / "report" / "index.html"
        state.stage("time", lambda: over_time(config, trained, over, progress), [over])
        state.stage("report", lambda: report(trained, over, index.parent, state), [index])
        if not config.keep:
            lk.discard_gradients(_gradients(trained))
    return f"Report  {index}\nStore   {trained.store}\nUse it with --trained {folder}"


def _gradients(trained: Trained) -> Path:
    return Path(trained.folder) / "gradients.zarr"


def over_time(config: Config, trained: Trained, out: Path, show: bool) -> None:
    """Store gradients of training images at each epoch, and compare the epochs."""
    path, trace = _gradients(trained), trained.trace()
    images, steps = trained.images("train", config.features), trained.epochs()
    G = lk.gradient_features(trace, images, steps, store=path, progress=show)
    # The last state has no step, and so no learning rate.
    kernel = lk.temporal_kernel(G.isel(time=slice(-1))).compute()
    store.put(path, "temporal_kernel", kernel)
    store.put(path, "temporal_modes", lk.temporal_modes(kernel).compute())
    ratios = []
    for t in range(len(steps)):
        square = np.linalg.eigvalsh(lk.lgk(G.isel(time=t)).values.astype(np.float64))
        ratios.append(float(lk.participation_ratio(np.sqrt(np.maximum(square, 0)))))
    hidden = lk.activations(trace, images, steps, module=last_hidden(trained.untrained()))
    overlaps = lk.feature_overlap(G), lk.subspace_overlap(G, 10), lk.activation_overlap(hidden)
    found = {name: x.values.tolist() for name, x in zip(OVERLAPS, overlaps, strict=True)}
    out.write_text(json.dumps({"images": len(images), "participation_ratio": ratios, **found}))


def report(trained: Trained, over: Path, folder: Path, state: workflow.Run) -> None:
    """Write the report folder."""
    time, derived = json.loads(over.read_text()), lk.open(_gradients(trained))["derived"]
    kernel = derived["temporal_kernel"].to_dataset()["temporal_kernel"].load()
    modes = derived["temporal_modes"].to_dataset().load()
    epochs = np.arange(len(time["participation_ratio"]))
    ratio, *overlaps = (
        xr.DataArray(time[name], dims="time") for name in ("participation_ratio", *OVERLAPS)
    )
    curves = dict(zip((n.replace("_", " ") for n in OVERLAPS), overlaps, strict=True))
    config, trace = trained.config, trained.trace()
    model = trained.final()
    right = {}
    for part in ("train", "test"):
        inputs, labels = trained.images(part).tensors
        right[part] = float((logits_of(model, inputs).argmax(1) == labels).double().mean())
    means = trained.losses_along(trained.images("train", 2000), trained.epochs()).mean(1).tolist()
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
        ("Energy of the first temporal mode", f"{float(modes['share'][0]):.1%}", ""),
        (
            "Participation ratio, first epoch / last",
            f"{ratio[0]:.1f} / {ratio[-1]:.1f}",
            "paper: falls",
        ),
        (
            "First epoch with half the final overlap (features, subspace, activations)",
            " / ".join(str(int((curve.values > 0.5).argmax())) for curve in overlaps),
            "paper: epochs 5 to 10",
        ),
    ]
    metrics: dict[str, Any] = {
        "accuracy": right,
        "losses": means,
        "parameters": sizes,
        "seconds": state.seconds(),
        "config": config.model_dump(mode="json"),
        "time": time,
        "temporal_share": modes["share"].values.tolist(),
    }
    curve = xr.DataArray(means, dims="time")
    workflow.write_report(
        workflow.Report(
            title="A recorded training run",
            summary=[
                f"{len(trained.images('train')):,} training images of "
                f"{CLASSES[config.dataset][0]}, {config.epochs} epochs, Adam "
                f"{config.learning_rate:g}. Gradients are of {time['images']} of them, at "
                "the start of each epoch and at the end."
            ],
            metrics=metrics,
            rows=rows,
            figures=[
                workflow.Figure(
                    "loss",
                    "Loss over training",
                    "Mean of 2,000 training images, or all, at each epoch's start and the end.",
                    plots.over_training(
                        {"mean loss": curve}, ylabel="loss (nats)", title="Training", labels=epochs
                    ),
                ),
                workflow.Figure(
                    "temporal",
                    "Gradients over training",
                    "All gradients, epoch against epoch, and the temporal modes (PLGK figure 23).",
                    plots.temporal_structure(kernel, modes, labels=epochs[:-1]),
                ),
                workflow.Figure(
                    "participation",
                    "Participation ratio",
                    "Of the spectrum of the gradients at each epoch (figure 24).",
                    plots.over_training(
                        {"participation ratio": ratio},
                        ylabel="modes",
                        title="Effective modes",
                        labels=epochs,
                    ),
                ),
                workflow.Figure(
                    "regime",
                    "Kernel-regime metrics",
                    "Each epoch compared with the end (figure 14).",
                    plots.over_training(
                        curves,
                        ylabel="overlap with the end",
                        title="Approach to the kernel regime",
                        labels=epochs,
                    ),
                ),
            ],
            settings=config.model_dump(mode="json"),
            next_steps=f"lkarray run lenet_audit --trained {trained.folder}",
        ),
        folder,
    )
