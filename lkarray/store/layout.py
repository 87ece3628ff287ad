"""How arrays are laid out in a store, and the making and growing of them."""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Mapping
from typing import Any

import numpy as np
import zarr
from zarr.abc.store import Store
from zarr.codecs import Crc32cCodec
from zarr.core.array_spec import ArrayConfigParams
from zarr.core.sync import sync
from zarr.errors import ZarrUserWarning

from lkarray import schema
from lkarray.errors import StoreError
from lkarray.schema import VariableSpec
from lkarray.store.location import (
    MARK,
    StoreLike,
    create_root,
    describe,
    local_path,
    update_mark,
    writing,
)

#: Bit flips pass raw and zstd chunks unseen, and zstd halves the speed of reading.
CODECS = (Crc32cCodec(),)

#: A chunk of nothing but zeros is written too, so that a missing one is always a fault.
_WRITE_ALL: ArrayConfigParams = {"write_empty_chunks": True}

#: Bytes of losses that one chain buffers before it must write a block.
_BLOCK_BYTES = 64 << 20
_STATE_CHUNK = 1 << 22


def loss_chunks(draws: int, samples: int) -> tuple[int, int, int]:
    """Return the chunk shape of ``loss(chain, draw, sample)`` (design section 2).

    A block of one chain, D draws and all samples is buffered, so D falls with the number of
    samples; chunks stay near 2 MiB, large enough to read fast and small enough to select.
    """
    block = max(100, _BLOCK_BYTES // (4 * max(samples, 1)))
    depth = min(max(draws, 32), block)
    width = 2048 if depth >= 200 or samples <= 2048 else 8192
    return 1, depth, min(width, samples)


def create_array(
    group: zarr.Group,
    spec: VariableSpec,
    shape: tuple[int, ...],
    chunks: tuple[int, ...],
    *,
    dtype: Any = None,
    attrs: Mapping[str, Any] | None = None,
) -> zarr.Array:
    """Create the array of ``spec``: NaN (or zero) where nothing was written."""
    dtype = np.dtype(dtype or spec.dtype)
    return group.create_array(
        spec.name,
        shape=shape,
        chunks=chunks,
        dtype=dtype,
        fill_value=np.nan if dtype.kind == "f" else dtype.type(0),
        compressors=CODECS,
        dimension_names=spec.dims,
        attributes=spec.attrs() | dict(attrs or {}),
        config=_WRITE_ALL,
    )


def create_losses(
    path: StoreLike,
    *,
    chains: int,
    draws: int,
    coords: Mapping[str, np.ndarray],
    center_loss: np.ndarray,
    state_size: int,
    state_dtype: Any,
    fingerprint: Mapping[str, Any],
    attrs: Mapping[str, Any],
) -> zarr.Group:
    """Create the groups of a sampled store and return its root.

    The fingerprint is written last: a store that has none was killed while it was being
    made, holds no draw, and is made again by the next run.
    """
    root = create_root(path)
    store = root.store
    samples = len(center_loss)
    _require_space(store, 4 * chains * draws * samples)
    with writing(store):
        one, depth, width = loss_chunks(draws, samples)
        losses = root.create_group(schema.LOSSES, attributes=dict(attrs))
        labels = " ".join(name for name in coords if name != schema.SAMPLE)
        extra = {"coordinates": labels} if labels else {}
        create_array(
            losses, schema.LOSS, (chains, draws, samples), (one, depth, width), attrs=extra
        )
        create_array(losses, schema.CENTER_LOSS, (samples,), (samples,), attrs=extra)[:] = (
            center_loss
        )
        for name, values in coords.items():
            _create_coord(losses, name, values)
        stats = root.create_group(schema.SAMPLE_STATS)
        for spec in schema.STATS:
            create_array(stats, spec, (chains, draws), (one, depth))
        create_array(
            root.create_group(schema.STATE),
            schema.PARAMETERS,
            (chains, 2, state_size),
            (1, 1, min(state_size, _STATE_CHUNK)),
            dtype=state_dtype,
        )
        fields = {"fields": ["draws", "step", "slot"]}
        commit = root.create_group(schema.COMMIT)
        create_array(commit, schema.RECORD, (chains, 3), (1, 3), attrs=fields)
        update_mark(root, **{schema.LOSSES: dict(fingerprint)})
    return root


def _create_coord(group: zarr.Group, name: str, values: np.ndarray) -> None:
    text = values.dtype.kind == "T"
    array = group.create_array(
        name,
        shape=values.shape,
        chunks=values.shape,
        dtype=str if text else values.dtype,
        compressors=None if text else CODECS,
        dimension_names=(schema.SAMPLE,),
        config=_WRITE_ALL,
    )
    array[:] = values


def stored_fingerprint(root: zarr.Group) -> dict[str, Any] | None:
    """Return the settings that the stored losses were made with, ``None`` before that."""
    return dict(root.attrs[MARK]).get(schema.LOSSES)  # type: ignore[arg-type, return-value]


def drop_unfinished(root: zarr.Group) -> None:
    """Remove the groups of a store whose making was interrupted: they hold no draw."""
    if stored_fingerprint(root) is not None:
        raise StoreError(f"{describe(root.store)} holds losses; nothing was removed")
    for name in schema.GROUPS:
        sync(root.store.delete_dir(name))  # even where its metadata was removed already


def grow(root: zarr.Group, *, chains: int, draws: int) -> None:
    """Enlarge the arrays to at least ``chains`` and ``draws``; nothing stored is touched."""
    loss = stored(root, schema.LOSSES, schema.LOSS)
    want = {schema.CHAIN: max(chains, loss.shape[0]), schema.DRAW: max(draws, loss.shape[1])}
    arrays = [(stored(root, group, spec), spec.dims) for group, spec in _GROWING]
    grown = [
        (array, tuple(max(n, want.get(dim, n)) for dim, n in zip(dims, array.shape, strict=True)))
        for array, dims in arrays
    ]
    if all(shape == array.shape for array, shape in grown):
        return
    new = want[schema.CHAIN] * want[schema.DRAW] - loss.shape[0] * loss.shape[1]
    _require_space(root.store, 4 * new * loss.shape[2])
    with writing(root.store, safe="Nothing that was stored is lost"):
        root.update_attributes({})  # drops the consolidated metadata, which would be stale
        for array, shape in grown:
            if shape != array.shape:
                array.resize(shape)


#: Arrays that grow with chains and draws. The losses come last: readers take their sizes and
#: cut the others to them, so that a kill in between is harmless.
_GROWING = (
    (schema.COMMIT, schema.RECORD),
    (schema.STATE, schema.PARAMETERS),
    *((schema.SAMPLE_STATS, spec) for spec in schema.STATS),
    (schema.LOSSES, schema.LOSS),
)


def finish(root: zarr.Group) -> None:
    """Consolidate the metadata, so that plain readers open the store in one read."""
    if root.store.supports_consolidated_metadata:
        with writing(root.store, safe="Every draw is stored"), warnings.catch_warnings():
            # Zarr warns that version 3 leaves it unspecified; readers without it just ignore it.
            warnings.simplefilter("ignore", ZarrUserWarning)
            zarr.consolidate_metadata(root.store, zarr_format=3)


def stored(root: zarr.Group, group: str, spec: VariableSpec) -> zarr.Array:
    """Return the stored array of ``spec``, which writes chunks of nothing but zeros too."""
    array = root[f"{group}/{spec.name}"]
    assert isinstance(array, zarr.Array)
    whole: zarr.Array = array.with_config(_WRITE_ALL)
    return whole


def _require_space(store: Store, needed: int) -> None:
    folder = local_path(store)
    if folder is None:
        return
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise StoreError(
            f"{describe(store)} would grow by {needed / 1e9:.2f} GB, but the disk has "
            f"{free / 1e9:.2f} GB free; observe fewer samples, take fewer draws, or choose "
            "another disk"
        )
