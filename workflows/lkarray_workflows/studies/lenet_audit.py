"""LeNet-5's decisions, decomposed: which training images made each of them.

See Anonymous 2026, 6.1, A.3, A.5.

LeNet-5 learns MNIST (or Fashion-MNIST, or SVHN) as in Anonymous 2026, A.3 (200 batches of 256, 50
epochs, Adam 1.5e-5), recorded at every step, and the losses of one batch of test images are
audited. The report has the reconstruction over training (figure 1), one wrong decision with the
images that helped and harmed it (figures 2 to 4), how concentrated influence is, influence by layer
and epoch (figure 10), and tables of rules of integration and of other attributions (A.11, A.12),
and of costs (A.5).
"""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np
import xarray as xr
from pydantic import Field, model_validator

import lkarray as lk
from lkarray import workflow
from lkarray_workflows.shared.costs import cost_of
from lkarray_workflows.shared.lenet_audit_report import report
from lkarray_workflows.shared.recorded import (
    TEST,
    Trained,
    Training,
    check,
    discard,
    layers,
    logits_of,
    require_enough,
    train,
)

#: Rules and strides of the table, beside the audit's own.
RULES: dict[str, dict[str, Any]] = {
    "euler": {"rule": "euler"},
    "supersampled twice": {"supersample": 2},
    "stride 2": {"stride": 2},
    "stride 5": {"stride": 5},
}


class Config(Training):
    """Settings; the defaults are the paper's."""

    presets: ClassVar = {
        "paper": {"trak_train": 51200, "profiled": 10_000},
        "five_epochs": {
            "epochs": 5,
            "learning_rate": 1e-4,
            "detailed": 16,
            "trak_train": 5120,
            "profiled": 100,
        },
        "small": {
            "batches": 10,
            "batch_size": 64,
            "epochs": 4,
            "learning_rate": 1e-3,
            "audited": 32,
            "detailed": 8,
            "trak_train": 200,
            "trak_size": 128,
            "profiled": 20,
        },
    }

    audited: int = Field(256, ge=2, le=TEST, description="test images")
    detailed: int = Field(32, ge=1, description="of these, audited by layer and epoch too")
    trak_train: int = Field(10240, ge=10, description="training images of TRAK")
    trak_size: int = Field(2048, ge=8, description="columns of TRAK's projection")
    profiled: int = Field(500, ge=2, description="steps whose cost is measured")

    @model_validator(mode="after")
    def _fits(self) -> Self:
        require_enough(self, {"detailed": self.audited})
        return self


Study = workflow.Study[Config]


def run(config: Config, folder: Path, *, progress: bool = True) -> str:
    """Run the study in ``folder``, or continue it; return what to tell the user."""
    check(config)
    with workflow.Study("lenet_audit", config, folder, progress) as study:
        recorded = train(study)
        for name, work in STAGES.items():
            study.stage(name, work, f"{name}.json", recorded)
        study.stage("report", report, "report/index.html", recorded)
        discard(config, recorded)
    return f"Report  {study.index}\nStore   {study.path('audits.zarr')}"


def labels_of(study: Study, run: Trained) -> dict[str, dict[str, np.ndarray]]:
    """Return the classes of audited and training images, and what the network says."""
    images, labels = run.images("test", study.config.audited).tensors
    predicted = logits_of(run.final(), images).argmax(1).numpy()
    return {
        "coords": {"label": labels.numpy(), "predicted": predicted},
        "example_coords": {"train_label": run.images("train").tensors[1].numpy()},
    }


def make_audit(study: Study, run: Trained) -> None:
    """Audit the losses of the test images: influence of each training image on each."""
    labels = labels_of(study, run)
    audit = lk.audit(
        run.trace(),
        run.images("test", study.config.audited),
        coords=labels["coords"],
        example_coords=labels["example_coords"],
        store=study.path("audits.zarr"),
        progress=study.show,
    )
    curves = lk.completeness(audit)
    numbers = {
        **{key: audit.attrs[key] for key in ("mre", "lc", "closure")},
        "epochs": {key: curves[key].values.tolist() for key in ("mre", "lc")},
        "change": float(np.abs(audit["change"]).mean()),
    }
    study.write("audit.json", numbers)


def detail(study: Study, run: Trained) -> None:
    """Audit some of them by layer and epoch, each training image apart for no longer than that."""
    count = study.config.detailed
    labels = labels_of(study, run)
    audit = lk.audit(
        run.trace(),
        run.images("test", count),
        groups={
            "example": labels["example_coords"]["train_label"],
            "param": layers(run.untrained()),
            "time": "epoch",
        },
        coords={key: values[:count] for key, values in labels["coords"].items()},
        store=study.path("audits.zarr"),
        name="detail",
        progress=study.show,
    )
    numbers = {key: audit.attrs[key] for key in ("mre", "lc", "closure")}
    study.write("detail.json", numbers, allow_nan=True)  # one image has no correlation


def rules(study: Study, run: Trained) -> None:
    """Reconstruct with other rules of integration: what their audits would add up to."""
    trace, test = run.trace(), run.images("test", study.config.audited)
    rows = {}
    for name, options in RULES.items():
        rebuilt = lk.reconstruction(trace, test, **options, progress=study.show)
        rows[name] = {key: rebuilt.attrs[key] for key in ("mre", "lc")}
    study.write("rules.json", rows)


def others(study: Study, run: Trained) -> None:
    """Attribute by TracIn and TRAK, from the same run."""
    config = study.config
    trace, test = run.trace(), run.images("test", config.audited)
    change = np.asarray(lk.open(study.path("audits.zarr"))["audit"].to_dataset()["change"].values)
    rng = np.random.default_rng(config.seed)
    n = config.batches * config.batch_size
    some = np.sort(rng.choice(n, min(config.trak_train, n), replace=False))
    five = np.linspace(0, trace.steps, 6).astype(int)[1:].tolist()

    def tracin(**options: Any) -> xr.DataArray:
        return lk.tracin_in_run(trace, test, progress=study.show, **options)

    def trak(checkpoints: list[int]) -> xr.DataArray:
        scores: xr.DataArray = lk.trak(
            trace,
            test,
            checkpoints=checkpoints,
            size=config.trak_size,
            examples=some,
            progress=study.show,
        )
        return -scores  # of the margin's change; the loss falls where it grows

    ways: dict[str, Callable[[], xr.DataArray]] = {
        "TracIn, all layers": tracin,
        "TracIn, last layer": partial(tracin, params="last"),
        "TRAK, 1 checkpoint": partial(trak, [trace.steps]),
        "TRAK, 5 checkpoints": partial(trak, five),
    }
    rows = {}
    for name, attribute in ways.items():
        began = time.perf_counter()
        total = attribute().sum("example").values
        rows[name] = {
            "mre": float(np.abs(total - change).mean()),
            "lc": float(np.corrcoef(total, change)[0, 1]),
            "seconds": time.perf_counter() - began,
        }
    study.write("others.json", rows)


def profile(study: Study, run: Trained) -> None:
    """Measure seconds and peak memory of training, and of recording and auditing, by each rule.

    Each runs in a process of its own, over as many steps: memory is what it took beyond what it
    had when torch was loaded and the data were read.
    """
    config = study.config
    work = partial(cost_of, audited=config.audited, steps=config.profiled)
    rows = {}
    ways: dict[str, dict[str, Any] | None] = {"training": None, "audit": {}, **RULES}
    context = multiprocessing.get_context("spawn")
    for name, options in ways.items():
        with ProcessPoolExecutor(1, mp_context=context) as pool:
            rows[name] = pool.submit(work, run, options, study.folder).result()
    study.write("profile.json", rows)


#: What the study does to the run, in this order.
STAGES: dict[str, Callable[[Study, Trained], None]] = {
    "audit": make_audit,
    "detail": detail,
    "rules": rules,
    "others": others,
    "profile": profile,
}
