"""Fixtures shared by all tests: small real problems, and stores sampled from them."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
import xarray as xr
from torch import nn
from torch.utils.data import TensorDataset
from zarr.storage import MemoryStore

import lkarray as lk

pytest_plugins = ["tests.cluster.services"]

#: Address of a scheduler: all that a test computes with Dask then runs there (tests/cluster).
CLUSTER = os.environ.get("LKARRAY_TEST_CLUSTER")


@pytest.fixture(scope="session", autouse=CLUSTER is not None)
def on_cluster() -> Iterator[None]:
    assert CLUSTER is not None
    with lk.cluster.connect(CLUSTER):
        yield


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)


def classification(n: int = 40, features: int = 6, classes: int = 3) -> TensorDataset:
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(n, features, generator=generator)
    return TensorDataset(inputs, inputs[:, :classes].argmax(1))


def small_network(features: int = 6, classes: int = 3) -> nn.Module:
    torch.manual_seed(2)
    return nn.Sequential(nn.Linear(features, 5), nn.Tanh(), nn.Linear(5, classes))


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


def in_memory(
    posterior: lk.LocalPosterior, observed: object, *, step_size: float = 1e-4, draws: int = 2
) -> xr.DataTree:
    """`lk.sample` of one short chain into memory."""
    return lk.sample(
        posterior,
        observed,
        sampler=lk.SGLD(step_size=step_size),
        chains=1,
        draws=draws,
        store=MemoryStore(),
        progress=False,
    )


@pytest.fixture
def store(tmp_path: Path, sample: Callable[..., xr.DataTree]) -> Path:
    path = tmp_path / "run.zarr"
    sample(path)
    return path


def random_losses(
    rng: np.random.Generator,
    chains: int = 3,
    draws: int = 20,
    samples: int = 17,
    dtype: str = "float32",
) -> xr.DataArray:
    """A loss tensor with structure: a few shared directions, offsets and scales."""
    shared = rng.normal(size=(chains * draws, 4)) @ rng.normal(size=(4, samples))
    values = shared + rng.normal(size=shared.shape) + rng.normal(size=samples) * 3
    values = (values * np.exp(rng.normal(size=samples))).reshape(chains, draws, samples)
    if np.dtype(dtype).kind in "iu":
        values = np.round(values * 10)
    return xr.DataArray(
        values.astype(dtype),
        dims=("chain", "draw", "sample"),
        coords={"sample": np.arange(samples), "label": ("sample", np.arange(samples) % 4)},
        name="loss",
    )


def numpy_covariance(losses: xr.DataArray, center: str = "pooled") -> np.ndarray:
    """The kernel in float64, by its definition."""
    x = losses.transpose("chain", "draw", "sample").values.astype(np.float64)
    chains, draws, samples = x.shape
    axis, means = ((0, 1), 1) if center == "pooled" else ((1,), chains)
    x = (x - x.mean(axis=axis, keepdims=True)).reshape(-1, samples)
    return x.T @ x / (chains * draws - means)


def numpy_correlation(losses: xr.DataArray, center: str = "pooled") -> np.ndarray:
    k = numpy_covariance(losses, center)
    scale = np.sqrt(np.diag(k))
    with np.errstate(divide="ignore", invalid="ignore"):
        r = k / np.outer(scale, scale)
    # A mean may miss a constant by rounding: no variance is told by the values themselves.
    dims = ("draw",) if center == "chain" else ("chain", "draw")
    same = losses.max(dims) == losses.min(dims)
    constant = (same.all("chain") if center == "chain" else same).values
    varies = (scale > 0) & ~constant
    return np.where(np.outer(varies, varies), r, 0.0)


class Forbidding:
    """A Dask scheduler that fails a test in which something computes too early."""

    def __call__(self, graph: object, keys: object, **options: object) -> None:
        raise AssertionError(f"computed {keys} although nothing was asked for")


@pytest.fixture(scope="session")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which `lkarray run digits` has run, with its quick preset, as a user would."""
    folder = tmp_path_factory.mktemp("demo")
    command = [sys.executable, "-m", "lkarray", "run", "digits", "--preset", "quick"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (folder / "said.txt").write_text(done.stdout)
    return folder
