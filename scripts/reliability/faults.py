"""Faults of files, one at a time and undone after it."""

from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from reliability.stores import counted, outcome, shown, spare

Edit = dict[Path, bytes | None]


def flip(files: list[Path], rng: random.Random) -> Edit:
    """Flip one bit."""
    at = rng.choice(files)
    content = bytearray(at.read_bytes())
    place = rng.randrange(len(content))
    content[place] ^= 1 << rng.randrange(8)
    return {at: bytes(content)}


def truncate(files: list[Path], rng: random.Random) -> Edit:
    """Cut a file off, or leave none of it."""
    at = rng.choice(files)
    content = at.read_bytes()
    return {at: content[: rng.choice([0, rng.randrange(len(content))])]}


def delete(files: list[Path], rng: random.Random) -> Edit:
    """Delete a file."""
    return {rng.choice(files): None}


def swap(files: list[Path], rng: random.Random) -> Edit:
    """Exchange two files of one size that differ."""
    sizes = Counter(p.stat().st_size for p in files)
    for _ in range(1000):
        a = rng.choice([p for p in files if sizes[p.stat().st_size] > 1])
        same = [p for p in files if p.stat().st_size == a.stat().st_size and p != a]
        b = rng.choice(same)
        if a.read_bytes() != b.read_bytes():
            return {a: b.read_bytes(), b: a.read_bytes()}
    raise AssertionError("no two files to exchange")


def edit(files: list[Path], rng: random.Random) -> Edit:
    """Change, add one to, or remove one value of some metadata."""
    at = rng.choice([p for p in files if p.name == "zarr.json"])
    content = json.loads(at.read_text())
    leaves = [(c, key) for c, key in _leaves(content) if "consolidated_metadata" not in str(key)]
    holder, key = rng.choice(leaves)
    value = holder[key]
    if rng.random() < 0.3 and isinstance(holder, dict):
        del holder[key]
    elif isinstance(value, bool):
        holder[key] = not value
    elif isinstance(value, int | float):
        holder[key] = value + 1
    elif isinstance(value, str):
        holder[key] = value[:-1] + chr(ord(value[-1]) ^ 1) if value else "x"
    else:
        holder[key] = "edited"
    return {at: json.dumps(content, indent=2).encode()}


def _leaves(node: Any) -> Iterator[tuple[Any, Any]]:
    items = node.items() if isinstance(node, dict) else enumerate(node)
    for key, value in list(items):
        if isinstance(value, dict | list) and value:
            yield from _leaves(value)
        else:
            yield node, key


FAULTS: dict[str, Callable[[list[Path], random.Random], Edit]] = {
    "a bit flipped": flip,
    "a file cut off or emptied": truncate,
    "a file deleted": delete,
    "two files exchanged": swap,
    "metadata edited": edit,
}


def attack(
    path: Path, kind: str, rounds: int, rng: random.Random, silent: list[str]
) -> Counter[str]:
    """Try one kind of fault, each undone before the next; return the outcomes."""
    before, files, idle = shown(path), counted(path), spare(path)
    tally: Counter[str] = Counter()
    for _ in range(rounds):
        change = FAULTS[kind](files, rng)
        kept = {at: at.read_bytes() for at in change}
        same_json = all(_same_json(kept[at], new) for at, new in change.items())
        try:
            for at, new in change.items():
                at.unlink() if new is None else at.write_bytes(new)
            result = outcome(path, before, harmless=same_json or set(change) <= idle)
        except Exception as error:
            result = "silent"
            silent.append(f"{kind}: {_names(change, path)}: {type(error).__name__}: {error}")
        else:
            if result == "silent":
                silent.append(f"{kind}: {_names(change, path)}")
        finally:
            for at, content in kept.items():
                at.write_bytes(content)
        tally[result] += 1
    assert shown(path) == before, "a fault was not undone"
    return tally


def _names(change: Edit, path: Path) -> str:
    return ", ".join(str(at.relative_to(path)) for at in change)


def _same_json(old: bytes, new: bytes | None) -> bool:
    """Say whether two files of metadata say the same, but for the root's copy of results'.

    A kill may leave that one stale, and lkarray does not read it.
    """
    try:
        return new is not None and _own(json.loads(old)) == _own(json.loads(new))
    except ValueError:
        return False


def _own(metadata: dict[str, Any]) -> dict[str, Any]:
    copy = metadata.get("consolidated_metadata") or {}
    for path in [p for p in copy.get("metadata", ()) if p.split("/")[0] == "derived"]:
        del copy["metadata"][path]
    return metadata
