"""LeNet-5's decisions, decomposed: which training images made each of them (PLGK 6.1, A.3, A.5).

LeNet-5 learns Fashion-MNIST (or MNIST, or SVHN) as in PLGK A.3 (200 batches of 256, 50 epochs,
Adam 1.5e-5), recorded at every step, and the losses of one batch of test images are audited. The
report has the reconstruction over training (figure 1), one wrong decision with the images that
helped and harmed it (figures 2 to 4), how concentrated influence is, influence by layer and epoch
(figure 10), and tables of rules of integration and of other attributions (A.11, A.12), and of costs
(A.5).
"""

from __future__ import annotations

import json
import multiprocessing
import resource
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, ClassVar, Self

import numpy as np
import xarray as xr
from lkarray_workflows.shared.images import CLASSES, NAMES
from lkarray_workflows.shared.recorded import (
    TEST,
    Trained,
    Training,
    check,
    discard,
    fit,
    layers,
    logits_of,
    plan,
    require_enough,
    train,
)
from pydantic import Field, model_validator

import lkarray as lk
from lkarray import plots, store, workflow

#: Rules and strides of the table, beside the audit's own.
RULES: dict[str, dict[str, Any]] = {
    "euler": {"rule": "euler"},
    "supersampled twice": {"supersample": 2},
    "stride 2": {"stride": 2},
    "stride 5": {"stride": 5},
}
#: What the paper has for each (A.5, A.11, A.12; MNIST): mean reconstruction error, correlation.
#: Its TracIn of all layers (0.090, 0.991) is its euler rule, and so beside ours: it follows Adam's
#: updates, where TracIn as published, and here, multiplies gradients by the learning rate alone.
PAPER = {
    "audit": (0.0104, 0.999998),
    "euler": (0.0901, 0.990681),
    "supersampled twice": (0.0104, 0.999998),
    "stride 2": (0.0133, 0.999976),
    "stride 5": (0.0217, 0.999786),
    "TRAK, 1 checkpoint": (2.3902, 0.6099),
    "TRAK, 5 checkpoints": (2.9349, 0.5152),
}


#: Of A.5's table: seconds over those of plain training, GiB.
PAPER_COST = {
    "training": (1.0, 0.435),
    "audit": (17.8, 2.915),
    "euler": (17.5, 2.859),
    "supersampled twice": (18.4, 3.039),
    "stride 2": (13.9, 4.991),
    "stride 5": (9.0, 5.084),
}


class Config(Training):
    """Settings; the defaults are the paper's, on Fashion-MNIST."""

    presets: ClassVar = {
        "paper": {"dataset": "mnist", "trak_train": 51200, "profiled": 10_000},
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


def run(config: Config, folder: Path, *, progress: bool = True) -> str:
    """Run the study in ``folder``, or continue it; return what to tell the user."""
    check(config)
    with workflow.Run("lenet_audit", config, folder) as state:
        run_: Trained = train(state, config, folder, progress)
        paths = Paths(folder, run_)
        for name, work in STAGES.items():
            state.stage(name, partial(work, config, paths, progress), [getattr(paths, name)])
        state.stage("report", lambda: report(config, paths, state), [paths.index])
        discard(config, run_)
    return f"Report  {paths.index}\nStore   {paths.store}"


class Paths:
    """Where the study's files are, and the run that it audits."""

    def __init__(self, folder: Path, run: Trained) -> None:
        self.folder, self.report, self.run = folder, folder / "report", run
        self.store = folder / "audits.zarr"
        self.audit, self.detail, self.rules, self.others, self.profile = (
            folder / f"{name}.json" for name in ("audit", "detail", "rules", "others", "profile")
        )
        self.index = self.report / "index.html"


def labels_of(config: Config, paths: Paths) -> dict[str, dict[str, np.ndarray]]:
    """Return the classes of audited and training images, and what the network says."""
    images, labels = paths.run.images("test", config.audited).tensors
    predicted = logits_of(paths.run.final(), images).argmax(1).numpy()
    return {
        "coords": {"label": labels.numpy(), "predicted": predicted},
        "example_coords": {"train_label": paths.run.images("train").tensors[1].numpy()},
    }


def make_audit(config: Config, paths: Paths, show: bool) -> None:
    """Audit the losses of the test images: influence of each training image on each."""
    labels = labels_of(config, paths)
    found = lk.audit(
        paths.run.trace(),
        paths.run.images("test", config.audited),
        coords=labels["coords"],
        example_coords=labels["example_coords"],
        store=paths.store,
        progress=show,
    )
    curves = lk.completeness(found)
    numbers = {key: found.attrs[key] for key in ("mre", "lc", "closure")}
    over = {key: curves[key].values.tolist() for key in ("mre", "lc")}
    paths.audit.write_text(
        json.dumps({**numbers, "epochs": over, "change": float(np.abs(found["change"]).mean())})
    )


def detail(config: Config, paths: Paths, show: bool) -> None:
    """Audit some of them by layer and epoch, each training image apart for no longer than that."""
    count = config.detailed
    labels = labels_of(config, paths)
    found = lk.audit(
        paths.run.trace(),
        paths.run.images("test", count),
        groups={
            "example": labels["example_coords"]["train_label"],
            "param": layers(paths.run.untrained()),
            "time": "epoch",
        },
        coords={key: values[:count] for key, values in labels["coords"].items()},
        store=paths.store,
        name="detail",
        progress=show,
    )
    paths.detail.write_text(json.dumps({key: found.attrs[key] for key in ("mre", "lc", "closure")}))


def rules(config: Config, paths: Paths, show: bool) -> None:
    """Reconstruct with other rules of integration: what their audits would add up to."""
    trace, test = paths.run.trace(), paths.run.images("test", config.audited)
    rows = {}
    for name, options in RULES.items():
        found = lk.reconstruction(trace, test, **options, progress=show)
        rows[name] = {key: found.attrs[key] for key in ("mre", "lc")}
    paths.rules.write_text(json.dumps(rows))


def others(config: Config, paths: Paths, show: bool) -> None:
    """Attribute by TracIn and TRAK, from the same run."""
    trace, test = paths.run.trace(), paths.run.images("test", config.audited)
    change = np.asarray(lk.open(paths.store)["audit"].to_dataset()["change"].values)
    rng = np.random.default_rng(config.seed)
    n = config.batches * config.batch_size
    some = np.sort(rng.choice(n, min(config.trak_train, n), replace=False))
    last = [trace.steps]
    five = np.linspace(0, trace.steps, 6).astype(int)[1:].tolist()

    def trak(checkpoints: list[int]) -> xr.DataArray:
        found: xr.DataArray = lk.trak(
            trace,
            test,
            checkpoints=checkpoints,
            size=config.trak_size,
            examples=some,
            progress=show,
        )
        return -found  # of the margin's change; the loss falls where it grows

    ways: dict[str, Callable[[], xr.DataArray]] = {
        "TracIn, all layers": lambda: lk.tracin_in_run(trace, test, progress=show),
        "TracIn, last layer": lambda: lk.tracin_in_run(trace, test, params="last", progress=show),
        "TRAK, 1 checkpoint": lambda: trak(last),
        "TRAK, 5 checkpoints": lambda: trak(five),
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
    paths.others.write_text(json.dumps(rows))


def profile(config: Config, paths: Paths, show: bool) -> None:
    """Measure seconds and peak memory of training, and of recording and auditing, by each rule.

    Each runs in a process of its own, over as many steps: memory is what it took beyond what it
    had when torch was loaded and the data were read.
    """
    rows = {}
    ways: dict[str, dict[str, Any] | None] = {"training": None, "audit": {}, **RULES}
    context = multiprocessing.get_context("spawn")
    for name, options in ways.items():
        with ProcessPoolExecutor(1, mp_context=context) as pool:
            rows[name] = pool.submit(_cost, config, paths.run, options, paths.folder).result()
    paths.profile.write_text(json.dumps(rows))


def _cost(
    config: Config, run: Trained, options: dict[str, Any] | None, where: Path
) -> dict[str, float]:
    """Return what training costs, or with options of `lkarray.audit` recording it and auditing."""
    data, test = run.images("train"), run.images("test", config.audited)
    model = run.untrained()
    logits_of(model, test.tensors[0][:2])
    before, began = _peak(), time.perf_counter()
    steps = min(config.profiled, config.batches * config.epochs)
    batches = plan(len(data), config.batch_size, steps, run.seed)
    if options is None:
        fit(model, data, batches, config.learning_rate)
    else:
        with TemporaryDirectory(dir=where) as folder:
            fit(model, data, batches, config.learning_rate, store=Path(folder) / "train.zarr")
            trace = lk.open_trace(Path(folder) / "train.zarr", run.untrained(), data)
            lk.audit(trace, test, store=Path(folder) / "audit.zarr", **options)
    return {"seconds": time.perf_counter() - began, "gib": (_peak() - before) / 2**30}


def _peak() -> int:
    """Return the largest memory that this process has had, in bytes.

    Of Linux's own count: what `getrusage` says of a new process is what its parent had.
    """
    status = Path("/proc/self/status")
    if status.exists():
        line = next(x for x in status.read_text().splitlines() if x.startswith("VmHWM"))
        return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


#: What the study does to the run, in this order.
STAGES: dict[str, Callable[[Config, Paths, bool], None]] = {
    "audit": make_audit,
    "detail": detail,
    "rules": rules,
    "others": others,
    "profile": profile,
}


def report(config: Config, paths: Paths, state: workflow.Run) -> None:
    """Write the report folder."""
    tree = lk.open(paths.store)
    found, detailed = (tree[name].to_dataset() for name in ("audit", "audit_detail"))
    audit_, rules_, others_, profile_ = (
        json.loads(path.read_text())
        for path in (paths.audit, paths.rules, paths.others, paths.profile)
    )
    wrong = np.flatnonzero(found["label"].values != found["predicted"].values)
    at = int(wrong[0]) if len(wrong) else 0
    which = "One wrong decision" if len(wrong) else "One decision (none is wrong)"
    with np.load(paths.run.data) as data:
        train_images, test_images = data["train_images"], data["test_images"]
    decided = int(found["predicted"][at])
    top = lk.most_influential(found, 25).compute()
    by = lk.most_influential(found, 25, by="train_label").compute()
    store.put(paths.store, "most_influential", top)
    names = NAMES[config.dataset]
    said = f"{names[int(found['label'][at])]} taken for {names[decided]}"
    figures = [
        workflow.Figure(
            "completeness",
            "Reconstruction over training",
            "Mean error, and correlation with the true changes (PLGK figure 1).",
            plots.completeness(found),
        ),
        workflow.Figure(
            "decision",
            which,
            f"A {said}, and the influence of every training image on its loss, sorted (figure 2).",
            plots.decision(found, at, image=test_images[at]),
        ),
        workflow.Figure(
            "images",
            "What helped and what harmed",
            "Training images that lowered its loss most, and that raised it most (figure 3).",
            plots.influential_images(top, train_images, at),
        ),
        *(
            workflow.Figure(
                f"class_{kind}",
                f"The same among {names[of]}",
                f"Images of the class that it {verb} (figure 4).",
                plots.influential_images(by.sel(train_label=of), train_images, at),
            )
            for kind, verb, of in (
                ("decided", "was taken for", decided),
                ("own", "is of", int(found["label"][at])),
            )
        ),
        workflow.Figure(
            "concentration",
            "Concentration of influence",
            "Share of the summed magnitudes held by the most influential training images.",
            plots.concentration(found),
        ),
        workflow.Figure(
            "layers",
            "Influence by layer and epoch",
            "Sums, and sums of magnitudes over classes of training images (figure 10).",
            plots.layer_epoch(detailed),
        ),
    ]
    table = {"audit": audit_} | rules_ | others_
    rows = [
        (
            f"{name}: mean reconstruction error, correlation",
            f"{row['mre']:.5f}, {row['lc']:.7f}",
            "paper: {:g}, {:g}".format(*PAPER[name]) if name in PAPER else "",
        )
        for name, row in table.items()
    ] + [
        *(
            (
                f"{name}: seconds over training's, GiB",
                f"{row['seconds'] / profile_['training']['seconds']:.2f}, {row['gib']:.2f}",
                "paper: {:g}, {:g}".format(*PAPER_COST[name]),
            )
            for name, row in profile_.items()
        ),
        ("Mean change of a loss", f"{audit_['change']:.3f} nats", ""),
        ("Parts against their sum (closure)", f"{audit_['closure']:.1e}", ""),
        (
            "Accuracy on the audited images",
            f"{1 - len(wrong) / found.sizes['audit']:.1%}",
            "paper: 93% (of MNIST's test set)",
        ),
    ]
    workflow.write_report(
        workflow.Report(
            title="LeNet-5's decisions, decomposed",
            summary=[
                f"{len(train_images):,} training images of "
                f"{CLASSES[config.dataset][0]}, {config.epochs} epochs, Adam "
                f"{config.learning_rate:g}; {config.audited} test images audited. The paper's "
                "numbers are of MNIST."
            ],
            metrics={
                "table": table,
                "profile": profile_,
                "layers": by_layer(detailed),
                "seconds": state.seconds(),
                "config": config.model_dump(mode="json"),
            },
            rows=rows,
            figures=figures,
            settings=config.model_dump(mode="json"),
            next_steps=f'audit = lk.open("{paths.store}")["audit"].to_dataset()\n'
            "lk.most_influential(audit, 10)",
        ),
        paths.report,
    )


def by_layer(detailed: xr.Dataset) -> dict[str, Any]:
    """Return net and gross influence of layers and epochs, ``(layer, epoch)``, means of images."""
    parts = {"net": lk.net_influence(detailed), "gross": lk.gross_influence(detailed)}
    tables = {k: v.mean("audit").transpose("layer", "epoch").values for k, v in parts.items()}
    return {"names": [str(name) for name in detailed["layer"].values]} | {
        name: table.tolist() for name, table in tables.items()
    }
