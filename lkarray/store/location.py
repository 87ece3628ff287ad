"""Where a store is: paths, URLs and Zarr stores, and the errors of reaching them."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import zarr
from zarr.abc.store import Store
from zarr.core.sync import sync
from zarr.storage import FsspecStore, LocalStore

from lkarray._version import __version__
from lkarray.errors import DamagedError, MissingPackageError, StoreError, StoreVersionError
from lkarray.store import objects
from lkarray.store.checksums import json_digest
from lkarray.store.files import fsync_all, make_folder
from lkarray.store.objects import ObjectError, UrlStore, without_credentials
from lkarray.store.typed import attributes_of

StoreLike = str | os.PathLike[str] | Store

#: Version of the layout on disk; a reader refuses a store with a larger one.
SCHEMA_VERSION = 1

#: Root attribute in which lkarray enters what a store has, and what each of it was made with.
ENTRIES = "lkarray"
_SEAL = "seal"  # in it: a checksum of the rest
#: What lkarray 0.1.0 wrote there.
_UNSEALED = {"schema", "version", "losses", "parts", "trajectory", "gradients", "audits"}

_CAUSES = {
    errno.ENOSPC: "the disk is full; free some space",
    errno.EDQUOT: "the disk quota is used up; free some space",
    errno.EFBIG: "a file would exceed the allowed size; raise the limit",
    errno.EROFS: "the file system is read-only; choose another path",
    errno.EACCES: "permission is denied; choose another path or change its permissions",
    errno.EPERM: "permission is denied; choose another path or change its permissions",
}


def as_store(path: StoreLike) -> Store:
    """Return the Zarr store that a path, a URL or a store stands for. Touches nothing.

    URLs of object storage (``s3://``, ``gs://``, ``az://``) are opened by obstore, with the
    credentials of the environment; other URLs by fsspec.

    Raises
    ------
    MissingPackageError
        What opens such a URL is not installed.
    StoreError
        The URL cannot be opened, or holds credentials that have no place there.
    """
    if isinstance(path, Store):
        return objects.adopt(path)
    text = _text_of(path).removeprefix("file://")
    if objects.kind_of(text) is not None:
        return objects.open_url(text)
    if "://" in text:
        try:
            return FsspecStore.from_url(text)
        except ImportError as error:
            raise MissingPackageError(f"{without_credentials(text)}: {error}") from None
        except ValueError as error:
            raise StoreError(f"{without_credentials(text)}: {error}; correct the URL") from None
    try:
        return LocalStore(Path(text).expanduser().absolute())
    except RuntimeError:
        raise StoreError(f"path or store {text!r}: there is no such home directory") from None


def _text_of(path: object) -> str:
    """Return a path or URL as text, or say what a store's place may be."""
    expected = "path or store must be a folder, a URL or a Zarr store"
    text = os.fspath(path) if isinstance(path, str | os.PathLike) else None
    if not isinstance(text, str):
        raise TypeError(f"{expected}, not {type(path).__name__}")
    if not text.removeprefix("file://") or "\0" in text:
        raise StoreError(f"{expected}, not {text!r}")
    return text


def local_path(store: Store) -> Path | None:
    """Return the folder of a store on a local disk, ``None`` for any other."""
    return Path(store.root) if isinstance(store, LocalStore) else None


def inner_store(store: Store, path: str) -> Store:
    """Return the store at a path inside another.

    Raises
    ------
    StoreError
        It is neither a folder nor a URL.
    """
    folder = local_path(store)
    if folder is not None:
        return LocalStore(folder / path, read_only=store.read_only)
    if isinstance(store, UrlStore):
        return store.inside(path)
    if isinstance(store, FsspecStore):
        return FsspecStore(store.fs, path=f"{store.path}/{path}", read_only=store.read_only)
    raise StoreError(
        f"{describe(store)} cannot hold several runs; give a folder or a URL as the store"
    )


def describe(store: Store) -> str:
    """Return a name for the store that a user recognises, without any credentials."""
    folder = local_path(store)
    if folder is not None:
        return str(folder)
    if isinstance(store, UrlStore):
        return store.url
    if isinstance(store, FsspecStore) and "://" not in store.path:
        protocol = store.fs.protocol
        name = protocol if isinstance(protocol, str) else protocol[0]
        return f"{name}://{store.path.lstrip('/')}"
    return without_credentials(store.path if isinstance(store, FsspecStore) else str(store))


def address(store: Store) -> str | Store:
    """Return what another process opens the store by, with its own credentials if need be.

    A path or a URL; of a store that was given as an object, that object.
    """
    folder = local_path(store)
    if folder is not None:
        return str(folder)
    if isinstance(store, UrlStore) and store.by_url:
        return store.url
    return store.with_read_only(False) if store.read_only else store


def sizes(store: Store, prefix: str) -> Iterator[tuple[str, int]]:
    """Yield the keys under a prefix, and the bytes stored at each."""

    async def look() -> list[tuple[str, int]]:
        if isinstance(store, UrlStore):  # a list tells the sizes too
            return [(item["path"], item["size"]) async for item in store._list(prefix)]
        return [(key, await store.getsize(key)) async for key in store.list_prefix(prefix)]

    yield from sync(look())


def exists(store: Store) -> bool:
    """Say whether there is a Zarr group at the store's root.

    Raises
    ------
    StoreError
        The path is a file, or a folder that holds something else; or there is no such bucket,
        access to it is denied, or it cannot be reached.
    """
    folder = local_path(store)
    if folder is not None:
        try:
            there = folder.exists()
        except OSError as error:  # a name too long, say
            raise StoreError(f"cannot read {folder}: {error.strerror}") from None
        if not there:
            return False
        if not folder.is_dir():
            raise StoreError(f"{folder} is a file, not a store; choose another path")
        if not (folder / "zarr.json").is_file():
            # What a kill leaves while a store is being made does not count.
            names = sorted(p.name for p in folder.iterdir())
            other = [n for n in names if not n.startswith(".lkarray") and not n.endswith("partial")]
            _refuse_others(store, other)
            return False
    try:
        zarr.open_group(store, mode="r", zarr_format=3, use_consolidated=False)
    except FileNotFoundError:
        if isinstance(store, UrlStore):
            _refuse_others(store, store.others())
        return False
    except StoreError:
        raise
    except OSError as error:
        raise StoreError(f"cannot read {describe(store)}: {error.strerror or error}") from error
    except Exception as error:  # zarr names no common base for broken metadata
        raise DamagedError(
            f"the root metadata of {describe(store)} cannot be read ({error}); nothing was "
            "touched. Restore zarr.json from a copy"
        ) from None
    return True


def _refuse_others(store: Store, names: list[str]) -> None:
    if names:
        raise StoreError(
            f"{describe(store)} holds {sorted(names)[:3]} and is not a Zarr v3 store; nothing was "
            "touched. Choose another path"
        )


def open_root(path: StoreLike, *, mode: str = "r") -> zarr.Group:
    """Open the root group of an lkarray store.

    Raises
    ------
    StoreError
        Nothing is there, it is a file, or it is not an lkarray store.
    StoreVersionError
        It was written by a newer lkarray.
    """
    store = as_store(path)
    if not exists(store):
        raise StoreError(
            f"there is no store at {describe(store)}; write one with lk.sample(..., store=...)"
        )
    if mode == "r" and not store.read_only:
        store = store.with_read_only(True)
    root = zarr.open_group(store, mode=mode, zarr_format=3, use_consolidated=False)  # type: ignore[arg-type]
    entries = root.attrs.get(ENTRIES)
    if not isinstance(entries, dict) or not isinstance(entries.get("schema"), int):
        raise StoreError(
            f"{describe(store)} is a Zarr store, but not one of lkarray's; nothing was touched"
        )
    if entries["schema"] > SCHEMA_VERSION:
        raise StoreVersionError(
            f"{describe(store)} was written by lkarray {entries.get('version')} with layout "
            f"{entries['schema']}; this is lkarray {__version__}, which reads up to layout "
            f"{SCHEMA_VERSION}. Upgrade lkarray; nothing was touched"
        )
    rest = {key: value for key, value in entries.items() if key != _SEAL}
    lost = _SEAL not in entries and not set(entries) <= _UNSEALED  # the seal's own key was changed
    if lost or entries.get(_SEAL, json_digest(rest)) != json_digest(rest):
        raise DamagedError(
            f"the root metadata of {describe(store)} were changed since they were written "
            f"(attribute {ENTRIES!r} of zarr.json); nothing was touched. Restore zarr.json from a "
            "copy"
        )
    return root


def create_root(path: StoreLike) -> zarr.Group:
    """Open the root group for writing, making it if there is none."""
    store = as_store(path)
    if exists(store):
        return open_root(store, mode="r+")
    with writing(store):
        entries = sealed({"schema": SCHEMA_VERSION, "version": __version__})
        folder = local_path(store)
        if folder is not None:
            make_folder(folder)
        root = zarr.create_group(store, zarr_format=3, attributes={ENTRIES: entries})
        _flush_entries(store)
        return root


def entries_of(root: zarr.Group) -> dict[str, Any]:
    """Return what lkarray entered of a store: its version, and what each thing was made with."""
    return dict(attributes_of(root)[ENTRIES])


def enter(root: zarr.Group, **entries: Any) -> None:
    """Set entries of a store, and put them on the disk.

    What they imply must be there before (`chunks.flush_tree`).
    """
    before = {key: value for key, value in entries_of(root).items() if key != _SEAL}
    # A store of lkarray 0.1.0 has no seals, and does not get this one: it would promise others.
    now = before | entries
    root.update_attributes({ENTRIES: sealed(now) if is_sealed(root) else now})
    _flush_entries(root.store)


def _flush_entries(store: Store) -> None:
    folder = local_path(store)
    if folder is not None:
        fsync_all([folder / "zarr.json"], folder)


def sealed(entries: dict[str, Any]) -> dict[str, Any]:
    """Return entries of a store with a checksum of them."""
    return entries | {_SEAL: json_digest(entries)}


def is_sealed(root: zarr.Group) -> bool:
    """Say whether a store has seals and digests, as all have but those of lkarray 0.1.0."""
    return _SEAL in entries_of(root)


@contextmanager
def writing(store: Store, *, safe: str = "") -> Iterator[None]:
    """Turn an ``OSError`` of writing into a `StoreError` that says what to do.

    One of object storage says so already, and is told what is safe.

    Parameters
    ----------
    store
        The store being written.
    safe
        What is stored already and not lost, for the message.
    """
    tail = f". {safe}" if safe else ""
    try:
        yield
    except ObjectError as error:
        raise StoreError(f"cannot write to {error}{tail}") from None
    except StoreError:
        raise
    except OSError as error:
        cause = _CAUSES.get(error.errno or 0, f"{error.strerror or error}; choose another path")
        raise StoreError(f"cannot write to {describe(store)}: {cause}{tail}") from error
