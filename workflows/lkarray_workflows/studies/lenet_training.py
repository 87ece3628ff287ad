"""One recorded training run, for the studies that ask of it: LeNet-5, or a small CNN.

LeNet-5 learns MNIST (or Fashion-MNIST, or SVHN) as in Anonymous 2026, A.3 (200 batches of 256, 50
epochs, Adam 1.5e-5), recorded at every step. Studies take it by ``--trained``, so that it is
trained once. The report has how gradients change over training: the temporal kernel and the
participation ratio (A.7), and the three kernel-regime metrics (figure 14).
"""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

import numpy as np
from pydantic import Field

import lkarray as lk
from lkarray import store, workflow
from lkarray.errors import SettingsError
from lkarray_workflows.shared.images import CLASSES
from lkarray_workflows.shared.lenet_training_report import OVERLAPS, figures_of, rows_of
from lkarray_workflows.shared.recorded import (
    Trained,
    Training,
    check,
    last_hidden,
    layers,
    logits_of,
    train,
)


class Config(Training):
    """Settings; the defaults are the paper's."""

    presets: ClassVar = {
        "paper": {},
        "small": {
            "batches": 10,
            "batch_size": 64,
            "epochs": 4,
            "learning_rate": 1e-3,
            "features": 200,
        },
    }

    features: int = Field(500, ge=20, description="training images whose gradients are stored")


Study = workflow.Study[Config]


def run(config: Config, folder: Path, *, progress: bool = True) -> str:
    """Train in ``folder``, or go on; return what to tell the user."""
    if config.trained is not None:
        raise SettingsError(
            "lenet_training trains: --trained is a setting of the studies that use it"
        )
    check(config)
    with workflow.Study("lenet_training", config, folder, progress) as study:
        recorded = train(study)
        study.stage("time", over_time, "time.json", recorded)
        study.stage("report", report, "report/index.html", recorded)
        if not config.keep:
            lk.discard_gradients(study.path("gradients.zarr"))
    return f"Report  {study.index}\nStore   {recorded.store}\nUse it with --trained {folder}"


def over_time(study: Study, run: Trained) -> None:
    """Store gradients of training images at each epoch, and compare the epochs."""
    path, trace = study.path("gradients.zarr"), run.trace()
    images, steps = run.images("train", study.config.features), run.epochs()
    G = lk.gradient_features(trace, images, steps, store=path, progress=study.show)
    # The last state has no step, and so no learning rate.
    kernel = lk.temporal_kernel(G.isel(time=slice(-1))).compute()
    store.put(path, "temporal_kernel", kernel)
    store.put(path, "temporal_modes", lk.temporal_modes(kernel).compute())
    ratios = []
    for t in range(len(steps)):
        square = np.linalg.eigvalsh(lk.lgk(G.isel(time=t)).values.astype(np.float64))
        ratios.append(float(lk.participation_ratio(np.sqrt(np.maximum(square, 0)))))
    hidden = lk.activations(trace, images, steps, module=last_hidden(run.untrained()))
    overlaps = lk.feature_overlap(G), lk.subspace_overlap(G, 10), lk.activation_overlap(hidden)
    curves = {name: x.values.tolist() for name, x in zip(OVERLAPS, overlaps, strict=True)}
    study.write("time.json", {"images": len(images), "participation_ratio": ratios, **curves})


def report(study: Study, run: Trained) -> None:
    """Write the report folder."""
    config, time, model = study.config, study.read("time.json"), run.final()
    modes = lk.open(study.path("gradients.zarr"))["derived/temporal_modes"].to_dataset().load()
    right = {
        split: float((logits_of(model, inputs).argmax(1) == labels).double().mean())
        for split in ("train", "test")
        for inputs, labels in [run.images(split).tensors]
    }
    sizes = {
        name: sum(p.numel() for p in model.get_submodule(module).parameters())
        for name, module in layers(model).items()
    }
    metrics = {
        "accuracy": right,
        "losses": run.losses_along(run.images("train", 2000), run.epochs()).mean(1).tolist(),
        "parameters": sizes,
        "time": time,
        "temporal_share": modes["share"].values.tolist(),
    }
    study.report(
        title="A recorded training run",
        summary=f"{len(run.images('train')):,} training images of {CLASSES[config.dataset][0]}, "
        f"{config.epochs} epochs, Adam {config.learning_rate:g}. Gradients are of "
        f"{time['images']} of them, at the start of each epoch and at the end.",
        metrics=metrics,
        rows=rows_of(metrics, run.trace().steps),
        figures=figures_of(study, metrics),
        next_steps=f"lkarray run lenet_audit --trained {run.folder}",
    )
