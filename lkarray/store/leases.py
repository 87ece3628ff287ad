"""Locks on object storage: an object that its holder renews, and that expires if it does not.

The lock is made by a put that fails where there is one already (``If-None-Match: *``), and
renewed, freed and taken over by puts that fail unless it is the version last seen
(``If-Match``), so that of several processes one succeeds. A killed holder renews no more; after
`EXPIRY` seconds, by the server's own clock, another process may take the lock over.

A holder whose last renewal is older than `_SURE` renews before it writes anything more, and
stops if it was replaced. A request lasts less than ``EXPIRY - _SURE`` seconds, repeats included,
so that none of a replaced holder lands after the other began.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import socket
import threading
import time
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import datetime
from typing import Any, NamedTuple

from lkarray.errors import LockedError, StoreError
from lkarray.store.objects import HIDDEN, UrlStore, guards, told

logger = logging.getLogger("lkarray")

#: Seconds without a renewal after which a lock may be taken over, and between renewals.
EXPIRY = 60.0
RENEWAL = 5.0

_CLOCK = getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC)  # goes on while a machine sleeps
_registry = threading.Lock()


class _Found(NamedTuple):
    """A lock as it lies in the bucket."""

    body: dict[str, Any]
    version: dict[str, str]
    modified: datetime


class Lease:
    """A lock that this process holds, renewed by a thread of its own until it is freed."""

    def __init__(self, store: UrlStore, key: str) -> None:
        self._store, self._key = store, key
        self.body: dict[str, Any] = {
            "pid": os.getpid(),
            "host": socket.gethostname(),
            "since": time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime()),
            "expires": EXPIRY,
            "id": uuid.uuid4().hex,
            "renewed": 0,
        }
        self._sure = min(2 * RENEWAL, EXPIRY / 6)
        self._version: dict[str, str] = {}
        self._until = 0.0
        self._lost: str | None = None
        self._turn, self._over = threading.Lock(), threading.Event()
        self._thread = threading.Thread(target=self._keep, name="lkarray-lock", daemon=True)

    def put(self, version: Mapping[str, str] | None, **changes: Any) -> bool:
        """Write the lock if it is at ``version`` (``None``: not there); say whether it was."""
        import obstore

        began = time.clock_gettime(_CLOCK)
        self.body["renewed"] += 1
        mode: Any = "create" if version is None else dict(version)
        text = json.dumps(self.body | changes).encode()
        try:
            with told(self._store.url), _or_refused():
                made = obstore.put(self._store.store, self._key, text, mode=mode)
        except _RefusedError:
            return False
        self._version = _version(made)
        self._until = began + self._sure
        return True

    def start(self) -> None:
        """Go on renewing."""
        with _registry:
            guards.setdefault(self._store.url, []).append(self)
        self._thread.start()

    def stop(self) -> None:
        """Free the lock, unless it was lost."""
        self._over.set()
        self._thread.join()
        with _registry:
            held = guards[self._store.url]
            held.remove(self)
            if not held:
                del guards[self._store.url]
        with suppress(StoreError, OSError), self._turn:
            if self._lost is None:
                self._replace(free=True)

    async def assure(self) -> None:
        """Renew the lock if it may have expired, and raise if another process has it.

        Raises
        ------
        LockedError
            It was taken over while this process did not renew it.
        """
        if self._lost is None and time.clock_gettime(_CLOCK) > self._until:
            await asyncio.to_thread(self._renew)
        if self._lost is not None:
            raise LockedError(
                f"{self._store.url} was taken over by {self._lost}, because this process did not "
                f"renew its lock for {self.body['expires']:g} s; what it committed is safe"
            )

    def _keep(self) -> None:
        while not self._over.wait(RENEWAL) and self._lost is None:
            with suppress(StoreError, OSError):  # the next write tells
                self._renew()

    def _renew(self) -> None:
        with self._turn:
            if self._lost is None:
                self._replace()

    def _replace(self, **changes: Any) -> None:
        """Write the lock over itself; a put whose answer was lost is recognised by its id."""
        for _ in range(3):
            if self.put(self._version, **changes):
                return
            lock = _read(self._store, self._key)
            if lock is None or lock.body.get("id") != self.body["id"]:
                self._lost = holder(lock.body) if lock else "a process that removed the lock"
                return
            self._version = lock.version


@contextmanager
def leased(store: UrlStore, name: str) -> Iterator[None]:
    """Hold a lock of a store on object storage.

    One that nobody renews any more is waited for until it expires, at most `EXPIRY` seconds.

    Raises
    ------
    LockedError
        Another process holds it, and renews it.
    StoreError
        The storage refuses, cannot be reached, or has no conditional put.
    """
    lease = _acquire(store, f"{HIDDEN}.{name}.lock")
    lease.start()
    try:
        yield
    finally:
        lease.stop()


def _acquire(store: UrlStore, key: str) -> Lease:
    lease = Lease(store, key)
    if lease.put(None):
        _check_conditions(store, lease)
        return lease
    first: _Found | None = None
    began = since = time.monotonic()
    offset, said = 0.0, False
    while True:
        lock = _read(store, key)
        if lock is None:
            if lease.put(None):
                return lease
            continue
        if lock.body.get("id") == lease.body["id"]:  # ours: the answer to the put was lost
            if lease.put(lock.version):
                return lease
            continue
        if lock.body.get("free"):
            if lease.put(lock.version):
                return lease
            continue
        if first is None:
            first = lock
            offset = (_server_time(store) - lock.modified).total_seconds()
            since = time.monotonic()  # after the request, however long it took: rather too late
        elif lock.version != first.version:
            raise LockedError(f"{store.url} is in use by {holder(lock.body)}; wait for it")
        expires = float(lock.body.get("expires", EXPIRY))
        # A second more, since servers tell the time in whole seconds.
        left = expires + 1 - offset - (time.monotonic() - since)
        if left <= 0:
            if lease.put(lock.version):
                logger.warning(
                    "%s: took over the lock of %s, which did not renew it for %.0f s",
                    store.url,
                    holder(lock.body),
                    expires,
                )
                return lease
            first = lock  # another process was faster: its renewals will tell
            continue
        if not said and time.monotonic() - began > 2 * RENEWAL:
            who, said = holder(lock.body), True
            logger.info("%s: waiting %.0f s for the lock of %s to expire", store.url, left, who)
        time.sleep(min(RENEWAL / 4, left))


def holder(body: Mapping[str, Any]) -> str:
    """Return who holds a lock, for a message."""
    if not {"pid", "host", "since"} <= body.keys():
        return "another process"
    return f"process {body['pid']} on {body['host']} since {body['since']}"


def _check_conditions(store: UrlStore, lease: Lease) -> None:
    """Raise unless the server refuses to make what is there: some ignore the condition."""
    if lease.put(None):
        raise StoreError(
            f"{store.url}: the server has no conditional put (If-None-Match), so that two writers "
            "could not be told apart; use storage that has, or a folder"
        )


def _read(store: UrlStore, key: str) -> _Found | None:
    import obstore

    try:
        with told(store.url):
            answer = obstore.get(store.store, key)
            text, meta = bytes(answer.bytes()), answer.meta
    except FileNotFoundError:
        return None
    try:
        body = json.loads(text)
    except ValueError:
        body = {}
    return _Found(body if isinstance(body, dict) else {}, _version(meta), meta["last_modified"])


def _server_time(store: UrlStore) -> datetime:
    """Return the time by the clock that stamps objects, which ours may be far from."""
    import obstore

    key = f"{HIDDEN}.clock-{uuid.uuid4().hex}"
    with told(store.url):
        obstore.put(store.store, key, b"")
        now = obstore.head(store.store, key)["last_modified"]
    with suppress(StoreError, OSError), told(store.url):
        obstore.delete(store.store, key)
    return now


def _version(meta: Mapping[str, Any]) -> dict[str, str]:
    return {key: meta[key] for key in ("e_tag", "version") if meta.get(key)}


class _RefusedError(StoreError):
    """The condition of a put did not hold."""


@contextmanager
def _or_refused() -> Iterator[None]:
    from obstore.exceptions import AlreadyExistsError, PreconditionError

    try:
        yield
    except (AlreadyExistsError, PreconditionError):
        raise _RefusedError from None
