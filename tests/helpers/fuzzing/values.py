"""What is put in the places of arguments."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xarray as xr
from torch.utils.data import TensorDataset

from tests.helpers.fuzzing.world import Case

#: Arguments that are places.
PATHS = ("path", "store", "shared", "tls")

#: Put in the place of any argument.
ODD: dict[str, Any] = {
    "none": None,
    "empty": "",
    "junk": "junk",
    "nul": "a\0b",
    "bytes": b"loss",
    "zero": 0,
    "minus one": -1,
    "half": 0.5,
    "fraction": 1.5,
    "true": True,
    "nan": float("nan"),
    "infinity": float("inf"),
    "huge": 10**30,
    "large": 10**7,
    "complex": 1j,
    "numpy integer": np.int64(2),
    "numpy float": np.float32(0.5),
    "numpy bool": np.bool_(True),
    "0-d": np.array(2),
    "array": np.array([1.0, 2.0]),
    "empty array": np.array([]),
    "matrix": np.eye(3),
    "object array": np.array([None, "a"], dtype=object),
    "date": np.datetime64("2020-01-01"),
    "list": [1, "a"],
    "list of none": [None],
    "nested": [[1, 2], [3]],
    "empty list": [],
    "empty tuple": (),
    "tuple": (5, 1),
    "dict": {"a": 1},
    "empty dict": {},
    "mixed dict": {None: "a", ("b",): [1]},
    "set": {"a", "b"},
    "function": lambda *a, **k: "junk",
    "object": object(),
    "type": int,
    "tensor": torch.zeros(3),
    "DataArray": xr.DataArray(3.0),
    "other DataArray": xr.DataArray(np.zeros((2, 3)), dims=("p", "q"), name="other"),
    "Dataset": xr.Dataset({"other": ("p", [1.0, 2.0])}),
    "empty Dataset": xr.Dataset(),
    "DataTree": xr.DataTree(),
    "module": torch.nn.Linear(2, 2),
    "dataset": TensorDataset(torch.zeros(3, 2)),
}


def variants(base: Any) -> Iterator[tuple[str, Any]]:
    """Yield labelled data with what may be wrong about it."""
    if isinstance(base, xr.DataTree):
        for name in base.children:
            rest = base.copy()
            del rest[name]
            yield f"without {name}", rest
            yield f"only {name}", base[name]
        return
    if not isinstance(base, xr.DataArray | xr.Dataset):
        return
    for dim, size in base.sizes.items():
        yield f"one of {dim}", base.isel({dim: 0})
        yield f"no {dim}", base.isel({dim: slice(0)})
        yield f"a single {dim}", base.isel({dim: slice(1)})
        yield f"two of {dim}", base.isel({dim: slice(2)})
        yield f"another name for {dim}", base.rename({dim: "elsewhere"})
        yield f"{dim} not indexed", base.drop_vars(dim, errors="ignore")
        yield f"{dim} twice the same", base.assign_coords({dim: np.zeros(size, int)})
        yield f"{dim} by strings", base.assign_coords({dim: [f"x{i}" for i in range(size)]})
        yield f"{dim} backwards", base.isel({dim: slice(None, None, -1)})
    yield "one dim more", base.expand_dims("more")
    yield "dims reversed", base.transpose(*reversed(list(base.sizes)))
    yield "in chunks", base.chunk()
    yield "no coordinates", base.drop_vars(list(base.coords))
    yield "no attributes", base.drop_attrs()
    if isinstance(base, xr.Dataset):
        for name in base.data_vars:
            yield f"without {name}", base.drop_vars(name)
            yield f"{name} complex", base.assign({name: base[name].astype(complex)})
            yield f"{name} of objects", base.assign({name: base[name].astype(object)})
            if base[name].ndim:
                yield (
                    f"{name} fewer dims",
                    base.assign({name: base[name].isel({base[name].dims[0]: 0})}),
                )
            if base[name].dtype.kind == "f":
                yield f"{name} nan", base.assign({name: base[name] * np.nan})
        return
    kinds = ("complex64", "object", "datetime64[s]", "str", "float16", "int16", "bool")
    for kind in kinds:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield kind, base.astype(kind)
    if base.ndim > 1:
        shape = dict.fromkeys(base.dims, 2)
        small = base.isel({dim: slice(2) for dim in base.dims})
        if all(small.sizes[dim] == 2 for dim in shape):
            first = base.dims[0]
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                yield "a dim twice", xr.DataArray(small.values, dims=(first,) * base.ndim)
    yield "nan", base * np.nan
    yield "one nan", base.where(np.arange(base.size).reshape(base.shape) != 1)
    yield "infinite", base * np.inf
    yield "constant", xr.ones_like(base)
    yield "zeros", xr.zeros_like(base)
    yield "as a Dataset", base.to_dataset(name="anything")


def same_as(base: Any) -> Iterator[tuple[str, Any]]:
    """Yield other spellings of a number, which must give what it gives or be refused."""
    if type(base) is int:
        yield "numpy integer", np.int64(base)
        yield "numpy int8", np.int8(base)
        yield "0-d integer", np.array(base)
        yield "tensor", torch.tensor(base)
    if type(base) is float:
        yield "numpy float", np.float64(base)
        yield "0-d float", np.array(base)
        if base == int(base):
            yield "int", int(base)
    if type(base) is bool:
        yield "numpy bool", np.bool_(base)
    if type(base) is str:
        yield "numpy str", np.str_(base)


def values_for(case: Case, argument: str, folder: Path) -> Iterator[tuple[str, Any]]:
    """Yield what is put in the place of an argument."""
    yield from ODD.items()
    yield from variants(case.arguments[argument])
    if argument in PATHS:
        yield from strange_paths(folder)


def strange_paths(folder: Path) -> Iterator[tuple[str, Any]]:
    """Yield what is no place of a store."""
    file, fifo, other = folder / "a file", folder / "a fifo", folder / "other"
    file.write_text("{}")
    if not fifo.exists():
        os.mkfifo(fifo)
    other.mkdir(exist_ok=True)
    (other / "notes.txt").write_text("of something else")
    broken = folder / "broken"
    broken.mkdir(exist_ok=True)
    (broken / "zarr.json").write_text('{"zarr_format": 3,')
    for path in (file, fifo, other, broken, folder / "a file" / "below"):
        yield path.name, path
    yield "a device", "/dev/null"
    yield "a long name", "x" * 5000
    yield "bytes of a path", os.fsencode(file)
    for url in (
        "foo://x",
        "http://127.0.0.1:1/x",
        "memory://nowhere",
        "s3://",
        "gs:///x",
        "file://",
        "://",
        "foo://",
        "~nobody-of-this-name/x",
    ):
        yield url, url
