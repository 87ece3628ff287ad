"""Fixtures shared by all tests: small real problems, and stores sampled from them."""

from __future__ import annotations

import gzip
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import xarray as xr
from hypothesis import settings
from torch import nn
from torch.utils.data import TensorDataset

import lkarray as lk
from lkarray.analysis.hierarchy import sources
from tests.helpers.gradients import tensor
from tests.helpers.losses import (
    CLUSTER,
)
from tests.helpers.networks import classification, small_network
from tests.helpers.recorded_runs import batches_of, cross_entropy, examples, network

settings.register_profile("lkarray", deadline=None)
settings.load_profile("lkarray")

pytest_plugins = [
    "tests.helpers.deployment",
    "tests.helpers.object_store",
    "tests.helpers.services",
]


#: Fixtures that are made once in a process, and take seconds.
SHARED = {"digits", "local_cluster", "owned", "whole", "made"}


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What is made once takes its time: one process has all that needs it."""
    for item in items:
        names = SHARED & set(getattr(item, "fixturenames", ()))
        if "embed" in item.nodeid:  # UMAP is compiled, in half a minute
            names.add("made")  # whose tests embed too
        for shared in sorted(names)[:1]:
            item.add_marker(pytest.mark.xdist_group(shared))
        if "digits" in names:
            item.add_marker(pytest.mark.minutes)


@pytest.fixture(scope="session", autouse=CLUSTER is not None)
def on_cluster() -> Iterator[None]:
    assert CLUSTER is not None
    with lk.cluster.connect(CLUSTER):
        yield


@pytest.fixture(scope="session")
def local_cluster() -> Iterator[Any]:
    """Two worker processes, which no test kills; each makes its own client."""
    from distributed import LocalCluster

    with LocalCluster(
        n_workers=2, threads_per_worker=1, dashboard_address="127.0.0.1:0"
    ) as cluster:
        yield cluster


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)


@pytest.fixture
def data() -> TensorDataset:
    return classification()


@pytest.fixture
def model() -> nn.Module:
    return small_network()


@pytest.fixture
def posterior(model: nn.Module, data: TensorDataset) -> lk.LocalPosterior:
    return lk.LocalPosterior(model, data, nbeta=10.0, gamma=50.0)


@pytest.fixture
def sample(posterior: lk.LocalPosterior) -> Callable[..., xr.DataTree]:
    """`lk.sample` of the small posterior on its training set, quickly."""

    def call(store: object, **changes: object) -> xr.DataTree:
        options: dict[str, object] = {
            "sampler": lk.SGLD(step_size=1e-3),
            "chains": 2,
            "draws": 9,
            "burn_in": 3,
            "batch_size": 16,
            "coords": {"label": posterior.train_set.tensors[1].numpy()},
            "progress": False,
        }
        return lk.sample(posterior, posterior.train_set, store=store, **(options | changes))

    return call


@pytest.fixture
def store(tmp_path: Path, sample: Callable[..., xr.DataTree]) -> Path:
    path = tmp_path / "run.zarr"
    sample(path)
    return path


@pytest.fixture(scope="session")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which `lkarray run digits` has run, with its quick preset, as a user would."""
    folder = tmp_path_factory.mktemp("demo")
    command = [sys.executable, "-m", "lkarray", "run", "digits", "--preset", "quick"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (folder / "said.txt").write_text(done.stdout)
    return folder


@pytest.fixture(scope="module")
def wordnet():
    try:
        return sources.open_wordnet()
    except LookupError:
        if os.environ.get("CI"):
            raise
        pytest.skip("needs nltk's WordNet corpus: set NLTK_DATA")


@pytest.fixture
def garments(tmp_path):
    """Files as Fashion-MNIST has them: each class its own bright rows, in noise."""
    rng = np.random.default_rng(0)
    folder = tmp_path / "data"
    folder.mkdir()
    for part, n in (("train", 1200), ("t10k", 400)):
        labels = rng.integers(0, 10, n).astype(np.uint8)
        images = rng.integers(0, 120, (n, 28, 28)).astype(np.uint8)
        for row in (0, 1):
            images[np.arange(n), 2 * labels + row] += 100
        for kind, header, values in (("images-idx3", 16, images), ("labels-idx1", 8, labels)):
            data = bytes(header) + values.tobytes()
            (folder / f"{part}-{kind}-ubyte.gz").write_bytes(gzip.compress(data))
    return folder


@pytest.fixture
def train() -> Callable[..., tuple[nn.Module, Any]]:
    """Train the small network, recorded; returns it and the recorder."""

    def call(
        store: Any,
        *,
        make: Any = None,
        steps: int = 22,
        clip: Any = None,
        resume: bool = False,
        scheduler: Any = None,
        model: nn.Module | None = None,
        groups: bool = False,
        **options: Any,
    ) -> tuple[nn.Module, Any]:
        model = network() if model is None else model
        data = examples()
        inputs, labels = data.tensors
        parameters: Any = list(model.parameters())
        if groups:
            parameters = [{"params": parameters[:2]}, {"params": parameters[2:], "lr": 2e-3}]
        optimizer = (make or (lambda p: torch.optim.Adam(p, 1e-2)))(parameters)
        schedule = scheduler and scheduler(optimizer)
        recorder = lk.record(
            model, optimizer, data, loss=cross_entropy, store=store, scheduler=schedule, **options
        )
        with recorder as trace:
            batches = batches_of(steps)
            for batch in trace.remaining(batches) if resume else batches:
                with trace.step(batch):
                    optimizer.zero_grad()
                    cross_entropy(model(inputs[batch]), labels[batch]).mean().backward()
                    if clip:
                        clip(model.parameters())
                    optimizer.step()
                if schedule:
                    schedule.step()
        return model, recorder

    return call


@pytest.fixture
def G(rng):
    return tensor(rng).chunk({"time": 1, "example": 5, "param": 11})


@pytest.fixture
def outputs(rng):
    values = rng.normal(size=(5, 7, 3, 30))
    coords = {
        "time": np.arange(5) * 10,
        "output": ["a", "b", "c"],
        "label": ("example", np.arange(7)),
    }
    array = xr.DataArray(values, dims=("time", "example", "output", "param"), coords=coords)
    return array.chunk({"time": 1, "example": 2, "output": 3, "param": 11})


@pytest.fixture(scope="module")
def clusters():
    """Losses of three groups of samples, each driven by its own direction."""
    rng = np.random.default_rng(0)
    group = np.arange(90) % 3
    drivers = rng.normal(size=(2, 60, 3))
    values = drivers[..., group] + 0.5 * rng.normal(size=(2, 60, 90)) + 1
    coords = {"sample": np.arange(90) + 7, "group": ("sample", group)}
    coords["odd"] = ("sample", np.arange(90) % 2 == 1)
    array = xr.DataArray(values.astype("f4"), dims=("chain", "draw", "sample"), coords=coords)
    return array.to_dataset(name="loss").assign(
        center_loss=("sample", np.full(90, 0.9, np.float32))
    )


@pytest.fixture(scope="module")
def mapped():
    """Thirty points in three groups, and a kernel that falls with their distance."""
    rng = np.random.default_rng(0)
    group = np.arange(30) % 3
    xy = rng.normal(size=(30, 2)) + 3 * np.eye(3)[group, :2]
    apart = np.linalg.norm(xy[:, None] - xy, axis=-1)
    coords = {"label": ("sample", group)}
    values = np.exp(-apart) - 0.3 * (group[:, None] != group)
    kernel = xr.DataArray(values, dims=("sample", "sample_2"), coords=coords, name="ips")
    return kernel, xr.DataArray(xy, dims=("sample", "component"), coords=coords), apart
