"""When a draw counts: the block, the state in two slots, and the record that decides.

The order of writing (docs/reliability.md) makes a kill at any moment harmless. A block of
losses and statistics is written whole, and its checksums (see `digests`); then the sampler's
state goes to the slot that the record does not name; all of it is flushed to the disk; and only
then the chain's record ``[draws, step, slot]``, one chunk, replaced in one move. What the record
does not count is written again, with the same numbers, by the run that resumes.

What it does count must be there, whole, and what was written, before a chain goes on: else the
damage would be taken up and sealed anew.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Executor, Future
from contextlib import contextmanager
from typing import NamedTuple

import numpy as np
import zarr

from lkarray import schema
from lkarray.errors import StoreError
from lkarray.store.arrays import stored
from lkarray.store.chunks import (
    chunk_keys,
    chunk_size,
    damaged,
    flush,
    missing,
    read,
    read_whole,
    require_chunks,
)
from lkarray.store.digests import Digests, Latest
from lkarray.store.layout import carried, loss_groups, recorded, run_groups, stored_fingerprint
from lkarray.store.location import is_sealed, local_path, writing
from lkarray.store.nodes import group_at, stored_at
from lkarray.store.seals import broken_seals, seal_of

#: A chain commits when a block fills, or after this long and this many times the last cost.
COMMIT_SECONDS = 30.0
_COMMIT_SHARE = 50.0


_DIVERGED = f"{schema.SAMPLE_STATS}/{schema.DIVERGED.name}"


class Record(NamedTuple):
    """What of one chain counts: its draws, the steps taken, and where its state lies."""

    draws: int
    step: int
    slot: int


def read_record(root: zarr.Group, chain: int) -> Record:
    """Return the record of one chain; see `read_records`."""
    return read_records(root, slice(chain, chain + 1))[chain]


def read_records(root: zarr.Group, chains: slice) -> dict[int, Record]:
    """Return the records of some chains; zeros for a chain that never committed.

    Raises
    ------
    DamagedError
        One is missing, though every chain has one, or it cannot be read.
    """
    array = stored(root, schema.COMMIT, schema.RECORD)
    numbers = range(array.shape[0])[chains]
    if is_sealed(root) and stored_fingerprint(root) is not None:
        require_chunks(array, *((chain,) for chain in numbers))
    rows = read(array, chains).tolist()
    return {chain: Record(*row) for chain, row in zip(numbers, rows, strict=True)}


def require_sound(root: zarr.Group, chains: Iterable[int] = ()) -> None:
    """Raise unless a run can be continued: what is sealed is as it was, what counts is there.

    Of the ``chains`` that go on, what they go on from is read and compared too: the state and
    the open block. Of all else only labels and losses at w* are read; `verify` reads everything.

    Raises
    ------
    DamagedError
        The first fault.
    """
    for path in run_groups(root):
        group = group_at(root, path)
        if is_sealed(root) and seal_of(group) is None:
            raise damaged(root.store, f"{path}/zarr.json has lost its seal")
        for problem in broken_seals(group):
            raise damaged(root.store, f"{problem.path}: {problem.detail}")
        if path in loss_groups(root):
            for name in set(group.array_keys()) - {schema.LOSS.name}:
                read_whole(stored_at(root, f"{path}/{name}"))
    arrays, known = recorded(root), Digests.of(root)
    number = stored(root, schema.LOSSES, schema.LOSS).shape[0]
    for chain, record in read_records(root, slice(number)).items():
        if chain in chains:
            ChainRegion(root, chain).state()
        else:
            require_committed(root, chain, record, arrays, known)


def require_committed(
    root: zarr.Group,
    chain: int,
    record: Record,
    arrays: Mapping[str, zarr.Array],
    known: Digests | None,
) -> Latest | None:
    """Raise unless all that a record counts is there; return its checksums, if it has any.

    Raises
    ------
    DamagedError
        A chunk is missing or cut off, or the record is not the one that was written with them.
    """
    name = f"{schema.COMMIT}/{schema.RECORD.name} of chain {chain}"
    first = next(iter(arrays.values()))
    if record.slot not in (0, 1) or not 0 <= record.draws <= first.shape[1]:
        raise damaged(root.store, f"{name} is {list(record)}, which cannot be")
    for array in arrays.values():
        blocks = range(-(-record.draws // array.chunks[1]))
        keys = [key for block in blocks for key in chunk_keys(array, (chain, block))]
        if lost := missing(array.store, keys, size=chunk_size(array)):
            raise damaged(
                root.store,
                f"{lost[0]} was committed, but is missing, empty or cut off ({len(lost)} such "
                f"chunks of {array.path})",
            )
    if known is None or record.step == 0:
        return None
    latest = known.read_latest(chain, record.slot)
    if latest is None:
        key = known.latest_key(chain, record.slot)
        raise damaged(root.store, f"{key} is missing, or another's is in its place")
    if (latest.draws, latest.step) != (record.draws, record.step):
        raise damaged(
            root.store,
            f"{name} counts {record.draws} draws and {record.step} steps, but the checksums "
            f"beside it are of {latest.draws} draws and {latest.step} steps",
        )
    return latest


def empty_rows(arrays: Mapping[str, zarr.Array], depth: int) -> dict[str, np.ndarray]:
    """Return room for the draws of a block, by path: of fill values."""
    return {
        path: np.full((depth, *array.shape[2:]), array.fill_value, array.dtype)
        for path, array in arrays.items()
    }


class ChainRegion:
    """The part of a store that one chain owns: buffered, committed, resumed.

    Parameters
    ----------
    root
        The store, open for writing.
    chain
        Index of the chain.
    executor
        Runs the writing beside the sampling. At most one commit is under way, so memory is
        bounded by two blocks however many draws there are. A region without one only reads.

    Attributes
    ----------
    draws
        Draws that the chain holds, committed or buffered.
    record
        What is committed, as of the resume.
    """

    def __init__(self, root: zarr.Group, chain: int, executor: Executor | None = None) -> None:
        self._root, self._chain, self._executor = root, chain, executor
        self._arrays = recorded(root)
        self._vectors = carried(root)
        self._record = stored(root, schema.COMMIT, schema.RECORD)
        self._digests = Digests.of(root)
        self._depth = stored(root, schema.LOSSES, schema.LOSS).chunks[1]
        self._pending: Future[float] | None = None
        self._last, self._cost = time.monotonic(), 0.0
        self.record = read_record(root, chain)
        self._latest = require_committed(root, chain, self.record, self._arrays, self._digests)
        self.draws = self.record.draws
        self._committed = self.record
        self._open_block(self.draws // self._depth * self._depth)
        self._refill()

    def _open_block(self, start: int) -> None:
        self._start, self._rows = start, empty_rows(self._arrays, self._depth)

    def _refill(self) -> None:
        kept = slice(self._start, self.draws)
        count = self.draws - self._start
        if not count:
            return
        for path, array in self._arrays.items():
            self._rows[path][:count] = read(array, (self._chain, kept))
        if self._digests is not None and self._latest is not None:
            at = self._chain, self._start // self._depth
            rows = {path: values[:count] for path, values in self._rows.items()}
            self._compare(self._arrays, at, self._digests.of_block(*at, rows), self._latest.block)

    def _compare(
        self,
        arrays: Mapping[str, zarr.Array],
        at: tuple[int, int],
        now: Mapping[str, np.ndarray],
        known: Mapping[str, np.ndarray],
    ) -> None:
        for name, array in arrays.items():
            differ = np.flatnonzero(now[name] != known[name])
            if len(differ):
                key = chunk_keys(array, at)[int(differ[0])]
                raise damaged(self._root.store, f"{key} is not the chunk that was committed")

    def state(self) -> dict[str, np.ndarray] | None:
        """Return the vectors carried at the last commit, by name; ``None`` at the start.

        Raises
        ------
        DamagedError
            A vector is missing or damaged, or not the one that was committed.
        """
        if self.record.step == 0:
            return None
        at = self._chain, self.record.slot
        vectors = {}
        for name, array in self._vectors.items():
            require_chunks(array, at)
            vectors[name] = read(array, at)
        if self._digests is not None and self._latest is not None:
            now = self._digests.of_state(*at, vectors)
            self._compare(self._vectors, at, now, self._latest.state)
        return vectors

    def diverged(self) -> bool:
        """Say whether the last draw was flagged as non-finite."""
        if self.draws == 0:
            return False
        if self.draws > self._start:
            return bool(self._rows[_DIVERGED][self.draws - self._start - 1])
        return bool(read(self._arrays[_DIVERGED], (self._chain, self.draws - 1)))

    @property
    def committed(self) -> Record:
        """What was handed to the writer last; on disk after `wait`."""
        return self._committed

    def uncommitted(self) -> int:
        """Return how many draws are buffered and not yet handed to the writer."""
        return self.draws - self._committed.draws

    def room(self) -> int:
        """Return how many draws the open block still takes."""
        return self._start + self._depth - self.draws

    def append(self, row: Mapping[str, np.ndarray | float | bool]) -> None:
        """Add one draw, by the paths of the arrays, to the open block; others stay missing."""
        at = self.draws - self._start
        for path, value in row.items():
            self._rows[path][at] = value
        self.draws += 1

    def due(self) -> bool:
        """Say whether it is time to commit."""
        if self.room() == 0:
            return True
        pause = max(COMMIT_SECONDS, _COMMIT_SHARE * self._cost)
        return time.monotonic() - self._last >= pause

    def commit(self, step: int, state: Mapping[str, np.ndarray]) -> None:
        """Hand everything so far to the writer; ``state`` must not change afterwards.

        Raises
        ------
        StoreError
            This or an earlier commit could not be written.
        """
        assert self._executor is not None, "a region that only reads"
        self.wait()
        full = self.room() == 0
        rows = self._rows if full else {path: row.copy() for path, row in self._rows.items()}
        record = Record(self.draws, step, 1 - self._committed.slot)
        self._pending = self._executor.submit(self._write, self._start, rows, state, record)
        self._committed, self._last = record, time.monotonic()
        if full:
            self._open_block(self._start + self._depth)

    def wait(self) -> None:
        """Wait until the commit under way is on disk."""
        if self._pending is not None:
            self._cost = self._pending.result()
            self._pending = None

    def _write(
        self,
        start: int,
        rows: Mapping[str, np.ndarray],
        state: Mapping[str, np.ndarray],
        record: Record,
    ) -> float:
        began = time.monotonic()
        safe = "The draws committed before are safe; run again to resume"
        with _there(self._root, self._arrays), writing(self._root.store, safe=safe):
            block, chain = start // self._depth, self._chain
            keys: list[str] = []
            if record.draws > start:
                for path, array in self._arrays.items():
                    stop = min(start + self._depth, array.shape[1])
                    array[chain, start:stop] = rows[path][: stop - start]
                    keys += chunk_keys(array, (chain, block))
            if self._digests is not None:
                keys += self._write_digests(self._digests, start, rows, state, record)
            for name, array in self._vectors.items():
                array[chain, record.slot] = state[name]
                keys += chunk_keys(array, (chain, record.slot))
            flush(self._root.store, keys)
            self._record[chain] = record
            flush(self._root.store, chunk_keys(self._record, (chain,)))
        return time.monotonic() - began

    def _write_digests(
        self,
        to: Digests,
        start: int,
        rows: Mapping[str, np.ndarray],
        state: Mapping[str, np.ndarray],
        record: Record,
    ) -> list[str]:
        chain, block = self._chain, start // self._depth
        checksums, keys = to.no_block(), []
        if record.draws > start:
            kept = {path: values[: record.draws - start] for path, values in rows.items()}
            checksums = to.of_block(chain, block, kept)
            if record.draws == start + self._depth:
                keys.append(to.write_block(chain, block, checksums))
        carried = to.of_state(chain, record.slot, state)
        row = Latest(chain, record.slot, record.draws, record.step, carried, checksums)
        return [*keys, to.write_latest(row)]


@contextmanager
def _there(root: zarr.Group, arrays: Iterable[str]) -> Iterator[None]:
    """Raise `StoreError` where a local store was deleted meanwhile: writing would make it anew."""
    folder = local_path(root.store)

    def look() -> None:
        if folder is None:
            return
        if not (folder / "zarr.json").exists():
            raise StoreError(
                f"{folder} was deleted or moved while it was sampled, and its draws with it. Move "
                "it back, or sample again"
            )
        gone = [path for path in arrays if not (folder / path / "zarr.json").exists()]
        if gone:
            raise StoreError(
                f"parts of {folder} were deleted while it was sampled: {gone}. Restore them from a "
                "copy; draws in the files that are left are not touched, and lk.verify says what "
                "is missing"
            )

    look()
    try:
        yield
    except StoreError:
        look()
        raise
    look()
