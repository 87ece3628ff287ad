"""Chunks as files: their keys, their checksums, and that they are really there.

Zarr reads a chunk that is missing as its fill value, so whatever reads something that must be
there asks for it here. Each chunk ends in the CRC-32C of its content; kept a second time, in a
place of its own, that number also tells when a sound chunk lies where another belongs.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Iterable, Sequence
from math import prod
from pathlib import Path

import numpy as np
import zarr
from zarr.abc.store import Store, SuffixByteRequest
from zarr.codecs import BytesCodec, Crc32cCodec
from zarr.core.buffer import default_buffer_prototype
from zarr.core.sync import sync

from lkarray.errors import DamagedError
from lkarray.store.checksums import crc, extend_crc
from lkarray.store.files import fsync_all
from lkarray.store.location import describe, local_path

_CRC_BYTES = 4
_AT_ONCE = 64  # requests under way
_FILLED = 1 << 16  # elements of the fill value at once
_FEW = 8  # keys that are asked for one by one rather than listed


def chunk_keys(array: zarr.Array, leading: tuple[int, ...] = ()) -> list[str]:
    """Return the keys of the chunks of ``array`` whose first indices are ``leading``."""
    return [chunk_key(array, (*leading, *rest)) for rest in _rest(array, leading)]


def chunk_key(array: zarr.Array, at: tuple[int, ...]) -> str:
    """Return the key of one chunk."""
    return f"{array.path}/{array.metadata.encode_chunk_key(at)}"


def _rest(array: zarr.Array, leading: tuple[int, ...]) -> Iterable[tuple[int, ...]]:
    return np.ndindex(array.cdata_shape[len(leading) :])


def flush(store: Store, keys: Iterable[str]) -> None:
    """Make the operating system put some keys of a local store, and their folders, on the disk."""
    folder = local_path(store)
    if folder is not None:
        fsync_all((path for key in keys if (path := folder / key).exists()), folder)


def flush_tree(store: Store, *prefixes: str) -> None:
    """Make the operating system put all below some prefixes on the disk, and what leads there.

    That is the metadata of the groups above them, and the folders up to that of the store.
    """
    folder = local_path(store)
    if folder is None:
        return
    files: set[Path] = set()
    for top in (folder / prefix for prefix in prefixes):
        files |= {Path(at, name) for at, _, names in os.walk(top) for name in names}
        files |= {at / "zarr.json" for at in (top, *top.parents) if at.is_relative_to(folder)}
    fsync_all((file for file in files if not _passing(file.name) and file.exists()), folder)


def _passing(name: str) -> bool:
    """Say whether a file is a lock, or one that is being written and goes away."""
    return name.startswith(".lkarray") or name.endswith(".partial")


def digests(array: zarr.Array, leading: tuple[int, ...], values: np.ndarray) -> np.ndarray:
    """Return the CRC-32C of the chunks that ``values`` would be stored as, ``uint32``.

    Parameters
    ----------
    array
        Of numbers, stored raw.
    leading
        First indices of the chunks; they have one chunk along each dim of these.
    values
        What these chunks hold, without the dims of ``leading`` whose chunks are one long. It may be
        shorter than the chunks: the rest is the fill value, as Zarr stores it.
    """
    chunks = array.chunks
    squeezed = len(chunks) - values.ndim
    whole = chunks[squeezed:]
    fixed = len(leading) - squeezed
    little = array.dtype.newbyteorder("<") if array.dtype.byteorder == ">" else array.dtype
    checksums = []
    for rest in _rest(array, leading):
        at = (*(0,) * fixed, *rest)
        place = tuple(slice(i * n, (i + 1) * n) for i, n in zip(at, whole, strict=True))
        piece = values[place]
        checksums.append(_padded_crc(piece, whole, array.fill_value, little))
    return np.array(checksums, np.uint32)


def _padded_crc(piece: np.ndarray, whole: tuple[int, ...], fill: object, dtype: np.dtype) -> int:
    """Return the CRC-32C of a chunk that begins with ``piece`` and goes on with the fill value."""
    if piece.dtype != dtype or piece.shape[1:] != whole[1:]:
        padded = np.full(whole, fill, dtype)
        padded[tuple(map(slice, piece.shape))] = piece
        piece = padded
    checksum = crc(np.ascontiguousarray(piece).reshape(-1).view(np.uint8))
    # Blocks are large, and what is lacking of an open one is most of it: no copy is made of it.
    lacking = prod(whole) - piece.size
    filled = np.full(min(lacking, _FILLED), fill, dtype).view(np.uint8)
    for start in range(0, lacking, _FILLED):
        checksum = extend_crc(checksum, filled[: (lacking - start) * dtype.itemsize])
    return checksum


def stored_digests(array: zarr.Array, keys: Sequence[str]) -> list[bytes | None]:
    """Return the checksums that some stored chunks end in, ``None`` for those that are missing.

    Of an array without checksums, as lkarray 0.1.0 stored text, they are taken of the chunk.
    """
    checked = any(isinstance(codec, Crc32cCodec) for codec in array.compressors)
    part = SuffixByteRequest(_CRC_BYTES) if checked else None
    prototype = default_buffer_prototype()

    async def tail_of(key: str) -> bytes | None:
        buffer = await array.store.get(key, prototype, part)
        if buffer is None:
            return None
        content = buffer.to_bytes()
        return content if checked else crc(content).to_bytes(_CRC_BYTES, "little")

    async def look() -> list[bytes | None]:
        tails: list[bytes | None] = []
        for start in range(0, len(keys), _AT_ONCE):
            tails += await asyncio.gather(*map(tail_of, keys[start : start + _AT_ONCE]))
        return tails

    return sync(look())


def stored_numbers(array: zarr.Array, keys: Sequence[str]) -> list[int]:
    """Return `stored_digests` as numbers, 0 for a chunk that is missing."""
    tails = stored_digests(array, keys)
    return [0 if tail is None else int.from_bytes(tail, "little") for tail in tails]


def missing(store: Store, keys: Iterable[str], *, size: int | None = None) -> list[str]:
    """Return those keys at which nothing is stored, or a file without content.

    Parameters
    ----------
    store
        Where to look. Elsewhere than on a local disk, many keys are looked up by one listing of
        the folder that they share.
    keys
        Of chunks.
    size
        Bytes of each; on a local disk those of another size are returned too.
    """
    keys = list(keys)
    folder = local_path(store)
    if folder is not None:
        root = os.fspath(folder)
        return [key for key in keys if not _has_content(f"{root}/{key}", size)]

    async def ask() -> list[str]:
        there: list[bool] = []
        for start in range(0, len(keys), _AT_ONCE):
            there += await asyncio.gather(*map(store.exists, keys[start : start + _AT_ONCE]))
        return [key for key, known in zip(keys, there, strict=True) if not known]

    async def look() -> list[str]:
        shared = os.path.commonpath(key.rpartition("/")[0] for key in keys)
        known = {key async for key in store.list_prefix(f"{shared}/" if shared else "")}
        return [key for key in keys if key not in known]

    return sync(ask() if len(keys) <= _FEW or not store.supports_listing else look())


def _has_content(path: str, size: int | None) -> bool:
    try:
        bytes_there = os.stat(path).st_size
    except OSError:
        return False
    return bytes_there > 0 if size is None else bytes_there == size


def chunk_size(array: zarr.Array) -> int | None:
    """Return the bytes of each stored chunk, ``None`` where they are not known beforehand."""
    if not raw(array):
        return None
    return prod(array.chunks) * array.dtype.itemsize + _CRC_BYTES * len(array.compressors)


def require_chunks(array: zarr.Array, *leading: tuple[int, ...]) -> None:
    """Raise `DamagedError`, naming the first that is lost of the chunks with these first indices.

    Of all chunks, where none are given.
    """
    keys = [key for first in leading or [()] for key in chunk_keys(array, first)]
    lost = missing(array.store, keys, size=chunk_size(array))
    if lost:
        raise damaged(
            array.store,
            f"{lost[0]} was committed, but is missing, empty or cut off ({len(lost)} such chunks "
            f"of {array.path})",
        )


def damaged(store: Store, what: str) -> DamagedError:
    """Return the error that says what of a store is damaged, and what to do."""
    error = DamagedError(
        f"{describe(store)} is damaged: {what}. Nothing was touched: restore it from a copy; "
        "lk.verify lists all faults, and lk.repair takes again what it can"
    )
    error.what = what
    return error


def read_whole(array: zarr.Array) -> np.ndarray:
    """Return an array that was written whole; a chunk that is missing or damaged is an error.

    Raises
    ------
    DamagedError
        A chunk is missing, cut off, or fails its checksum; the message names it.
    """
    require_chunks(array)
    return read(array, ...)


def read(array: zarr.Array, place: object) -> np.ndarray:
    """Return a selection of an array of which the chunks are known to be there.

    Raises
    ------
    DamagedError
        A chunk cannot be decoded; the message names the array.
    """
    try:
        return np.asarray(array[place])  # type: ignore[index]
    except Exception as error:  # every codec raises its own
        if isinstance(error, OSError):
            raise
        reason = str(error).splitlines()[0] if str(error) else repr(error)
        raise damaged(array.store, f"{_place(array)} cannot be read ({reason})") from error


def _place(array: zarr.Array) -> str:
    single = array.nchunks == 1
    return chunk_key(array, (0,) * array.ndim) if single else f"a chunk of {array.path}"


def raw(array: zarr.Array) -> bool:
    """Say whether chunks are stored as they are in memory, so that their size is known."""
    return isinstance(array.serializer, BytesCodec) and all(
        isinstance(codec, Crc32cCodec) for codec in array.compressors
    )
