"""Names of groups and variables in a store: which may be given, and which are lkarray's own."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Collection, Mapping
from typing import Any

import zarr
from zarr.abc.store import Store
from zarr.core.sync import sync

from lkarray import schema
from lkarray.errors import GroupError
from lkarray.store.location import describe

DERIVED = "derived"
HIDDEN = "."  # begins the names of derived groups that are being written
#: Attribute of a group that `lkarray.save` fills: what is being saved there.
SAVED = "lkarray_save"

_LONGEST = 200  # bytes; file systems take 255, and Zarr appends to a name while it writes
_OWN = {
    DERIVED,
    schema.SAMPLE_STATS,
    schema.OBSERVABLES,
    schema.STATE,
    schema.COMMIT,
    schema.TRAJECTORY,
    schema.FEATURES,
    schema.COMPONENT,
    schema.CHECKPOINT,
}
_FAMILIES = re.compile(rf"({schema.LOSSES}|{schema.GRADIENTS}|audits?)(_.*)?", re.S)


def check_name(name: Any, what: str) -> str:
    """Return a name that is one step of a path in any store, or raise and say why it is not.

    Raises
    ------
    TypeError
        It is not text.
    GroupError
        It is empty, has slashes or control characters, begins with a dot, is Zarr's own or long.
    """
    if not isinstance(name, str):
        raise TypeError(f"{what} must be text, not {type(name).__name__} {name!r}")
    wrong = None
    if not name.strip():
        wrong = "is empty"
    elif "/" in name or "\\" in name:
        wrong = "holds a slash"
    elif name.startswith("."):
        wrong = "begins with a dot"
    elif name == "zarr.json" or name.startswith("__"):
        wrong = "is one of Zarr's own"
    elif any(unicodedata.category(sign) in ("Cc", "Cs") for sign in name):
        wrong = "holds control characters"
    elif len(name.encode()) > _LONGEST:
        wrong = f"is longer than {_LONGEST} bytes"
    if wrong:
        raise GroupError(f"{what} {name!r:.80} {wrong}; nothing was touched. Choose another name")
    return name


def group_path(group: Any) -> str:
    """Return the path of a group that a user may write to, or raise and say why it may not be.

    Raises
    ------
    TypeError
        It is not text.
    GroupError
        It is the whole store, a group of lkarray's own, below a result, or no path.
    """
    if not isinstance(group, str):
        raise TypeError(f"group must be text, not {type(group).__name__} {group!r}")
    path = group.strip("/")
    if not path:
        raise GroupError(
            f"group {group!r} is the whole store, with all that it holds; nothing was touched. "
            f"Name a group of its own, for example {DERIVED}/correlation"
        )
    first, *rest = [check_name(part, f"group {group!r}: its part") for part in path.split("/")]
    if first.casefold() == DERIVED and (first != DERIVED or len(rest) != 1):
        raise GroupError(
            f"group {group!r}: results are kept directly under {DERIVED}, where lk.open shows "
            f"them; nothing was touched. Choose {DERIVED}/NAME"
        )
    if first != DERIVED and own_group(first):
        raise GroupError(
            f"group {group!r}: {first!r} is kept for lkarray's own groups; nothing was touched. "
            f"Choose {DERIVED}/NAME"
        )
    return path


def own_group(name: str) -> bool:
    """Say whether a name at a store's top is one of lkarray's own groups."""
    name = name.casefold()  # some file systems do not tell the case
    return name in _OWN or _FAMILIES.fullmatch(name) is not None


def names_in(store: Store, path: str) -> list[str]:
    """Return the names directly under a path, of groups without metadata too.

    What a kill left of a file that was being written does not count.
    """

    async def names() -> list[str]:
        return [name async for name in store.list_dir(path)]

    try:
        there = sync(names())
    except (FileNotFoundError, NotADirectoryError):
        return []
    return sorted(name for name in there if name and not name.endswith(".partial"))


def folders(store: Store, path: str) -> list[str]:
    """Return the names of the folders at a path, whether they have metadata or not; none hidden."""

    async def is_folder(name: str) -> bool:
        inside = f"{path}/{name}".lstrip("/")
        return await store.exists(f"{inside}/zarr.json") or not await store.is_empty(inside)

    names = [n for n in names_in(store, path) if not n.startswith(HIDDEN) and n != "zarr.json"]
    return [name for name in names if sync(is_folder(name))]


def make_group(
    root: zarr.Group,
    name: str,
    *,
    ours: Collection[str],
    attributes: Mapping[str, Any] | None = None,
) -> zarr.Group:
    """Create a group of lkarray's own; what a kill left of making it before is replaced.

    Parameters
    ----------
    root
        The store.
    name
        Of the group, at the store's top.
    ours
        Names of all that making and filling the group writes into it.
    attributes
        Of the group.

    Raises
    ------
    GroupError
        Something else is there.
    """
    others = sorted(set(names_in(root.store, name)) - {*ours, "zarr.json"})
    saved = name in root and SAVED in root[name].attrs
    if others or saved or (name in root and not isinstance(root[name], zarr.Group)):
        held = others[:3] or "a saved kernel"
        raise GroupError(
            f"group {name!r} of {describe(root.store)} holds {held}, which this does not write; "
            "nothing was touched. Give a name= of its own, or another store"
        )
    return root.create_group(name, overwrite=True, attributes=dict(attributes or {}))
