"""What studies of recorded training runs share: the settings, the network, the run itself."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from pydantic import Field
from torch import nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset

import lkarray as lk
from lkarray import progress, workflow
from lkarray.errors import SettingsError
from lkarray.training import Trace
from lkarray.workflow.running import read_record
from lkarray_workflows.shared.images import FOLDER, Dataset, data_set, require_files, take_images


class Training(workflow.Config):
    """Settings of a recorded run; the defaults are those of Anonymous 2026, A.3."""

    seed: int = Field(1, ge=0)
    dataset: Dataset = "mnist"
    data: Path | None = Field(None, description=FOLDER)
    network: Literal["lenet", "cnn"] = "lenet"
    batches: int = Field(200, ge=1, description="of an epoch")
    batch_size: int = Field(256, ge=1)
    epochs: int = Field(50, ge=2)
    learning_rate: float = Field(1.5e-5, gt=0, description="of Adam")
    trained: Path | None = Field(
        None, description="folder of a run of lenet_training to use, with its data and settings"
    )
    keep: bool = Field(False, description="keep recorded runs and gradients (GBs) at the end")

    @classmethod
    def inherited(cls, settings: Mapping[str, str]) -> dict[str, Any]:
        """Return the settings of the run that ``trained`` names; they stand above a preset's."""
        record = read_record(Path(settings.get("trained", "")))
        if "trained" not in settings or record.get("workflow") != "lenet_training":
            return {}  # `check` says what is wrong with the folder
        return {key: record["config"][key] for key in (*SHARED, "data")}


#: Settings that another study's run must share.
SHARED = ("seed", "dataset", "network", "batches", "batch_size", "epochs", "learning_rate")
TEST = 10_000  # images at most kept for testing


def require_enough(config: workflow.Config, available: Mapping[str, int]) -> None:
    """Raise where a setting asks for more than there is of something."""
    for name, most in available.items():
        if getattr(config, name) > most:
            raise SettingsError(f"{name}={getattr(config, name)} is more than there are: {most}")


@dataclass(frozen=True)
class Trained:
    """A recorded run in a folder: its data, its weights and its trace."""

    folder: Path
    config: Training
    seed: int

    @property
    def data(self) -> Path:
        """Images and labels that were taken: `data_set` reads them."""
        return self.folder / "data.npz"

    @property
    def model(self) -> Path:
        """Final weights."""
        return self.folder / "model.pt"

    @property
    def store(self) -> Path:
        """Store of the trace."""
        return self.folder / "train.zarr"

    def images(self, split: str, count: int | None = None) -> TensorDataset:
        """Return images of ``"train"`` or ``"test"`` as the network takes them."""
        return data_set(self.data, split, count)

    def untrained(self) -> nn.Sequential:
        """Return the network as it began."""
        return build(self.config.network, self.images("train", 1).tensors[0].shape[1:], self.seed)

    def final(self) -> nn.Sequential:
        """Return the network as it ended, in eval mode."""
        model = self.untrained()
        model.load_state_dict(torch.load(self.model, weights_only=True))
        return model.eval()

    def trace(self) -> Trace:
        """Open the trace."""
        return lk.open_trace(self.store, self.untrained(), self.images("train"))

    def losses_along(self, data: TensorDataset, steps: Sequence[int]) -> np.ndarray:
        """Return the loss of each image at each of some steps, ``(time, n)`` nats."""
        trace = self.trace()
        inputs, labels = data.tensors
        table = np.empty((len(steps), len(labels)))
        for t, (_, theta) in enumerate(trace.states(list(steps))):
            trace.set_parameters(theta)
            with torch.no_grad():
                logits: list[Any] = [trace.flat(some) for some in inputs.split(2000)]
            losses = F.cross_entropy(torch.cat(logits).double(), labels, reduction="none")
            table[t] = losses.numpy()
        return table

    def epochs(self, count: int | None = None) -> list[int]:
        """Return the steps where epochs begin, and the last: all, or so many, evenly spaced."""
        trace = self.trace()
        steps = np.append(trace.epochs, trace.steps)
        chosen = np.linspace(0, len(steps) - 1, count or len(steps)).round().astype(int)
        return [int(step) for step in steps[np.unique(chosen)]]

    def times(self, count: int | None = None) -> tuple[list[int], np.ndarray]:
        """Return such steps, and the epochs that begin there."""
        steps = self.epochs(count)
        return steps, np.searchsorted(self.epochs(), steps)


def train(study: workflow.Study[Training], *, seed: int | None = None, every: int = 1) -> Trained:
    """Train, recorded, as two stages of a study; or take the run that ``config.trained`` names.

    ``seed`` is one after the config's own, whose run is then always the study's own; it records
    every ``every``-th state.

    See `check`, which is to be called first.
    """
    config = study.config
    first = seed is None or seed == config.seed
    seed = config.seed if seed is None else seed
    if config.trained is not None and first:
        return Trained(config.trained, config, seed)
    run = Trained(study.folder, config, seed)
    study.stage(f"data {seed}", _make_data, "data.npz", run)
    study.stage(f"train {seed}", _train, ["model.pt", "train.zarr"], run, every)
    return run


def discard(config: Training, *runs: Trained) -> None:
    """Delete what a study recorded itself, unless it is to be kept."""
    for run in runs:
        if not config.keep and run.folder != config.trained:
            lk.discard_trace(run.store)


def check(config: Training, seeds: int = 1) -> None:
    """Refuse, before any work, what could not be done: for so many networks.

    Raises
    ------
    SettingsError
        The run that ``config.trained`` names is not finished, was discarded, or has other
        settings; or more than that run is needed and
    StoreError
        files of the data set are missing: the message has the command that gets them.
    """
    if config.trained is not None:
        _check_run(config, config.trained)
    if config.trained is None or seeds > 1:
        require_files(config)


def _check_run(config: Training, folder: Path) -> None:
    record = read_record(folder)
    if not record:
        raise SettingsError(
            f"{folder} holds no run; make it with: "
            f"lkarray run lenet_training --out {folder} --keep true"
        )
    if record["workflow"] != "lenet_training" or "report" not in record["stages"]:
        raise SettingsError(
            f"{folder} holds no finished run of lenet_training but {record['workflow']}, with the "
            f"stages {list(record['stages'])}; name another folder, or finish it first"
        )
    now = config.model_dump(mode="json")
    other = [
        f"{key} ({record['config'][key]}, here {now[key]})"
        for key in SHARED
        if record["config"][key] != now[key]
    ]
    if other:
        raise SettingsError(
            f"{folder} was trained with other settings: {', '.join(other)}; leave these out, "
            "or name another folder"
        )
    if not (folder / "train.zarr" / "trajectory").exists():
        raise SettingsError(
            f"{folder} has no recorded states any more: they were discarded; train again in "
            "another folder, and keep them"
        )


def _make_data(study: workflow.Study[Training], run: Trained) -> None:
    wanted = run.config.batches * run.config.batch_size
    kept = take_images(run.config, wanted, TEST, seed=run.seed)
    if len(kept["train_labels"]) < wanted:
        raise SettingsError(
            f"{run.config.batches} batches of {run.config.batch_size} are {wanted:,} images, and "
            f"there are {len(kept['train_labels']):,}; take fewer --batches"
        )
    study.save("data.npz", **kept)


def _train(study: workflow.Study[Training], run: Trained, every: int) -> None:
    config, data = run.config, run.images("train")
    batches = plan(len(data), config.batch_size, config.batches * config.epochs, run.seed)
    model = fit(
        run.untrained(),
        data,
        batches,
        config.learning_rate,
        store=run.store,
        every=every,
        show=study.show,
    )
    with workflow.replacing(run.model) as new:
        torch.save(model.state_dict(), new)


def build(network: str, shape: Sequence[int], seed: int) -> nn.Sequential:
    """Return an untrained network for images ``(channel, row, column)``: `lenet`, or `cnn`."""
    torch.manual_seed(seed)
    return {"lenet": lenet, "cnn": cnn}[network](*(int(n) for n in shape[:2]))


def lenet(channels: int = 1, side: int = 28) -> nn.Sequential:
    """Return LeNet-5 with ReLU and max pooling: 61,706 parameters for 28 x 28 grey pixels."""
    return nn.Sequential(
        nn.Conv2d(channels, 6, 5, padding=(32 - side) // 2),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(6, 16, 5),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(400, 120),
        nn.ReLU(),
        nn.Linear(120, 84),
        nn.ReLU(),
        nn.Linear(84, 10),
    )


def cnn(channels: int = 3, side: int = 32) -> nn.Sequential:
    """Return three convolutions and two linear layers: 151,934 parameters for SVHN.

    The paper says "a small CNN" of "roughly 2.5 times" LeNet's parameters, and no more (A.15).
    """
    return nn.Sequential(
        nn.Conv2d(channels, 16, 3, padding=(34 - side) // 2),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(16, 32, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(32, 64, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(1024, 124),
        nn.ReLU(),
        nn.Linear(124, 10),
    )


def layers(model: nn.Sequential) -> dict[str, str]:
    """Return names people use for a network's layers, and the module that each is."""
    counts, modules = {"conv": 0, "fc": 0}, {}
    for name, module in model.named_children():
        kind = {nn.Conv2d: "conv", nn.Linear: "fc"}.get(type(module))
        if kind is not None:
            counts[kind] += 1
            modules[f"{kind}{counts[kind]}"] = name
    return modules


def last_hidden(model: nn.Sequential) -> str:
    """Return the name of the module before the output layer."""
    return str(len(model) - 2)


def plan(n: int, batch_size: int, steps: int, seed: int) -> list[torch.Tensor]:
    """Return so many batches, epoch by epoch, each in an order of its own."""
    shuffle = torch.Generator().manual_seed(seed)
    batches: list[torch.Tensor] = []
    while len(batches) < steps:
        batches += torch.randperm(n, generator=shuffle).split(batch_size)
    return batches[:steps]


def fit(
    model: nn.Sequential,
    data: TensorDataset,
    batches: Sequence[torch.Tensor],
    rate: float,
    *,
    store: Path | None = None,
    every: int = 1,
    show: bool = False,
    altered: Callable[[nn.Module, torch.Tensor, torch.Tensor], torch.Tensor] | None = None,
    optimizer: torch.optim.Optimizer | None = None,
) -> nn.Sequential:
    """Train by Adam on batches of indices; recorded in a store, if there is one.

    A recorded run that was cut off goes on. ``altered(model, images, labels)`` gives the images
    that a step learns, such as attacked ones, instead of those it takes. ``optimizer`` is one that
    goes on.
    """
    images, labels = data.tensors
    if optimizer is None:
        optimizer = torch.optim.Adam(model.parameters(), lr=rate)
    with ExitStack() as stack:
        bar = stack.enter_context(
            progress.bar("training", total=len(batches), unit="step", show=show)
        )
        left: Iterable[Any] = batches
        step: Callable[[Any], AbstractContextManager[Any]] = nullcontext
        if store is not None:
            trace = stack.enter_context(lk.record(model, optimizer, data, store=store, every=every))
            left, step = trace.remaining(batches), trace.step
        for batch in left:
            learned = images[batch]
            if altered is not None:
                learned = altered(model, learned, labels[batch])
            with step(batch):
                optimizer.zero_grad()
                F.cross_entropy(model(learned), labels[batch]).backward()
                optimizer.step()
            bar.update()
    return model


def logits_of(model: nn.Module, inputs: torch.Tensor, rows: int = 2000) -> torch.Tensor:
    """Return what a network says of images, ``(n, class)`` in float64."""
    with torch.inference_mode():
        return torch.cat([model.eval()(some) for some in inputs.split(rows)]).double()


def losses_of(model: nn.Module, data: TensorDataset) -> np.ndarray:
    """Return the loss of each image, ``(n,)`` nats."""
    inputs, labels = data.tensors
    return np.asarray(F.cross_entropy(logits_of(model, inputs), labels, reduction="none").numpy())
