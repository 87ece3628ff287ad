"""Object storage by URL, through obstore, which is loaded on first use.

A put is atomic, and durable once it is answered: neither a move nor a flush is needed.
"""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import AsyncGenerator, Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import TYPE_CHECKING, Any, Protocol, Self
from urllib.parse import quote

from zarr.abc.store import Store
from zarr.core.sync import sync
from zarr.storage import ObjectStore

from lkarray.errors import MissingPackageError, StoreError

if TYPE_CHECKING:
    from zarr.abc.store import ByteRequest
    from zarr.core.buffer import Buffer, BufferPrototype

#: URLs that obstore opens, with the settings that give access; fsspec opens the others.
_ACCESS = {
    "s3": "AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_REGION and, where it is not Amazon's, "
    "AWS_ENDPOINT_URL",
    "gs": "GOOGLE_APPLICATION_CREDENTIALS",
    "az": "AZURE_STORAGE_ACCOUNT_NAME and AZURE_STORAGE_ACCOUNT_KEY",
}
_KINDS = {"s3a": "s3", "gcs": "gs", "azure": "az", "adl": "az", "abfs": "az", "abfss": "az"}

#: Seconds in which obstore repeats a request that failed; a writer goes on trying for longer,
#: so that what it repeats is never older than its lock (see `leases`).
_RETRY_SECONDS = 20
_WRITE_PATIENCE = 180.0
#: Up to this size an object is one request, above it several parts.
_ONE_PUT = 32 << 20
_CREDENTIALS = re.compile(
    # User and password, which may hold any sign but spaces, and the query.
    r"([a-z][a-z0-9+.-]*://)(?:[^/\s'\"]*@|[^/\s'\"]*:[^\s'\"]*@)?([^\s?'\"]*)(?:\?[^\s'\")]*)?",
    re.I,
)

# Objects of ours that are no part of a Zarr hierarchy begin so.
HIDDEN = ".lkarray"


class ObjectError(StoreError):
    """Object storage refused a request."""


class UnreachableError(ObjectError):
    """Object storage did not answer."""


class Guard(Protocol):
    """What must hold for a writer to write: its lock."""

    async def assure(self) -> None:
        """Raise if the lock was lost."""


#: The locks that this process holds, by the URL of their store.
guards: dict[str, list[Guard]] = {}


class UrlStore(ObjectStore[Any]):
    """A Zarr store at a URL: pickled as that URL, with errors that say what to do.

    Parameters
    ----------
    store
        The obstore store.
    url
        Where it is, free of credentials.
    by_url
        Whether the URL and the environment are all it takes to open the store again.
    """

    def __init__(
        self, store: Any, *, url: str, by_url: bool = True, read_only: bool = False
    ) -> None:
        super().__init__(store, read_only=read_only)
        self.url, self.by_url = url, by_url

    def with_read_only(self, read_only: bool = False) -> Self:
        """Return the same store, for reading only or for writing too."""
        return type(self)(self.store, url=self.url, by_url=self.by_url, read_only=read_only)

    def __str__(self) -> str:
        return self.url

    def __eq__(self, other: object) -> bool:
        return isinstance(other, UrlStore) and (
            (self.url, self.read_only, self.store) == (other.url, other.read_only, other.store)
        )

    __hash__ = None  # type: ignore[assignment]

    def __reduce__(self) -> Any:
        if self.by_url:
            return _reopen, (self.url, self.read_only)
        return _restore, (self.store, self.url, self.read_only)

    def inside(self, path: str) -> UrlStore:
        """Return the store at a path inside."""
        url = f"{self.url}/{quote(path)}".rstrip("/")
        if self.by_url:
            return _reopen(url, self.read_only)
        args, options = self.store.__getnewargs_ex__()
        options = options | {"prefix": f"{self.store.prefix or ''}/{path}".strip("/")}
        return _restore(type(self.store)(*args, **options), url, self.read_only)

    async def get(
        self, key: str, prototype: BufferPrototype, byte_range: ByteRequest | None = None
    ) -> Buffer | None:
        """Return an object or a part of it, or ``None``."""
        with told(self.url):
            return await super().get(key, prototype, byte_range)

    async def get_partial_values(self, prototype: Any, key_ranges: Any) -> list[Buffer | None]:
        """Return parts of objects."""
        with told(self.url):
            return await super().get_partial_values(prototype, key_ranges)

    async def exists(self, key: str) -> bool:
        """Say whether an object is there."""
        with told(self.url):
            return await super().exists(key)

    async def getsize(self, key: str) -> int:
        """Return the bytes of an object."""
        with told(self.url):
            return await super().getsize(key)

    async def set(self, key: str, value: Buffer) -> None:
        """Write an object, while this process holds the locks that it took."""
        self._check_writable()
        import obstore

        data = value.as_buffer_like()
        parts = None if len(value) > _ONE_PUT else False
        deadline = time.monotonic() + _WRITE_PATIENCE
        while True:
            try:
                await self._assured()
                with told(self.url):
                    await obstore.put_async(self.store, key, data, use_multipart=parts)
                    return
            except UnreachableError:
                if self.url not in guards or time.monotonic() > deadline:
                    raise
                await asyncio.sleep(1.0)

    async def set_if_not_exists(self, key: str, value: Buffer) -> None:
        """Write an object unless there is one."""
        await self._assured()
        with told(self.url):
            await super().set_if_not_exists(key, value)

    async def delete(self, key: str) -> None:
        """Delete an object, if it is there."""
        await self._assured()
        with told(self.url):
            await super().delete(key)

    async def _assured(self) -> None:
        for guard in list(guards.get(self.url, ())):
            await guard.assure()

    async def delete_dir(self, prefix: str) -> None:
        """Delete all objects under a prefix."""
        with told(self.url):
            await super().delete_dir(prefix)

    async def _list(self, prefix: str | None = None) -> AsyncGenerator[Any, None]:
        with told(self.url):
            async for item in super()._list(prefix):
                yield item

    async def list_dir(self, prefix: str) -> AsyncGenerator[str, None]:
        """Yield the names directly under a prefix."""
        with told(self.url):
            async for name in super().list_dir(prefix):
                yield name

    def others(self) -> list[str]:
        """Return the names at the top that are not lkarray's own locks.

        Raises
        ------
        StoreError
            There is no such bucket, access is denied, or nothing answers.
        """

        async def names() -> list[str]:
            return [name async for name in self.list_dir("")]

        return [name for name in sync(names()) if not name.startswith(HIDDEN)]

    def move(self, old: str, new: str) -> None:
        """Put a finished group in the place of another.

        The copies are the server's own. The group's metadata goes first and comes last: without
        them it is not there, so that a kill in between leaves nothing half done in sight.
        """
        import obstore

        async def copy(key: str) -> None:
            await self._assured()
            to = f"{new}/{key.removeprefix(f'{old}/')}"
            with told(self.url):
                await obstore.copy_async(self.store, key, to)

        async def run() -> None:
            head = f"{old}/zarr.json"
            await self.delete(f"{new}/zarr.json")
            await self.delete_dir(new)
            keys = [item["path"] async for item in self._list(old)]
            for key in sorted(keys, key=lambda key: key == head):
                await copy(key)
            await self.delete_dir(old)

        sync(run())

    def probe(self) -> None:
        """Write a small object and delete it, so that a refusal comes before any work."""
        import obstore

        key = f"{HIDDEN}.probe"
        with told(self.url):
            obstore.put(self.store, key, b"1")
        with suppress(StoreError, OSError), told(self.url):
            obstore.delete(self.store, key)


def kind_of(url: str) -> str | None:
    """Return which object storage a URL is on, or ``None`` if obstore does not open it."""
    scheme, mark, _ = url.partition("://")
    kind = _KINDS.get(scheme.lower(), scheme.lower())
    return kind if mark and kind in _ACCESS else None


def open_url(url: str) -> UrlStore:
    """Return the store at a URL of object storage. Sends nothing.

    Raises
    ------
    StoreError
        The URL holds credentials, or names no bucket or account.
    MissingPackageError
        obstore is not installed.
    """
    kind = kind_of(url)
    assert kind is not None
    bucket = url.partition("://")[2].partition("/")[0]
    # abfss://container@account.dfs.core.windows.net/path has an @ of its own.
    if ":" in bucket or "?" in url or ("@" in bucket and kind != "az"):
        raise StoreError(
            f"the URL of {without_credentials(url)} holds credentials or a query, which would end "
            f"up in logs; give access by the environment: {_ACCESS[kind]}"
        )
    if not bucket:
        raise StoreError(f"{url} names no bucket; correct the URL")
    return _reopen(url.rstrip("/"), False)


def _reopen(url: str, read_only: bool) -> UrlStore:
    try:
        from obstore.store import from_url
    except ModuleNotFoundError:
        raise MissingPackageError(
            f"{url} needs obstore, which is not installed: pip install 'lkarray[storage]'"
        ) from None
    retry: Any = {"retry_timeout": timedelta(seconds=_RETRY_SECONDS)}
    try:
        with told(url):
            store = from_url(re.sub("^gcs:", "gs:", url), retry_config=retry)
    except ValueError:
        raise StoreError(f"{url} is not a URL of object storage; correct it") from None
    return UrlStore(store, url=url, read_only=read_only)


def _restore(store: Any, url: str, read_only: bool) -> UrlStore:
    return UrlStore(store, url=url, by_url=False, read_only=read_only)


def adopt(store: Store) -> Store:
    """Return a user's own `zarr.storage.ObjectStore` on a bucket as a `UrlStore`, others as is."""
    if not isinstance(store, ObjectStore) or isinstance(store, UrlStore):
        return store
    scheme = {"S3Store": "s3", "GCSStore": "gs", "AzureStore": "az"}.get(type(store.store).__name__)
    if scheme is None:
        return store
    config = store.store.config
    bucket = config.get("bucket") or config.get("container_name") or "?"
    url = f"{scheme}://{bucket}/{quote(store.store.prefix or '')}".rstrip("/")
    return _restore(store.store, url, store.read_only)


def without_credentials(text: str) -> str:
    """Return a text whose URLs have neither user, password nor query."""
    return _CREDENTIALS.sub(r"\1\2", text)


@contextmanager
def told(url: str) -> Iterator[None]:
    """Turn an error of obstore into a `StoreError` that names the cause and the remedy.

    That an object is missing stays a ``FileNotFoundError``, which Zarr expects. The text of
    obstore's errors is not passed on: a server's answer may repeat the key that it was sent.
    """
    try:
        yield
    except StoreError:
        raise
    except Exception as error:
        module = type(error).__module__.partition(".")[0]
        text = str(error)
        gone = isinstance(error, FileNotFoundError)
        if (module != "obstore" and not gone) or (gone and not _NO_BUCKET.search(text)):
            raise
        raise _say(text, type(error).__name__, url) from None


_NO_BUCKET = re.compile(r"NoSuchBucket|ContainerNotFound|bucket does not exist", re.I)

#: What the text of an error says, the class of ours, the cause, and what to do.
_CAUSES: list[tuple[str, type[ObjectError], str, Callable[[str], str]]] = [
    (
        _NO_BUCKET.pattern,
        ObjectError,
        "there is no such bucket",
        lambda _: "make it, or correct the URL",
    ),
    (
        "BadScheme|scheme is not allowed",
        ObjectError,
        "its endpoint is http, which is not allowed",
        lambda _: "set AWS_ALLOW_HTTP=true if the network is to be trusted, or use https",
    ),
    (
        r"169\.254\.|metadata\.google|MissingAccount|must be specified|MissingCredentials",
        ObjectError,
        "there are no credentials or no account",
        lambda access: f"set {access}",
    ),
    (
        "PermanentRedirect|AuthorizationHeaderMalformed|IllegalLocationConstraint",
        ObjectError,
        "the bucket is in another region",
        lambda _: "set AWS_REGION",
    ),
    (
        "PermissionDenied|Unauthenticated|AccessDenied|InvalidAccessKeyId|SignatureDoesNotMatch"
        "|AuthenticationFailed|code: 40[13]",
        ObjectError,
        "access is denied",
        lambda access: f"check the credentials' permissions and {access}",
    ),
    (
        "HTTP error|Connect|timed? ?out|dns error|code: 5",
        UnreachableError,
        "it cannot be reached",
        lambda access: f"check the network and {access}; then run again",
    ),
]


def _say(text: str, name: str, url: str) -> ObjectError:
    access = _ACCESS[kind_of(url) or "s3"]
    code = re.search(r"<Code>(\w+)</Code>", text)
    for pattern, kind, cause, remedy in _CAUSES:
        if re.search(pattern, f"{name} {text}", re.I):
            said = f" ({code[1]})" if code else ""
            return kind(f"{url}: {cause}{said}; {remedy(access)}")
    first = without_credentials(text.splitlines()[0] if text else name)
    return ObjectError(f"{url}: {first[:300]}; check {access}")
