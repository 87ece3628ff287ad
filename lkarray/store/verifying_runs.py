"""The checks of a sampled run: its groups, and of each chain all that its record counts."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import partial

import numpy as np
import zarr

from lkarray import schema
from lkarray.errors import DamagedError
from lkarray.store.checksums import json_digest
from lkarray.store.chunks import chunk_key, chunk_keys, digests, read
from lkarray.store.commit import Record
from lkarray.store.digests import Digests, Latest
from lkarray.store.fingerprints import hash_labels
from lkarray.store.layout import (
    carried_paths,
    center_path,
    centered_names,
    loss_groups,
    recorded_names,
    recorded_paths,
    run_groups,
    stored_fingerprint,
)
from lkarray.store.location import is_sealed
from lkarray.store.names import folders
from lkarray.store.nodes import node_at, stored_at
from lkarray.store.problems import Problem
from lkarray.store.reading import changed_settings
from lkarray.store.seals import seal_of, stored_metadata
from lkarray.store.verifying_pieces import (
    check_chunk,
    chunk_problems,
    group_problems,
    guarded,
    misplaced,
    unreadable,
)

_RECORD = f"{schema.COMMIT}/{schema.RECORD.name}"
_LATEST = f"{schema.COMMIT}/{schema.LATEST.name}"
_BLOCKS = f"{schema.COMMIT}/{schema.BLOCKS.name}"
#: Zarr's name for a copy of what lies below a node, and what it writes where nothing does.
_COPY = "consolidated_metadata"
_NO_COPY = {"kind": "inline", "must_understand": False, "metadata": {}}
_FLAGS = f"{schema.SAMPLE_STATS}/{schema.DIVERGED.name}"


def run_problems(root: zarr.Group) -> Iterator[Problem]:
    """Check a sampled run, each of its pieces whatever is wrong with the others."""
    arrays: dict[str, zarr.Array] = {}
    broken: set[str] = set()
    for path in run_groups(root):
        problems = list(guarded(f"{path}/zarr.json", partial(_group, root, path)))
        yield from problems
        broken |= {problem.path for problem in problems}
    expected = _expected(root)
    for path in expected:
        try:
            array = node_at(root, path)
        except DamagedError as error:
            if f"{path}/zarr.json" not in broken:
                yield unreadable(path, error)
            continue
        if not isinstance(array, zarr.Array):
            yield Problem("mismatch", path, "expected an array, but it is a group")
        elif f"{path}/zarr.json" not in broken:
            arrays[path] = array
    yield from guarded(schema.LOSSES, partial(_shapes, arrays, expected))
    yield from _chains(root, arrays)


def _expected(root: zarr.Group) -> dict[str, tuple[str, ...]]:
    """Return the paths of all arrays of a run that are of known names, and their first dims."""
    dims = recorded_paths(root) | carried_paths(root)
    for group in loss_groups(root):
        for name in centered_names(root):
            dims[center_path(f"{group}/{name}")] = schema.CENTER_LOSS.dims
    specs = (schema.RECORD, schema.LATEST, schema.BLOCKS) if is_sealed(root) else (schema.RECORD,)
    return dims | {f"{schema.COMMIT}/{spec.name}": spec.dims for spec in specs}


def _group(root: zarr.Group, path: str) -> Iterator[Problem]:
    """Check a group's metadata and seal, and what of it was written once: labels, losses at w*."""
    sealed = list(group_problems(root, path, sealed=is_sealed(root)))
    metadata = {problem.path for problem in sealed if problem.path.endswith("zarr.json")}
    yield from (problem for problem in sealed if problem.path in metadata)
    if path not in loss_groups(root):
        return
    faults = []
    labels = {}
    grows = recorded_names(root)
    centers = {schema.at_center(name) for name in centered_names(root)}
    for name in folders(root.store, path):
        at = f"{path}/{name}"
        if f"{at}/zarr.json" in metadata or name in grows:
            continue
        try:
            array = node_at(root, at)
        except DamagedError as error:
            yield unreadable(at, error)
            continue
        if isinstance(array, zarr.Array):
            bad = list(chunk_problems(array, ()))
            faults += bad
            if name not in centers and not bad:
                labels[name] = read(array, ...)
    faults += misplaced(sealed, faults)
    yield from faults
    node = node_at(root, path)
    if not metadata and isinstance(node, zarr.Group):
        for name, known, now in changed_settings(root, node):
            detail = f"attribute {name!r} is {now!r}, but the run was made with {known!r}"
            yield Problem("mismatch", f"{path}/zarr.json", detail)
        known = (stored_fingerprint(root) or {}).get("coords", {}).get(path)
        if known is not None and not faults and hash_labels(labels) != known:
            yield Problem("mismatch", path, "its labels are not those that the run was made with")


def _shapes(
    arrays: dict[str, zarr.Array], expected: dict[str, tuple[str, ...]]
) -> Iterator[Problem]:
    loss = arrays.get(f"{schema.LOSSES}/{schema.LOSS.name}")
    if loss is None:
        return
    common = dict(zip(schema.LOSS.dims[:2], loss.shape, strict=False))
    for path, array in arrays.items():
        dims, sizes = expected[path], common
        own = arrays.get(f"{path.split('/')[0]}/{schema.LOSS.name}")
        if schema.SAMPLE in dims and own is not None and own.ndim > 2:
            sizes = common | {schema.SAMPLE: own.shape[2]}
        # An array that is larger than the losses is one whose growth was killed: no fault.
        fits = array.ndim >= len(dims) and all(
            got == sizes.get(dim, got) or (dim in schema.POSTERIOR and got > sizes[dim])
            for dim, got in zip(dims, array.shape, strict=False)
        )
        if not fits:
            detail = f"shape {array.shape} does not fit dims {dims} of {sizes}"
            yield Problem("mismatch", f"{array.path}/zarr.json", detail)


def _chains(root: zarr.Group, arrays: dict[str, zarr.Array]) -> Iterator[Problem]:
    run = counted_run(root, arrays)
    if run is None:
        return
    chains = next(iter(run.recorded.values())).shape[0]
    yield from guarded(_RECORD, partial(_beyond, arrays[_RECORD], chains))
    for chain in range(chains):
        yield from guarded(f"{_RECORD} of chain {chain}", partial(run.chain, chain))


def counted_run(root: zarr.Group, arrays: dict[str, zarr.Array] | None = None) -> CountedRun | None:
    """Return a run with those of its arrays that can be opened; ``None`` without its records."""
    arrays = open_arrays(root) if arrays is None else arrays
    recorded = {path: arrays[path] for path in recorded_paths(root) if path in arrays}
    if _RECORD not in arrays or not recorded:
        return None
    known = None
    if {_LATEST, _BLOCKS} <= set(arrays) and len(recorded) == len(recorded_paths(root)):
        try:
            known = Digests.of(root)
        except DamagedError:  # of an array that is named by itself
            known = None
    return CountedRun(root, arrays, recorded, known)


def open_arrays(root: zarr.Group) -> dict[str, zarr.Array]:
    """Return the arrays of a run whose metadata can be read, by path."""
    arrays = {}
    for path in _expected(root):
        with suppress(DamagedError):
            arrays[path] = stored_at(root, path)
    return arrays


def _beyond(record: zarr.Array, chains: int) -> Iterator[Problem]:
    """Find records of chains that the arrays have no room for, as an edited shape leaves them."""
    for name in folders(record.store, f"{record.path}/c"):
        chain = int(name)
        if chain >= record.shape[0] or (chain >= chains and int(read(record, (chain, 0)))):
            key = f"{record.path}/c/{name}/0"
            yield Problem("mismatch", key, f"chain {chain} of {chains} has a record")


@dataclass(frozen=True)
class CountedRun:
    """The arrays of a run that can be opened, and the checksums that its commits left."""

    root: zarr.Group
    arrays: dict[str, zarr.Array]
    recorded: dict[str, zarr.Array]
    known: Digests | None

    def chain(self, chain: int) -> Iterator[Problem]:
        """Check all that the record of a chain counts."""
        array = self.arrays[_RECORD]
        faults = list(chunk_problems(array, (chain,), optional=not is_sealed(self.root)))
        yield from faults
        if faults:
            return
        yield from self.counted(chain, Record(*map(int, np.asarray(array[chain]))))

    def counted(self, chain: int, record: Record) -> Iterator[Problem]:
        """Check all that such a record of a chain would count."""
        array = self.arrays[_RECORD]
        sizes = {path: array.shape[1] for path, array in self.recorded.items()}
        shortest = min(sizes, key=lambda path: sizes[path])
        if record.slot not in (0, 1) or not 0 <= record.draws <= sizes[shortest]:
            detail = f"chain {chain} has {record.draws} draws, but {shortest} {sizes[shortest]}"
            yield Problem("mismatch", array.path, detail)
            return
        latest = None
        if self.known is not None and record.step:
            outcome = self._latest(self.known, chain, record)
            latest = outcome if isinstance(outcome, Latest) else None
            if isinstance(outcome, Problem):
                yield outcome
        for path in carried_paths(self.root) if record.step else ():
            if path in self.arrays:
                expected = latest.state[path.split("/")[1]] if latest else None
                yield from self._compare(self.arrays[path], (chain, record.slot), expected)
        depth = next(iter(self.recorded.values())).chunks[1]
        for block in range(-(-record.draws // depth)):
            yield from self._block(chain, block, record, latest, depth)

    def _latest(self, known: Digests, chain: int, record: Record) -> Latest | Problem:
        key = known.latest_key(chain, record.slot)
        faults = list(chunk_problems(known.latest, (chain, record.slot)))
        if faults:
            return faults[0]
        latest = known.read_latest(chain, record.slot)
        if latest is None:
            return Problem("mismatch", key, "it is that of another chain or slot")
        if (latest.draws, latest.step) != (record.draws, record.step):
            detail = (
                f"the record of chain {chain} counts {record.draws} draws and {record.step} steps, "
                f"the checksums beside it are of {latest.draws} draws and {latest.step} steps"
            )
            return Problem("mismatch", chunk_key(self.arrays[_RECORD], (chain, 0)), detail)
        return latest

    def _block(
        self, chain: int, block: int, record: Record, latest: Latest | None, depth: int
    ) -> Iterator[Problem]:
        stop = min((block + 1) * depth, record.draws)
        rows = slice(block * depth, stop)
        expected = None
        if self.known is not None and stop == (block + 1) * depth:
            faults = list(chunk_problems(self.known.blocks, (chain, block)))
            yield from faults
            expected = None if faults else self.known.read_block(chain, block)
            if expected is None and not faults:
                key = self.known.block_key(chain, block)
                yield Problem("mismatch", key, "it is that of another chain or block")
        elif latest is not None:
            expected = latest.block
        for path, array in self.recorded.items():
            digest = expected[path] if expected is not None else None
            whole = stop == (block + 1) * depth
            faults = list(self._compare(array, (chain, block), digest, None if whole else rows))
            losses = path.startswith(schema.LOSSES) and _FLAGS in self.arrays
            if losses and all(fault.kind == "mismatch" for fault in faults):
                center = self.arrays.get(center_path(path))
                bad = list(_finite(array, center, self.arrays[_FLAGS], chain, rows))
                faults = bad or faults  # which says more
            yield from faults

    def _compare(
        self,
        array: zarr.Array,
        at: tuple[int, int],
        expected: np.ndarray | None,
        rows: slice | None = None,
    ) -> Iterator[Problem]:
        """Check the chunks of a chain's block or slot; ``rows`` are the draws of an open block."""
        keys = chunk_keys(array, at)
        places = list(np.ndindex(array.cdata_shape[2:]))
        moved = []
        for number, (key, rest) in enumerate(zip(keys, places, strict=True)):
            outcome = check_chunk(array, key, (*at, *rest))
            if isinstance(outcome, Problem):
                yield outcome
            elif expected is not None and outcome != int(expected[number]):
                moved.append(number)
        if moved and rows is not None and expected is not None:
            # A commit that was cut off leaves more draws than count: only those that do matter.
            try:
                now = digests(array, at, read(array, (at[0], rows)))
            except DamagedError:  # of a chunk beside it, named above
                now = None
            moved = [n for n in moved if now is not None and now[n] != expected[n]]
        for number in moved:
            detail = "the chunk is whole, but not the one that was committed there"
            yield Problem("mismatch", keys[number], detail)


def _finite(
    loss: zarr.Array, center: zarr.Array | None, flags: zarr.Array, chain: int, rows: slice
) -> Iterator[Problem]:
    width = loss.chunks[2]
    for start in range(0, loss.shape[2], width):
        try:
            values = read(loss, (chain, rows, slice(start, start + width)))
            flagged = read(flags, (chain, rows))
        except DamagedError:  # of a chunk that is named by itself
            return
        padding = _padding(center, slice(start, start + width)) if loss.ndim > 3 else False
        bad = ~(np.isfinite(values) | padding).all(axis=tuple(range(1, values.ndim)))
        bad &= ~flagged
        if bad.any():
            draw = rows.start + int(np.argmax(bad))
            name = loss.path.split("/")[-1]
            what = "losses" if name == schema.LOSS.name else name
            detail = f"non-finite {what} at chain {chain}, draw {draw}, not flagged as diverged"
            key = chunk_keys(loss, (chain, rows.start // loss.chunks[1]))
            per_width = len(key) // loss.cdata_shape[2]
            yield Problem("mismatch", key[start // width * per_width], detail)
            return


def _padding(center: zarr.Array | None, samples: slice) -> np.ndarray | bool:
    """Return which losses of tokens are padding: those that are NaN at w* too."""
    if center is None:
        return False
    try:
        return np.isnan(read(center, samples))
    except DamagedError:  # of a chunk that is named by itself
        return False


def consolidated_problems(root: zarr.Group) -> Iterator[Problem]:
    """Compare the root's copy of metadata, which plain readers take, with the real ones.

    Those of runs and features: of results and training runs a kill may leave the copy stale.
    """
    copy = stored_metadata(root).get(_COPY)
    if not copy:
        return
    if copy | {"metadata": {}} != _NO_COPY:
        yield Problem("mismatch", "zarr.json", f"its {_COPY} is not as Zarr writes it")
    groups = [] if stored_fingerprint(root) is None else run_groups(root)
    for path, copied in copy["metadata"].items():
        if path.split("/")[0] not in (*groups, schema.FEATURES):
            continue
        try:
            node = node_at(root, path)
            real = stored_metadata(node)
        except DamagedError:  # named by itself
            continue
        same = copied.pop(_COPY, _NO_COPY) == _NO_COPY
        real.pop(_COPY, None)
        sealed = isinstance(node, zarr.Array) or seal_of(node) is not None
        if sealed and not (same and json_digest(copied) == json_digest(real)):
            detail = f"its copy of the metadata of {path} differs from {path}/zarr.json"
            yield Problem("mismatch", "zarr.json", detail)
