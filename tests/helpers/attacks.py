"""A small store with something of everything, and ways to damage one file of it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import xarray as xr
from torch.utils.data import TensorDataset

import lkarray as lk
from lkarray import store as stores
from lkarray.store import layout
from lkarray.store.seals import seal
from tests.helpers.networks import classification, small_network

DEPTH, WIDTH = 4, 16


def sampled(path: Path, *, draws: int = 10, chains: int = 2) -> xr.DataTree:
    """Sample, or go on: two observed sets, labels of both kinds, an observable, three blocks."""
    data = classification(n=24)
    other = classification(n=20)
    posterior = lk.LocalPosterior(small_network(), data, nbeta=10.0, gamma=50.0)
    return lk.sample(
        posterior,
        {"train": data, "other": other},
        sampler=lk.SGLD(step_size=1e-3),
        store=path,
        chains=chains,
        draws=draws,
        burn_in=2,
        batch_size=8,
        coords={
            "train": labels(data),
            "other": labels(other, prefix="other"),
        },
        observables={"bias": first_bias},
        chains_per_device=1,
        progress=False,
    )


def first_bias(model: torch.nn.Module) -> torch.Tensor:
    return model[0].bias[:3]


def labels(data: TensorDataset, prefix: str = "train") -> dict[str, object]:
    names = [f"{prefix}{number:02d}" for number in range(len(data))]
    return {"label": data.tensors[1].numpy(), "name": names, "turned": names[::-1]}


def small_blocks(monkeypatch) -> None:
    """Make blocks of four draws, and several chunks of the losses in each."""
    monkeypatch.setattr(layout, "block_draws", lambda draws, values: DEPTH)
    chunks = lambda depth, samples, tail=(): (1, depth, min(WIDTH, samples), *tail)  # noqa: E731
    monkeypatch.setattr(layout, "loss_chunks", chunks)


def with_result(path: Path) -> None:
    """Keep a kernel and neighbours in the store, sealed."""
    tree = lk.open(path)
    stores.put(path, "kernel", lk.covariance(tree).chunk({"sample": 12, "sample_2": 12}))
    stores.put(path, "near", lk.neighbors(tree, 3))
    root = stores.open_root(path, mode="r+")
    for name in ("kernel", "near"):
        seal(root[f"derived/{name}"])
    stores.finish(root)


def seen(path: Path) -> dict[str, object]:
    """All that a user reads of a store, as plain values."""
    tree = lk.open(path).compute()
    content: dict[str, object] = {}
    for node in tree.subtree:
        ds = node.to_dataset(inherit=False)
        for name, variable in ds.variables.items():
            values = variable.values.tolist()
            about = (variable.dims, str(variable.dtype), sorted(variable.attrs.items()))
            content[f"{node.path}/{name}"] = repr((about, values))
        content[f"{node.path}@"] = json.dumps(dict(ds.attrs), sort_keys=True, default=str)
    return content


def files(path: Path) -> list[str]:
    """The files of a store but its locks."""
    names = [str(p.relative_to(path)) for p in path.rglob("*") if p.is_file()]
    return sorted(name for name in names if not Path(name).name.startswith(".lkarray"))


def flip(path: Path, rng: np.random.Generator) -> None:
    raw = bytearray(path.read_bytes())
    raw[int(rng.integers(len(raw)))] ^= 1 << int(rng.integers(8))
    path.write_bytes(raw)


def cut(path: Path, rng: np.random.Generator) -> None:
    raw = path.read_bytes()
    path.write_bytes(raw[: int(rng.integers(1, len(raw)))])


def empty(path: Path, rng: np.random.Generator) -> None:
    path.write_bytes(b"")


def delete(path: Path, rng: np.random.Generator) -> None:
    path.unlink()


ATTACKS = {"flip": flip, "cut": cut, "empty": empty, "delete": delete}


def pairs(path: Path) -> Iterator[tuple[str, str]]:
    """Files of equal size and other content, which could stand in each other's places."""
    paths = files(path)
    content = {name: (path / name).read_bytes() for name in paths}
    for i, a in enumerate(paths):
        for b in paths[i + 1 :]:
            both = (a.endswith("zarr.json"), b.endswith("zarr.json"))
            same = both == (True, True) or len(content[a]) == len(content[b])
            if both[0] == both[1] and same and content[a] != content[b]:
                yield a, b


def swap(path: Path, a: str, b: str) -> None:
    first, second = (path / a).read_bytes(), (path / b).read_bytes()
    (path / a).write_bytes(second)
    (path / b).write_bytes(first)


def outcome(path: Path, before: dict[str, object]) -> str | None:
    """How a damage was caught, ``"unchanged"`` if users read what they read before, else None."""
    problems = lk.verify(path)
    try:
        after = lk.open(path) if problems else seen(path)
    except Exception as error:
        return "open" if isinstance(error, lk.errors.LkarrayError) else None
    if problems:
        return "verify"
    return "unchanged" if after == before else None


def copied(path: Path, to: Path) -> Path:
    shutil.rmtree(to, ignore_errors=True)
    shutil.copytree(path, to)
    return to


def contents(path: Path) -> dict[str, bytes]:
    """The files of a store but its locks, with their bytes."""
    return {name: (path / name).read_bytes() for name in files(path)}


def latest_state(path: Path, chain: int = 0) -> str:
    slot = stores.read_record(stores.open_root(path), chain).slot
    return f"state/parameters/c/{chain}/{slot}/0"


def edit(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change some metadata."""
    metadata = json.loads(path.read_text())
    change(metadata)
    path.write_text(json.dumps(metadata))


def whole_store(path: Path) -> tuple[Path, dict[str, object]]:
    """Make a sound store; return its path, and what users read of it."""
    with pytest.MonkeyPatch.context() as patch:
        small_blocks(patch)
        sampled(path)
    with_result(path)
    assert lk.verify(path) == []
    return path, seen(path)
