"""Waits for the workers of a cluster: each ends with a result, or with words.

Light: distributed is loaded by whoever makes a client, never from here.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeVar, cast

from lkarray.errors import ClusterError, LkarrayError, StoreError

if TYPE_CHECKING:
    from distributed import Client

T = TypeVar("T")

_SAFE = "What was written is kept"


def current_client() -> Client | None:
    """Return the client on whose workers Dask computes by default, if there is one."""
    if "distributed" not in sys.modules:
        return None
    from distributed import default_client

    try:
        client: Client = default_client()
    except ValueError:
        return None
    return client


def compute(*collections: Any, doing: str = "computed", safe: str = _SAFE) -> tuple[Any, ...]:
    """Compute as Dask does, but never wait without end for workers that are gone.

    Parameters
    ----------
    *collections
        Dask collections, as of `dask.compute`.
    doing, safe
        As of `workers_awaited`.
    """
    import dask

    with workers_awaited(doing, safe):
        out: tuple[Any, ...] = dask.compute(*collections)
    return out


def computed(lazy: T, doing: str = "computed", safe: str = _SAFE) -> T:
    """Return an xarray object with its values in memory; see `compute`."""
    return cast(T, compute(lazy, doing=doing, safe=safe)[0])


@contextmanager
def workers_awaited(
    doing: str,
    safe: str = _SAFE,
    *,
    client: Client | None = None,
    bar: Any = None,
    resource: str | None = None,
) -> Iterator[None]:
    """Watch the workers while the block waits for them, and turn their loss into words.

    Also a decorator, of what computes here and there.

    Parameters
    ----------
    doing
        What they are at: ``"sampled"``.
    safe
        What is stored already and not lost.
    client
        Whose workers; by default the current client's, if there is one.
    bar
        Progress bar that shows what is said.
    resource
        What a worker must announce to count, such as ``"GPU"``.

    Raises
    ------
    ClusterError
        No worker is left and none comes, or the scheduler is gone.
    StoreError
        The same task ended several workers.
    """
    client = current_client() if client is None else client
    if client is None:
        yield
        return
    from distributed.client import FutureCancelledError, FuturesCancelledError
    from distributed.scheduler import KilledWorker

    from lkarray.cluster.watching import WorkersLostError, connection_lost, watched

    try:
        with watched(client, bar=bar, resource=resource):
            yield
    except KilledWorker as error:
        raise StoreError(
            f"workers died while they {doing} ({error}); look into their logs, for want of memory "
            f"perhaps. {safe}: run again to continue"
        ) from None
    except WorkersLostError as error:
        raise ClusterError(f"{error.what}. {safe}: run again to continue") from None
    except (FutureCancelledError, FuturesCancelledError, OSError) as error:
        if isinstance(error, LkarrayError) or not connection_lost(client, error):
            raise
        raise ClusterError(
            f"the connection to the scheduler was lost while workers {doing}; see that it runs, "
            f"and connect again. {safe}: run again to continue"
        ) from None
