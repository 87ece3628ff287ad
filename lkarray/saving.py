"""`save`: the resumable dense sink, one stored chunk a tile."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

import dask
import dask.array as da
import numpy as np
import xarray as xr
import zarr
from zarr.abc.store import Store
from zarr.storage import MemoryStore

from lkarray.arguments import checked
from lkarray.engine.contraction import Contraction, Tile, compute_tile, contraction_of, gram_array
from lkarray.engine.plan import WRITTEN_BYTES, make_plan, on_cluster
from lkarray.engine.tasks import Tasks
from lkarray.errors import SchemaError, StoreError
from lkarray.progress import dask_bar
from lkarray.results import Result, alone
from lkarray.store.location import StoreLike, as_store, describe, writing
from lkarray.store.locking import writer_lock
from lkarray.store.names import DERIVED, check_name, group_path
from lkarray.store.saved import Index, SavedKernel, sound_chunks, stored_indices
from lkarray.waiting import workers_awaited

_BATCH = 64  # stored chunks that a task reads
_SAFE = "Tiles that were written are kept"


@workers_awaited("computed", _SAFE)
@checked()
def save(
    kernel: Result,
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
        Group within it, of the kernel's own; ``"derived/NAME"`` of the kernel by default. Names of
        lkarray's own groups are refused, and groups that hold anything else.
    upper
        Of a symmetric kernel write the tiles on and above the diagonal only; those below
        stay missing (NaN).
    progress
        Show a progress bar.

    Returns
    -------
    xarray.DataArray
        The stored kernel, complete, lazy, with coordinates.

    Raises
    ------
    GroupError
        The group is the whole store or one of lkarray's own, or something that this did not write
        is there; nothing is touched.
    StoreError
        The group holds another kernel (nothing is touched), the store is in memory and the
        workers elsewhere, or writing failed: the disk is full, say. Tiles that were written
        stay, and the same call goes on from them.
    ClusterError
        No worker is left to compute, and none came; the same call goes on.
    LockedError
        Another process is writing to the store.
    SchemaError
        The kernel is not lazy, its chunks are uneven, or a label or attribute cannot be stored
        so that it is read back as it is: labels of None, say.
    NonFiniteError, DamagedError
        The input holds NaN or infinity, or cannot be read; or what is stored of the kernel was
        changed since it was complete.

    Notes
    -----
    Each tile is one task, which computes the tile and writes it, and its mirror image, as
    whole chunks with checksums; the array is NaN where a tile was not written, and a
    correlation of zero is written as zero. When all are written and flushed to the disk, the
    kernel is marked as complete, and sealed (10,000 tiles: some seconds); until then `lkarray.open`
    hides it and `lkarray.verify` calls it unfinished.

    Of a kernel that is there already, every tile is read and its checksum taken; one that is
    damaged or missing is computed again, and no other. The first and the last are computed again
    and compared, so that a kernel of other data is noticed. Memory is the plan's
    (`lkarray.plan`).

    Examples
    --------
    >>> from zarr.storage import MemoryStore
    >>> import xarray as xr, lkarray as lk
    >>> values = [[[0.0, 1.0, 4.0], [1.0, 3.0, 3.0], [2.0, 5.0, 2.0]]]
    >>> losses = xr.DataArray(values, dims=("chain", "draw", "sample"))
    >>> store = MemoryStore()
    >>> stored = lk.save(lk.covariance(losses), store)
    >>> stored.values.tolist() == lk.covariance(losses).values.tolist()
    True
    """
    kernel = _checked(alone(kernel, "kernel"))
    saved = SavedKernel.of(
        kernel, group_path(f"{DERIVED}/{kernel.name}" if group is None else group), upper
    )
    target = as_store(store)
    if isinstance(target, MemoryStore) and on_cluster():
        raise StoreError(
            "a store in memory cannot be written by Dask workers; give a folder that all of them "
            "see, or a URL"
        )
    if not _complete(saved, kernel, target):  # on a read-only disk it opens as it is
        _fill(saved, kernel, target, progress=progress)
    return saved.read(target)


def _complete(saved: SavedKernel, kernel: xr.DataArray, target: Store) -> bool:
    """Say whether the kernel is stored whole already; writes nothing."""
    array = saved.stored(target)
    if array is None:
        return False
    work = _Work.of(kernel, array, int(array.chunks[-2]), saved.upper)
    kept = _sound(array)
    if any(outs - kept for _, outs in work.tiles()) or saved.resealed(target, array):
        return False
    _compare(work, array, {min(kept), max(kept)} if kept else (), saved.group)
    return True


def _fill(saved: SavedKernel, kernel: xr.DataArray, target: Store, *, progress: bool) -> None:
    """Write what of the kernel is missing, and seal it."""
    safe = f"{_SAFE}; run the same call again to go on"
    with writer_lock(target), writing(target, safe=safe):
        array = saved.open(target)
        work = _Work.of(kernel, array, int(array.chunks[-2]), saved.upper)
        kept = _sound(array)
        _compare(work, array, {min(kept), max(kept)} if kept else (), saved.group)
        todo = [(tile, out) for tile, outs in work.tiles() if (out := sorted(outs - kept))]
        with dask_bar(f"saving {saved.group}", show=progress):
            _run(work, array, todo)
        if saved.resealed(target, array):
            _compare(work, array, kept, saved.group)  # swapped tiles, or of another rounding
        saved.finish(target)


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
            place = None if c.plan.placed is None else c.plan.placed.device
            options: dict[str, Any] = {"memory": c.plan.budget, "sink": WRITTEN_BYTES}
            plan = make_plan(c.x, c.y, side=side, device=place, **options)
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
            both = {(*tile.entry, tile.i, tile.j)}
            if self.contraction.symmetric and not self.upper:
                both.add((*tile.entry, tile.j, tile.i))
            yield tile, both


def _checked(kernel: Any) -> xr.DataArray:
    if not isinstance(kernel, xr.DataArray):
        raise TypeError(
            f"save takes a DataArray, not {type(kernel).__name__}; neighbours and other small "
            "results are written by .to_zarr"
        )
    if not kernel.name:
        raise SchemaError("the kernel has no name; give it one: kernel.rename('correlation')")
    check_name(str(kernel.name), "the kernel's name")
    if kernel.name in kernel.coords:
        raise SchemaError(
            f"the kernel has the name of its labels {kernel.name!r}; give it another: "
            "kernel.rename('correlation')"
        )
    if kernel.chunks is None:
        raise SchemaError("the kernel is in memory already; write it with .to_zarr")
    for dim, lengths in kernel.variable.chunksizes.items():
        if len(set(lengths[:-1])) > 1 or lengths[-1] > lengths[0]:
            raise SchemaError(
                f"the chunks of {dim!r} are uneven ({lengths[:4]}...), as a selection leaves them; "
                "select on the losses before the kernel, or rechunk"
            )
    return kernel


def _sound(array: zarr.Array) -> set[Index]:
    """Return the chunks that are stored whole: each is read, and its checksum taken."""
    there = stored_indices(array)
    batches = [there[start : start + _BATCH] for start in range(0, len(there), _BATCH)]
    check = dask.delayed(sound_chunks, pure=False)
    sound: tuple[list[Index], ...] = dask.compute(*(check(array, batch) for batch in batches))
    return {index for batch in sound for index in batch}


def _compare(work: _Work, array: zarr.Array, written: Iterable[Index], group: str) -> None:
    """Compute some stored tiles again: they must be the same kernel's."""
    for index in sorted(written):
        stored = array.blocks[index]
        fresh = work.data.blocks[index].compute()
        scale = max(float(np.abs(fresh).max(initial=0)), 1e-30)
        if not np.allclose(stored, fresh, rtol=1e-3, atol=1e-4 * scale):
            raise StoreError(
                f"group {group!r} of {describe(array.store)} holds tiles of other data (tile "
                f"{index} differs); nothing was touched. Choose another group="
            )


def _run(work: _Work, array: zarr.Array, todo: Iterable[tuple[Any, list[Index]]]) -> None:
    """Compute and write tiles, or blocks of an array, each in one task."""
    tasks = Tasks("save", work.data.name, array.path, str(array.store))
    target = tasks.hold(array)
    if work.contraction is not None:
        c = tasks.hold(work.contraction)
        written = [tasks.then(_save_tile, c, tile, target, outs) for tile, outs in todo]
    else:
        blocks = [(tasks.block(work.data, index), outs) for index, outs in todo]
        written = [tasks.then(_save_block, block, target, outs) for block, outs in blocks]
    if written:
        dask.compute(tasks.delayed(tasks.then(_count, written)))


def _save_tile(c: Contraction, tile: Tile, array: zarr.Array, outs: list[Index]) -> int:
    return _save_block(compute_tile(c, tile), array, outs, (*tile.entry, tile.i, tile.j))


def _save_block(
    values: np.ndarray, array: zarr.Array, outs: list[Index], own: Index | None = None
) -> int:
    """Write a tile to its chunk, and transposed to that of the other triangle."""
    for index in outs:
        mirrored = own is not None and index != own
        array.blocks[index] = values.swapaxes(-1, -2) if mirrored else values
    return len(outs)


def _count(written: list[int]) -> int:
    return sum(written)
