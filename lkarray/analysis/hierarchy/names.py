"""Names of nodes and labels: as Python's own types, without blanks, and missing ones left out."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping
from typing import Any

from lkarray.analysis.hierarchy.sources import is_missing, plain
from lkarray.values import mapping, several


def checked_parents(
    parents: Mapping[Hashable, Iterable[Hashable]],
) -> dict[Hashable, tuple[Hashable, ...]]:
    """Return the parents of each node, names plain, and missing ones left out: of a root."""
    above: dict[Hashable, tuple[Hashable, ...]] = {}
    parents = mapping("parents", parents)
    empty = "" in parents  # then it is a name
    for given, listed in parents.items():
        node = plain(given, "parents")
        names = plain_all(f"parents[{given!r}]", several_or_one(listed))
        kept = tuple(dict.fromkeys(p for p in names if not _absent(p, empty)))
        if _absent(node, empty):
            raise ValueError(
                f"a node has no name, and the parents {names}; name it, or leave it out"
            )
        if node in above:
            raise ValueError(
                f"{node!r} is there twice, but for blanks around it, with the parents "
                f"{above[node]} and {kept}; name it once, with all its parents"
            )
        if kept and any(_absent(p, empty) for p in names):
            raise ValueError(
                f"{node!r} has a parent, {kept[0]!r}, and one that is missing; leave that out, or "
                "name no parent, for a root"
            )
        above[node] = kept
    return above


def _absent(name: Hashable, empty: bool) -> bool:
    return is_missing(name) and not (empty and isinstance(name, str))


def plain_all(name: str, labels: Any) -> tuple[Hashable, ...]:
    """Return labels as Python's own types, checked."""
    return tuple(plain(label, name) for label in several(name, labels))


def named_nodes(name: str, labels: Any) -> dict[Hashable, Hashable]:
    """Return nodes by their labels, of a mapping or of nodes that are their own labels."""
    if not isinstance(labels, Mapping):
        return {label: label for label in plain_all(name, labels)}
    nodes = {plain(label, name): plain(node, name) for label, node in labels.items()}
    if len(nodes) < len(labels):
        raise ValueError(f"{name}: two are the same but for blanks around them; name each once")
    return nodes


def several_or_one(given: Any) -> tuple[Hashable, ...]:
    """Return what an iterable holds, or what is none, text for example, alone."""
    if isinstance(given, str) or not isinstance(given, Iterable):
        return (given,)
    return tuple(given)


def named_list(names: Iterable[Hashable], most: int = 10) -> str:
    """Return the first names as a message gives them, and how many more there are."""
    names = list(names)
    shown = ", ".join(map(repr, names[:most]))
    return shown + (f" and {len(names) - most} more" if len(names) > most else "")
