"""One writer at a time, by the operating system's own file lock.

``flock`` dies with its process, so a killed writer never leaves a store locked. On object
storage the lock is an object, which a killed writer leaves for a minute (see `leases`). Other
stores, those of fsspec's URLs among them, have no lock: there, `writer_lock` does nothing, and
two writers must not be pointed at one store.
"""

from __future__ import annotations

import fcntl
import json
import os
import socket
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from pathlib import Path

from zarr.abc.store import Store

from lkarray.errors import LockedError
from lkarray.store.files import make_folder, open_lock
from lkarray.store.leases import holder, leased
from lkarray.store.location import local_path, writing
from lkarray.store.objects import UrlStore

_LOCK_NAME = ".lkarray.lock"


@contextmanager
def file_lock(folder: Path, name: str = _LOCK_NAME) -> Iterator[None]:
    """Hold the lock of ``folder`` (made if missing), or say who holds it.

    Raises
    ------
    LockedError
        Another process holds it; the message names its process id, host and start.
    StoreError
        What lies at the lock's name is not lkarray's, or another user's.
    """
    make_folder(folder)
    with open(open_lock(folder / name), "r+", encoding="utf8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            raise LockedError(
                f"{folder} is in use by {_holder(file.read())}; wait for it"
            ) from None
        file.truncate(0)
        now = time.strftime("%Y-%m-%d %H:%M:%S")
        json.dump({"pid": os.getpid(), "host": socket.gethostname(), "since": now}, file)
        file.flush()
        yield


@contextmanager
def writer_lock(store: Store) -> Iterator[None]:
    """Hold the right to write to a store on a local disk or object storage.

    Raises
    ------
    LockedError
        Another process holds it; the message names its process id, host and start.
    """
    with ExitStack() as stack:
        with writing(store):
            stack.enter_context(_lock(store, "", "writer"))
        yield


@contextmanager
def region_lock(store: Store, name: str) -> Iterator[None]:
    """Hold the right to write to a region of a store, which outlives that to the whole.

    A worker may go on for a while after the process that it works for was killed.
    """
    with _lock(store, f".lkarray.region-{name}.lock", f"region-{name}"):
        yield


def _lock(store: Store, file: str, name: str) -> AbstractContextManager[None]:
    folder = local_path(store)
    if folder is not None:
        return file_lock(folder, file or _LOCK_NAME)
    return leased(store, name) if isinstance(store, UrlStore) else nullcontext()


def _holder(text: str) -> str:
    try:
        return holder(json.loads(text))
    except (ValueError, AttributeError):
        return "another process"
