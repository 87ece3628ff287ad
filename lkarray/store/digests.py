"""What each chain committed, as checksums of its chunks: they tell swapped chunks and lost ones.

A chunk's own checksum says that it is whole, not that it is the one that belongs there. So each
commit leaves the checksums of the chunks that it wrote: those of the state and of the open block
in ``commit/latest``, beside the chain's number, its draws and steps, in the slot that the record
will name; those of a block that is full in ``commit/blocks``, which is not written again. Both
are on the disk before the record is, so that a kill at any moment leaves the record with the
checksums that belong to it. The chain's number tells records that stand in each other's places.

Of the open block they are those of the draws that count, with the fill value beyond: a commit
that was cut off may have left more draws in some of its chunks.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
import zarr

from lkarray import schema
from lkarray.store.chunks import digests, missing, read
from lkarray.store.layout import BLOCK_HEAD, HEAD, carried, pieces, recorded
from lkarray.store.location import is_sealed
from lkarray.store.nodes import stored_at


class Latest(NamedTuple):
    """What a chain left with a commit, beside the record.

    Attributes
    ----------
    chain, slot, draws, step
        Of the commit.
    state
        Checksums of the chunks of each vector carried.
    block
        Checksums of the chunks of each array recorded, of the block that was open; zeros where
        it had no draw.
    """

    chain: int
    slot: int
    draws: int
    step: int
    state: dict[str, np.ndarray]
    block: dict[str, np.ndarray]


class Digests:
    """The checksums of a store's chains.

    Parameters
    ----------
    root
        The store; `of` makes none of one of lkarray 0.1.0, which has no such checksums.

    Attributes
    ----------
    arrays, vectors
        What chains record and carry: arrays by path, and by name.
    latest, blocks
        Where the checksums are.
    """

    def __init__(self, root: zarr.Group) -> None:
        self.arrays, self.vectors = recorded(root), carried(root)
        self.latest = stored_at(root, f"{schema.COMMIT}/{schema.LATEST.name}")
        self.blocks = stored_at(root, f"{schema.COMMIT}/{schema.BLOCKS.name}")

    @classmethod
    def of(cls, root: zarr.Group) -> Digests | None:
        """Return the checksums of a store, ``None`` if it has none."""
        return cls(root) if is_sealed(root) else None

    def read_latest(self, chain: int, slot: int) -> Latest | None:
        """Return what a chain left with the commit to a slot, ``None`` if it is missing.

        Or if that of another chain or slot is in its place.
        """
        if missing(self.latest.store, [self.latest_key(chain, slot)]):
            return None
        row = read(self.latest, (chain, slot))
        ends = HEAD + pieces(self.vectors.values())
        state, block = _split(row[HEAD:ends], self.vectors), _split(row[ends:], self.arrays)
        latest = Latest(*map(int, row[:HEAD]), state, block)  # type: ignore[call-arg, arg-type]
        return latest if (latest.chain, latest.slot) == (chain, slot) else None

    def read_block(self, chain: int, block: int) -> dict[str, np.ndarray] | None:
        """Return the checksums of the chunks of a full block, ``None`` if they are missing.

        Or if those of another block are in their place.
        """
        if missing(self.blocks.store, [self.block_key(chain, block)]):
            return None
        row = read(self.blocks, (chain, block))
        if row[:BLOCK_HEAD].tolist() != [chain, block]:
            return None
        return _split(row[BLOCK_HEAD:], self.arrays)

    def latest_key(self, chain: int, slot: int) -> str:
        """Return the key of the chunk that `read_latest` reads."""
        return f"{self.latest.path}/{self.latest.metadata.encode_chunk_key((chain, slot, 0))}"

    def block_key(self, chain: int, block: int) -> str:
        """Return the key of the chunk that `read_block` reads."""
        return f"{self.blocks.path}/{self.blocks.metadata.encode_chunk_key((chain, block, 0))}"

    def of_block(
        self, chain: int, block: int, rows: Mapping[str, np.ndarray]
    ) -> dict[str, np.ndarray]:
        """Return the checksums that chunks of these draws have, by path."""
        return {p: digests(array, (chain, block), rows[p]) for p, array in self.arrays.items()}

    def of_state(
        self, chain: int, slot: int, state: Mapping[str, np.ndarray]
    ) -> dict[str, np.ndarray]:
        """Return the checksums that chunks of these vectors have, by name."""
        return {n: digests(array, (chain, slot), state[n]) for n, array in self.vectors.items()}

    def write_latest(self, row: Latest) -> str:
        """Write what belongs to a commit; return the key."""
        numbers = np.array([row.chain, row.slot, row.draws, row.step])
        parts = [numbers, *row.state.values(), *row.block.values()]
        self.latest[row.chain, row.slot] = np.concatenate(parts).astype(np.uint32)
        return self.latest_key(row.chain, row.slot)

    def write_block(self, chain: int, block: int, checksums: Mapping[str, np.ndarray]) -> str:
        """Write the checksums of a full block; return the key."""
        row = np.concatenate([np.array([chain, block]), *checksums.values()])
        self.blocks[chain, block] = row.astype(np.uint32)
        return self.block_key(chain, block)

    def no_block(self) -> dict[str, np.ndarray]:
        """Return the checksums of a block without a draw."""
        return _split(np.zeros(pieces(self.arrays.values()), np.uint32), self.arrays)


def _split(row: np.ndarray, arrays: Mapping[str, zarr.Array]) -> dict[str, np.ndarray]:
    by_name, start = {}, 0
    for name, array in arrays.items():
        stop = start + pieces([array])
        by_name[name] = row[start:stop]
        start = stop
    return by_name
