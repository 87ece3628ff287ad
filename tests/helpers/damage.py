"""Damage done to the files of a store, and whether anybody would notice."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, MutableMapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr
from zarr.core.buffer import cpu
from zarr.storage import MemoryStore

import lkarray as lk
from lkarray import errors


class Files(MutableMapping[str, bytes]):
    """The files of a store, in a folder or in memory, by key."""

    def __init__(self, store: Path | MemoryStore) -> None:
        self.store = store

    def _held(self) -> dict[str, Any]:
        assert isinstance(self.store, MemoryStore)
        return self.store._store_dict

    def __getitem__(self, key: str) -> bytes:
        if isinstance(self.store, Path):
            return (self.store / key).read_bytes()
        return self._held()[key].to_bytes()

    def __setitem__(self, key: str, content: bytes) -> None:
        if isinstance(self.store, Path):
            (self.store / key).write_bytes(content)
        else:
            self._held()[key] = cpu.Buffer.from_bytes(content)

    def __delitem__(self, key: str) -> None:
        if isinstance(self.store, Path):
            (self.store / key).unlink()
        else:
            del self._held()[key]

    def __iter__(self) -> Iterator[str]:
        if isinstance(self.store, Path):
            paths = (p.relative_to(self.store) for p in self.store.rglob("*") if p.is_file())
            return iter(sorted(str(p) for p in paths if not p.name.startswith(".lkarray")))
        return iter(sorted(self._held()))

    def __len__(self) -> int:
        return len(list(iter(self)))


@dataclass(frozen=True)
class Attack:
    """One thing done to a file, or to two."""

    kind: str
    file: str
    other: str = ""
    bit: int = 0

    @contextmanager
    def done_to(self, files: Files) -> Iterator[None]:
        """Do it, and undo it."""
        before = {key: files[key] for key in (self.file, self.other) if key}
        content = bytearray(before[self.file])
        if self.kind == "flip":
            content[self.bit // 8] ^= 1 << self.bit % 8
        elif self.kind == "truncate":
            del content[len(content) // 2 :]
        elif self.kind == "empty":
            content.clear()
        if self.kind == "swap":
            files[self.file], files[self.other] = before[self.other], before[self.file]
        elif self.kind == "delete":
            del files[self.file]
        else:
            files[self.file] = bytes(content)
        try:
            yield
        finally:
            files.update(before)


def attacks(files: Files, *, bits: int = 3, seed: int = 0) -> list[Attack]:
    """Return everything that may be done to the files below a store's root, in a seeded order."""
    rng = np.random.default_rng(seed)
    out: list[Attack] = []
    sizes: dict[int, list[str]] = {}
    for key in files:
        if key == "zarr.json":
            continue
        size = len(files[key])
        out += [Attack(kind, key) for kind in ("truncate", "empty", "delete")]
        out += [Attack("flip", key, bit=int(b)) for b in rng.integers(0, 8 * size, bits)]
        sizes.setdefault(size, []).append(key)
    for alike in sizes.values():
        for i, key in enumerate(alike):
            others = [other for other in alike[i + 1 :] if files[other] != files[key]]
            out += [Attack("swap", key, other) for other in others]
    return [out[i] for i in rng.permutation(len(out))]


def contents(store: Path | MemoryStore) -> dict[str, xr.Dataset]:
    """Return all that a user reads of a store."""
    tree = lk.open(store)
    return {node.path: node.to_dataset(inherit=False).compute() for node in tree.subtree}


def noticed(store: Path | MemoryStore, whole: dict[str, xr.Dataset]) -> str | None:
    """Return by what damage is noticed; ``"harmless"`` where everything reads as it was.

    ``None`` where something reads otherwise and nothing says so. Any error but those that name
    the damage goes through.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        if lk.verify(store):
            try:
                lk.open(store)
            except errors.StoreError:
                return "open"
            return "verify"
        now = contents(store)
    same = set(now) == set(whole) and all(now[path].identical(whole[path]) for path in whole)
    return "harmless" if same else None
