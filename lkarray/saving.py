"""`save`: the resumable dense sink, one stored chunk a tile."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

import dask
import dask.array as da
import numpy as np
import xarray as xr
import zarr
from dask.base import tokenize
from dask.delayed import Delayed
from dask.highlevelgraph import HighLevelGraph
from zarr.abc.store import Store
from zarr.storage import MemoryStore

from lkarray.checking import checked
from lkarray.engine.contraction import Contraction, Tile, compute_tile, contraction_of, gram_array
from lkarray.engine.plan import WRITTEN_BYTES, make_plan, on_cluster
from lkarray.errors import SchemaError, StoreError
from lkarray.progress import dask_bar
from lkarray.store.layout import CODECS
from lkarray.store.location import StoreLike, as_store, create_root, describe, sizes, writing
from lkarray.store.locking import writer_lock

_SAVED = "lkarray_save"  # attribute of the group: what is being saved there
_CRC_BYTES = 4

Index = tuple[int, ...]


@checked()
def save(
    kernel: xr.DataArray,
    store: StoreLike,
    group: str | None = None,
    *,
    upper: bool = False,
    progress: bool = False,
) -> xr.DataArray:
    """Compute a kernel into a store, one chunk a tile; a rerun computes what is missing.

    Parameters
    ----------
    kernel
        What `gram`, `covariance`, `correlation` or `influence` returned, or any named DataArray
        on a Dask array of even chunks.
    store
        Path, URL or Zarr store; made if it is missing.
    group
        Group within it; ``"derived/NAME"`` of the kernel by default.
    upper
        Of a symmetric kernel write the tiles on and above the diagonal only; those below
        stay missing (NaN).
    progress
        Show a progress bar.

    Returns
    -------
    xarray.DataArray
        The stored kernel, lazy, with coordinates.

    Raises
    ------
    StoreError
        The group holds another kernel (nothing is touched), the store is in memory and the
        workers elsewhere, or writing failed: the disk is full, say. Tiles that were written
        stay, and the same call goes on from them.
    LockedError
        Another process is writing to the store.
    SchemaError
        The kernel is not lazy, or its chunks are uneven.
    NonFiniteError, DamagedError
        The input holds NaN or infinity, or cannot be read.

    Notes
    -----
    Each tile is one task, which computes the tile and writes it, and its mirror image, as
    whole chunks with checksums; the array is NaN where a tile was not written, and a
    correlation of zero is written as zero. Tiles are taken as written by whole files of the
    right size. When there are some already, the first and the last are computed again and
    compared, so that a kernel of other data is noticed. Memory is the plan's (`lkarray.plan`).
    """
    _check(kernel)
    group = f"derived/{kernel.name}" if group is None else group.strip("/")
    if not re.fullmatch(r"[^\0]*[^\0/.][^\0]*", group):
        raise ValueError(f"group must be the name of a group in the store, not {group!r}")
    target = as_store(store)
    if isinstance(target, MemoryStore) and on_cluster():
        raise StoreError(
            "a store in memory cannot be written by Dask workers; give a folder that all of them "
            "see, or a URL"
        )
    safe = "Tiles that were written are kept; run the same call again to go on"
    with writer_lock(target), writing(target, safe=safe):
        array, side = _open_target(target, kernel, group, upper)
        work = _Work.of(kernel, array, side, upper)
        written = _written(array)
        _compare(work, array, written, group)
        todo = [(tile, out) for tile, outs in work.tiles() if (out := sorted(outs - written))]
        with dask_bar(f"saving {group}", show=progress):
            _run(work, array, todo)
    stored: xr.DataArray = xr.open_zarr(target, group=group, chunks={}, consolidated=False)[
        kernel.name
    ]
    return stored


@dataclass(frozen=True)
class _Work:
    """How the chunks of the result are made: by tiles of a contraction, or by blocks."""

    data: da.Array
    contraction: Contraction | None
    upper: bool

    @classmethod
    def of(cls, kernel: xr.DataArray, array: zarr.Array, side: int, upper: bool) -> _Work:
        c = contraction_of(kernel.data)
        data = kernel.data
        if c is not None and not data.name.startswith("gram-"):
            c = None  # something was computed from the tiles
        if c is not None and side != data.chunksize[-2]:
            # Begun under another budget: go on with its tiles.
            plan = make_plan(c.x, c.y, memory=c.plan.budget, side=side, sink=WRITTEN_BYTES)
            c = replace(c, plan=plan)
            data = gram_array(c)
        if data.chunksize != array.chunks:
            data = data.rechunk(array.chunks)
        if upper and (c is None or not c.symmetric):
            raise SchemaError("upper=True needs a symmetric kernel as its function returned it")
        return cls(data, c, upper)

    def tiles(self) -> Iterator[tuple[Any, set[Index]]]:
        """Yield what to compute, and the chunks it fills."""
        if self.contraction is None:
            for index in product(*map(range, self.data.numblocks)):
                yield index, {index}
            return
        for tile in self.contraction.tiles():
            both = {(*tile.at, tile.i, tile.j)}
            if self.contraction.symmetric and not self.upper:
                both.add((*tile.at, tile.j, tile.i))
            yield tile, both


def _check(kernel: xr.DataArray) -> None:
    if not isinstance(kernel, xr.DataArray):
        raise TypeError(
            f"save takes a DataArray, not {type(kernel).__name__}; neighbours and other small "
            "results are written by .to_zarr"
        )
    if not kernel.name:
        raise SchemaError("the kernel has no name; give it one: kernel.rename('correlation')")
    if kernel.chunks is None:
        raise SchemaError("the kernel is in memory already; write it with .to_zarr")
    for dim, lengths in kernel.variable.chunksizes.items():
        if len(set(lengths[:-1])) > 1 or lengths[-1] > lengths[0]:
            raise SchemaError(
                f"the chunks of {dim!r} are uneven ({lengths[:4]}...), as a selection leaves them; "
                "select on the losses before the kernel, or rechunk"
            )


def _open_target(
    store: Store, kernel: xr.DataArray, group: str, upper: bool
) -> tuple[zarr.Array, int]:
    """Return the array to fill, made if it is missing, and the side of its tiles."""
    name = str(kernel.name)
    mark = _mark(kernel, upper)
    root = create_root(store)
    if group in root:
        node = root[group]
        found = dict(node.attrs).get(_SAVED) if isinstance(node, zarr.Group) else None
        if found is not None and found != mark:
            assert isinstance(found, dict)
            differ = sorted(key for key in mark if mark[key] != found.get(key))
            raise StoreError(
                f"group {group!r} of {describe(store)} holds another kernel (they differ in "
                f"{differ}); nothing was touched. Choose another group="
            )
        if found is not None:
            array = root[f"{group}/{name}"]
            assert isinstance(array, zarr.Array)
            return array.with_config({"write_empty_chunks": True}), int(array.chunks[-2])
        if isinstance(node, zarr.Array) or any(n != name for n, _ in node.arrays()):
            raise StoreError(
                f"group {group!r} of {describe(store)} holds something that save did not write; "
                "nothing was touched. Choose another group="
            )
    return _create(root, kernel, group, mark), kernel.data.chunksize[-2]


def _create(root: zarr.Group, kernel: xr.DataArray, group: str, mark: dict[str, Any]) -> zarr.Array:
    """Make the group, its coordinates, the array of NaN, and last the mark that it is whole."""
    coords = kernel.coords.to_dataset().reset_coords(drop=False).drop_encoding()
    coords = coords.set_coords(list(coords.variables))
    coords.to_zarr(root.store, group=group, mode="w", consolidated=False, zarr_format=3)
    node = root[group]
    assert isinstance(node, zarr.Group)
    floating = kernel.dtype.kind == "f"
    array = node.create_array(
        str(kernel.name),
        shape=kernel.shape,
        chunks=kernel.data.chunksize,
        dtype=kernel.dtype,
        fill_value=np.nan if floating else 0,
        compressors=CODECS,
        dimension_names=[str(dim) for dim in kernel.dims],
        attributes={str(k): _plain(v) for k, v in kernel.attrs.items()}
        | {"coordinates": " ".join(str(c) for c in kernel.coords if c not in kernel.dims)}
        | ({"triangle": "upper"} if mark["upper"] else {}),
        config={"write_empty_chunks": True},
    )
    node.attrs[_SAVED] = mark
    return array


def _mark(kernel: xr.DataArray, upper: bool) -> dict[str, Any]:
    """Return what a resumed save must share with the one that began."""
    coords = {str(n): tokenize(np.asarray(c.values)) for n, c in kernel.coords.items()}
    return {
        "name": str(kernel.name),
        "dims": [str(dim) for dim in kernel.dims],
        "shape": list(kernel.shape),
        "dtype": str(kernel.dtype),
        "attributes": {str(k): _plain(v) for k, v in sorted(kernel.attrs.items())},
        "coordinates": coords,
        "upper": upper,
    }


def _plain(value: Any) -> Any:
    return value.tolist() if isinstance(value, np.ndarray | np.generic) else value


def _written(array: zarr.Array) -> set[Index]:
    """Return the chunks that are stored whole, by their sizes."""
    size = int(np.prod(array.chunks)) * array.dtype.itemsize + _CRC_BYTES
    counts = [-(-n // c) for n, c in zip(array.shape, array.chunks, strict=True)]
    prefix = array.path

    found = set()
    for key, stored in sizes(array.store, f"{prefix}/c/"):
        parts = key.removeprefix(f"{prefix}/c/").split("/")
        if not all(part.isdecimal() for part in parts):
            continue  # what a killed write left beside its chunk
        index = tuple(map(int, parts))
        if len(index) == len(counts) and stored == size:
            found.add(index)
    return found


def _compare(work: _Work, array: zarr.Array, written: set[Index], group: str) -> None:
    """Compute the first and last stored tile again: they must be the same kernel's."""
    for index in {min(written), max(written)} if written else ():
        stored = array.blocks[index]
        fresh = work.data.blocks[index].compute()
        scale = max(float(np.abs(fresh).max(initial=0)), 1e-30)
        if not np.allclose(stored, fresh, rtol=1e-3, atol=1e-4 * scale):
            raise StoreError(
                f"group {group!r} of {describe(array.store)} holds tiles of other data (tile "
                f"{index} differs); nothing was touched. Choose another group="
            )


def _run(work: _Work, array: zarr.Array, todo: Iterable[tuple[Any, list[Index]]]) -> None:
    name = f"save-{tokenize(work.data.name, array.path, str(array.store))}"
    graph: dict[Any, Any] = {f"{name}-array": array}
    c = work.contraction
    if c is not None:
        graph[f"{name}-contraction"] = c
    for number, (tile, outs) in enumerate(todo):
        task: tuple[Any, ...]
        if c is not None:
            task = (_save_tile, f"{name}-contraction", tile, f"{name}-array", outs)
        else:
            task = (_save_block, (work.data.name, *tile), f"{name}-array", outs)
        graph[(name, number)] = task
    keys = [key for key in graph if isinstance(key, tuple)]
    if not keys:
        return
    graph[f"{name}-all"] = (_count, keys)
    below: list[Any] = [] if c is not None else [work.data]
    whole = HighLevelGraph.from_collections(name, graph, below)
    try:
        dask.compute(Delayed(f"{name}-all", whole, layer=name))
    except Exception as error:
        if type(error).__name__ != "KilledWorker":  # of distributed, which may not be loaded
            raise
        raise StoreError(
            f"workers died while they computed ({error}); look into their logs, for want of "
            "memory perhaps. Tiles that were written are kept: run again to continue"
        ) from None


def _save_tile(c: Contraction, tile: Tile, array: zarr.Array, outs: list[Index]) -> int:
    return _save_block(compute_tile(c, tile), array, outs, (*tile.at, tile.i, tile.j))


def _save_block(
    values: np.ndarray, array: zarr.Array, outs: list[Index], own: Index | None = None
) -> int:
    """Write a tile to its chunk, and transposed to that of the other triangle."""
    for index in outs:
        mirrored = own is not None and index != own
        array.blocks[index] = values.swapaxes(-1, -2) if mirrored else values
    return len(outs)


def _count(parts: list[int]) -> int:
    return sum(parts)
