"""When a draw counts: the block, the state in two slots, and the record that decides.

The order of writing (design section 2) makes a kill at any moment harmless. A block of
losses and statistics is written whole; then the sampler's state goes to the slot that the
record does not name; all of it is flushed to the disk; and only then the chain's record
``[draws, step, slot]``, one chunk, replaced in one move. What the record does not count is
written again, with the same numbers, by the run that resumes.
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
from lkarray.store.chunks import chunk_keys, flush
from lkarray.store.layout import carried, recorded, stored
from lkarray.store.location import local_path, writing

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
    """Return the record of one chain; zeros for a chain that never committed."""
    row = np.asarray(stored(root, schema.COMMIT, schema.RECORD)[chain])
    return Record(*(int(value) for value in row))


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
        bounded by two blocks however many draws there are.

    Attributes
    ----------
    draws
        Draws that the chain holds, committed or buffered.
    record
        What is committed, as of the resume.
    """

    def __init__(self, root: zarr.Group, chain: int, executor: Executor) -> None:
        self._root, self._chain, self._executor = root, chain, executor
        self._arrays = recorded(root)
        self._vectors = carried(root)
        self._record = stored(root, schema.COMMIT, schema.RECORD)
        self._depth = stored(root, schema.LOSSES, schema.LOSS).chunks[1]
        self._pending: Future[float] | None = None
        self._last, self._cost = time.monotonic(), 0.0
        self.record = read_record(root, chain)
        self.draws = self.record.draws
        self._committed = self.record
        self._open_block(self.draws // self._depth * self._depth)
        self._refill()

    def _open_block(self, start: int) -> None:
        self._start = start
        self._rows = {
            path: np.full((self._depth, *array.shape[2:]), array.fill_value, array.dtype)
            for path, array in self._arrays.items()
        }

    def _refill(self) -> None:
        kept = slice(self._start, self.draws)
        count = self.draws - self._start
        if count:
            for path, array in self._arrays.items():
                self._rows[path][:count] = array[self._chain, kept]

    def state(self) -> dict[str, np.ndarray] | None:
        """Return the vectors carried at the last commit, by name; ``None`` at the start."""
        if self.record.step == 0:
            return None
        slot = self.record.slot
        return {k: np.asarray(array[self._chain, slot]) for k, array in self._vectors.items()}

    def diverged(self) -> bool:
        """Say whether the last draw was flagged as non-finite."""
        if self.draws == 0:
            return False
        if self.draws > self._start:
            return bool(self._rows[_DIVERGED][self.draws - self._start - 1])
        return bool(self._arrays[_DIVERGED][self._chain, self.draws - 1])

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
            for name, array in self._vectors.items():
                array[chain, record.slot] = state[name]
                keys += chunk_keys(array, (chain, record.slot))
            flush(self._root.store, keys)
            self._record[chain] = record
            flush(self._root.store, chunk_keys(self._record, (chain,)))
        return time.monotonic() - began


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
