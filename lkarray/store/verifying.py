"""Is everything that counts really there? Every chunk is read and checked."""

from __future__ import annotations

from collections.abc import Container, Iterator
from math import prod
from typing import NamedTuple

import numpy as np
import zarr
from zarr.codecs import BytesCodec, Crc32cCodec
from zarr.core.buffer import default_buffer_prototype
from zarr.core.sync import sync

from lkarray import schema
from lkarray.errors import DamagedError, StoreError
from lkarray.store.audits import audit_marks, committed_panels
from lkarray.store.commit import Record, chunk_keys, read_record
from lkarray.store.gradients import committed_shards, gradient_marks
from lkarray.store.layout import (
    carried_paths,
    loss_groups,
    part_store,
    parts_of,
    recorded_paths,
    stored_fingerprint,
)
from lkarray.store.location import StoreLike, open_root
from lkarray.store.reading import derived_groups
from lkarray.store.trajectory import committed_chunks, trace_fingerprint


class Problem(NamedTuple):
    """One fault of a store.

    Attributes
    ----------
    kind
        ``missing``, ``truncated``, ``corrupt`` or ``mismatch``.
    path
        The piece: a chunk's key, or an array's or group's path.
    detail
        What was expected and what was found.
    """

    kind: str
    path: str
    detail: str

    def __str__(self) -> str:
        return f"{self.kind}: {self.path}: {self.detail}"


def verify(path: StoreLike) -> list[Problem]:
    """Check that every chunk that the store's records imply is whole.

    Reads every committed chunk once, one at a time. A store that is still being written may
    be verified: only what is committed is required.

    Parameters
    ----------
    path
        A folder, a URL or a Zarr store.

    Returns
    -------
    list of Problem
        One for each missing, truncated, corrupt or mismatching piece, with its path; empty
        for a sound store.

    Raises
    ------
    StoreError, StoreVersionError
        There is no store that could be verified.
    """
    try:
        root = open_root(path)
    except DamagedError as error:
        return [Problem("corrupt", "zarr.json", str(error))]
    parts = parts_of(root)
    if parts is not None:
        problems = []
        for label in parts["labels"]:
            at = f"{parts['dim']}/{label}"
            try:
                found = verify(part_store(root.store, parts["dim"], label))
            except StoreError as error:
                found = [Problem("missing", "zarr.json", str(error))]
            problems += [p._replace(path=f"{at}/{p.path}") for p in found]
        return problems
    others = [*_derived(root), *_training(root)]
    if stored_fingerprint(root) is not None:
        return [*_problems(root), *others]
    made = trace_fingerprint(root) or gradient_marks(root) or audit_marks(root)
    if not made and not derived_groups(root):
        return [Problem("missing", schema.LOSSES, "sampling was stopped before it began")]
    return others


def _training(root: zarr.Group) -> Iterator[Problem]:
    """Check the committed steps of a training run, and the finished shards of its tensors."""
    try:
        expected = list(committed_chunks(root)) if trace_fingerprint(root) is not None else []
        for group in gradient_marks(root):
            expected += committed_shards(root, group)
        for group in audit_marks(root):
            expected += committed_panels(root, group)
    except (KeyError, ValueError) as error:
        yield Problem("missing", schema.TRAJECTORY, f"metadata cannot be read ({error})")
        return
    for array, leading in expected:
        yield from _chunks(array, leading)


def _problems(root: zarr.Group) -> Iterator[Problem]:
    arrays: dict[str, zarr.Array] = {}
    expected = _expected(root)
    for name in expected:
        found = _open_array(root, name)
        if isinstance(found, Problem):
            yield found
        else:
            arrays[name] = found
    if len(arrays) < len(expected):
        return
    yield from _shapes(arrays, expected)
    yield from _whole_arrays(root, arrays)
    loss = arrays[f"{schema.LOSSES}/{schema.LOSS.name}"]
    record_array = arrays[f"{schema.COMMIT}/{schema.RECORD.name}"]
    for chain in range(loss.shape[0]):
        faults = list(_chunks(record_array, (chain,), optional=True))
        yield from faults
        if faults:
            continue
        record = read_record(root, chain)
        if record.draws > loss.shape[1]:
            detail = f"chain {chain} has {record.draws} draws, but the array {loss.shape[1]}"
            yield Problem("mismatch", record_array.path, detail)
        else:
            yield from _chain(root, arrays, chain, record)


def _open_array(root: zarr.Group, name: str) -> zarr.Array | Problem:
    try:
        found = root[name]
    except KeyError:
        return Problem("missing", f"{name}/zarr.json", "no such array")
    except Exception as error:  # zarr names no common base for broken metadata
        return Problem("corrupt", f"{name}/zarr.json", f"metadata cannot be read ({error})")
    if not isinstance(found, zarr.Array):
        return Problem("mismatch", name, "expected an array, found a group")
    return found


def _expected(root: zarr.Group) -> dict[str, tuple[str, ...]]:
    """Return the paths of all arrays of a run, and their first dims."""
    found = recorded_paths(root) | carried_paths(root)
    for group in loss_groups(root):
        found[f"{group}/{schema.CENTER_LOSS.name}"] = schema.CENTER_LOSS.dims
    return found | {f"{schema.COMMIT}/{schema.RECORD.name}": schema.RECORD.dims}


def _shapes(
    arrays: dict[str, zarr.Array], expected: dict[str, tuple[str, ...]]
) -> Iterator[Problem]:
    common = dict(zip(schema.LOSS.dims[:2], arrays["losses/loss"].shape, strict=False))
    for path, dims in expected.items():
        array, sizes = arrays[path], common
        group = path.split("/")[0]
        if schema.SAMPLE in dims and arrays[f"{group}/{schema.LOSS.name}"].ndim > 2:
            sizes = common | {schema.SAMPLE: arrays[f"{group}/{schema.LOSS.name}"].shape[2]}
        # An array that is larger than the losses is one whose growth was killed: no fault.
        fits = array.ndim >= len(dims) and all(
            got == sizes.get(dim, got) or (dim in schema.POSTERIOR and got > sizes[dim])
            for dim, got in zip(dims, array.shape, strict=False)
        )
        if not fits:
            detail = f"shape {array.shape} does not fit dims {dims} of {sizes}"
            yield Problem("mismatch", array.path, detail)


def _whole_arrays(root: zarr.Group, arrays: dict[str, zarr.Array]) -> Iterator[Problem]:
    """Check the arrays that are written at once: coordinates and center losses."""
    for group in loss_groups(root):
        yield from _chunks(arrays[f"{group}/{schema.CENTER_LOSS.name}"], ())
        yield from _of_group(root, group, arrays)


def _derived(root: zarr.Group) -> Iterator[Problem]:
    """Check the results that the store keeps, whatever it holds besides."""
    for group in derived_groups(root):
        yield from _of_group(root, group, ())


def _of_group(root: zarr.Group, group: str, known: Container[str]) -> Iterator[Problem]:
    """Check the arrays of a group, but for those that are known."""
    node = root[group]
    assert isinstance(node, zarr.Group)
    for name in sorted(node.array_keys()):
        if f"{group}/{name}" not in known:
            found = _open_array(root, f"{group}/{name}")
            problems = [found] if isinstance(found, Problem) else _chunks(found, ())
            yield from (p for p in problems if not _left_out(found, p))


def _left_out(array: zarr.Array | Problem, problem: Problem) -> bool:
    """Say whether a missing chunk is one below the diagonal of a kernel saved as a triangle."""
    if isinstance(array, Problem) or array.attrs.get("triangle") != "upper":
        return False
    i, j = map(int, problem.path.split("/")[-2:])
    return problem.kind == "missing" and i > j


def _chain(
    root: zarr.Group, arrays: dict[str, zarr.Array], chain: int, record: Record
) -> Iterator[Problem]:
    depth = arrays[f"{schema.LOSSES}/{schema.LOSS.name}"].chunks[1]
    flags = arrays[f"{schema.SAMPLE_STATS}/{schema.DIVERGED.name}"]
    for path in carried_paths(root) if record.step else ():
        yield from _chunks(arrays[path], (chain, record.slot))
    for block in range(-(-record.draws // depth)):
        rows = slice(block * depth, min((block + 1) * depth, record.draws))
        for path in recorded_paths(root):
            faults = list(_chunks(arrays[path], (chain, block)))
            yield from faults
            if not faults and path.endswith(f"/{schema.LOSS.name}"):
                center = arrays[f"{path.split('/')[0]}/{schema.CENTER_LOSS.name}"]
                yield from _finite(arrays[path], center, flags, chain, rows)


def _finite(
    loss: zarr.Array, center: zarr.Array, flags: zarr.Array, chain: int, rows: slice
) -> Iterator[Problem]:
    width = loss.chunks[2]
    for start in range(0, loss.shape[2], width):
        values = np.asarray(loss[chain, rows, start : start + width])
        padding = _padding(center, slice(start, start + width)) if loss.ndim > 3 else False
        bad = ~(np.isfinite(values) | padding).all(axis=tuple(range(1, values.ndim)))
        bad &= ~np.asarray(flags[chain, rows])
        if bad.any():
            draw = rows.start + int(np.argmax(bad))
            detail = f"non-finite losses at chain {chain}, draw {draw}, not flagged as diverged"
            yield Problem("mismatch", f"{loss.path} samples {start}...", detail)
            return


def _padding(center: zarr.Array, samples: slice) -> np.ndarray | bool:
    """Return which losses of tokens are padding: those that are NaN at w* too."""
    try:
        out: np.ndarray = np.isnan(np.asarray(center[samples]))
        return out
    except Exception:  # damaged, which is told of the array itself
        return False


def _chunks(
    array: zarr.Array, leading: tuple[int, ...], *, optional: bool = False
) -> Iterator[Problem]:
    """Check the chunks whose first indices are ``leading``: there, of full length, sound."""
    raw = isinstance(array.serializer, BytesCodec) and all(
        isinstance(codec, Crc32cCodec) for codec in array.compressors
    )
    expected = prod(array.chunks) * array.dtype.itemsize + 4 * len(array.compressors)
    for key, at in zip(chunk_keys(array, leading), _indices(array, leading), strict=True):
        buffer = sync(array.store.get(key, default_buffer_prototype()))
        if buffer is None:
            if not optional:
                yield Problem("missing", key, "the chunk was committed, but is not there")
        elif len(buffer) == 0 or (raw and len(buffer) != expected):
            yield Problem("truncated", key, f"{len(buffer)} of {expected if raw else '?'} bytes")
        else:
            try:
                array.blocks[at]
            except Exception as error:  # every codec raises its own
                yield Problem("corrupt", key, str(error).splitlines()[0])


def _indices(array: zarr.Array, leading: tuple[int, ...]) -> Iterator[tuple[int, ...]]:
    for rest in np.ndindex(array.cdata_shape[len(leading) :]):
        yield (*leading, *rest)
