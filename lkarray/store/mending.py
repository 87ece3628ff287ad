"""What of a damaged store can be put right from what is left of it, and from a replay.

Nothing is taken on trust: metadata are written again only as their seal says they were, and
chunks of chains only when the replayed chain agrees bit for bit with all that is sound of the
stored one.
"""

from __future__ import annotations

import json
from collections.abc import Container, Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np
import zarr
from zarr.core.buffer import default_buffer_prototype
from zarr.core.sync import sync

from lkarray import schema
from lkarray.errors import DamagedError
from lkarray.store.arrays import stored
from lkarray.store.checksums import crc, json_digest
from lkarray.store.chunks import chunk_keys, digests, flush, read, stored_digests
from lkarray.store.commit import Record, empty_rows
from lkarray.store.digests import Digests
from lkarray.store.layout import carried, loss_groups, recorded
from lkarray.store.nodes import group_at, stored_at
from lkarray.store.problems import Problem
from lkarray.store.reading import changed_settings
from lkarray.store.seals import GROWS, SEAL, digest_of, seal_of, stored_metadata
from lkarray.store.verifying_runs import counted_run


class Repair(NamedTuple):
    """What `repair` did about one fault.

    Attributes
    ----------
    path
        The piece, as `verify` names it.
    mended
        Whether it is whole again.
    detail
        What was wrong, and how it was mended, or why it could not be.
    """

    path: str
    mended: bool
    detail: str

    def __str__(self) -> str:
        return f"{'mended' if self.mended else 'not mended'}: {self.path}: {self.detail}"


def mend_metadata(root: zarr.Group, problems: Iterable[Problem]) -> None:
    """Write metadata again from the root's copy of them, where their seal agrees with it."""
    wanted = {p.path.removesuffix("/zarr.json") for p in problems if p.path.endswith("/zarr.json")}
    copy = (stored_metadata(root).get("consolidated_metadata") or {}).get("metadata", {})
    for path in sorted(wanted & set(copy), key=lambda path: path.count("/")):
        entry = {k: v for k, v in copy[path].items() if k != "consolidated_metadata"}
        if _as_sealed(root, copy, path, entry):
            content = default_buffer_prototype().buffer.from_bytes(json.dumps(entry).encode())
            sync(root.store.set(f"{path}/zarr.json", content))
    for group in loss_groups(root):
        try:
            node = group_at(root, group)
        except DamagedError:
            continue
        known = (seal_of(node) or {}).get("attributes", {})
        right = {
            name: value
            for name, value, _ in changed_settings(root, node)
            if known.get(name) in (None, json_digest(value))
        }
        if right:
            node.update_attributes(right)


def _as_sealed(
    root: zarr.Group, copy: Mapping[str, Any], path: str, entry: Mapping[str, Any]
) -> bool:
    """Say whether a copy of a node's metadata is what its seal says."""
    if entry.get("node_type") == "group":
        attributes = entry.get("attributes", {})
        known = attributes.get(SEAL, {}).get("attributes")
        return known is not None and all(
            json_digest(attributes.get(key)) == digest for key, digest in known.items()
        )
    parent, _, name = path.rpartition("/")
    try:
        seal = seal_of(group_at(root, parent))
    except DamagedError:
        seal = copy.get(parent, {}).get("attributes", {}).get(SEAL)
    known = (seal or {}).get("arrays", {}).get(name)
    without = GROWS if (known or {}).get("grows") else ()
    return known is not None and digest_of(entry, without=without) == known["metadata"]


def mend_index(root: zarr.Group, problems: Iterable[Problem]) -> None:
    """Write the ``sample`` index of losses again where it was the positions, as by default."""
    lost = {problem.path.partition("/c/")[0] for problem in problems}
    for group in loss_groups(root):
        path = f"{group}/{schema.SAMPLE}"
        if path in lost:
            try:
                array = stored_at(root, path)
                known = (seal_of(group_at(root, group)) or {})["arrays"][schema.SAMPLE]["content"]
            except (DamagedError, KeyError):
                continue
            mend_whole(array, np.arange(array.shape[0]).astype(array.dtype), known)


def mend_whole(array: zarr.Array, values: np.ndarray, known: int | None) -> bool:
    """Write a lost array again if it is what its seal says; of one without a seal, as it is."""
    if known is not None:
        tails = [int(number).to_bytes(4, "little") for number in digests(array, (), values)]
        if crc(b"".join(tails)) != known:
            return False
    array[...] = values
    flush(array.store, chunk_keys(array))
    return True


def mend_records(root: zarr.Group, problems: Iterable[Problem]) -> None:
    """Write lost records again, from the checksums that lie beside them."""
    run = counted_run(root)
    if run is None or run.known is None:
        return
    array = stored(root, schema.COMMIT, schema.RECORD)
    lost = {problem.path for problem in problems}
    for chain in range(array.shape[0]):
        if not lost & set(chunk_keys(array, (chain,))):
            continue
        rows = []
        for slot in (0, 1):
            try:
                row = run.known.read_latest(chain, slot)
            except DamagedError:
                continue
            if row is not None:
                rows.append(Record(row.draws, row.step, slot))
        rows.sort(key=lambda record: -record.step)
        sound = (record for record in rows if not list(run.counted(chain, record)))
        # Where neither is whole, a replay to the later one mends what is not.
        if record := next(sound, rows[0] if rows else None):
            array[chain] = record
            flush(root.store, chunk_keys(array, (chain,)))


class ChainMender:
    """Stands for a chain's region in a replay from w*: compares, and keeps what is to be mended.

    Parameters
    ----------
    root
        The store, open for writing.
    chain
        Index of the chain.
    until
        Its record: the replay ends there.
    damaged
        Keys of the chunks to write again; all others are compared with the replay.

    Attributes
    ----------
    refused
        Why nothing may be written: what is sound is not what the replay gives.
    """

    def __init__(
        self, root: zarr.Group, chain: int, until: Record, damaged: Container[str]
    ) -> None:
        self._root, self._chain, self._until, self._damaged = root, chain, until, damaged
        self._arrays, self._vectors = recorded(root), carried(root)
        self._known = Digests.of(root)
        self._depth = stored(root, schema.LOSSES, schema.LOSS).chunks[1]
        self.record, self.draws = Record(0, 0, 0), 0
        self.refused: str | None = None
        self._held: list[tuple[zarr.Array, str, tuple[Any, ...], np.ndarray]] = []
        self._agreed, self._steps, self._done = 0, 0, 0
        self._last: dict[str, np.ndarray] = {}
        self._block: dict[str, np.ndarray] | None = None
        self._open_block(0)

    def _open_block(self, start: int) -> None:
        self._start, self._rows = start, empty_rows(self._arrays, self._depth)

    def state(self) -> None:
        """Return no state: a replay begins at w*."""

    def uncommitted(self) -> int:
        """Return how many draws are not yet compared."""
        return self.draws - self._done

    def room(self) -> int:
        """Return how many draws the open block still takes."""
        return self._start + self._depth - self.draws

    def append(self, row: Mapping[str, np.ndarray | float | bool]) -> None:
        """Add one draw of the replay."""
        for path, value in row.items():
            self._rows[path][self.draws - self._start] = value
        self.draws += 1

    def due(self) -> bool:
        """Say whether a block is full, or the record's step was reached; called at each step."""
        self._steps += 1
        return self.room() == 0 or self._steps == self._until.step

    def wait(self) -> None:
        """Return: nothing is under way."""

    def commit(self, step: int, state: Mapping[str, np.ndarray]) -> None:
        """Compare what was replayed so far with what is stored."""
        if self.draws > self._done:
            self._done = self.draws
            full = self.room() == 0
            if full or self.draws == self._until.draws:
                self._compare_block(full)
            if full:
                self._open_block(self.draws)
        if step == self._until.step and not self._last:
            self._last = {name: np.array(vector) for name, vector in state.items()}
            self._compare_state()

    def _compare_block(self, full: bool) -> None:
        at = self._chain, self._start // self._depth
        count = self.draws - self._start
        known, lost = self._stored(at, full)
        replayed = {}
        for path, array in self._arrays.items():
            rows = self._rows[path]
            replayed[path] = digests(array, at, rows[:count])
            stop = min(self._depth, array.shape[1] - self._start)
            place = (self._chain, slice(self._start, self._start + stop))
            expected = None if known is None else known[path]
            self._compare(array, at, replayed[path], expected, place, rows[:stop], count, full)
        self._block = None if full else replayed
        if self._known is not None and full and lost:
            row = np.concatenate([np.array(at), *replayed.values()]).astype(np.uint32)
            self._held.append((self._known.blocks, self._known.block_key(*at), at, row))

    def _stored(self, at: tuple[int, int], full: bool) -> tuple[dict[str, np.ndarray] | None, bool]:
        """Return the checksums kept of a block, and whether they are lost."""
        if self._known is None:
            return None, False
        key = self._known.block_key(*at) if full else self._latest_key()
        if key in self._damaged:
            return None, True
        if full:
            return self._known.read_block(*at), False
        latest = self._known.read_latest(self._chain, self._until.slot)
        return (None if latest is None else latest.block), False

    def _latest_key(self) -> str:
        assert self._known is not None
        return self._known.latest_key(self._chain, self._until.slot)

    def _compare_state(self) -> None:
        at = self._chain, self._until.slot
        known = None
        if self._known is not None and self._latest_key() not in self._damaged:
            known = self._known.read_latest(*at)
        replayed = {}
        for name, array in self._vectors.items():
            values = self._last[name]
            replayed[name] = digests(array, at, values)
            expected = None if known is None else known.state[name]
            self._compare(array, at, replayed[name], expected, at, values, None, True)
        if self._known is not None and self._latest_key() in self._damaged:
            block = self._block if self._block is not None else self._known.no_block()
            numbers = np.array([*at, self._until.draws, self._until.step])
            row = np.concatenate([numbers, *replayed.values(), *block.values()]).astype(np.uint32)
            self._held.append((self._known.latest, self._latest_key(), at, row))

    def _compare(
        self,
        array: zarr.Array,
        at: tuple[int, int],
        replayed: np.ndarray,
        expected: np.ndarray | None,
        place: tuple[Any, ...],
        values: np.ndarray,
        count: int | None,
        full: bool,
    ) -> None:
        """Compare each chunk with the replay's, by checksums; keep those that are damaged."""
        keys = chunk_keys(array, at)
        tails = stored_digests(array, keys)
        for number, key in enumerate(keys):
            if key in self._damaged:
                if expected is not None and expected[number] != replayed[number]:
                    self._refuse(key)
                self._held.append((array, key, *_piece(array, number, place, values)))
                continue
            tail = tails[number]
            same = tail is not None and int.from_bytes(tail, "little") == int(replayed[number])
            if not same and not full and tail is not None:
                # More draws than count, of a commit that was cut off.
                inner, piece = _piece(array, number, place, values)
                stored_rows = read(array, (inner[0], slice(self._start, self.draws), *inner[2:]))
                same = stored_rows.tobytes() == np.ascontiguousarray(piece[:count]).tobytes()
            if same:
                self._agreed += 1
            else:
                self._refuse(key)

    def _refuse(self, key: str) -> None:
        self.refused = self.refused or (
            f"the replayed chain is not the stored one: {key} would differ, so nothing was "
            "written; replay on the hardware, with the versions, that the run was made with"
        )

    def write(self) -> None:
        """Write what is damaged, if all that is sound agrees."""
        if self.refused is None and not self._agreed:
            self.refused = "nothing of the chain is left that the replay could be compared with"
        if self.refused is None and (self.draws != self._until.draws or not self._last):
            self.refused = (
                f"the replay has {self.draws} draws where the record counts {self._until.draws}"
            )
        if self.refused is not None:
            return
        for array, _, place, values in self._held:
            array[place] = values
        flush(self._root.store, [key for _, key, _, _ in self._held])


def _piece(
    array: zarr.Array, number: int, place: tuple[Any, ...], values: np.ndarray
) -> tuple[tuple[Any, ...], np.ndarray]:
    """Return where one chunk lies, of those of a block or a slot, and what of ``values`` it is."""
    counts = array.cdata_shape[2:]
    at = np.unravel_index(number, counts) if counts else ()
    tail = tuple(
        slice(int(i) * n, min((int(i) + 1) * n, size))
        for i, n, size in zip(at, array.chunks[2:], array.shape[2:], strict=True)
    )
    rows = () if values.ndim == array.ndim - 2 else (slice(None),)
    return (*place, *tail), values[(*rows, *tail)]
