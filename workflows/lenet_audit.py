"""LeNet-5's decisions, decomposed: which training images made each of them (PLGK 6.1, A.3, A.5).

LeNet-5 learns Fashion-MNIST (or MNIST) as in PLGK A.3 (200 batches of 256, 50 epochs, Adam 1.5e-5),
recorded at every step, and the losses of one batch of test images are audited. The report has the
reconstruction over training (figure 1), one wrong decision with the images that helped and harmed
it (figures 2 to 4), how concentrated influence is, and influence by layer and epoch (figure 10);
and one table of rules of integration and of other attributions (A.5, A.11, A.12).
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from pathlib import Path
from typing import Any, ClassVar, Literal, Protocol

import numpy as np
import torch
import xarray as xr
from lkarray_workflows.fashion import read_fashion
from lkarray_workflows.lenet_path import network
from pydantic import Field
from torch import nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset

import lkarray as lk
from lkarray import plots, progress, store, workflow
from lkarray.training import Trace

_CLASSES = {"fashion": "FashionMNIST", "mnist": "MNIST"}
NAMES = {
    "fashion": ("T-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker",
                "bag", "boot"),
    "mnist": tuple("0123456789"),
}  # fmt: skip
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
    "audit": (0.0104, 0.999998), "euler": (0.0901, 0.990681),
    "supersampled twice": (0.0104, 0.999998), "stride 2": (0.0133, 0.999976),
    "stride 5": (0.0217, 0.999786), "TRAK, 1 checkpoint": (2.3902, 0.6099),
    "TRAK, 5 checkpoints": (2.9349, 0.5152),
}  # fmt: skip


class Config(workflow.Config):
    """Settings; the defaults are the paper's, on Fashion-MNIST."""

    presets: ClassVar = {
        "five_epochs": {"epochs": 5, "learning_rate": 1e-4, "detailed": 16, "trak_train": 5120},
        "small": {
            "batches": 10, "batch_size": 64, "epochs": 4, "learning_rate": 1e-3, "audited": 32,
            "detailed": 8, "trak_train": 200, "trak_size": 128,
        },
    }  # fmt: skip

    seed: int = Field(1, ge=0)
    dataset: Literal["fashion", "mnist"] = "fashion"
    data: Path | None = Field(None, description="folder of the four idx files; else torchvision's")
    batches: int = Field(200, ge=1, description="of an epoch")
    batch_size: int = Field(256, ge=1)
    epochs: int = Field(50, ge=2)
    learning_rate: float = Field(1.5e-5, gt=0)
    audited: int = Field(256, ge=2, le=10000, description="test images")
    detailed: int = Field(32, ge=1, description="of these, audited by layer and epoch too")
    trak_train: int = Field(51200, ge=10, description="training images of TRAK")
    trak_size: int = Field(2048, ge=8, description="columns of TRAK's projection")
    keep: bool = Field(False, description="keep the recorded run (5 GB) after the report")


def run(config: Config, folder: Path, *, progress: bool = True) -> str:
    """Run the study in ``folder``, or continue it; return what to tell the user."""
    with workflow.Run("lenet_audit", config, folder) as state:
        paths = Paths(folder)
        state.stage("data", lambda: make_data(config, paths), [paths.data])
        state.stage("train", lambda: train(config, paths, progress), [paths.model])
        state.stage("audit", lambda: make_audit(config, paths, progress), [paths.audit])
        state.stage("detail", lambda: detail(config, paths, progress), [paths.detail])
        state.stage("rules", lambda: rules(config, paths, progress), [paths.rules])
        state.stage("others", lambda: others(config, paths, progress), [paths.others])
        state.stage("report", lambda: report(config, paths, state), [paths.index])
        if not config.keep:
            lk.discard_trace(paths.store)
    return f"Report  {paths.index}\nStore   {paths.store}"


class Paths:
    """Where the study's files are."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.report = folder, folder / "report"
        self.data, self.model = folder / "data.npz", folder / "model.pt"
        self.store = folder / "train.zarr"
        self.audit, self.detail, self.rules, self.others = (
            folder / f"{name}.json" for name in ("audit", "detail", "rules", "others")
        )
        self.index = self.report / "index.html"


def make_data(config: Config, paths: Paths) -> None:
    """Take the training images of an epoch, and the test images."""
    wanted = config.batches * config.batch_size, config.audited
    np.savez(paths.data, **take_images(config, paths.folder, *wanted, seed=config.seed))


class Source(Protocol):
    """Settings that say where images come from."""

    dataset: Literal["fashion", "mnist"]
    data: Path | None


def take_images(
    source: Source, folder: Path, train: int, test: int, *, seed: int
) -> dict[str, Any]:
    """Return some images and labels of either part: ``train_images``, ``test_labels``, ..."""
    rng = np.random.default_rng(seed)
    kept: dict[str, Any] = {}
    for part, name, count in (("train", "train", train), ("t10k", "test", test)):
        images, labels = read_fashion(
            source.data, folder / "torchvision", part, dataset=_CLASSES[source.dataset]
        )
        chosen = rng.choice(len(labels), min(count, len(labels)), replace=False)
        kept |= {f"{name}_images": images[chosen], f"{name}_labels": labels[chosen]}
    return kept


def data_set(path: Path, part: str, count: int | None = None) -> TensorDataset:
    """Return images ``(n, 1, 28, 28)`` of 0 to 1, and their classes."""
    with np.load(path) as data:
        images = torch.from_numpy(data[f"{part}_images"][:count]).float().unsqueeze(1) / 255
        return TensorDataset(images, torch.from_numpy(data[f"{part}_labels"][:count]).long())


def train(config: Config, paths: Paths, show: bool) -> None:
    """Train with Adam, every step recorded."""
    data = data_set(paths.data, "train")
    batches = plan(len(data), config.batch_size, config.batches * config.epochs, config.seed)
    model = fit(data, batches, config.learning_rate, config.seed, store=paths.store, show=show)
    torch.save(model.state_dict(), paths.model)


def plan(n: int, batch_size: int, steps: int, seed: int) -> list[torch.Tensor]:
    """Return so many batches, epoch by epoch, each in an order of its own."""
    shuffle = torch.Generator().manual_seed(seed)
    out: list[torch.Tensor] = []
    while len(out) < steps:
        out += torch.randperm(n, generator=shuffle).split(batch_size)
    return out[:steps]


def fit(
    data: TensorDataset, batches: Sequence[torch.Tensor], rate: float, seed: int, *,
    store: Path | None = None, show: bool = False,
) -> nn.Sequential:  # fmt: skip
    """Return LeNet-5 trained by Adam on batches of indices; recorded in a store, if there is one.

    A recorded run that was cut off goes on.
    """
    images, labels = data.tensors
    model: nn.Sequential = network(seed)
    optimizer = torch.optim.Adam(model.parameters(), lr=rate)
    with ExitStack() as stack:
        bar = stack.enter_context(
            progress.bar("training", total=len(batches), unit="step", show=show)
        )
        left: Iterable[Any] = batches
        step: Callable[[Any], AbstractContextManager[Any]] = nullcontext
        if store is not None:
            trace = stack.enter_context(lk.record(model, optimizer, data, store=store))
            left, step = trace.remaining(batches), trace.step
        for batch in left:
            with step(batch):
                optimizer.zero_grad()
                F.cross_entropy(model(images[batch]), labels[batch]).backward()
                optimizer.step()
            bar.update()
    return model


def open_trace(config: Config, paths: Paths) -> Trace:
    """Open the recorded run."""
    return lk.open_trace(paths.store, network(config.seed), data_set(paths.data, "train"))


def labels_of(config: Config, paths: Paths) -> dict[str, dict[str, np.ndarray]]:
    """Return the classes of audited and training images, and what the network says."""
    model = network(config.seed)
    model.load_state_dict(torch.load(paths.model, weights_only=True))
    images, labels = data_set(paths.data, "test").tensors
    with torch.inference_mode():
        predicted = model.eval()(images).argmax(1).numpy()
    return {
        "coords": {"label": labels.numpy(), "predicted": predicted},
        "example_coords": {"train_label": data_set(paths.data, "train").tensors[1].numpy()},
    }


def make_audit(config: Config, paths: Paths, show: bool) -> None:
    """Audit the losses of the test images: influence of each training image on each."""
    trace = open_trace(config, paths)
    labels = labels_of(config, paths)
    found = lk.audit(
        trace, data_set(paths.data, "test"), coords=labels["coords"],
        example_coords=labels["example_coords"], store=paths.store, progress=show,
    )  # fmt: skip
    curves = lk.completeness(found)
    numbers = {key: found.attrs[key] for key in ("mre", "lc", "closure")}
    over = {key: curves[key].values.tolist() for key in ("mre", "lc")}
    paths.audit.write_text(json.dumps({**numbers, "epochs": over, "change": float(
        np.abs(found["change"]).mean())}))  # fmt: skip


def detail(config: Config, paths: Paths, show: bool) -> None:
    """Audit some of them by layer and epoch, each training image apart for no longer than that."""
    trace = open_trace(config, paths)
    count = config.detailed
    labels = labels_of(config, paths)
    names = {  # of LeNet-5's layers, by their places in the Sequential
        "conv1": "0", "conv2": "3", "fc1": "7", "fc2": "9", "fc3": "11",
    }  # fmt: skip
    found = lk.audit(
        trace, data_set(paths.data, "test", count), groups={
            "example": labels["example_coords"]["train_label"], "param": names, "time": "epoch",
        },
        coords={key: values[:count] for key, values in labels["coords"].items()},
        store=paths.store, name="detail", progress=show,
    )  # fmt: skip
    paths.detail.write_text(json.dumps({key: found.attrs[key] for key in ("mre", "lc", "closure")}))


def rules(config: Config, paths: Paths, show: bool) -> None:
    """Reconstruct with other rules of integration: what their audits would add up to."""
    trace, test = open_trace(config, paths), data_set(paths.data, "test")
    rows = {}
    for name, options in RULES.items():
        found = lk.reconstruction(trace, test, **options, progress=show)
        rows[name] = {key: found.attrs[key] for key in ("mre", "lc")}
    paths.rules.write_text(json.dumps(rows))


def others(config: Config, paths: Paths, show: bool) -> None:
    """Attribute by TracIn and TRAK, from the same run."""
    trace, test = open_trace(config, paths), data_set(paths.data, "test")
    change = np.asarray(lk.open(paths.store)["audit"].to_dataset()["change"].values)
    rng = np.random.default_rng(config.seed)
    n = config.batches * config.batch_size
    some = np.sort(rng.choice(n, min(config.trak_train, n), replace=False))
    last = [trace.steps]
    five = np.linspace(0, trace.steps, 6).astype(int)[1:].tolist()

    def trak(checkpoints: list[int]) -> xr.DataArray:
        found: xr.DataArray = lk.trak(
            trace, test, checkpoints=checkpoints, size=config.trak_size, examples=some,
            progress=show,
        )  # fmt: skip
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


def report(config: Config, paths: Paths, state: workflow.Run) -> None:
    """Write the report folder."""
    tree = lk.open(paths.store)
    found, detailed = (tree[name].to_dataset() for name in ("audit", "audit_detail"))
    audit_, rules_, others_ = (
        json.loads(path.read_text()) for path in (paths.audit, paths.rules, paths.others)
    )
    wrong = np.flatnonzero(found["label"].values != found["predicted"].values)
    at = int(wrong[0]) if len(wrong) else 0
    with np.load(paths.data) as data:
        train_images, test_images = data["train_images"], data["test_images"]
    decided = int(found["predicted"][at])
    top = lk.most_influential(found, 25).compute()
    by = lk.most_influential(found, 25, by="train_label").compute()
    store.put(paths.store, "most_influential", top)
    names = NAMES[config.dataset]
    said = f"{names[int(found['label'][at])]} taken for {names[decided]}"
    figures = [
        workflow.Figure("completeness", "Reconstruction over training",
                        "Mean error, and correlation with the true changes (PLGK figure 1).",
                        plots.completeness(found)),
        workflow.Figure("decision", "One wrong decision", f"A {said}, and the influence of every "
                        "training image on its loss, sorted (figure 2).",
                        plots.decision(found, at, image=test_images[at])),
        workflow.Figure("images", "What helped and what harmed", "Training images that lowered its "
                        "loss most, and that raised it most (figure 3).",
                        plots.influential_images(top, train_images, at)),
        *(
            workflow.Figure(f"class_{kind}", f"The same among {names[of]}", f"Images of the class "
                            f"that it {verb} (figure 4).",
                            plots.influential_images(by.sel(train_label=of), train_images, at))
            for kind, verb, of in (("decided", "was taken for", decided),
                                   ("own", "is of", int(found["label"][at])))
        ),
        workflow.Figure("concentration", "Concentration of influence", "Share of the summed "
                        "magnitudes held by the most influential training images.",
                        plots.concentration(found)),
        workflow.Figure("layers", "Influence by layer and epoch", "Sums, and sums of magnitudes "
                        "over classes of training images (figure 10).",
                        plots.layer_epoch(detailed)),
    ]  # fmt: skip
    table = {"audit": audit_} | rules_ | others_
    rows = [
        (f"{name}: mean reconstruction error, correlation",
         f"{row['mre']:.5f}, {row['lc']:.7f}",
         "paper: {:g}, {:g}".format(*PAPER[name]) if name in PAPER else "")
        for name, row in table.items()
    ] + [
        ("Mean change of a loss", f"{audit_['change']:.3f} nats", ""),
        ("Parts against their sum (closure)", f"{audit_['closure']:.1e}", ""),
        ("Accuracy on the audited images",
         f"{1 - len(wrong) / found.sizes['audit']:.1%}", "paper: 93% (of MNIST's test set)"),
    ]  # fmt: skip
    workflow.write_report(
        workflow.Report(
            title="LeNet-5's decisions, decomposed",
            summary=[
                f"{config.batches * config.batch_size:,} training images of "
                f"{_CLASSES[config.dataset]}, {config.epochs} epochs, Adam "
                f"{config.learning_rate:g}; {config.audited} test images audited. The paper's "
                "numbers are of MNIST."
            ],
            metrics={"table": table, "seconds": state.seconds(),
                     "config": config.model_dump(mode="json")},
            rows=rows,
            figures=figures,
            settings=config.model_dump(mode="json"),
            next_steps=f'audit = lk.open("{paths.store}")["audit"].to_dataset()\n'
                       "lk.most_influential(audit, 10)",
        ),
        paths.report,
    )  # fmt: skip
