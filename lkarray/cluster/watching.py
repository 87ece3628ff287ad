"""Is anybody left to work? Watched while somebody waits, so that no wait is without end."""

from __future__ import annotations

import asyncio
import logging
import threading
import time
import weakref
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

from distributed import Client

from lkarray.cluster.replacing import Keeper, expects_more
from lkarray.errors import ClusterError

logger = logging.getLogger("lkarray")

#: Seconds between looks; without a worker until that is said; without an answer until that is.
PERIOD, WORD, SILENCE = 1.0, 2.0, 5.0

#: Seconds without a worker until a wait ends, where nobody here can start one: longer than a nanny
#: takes to start one again.
PATIENCE = 25.0

#: Seconds without a worker until a wait ends, where lost ones are replaced at once.
LONG_PATIENCE = 300.0

#: Seconds in which all workers are paused, for want of memory, and none has a task in hand.
PAUSED = 60.0

_SECONDS = "SECONDS"  # in a text: how long it lasted
_REMIND = 60.0  # seconds between words of the same wait
_SOME = 100  # workers of whom a look asks details
_ANSWER = 0.5  # seconds that a look waits for the scheduler; a late answer counts at the next

_watches: weakref.WeakKeyDictionary[Client, Watch] = weakref.WeakKeyDictionary()
_lock = threading.Lock()


class WorkersLostError(ClusterError):
    """No worker is left; what waits for them ends with this."""

    def __init__(self, what: str) -> None:
        super().__init__(f"{what}. What was written is kept: run again to continue")
        self.what = what

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.what,)


@dataclass(eq=False)
class _Wait:
    """Somebody who waits: for futures, or without any for a worker to come."""

    bar: Any = None
    resource: str | None = None
    for_worker: bool = False
    error: WorkersLostError | None = None


@dataclass(frozen=True)
class _Trouble:
    """Why nothing works on what waits, and for how long to bear that."""

    what: str
    patience: float
    outlook: str
    end: str


class Watch:
    """Looks at the workers of a client, in a thread, for as long as somebody waits.

    Parameters
    ----------
    client
        Whose workers.
    name
        Of the cluster, in messages.
    keeper
        What replaces workers that are gone for good, of a cluster that was opened here.
    seen
        Whether there were workers before.
    """

    def __init__(
        self, client: Client, name: str, keeper: Keeper | None = None, *, seen: bool = False
    ) -> None:
        self._client = weakref.ref(client)
        self._name, self._keeper = name, keeper
        self._waits: list[_Wait] = []
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self._answer: Future[dict[str, Any]] | None = None
        self._answered = time.monotonic()
        self._seen = seen
        self._well()

    def enter(self, wait: _Wait) -> None:
        """Watch on behalf of one more who waits."""
        with _lock:
            self._waits.append(wait)
            if self._thread is None:
                self._stop = threading.Event()
                self._thread = threading.Thread(
                    target=self._run, args=(self._stop,), daemon=True, name="lkarray-watch"
                )
                self._thread.start()

    def leave(self, wait: _Wait) -> None:
        """Stop when nobody waits any more."""
        with _lock:
            self._waits.remove(wait)
            if self._waits:
                return
            self._stop.set()
            thread, self._thread = self._thread, None
        if thread is not None and thread is not threading.current_thread():
            thread.join(SILENCE)
        if self._keeper is not None:
            self._keeper.stop()
        self._well()

    def _well(self) -> None:
        self._trouble: _Trouble | None = None
        self._since = 0.0  # when it began
        self._told, self._told_at = "", 0.0

    def _run(self, stop: threading.Event) -> None:
        while not stop.wait(PERIOD):
            client = self._client()
            if client is None or client.status in ("closing", "closed"):
                return
            try:
                self._look(client)
            except Exception:  # it must go on: what it failed to see is there at the next look
                logger.debug("a look at the workers failed", exc_info=True)
            del client

    def _look(self, client: Client) -> None:
        if self._keeper is not None:
            self._keeper.look()
        waiting = _pending(client)
        if not waiting and not any(wait.for_worker for wait in self._waits):
            self._well()
            self._answered = time.monotonic()
            return
        info = self._ask(client)
        now = time.monotonic()
        if info is None:
            if client.status != "running":
                self._say(now, f"the connection to {self._name} is lost; trying to connect again")
            elif now - self._answered > SILENCE:
                self._say(now, f"the scheduler of {self._name} does not answer; it is busy or gone")
            return
        self._answered = now
        trouble = self._trouble_of(client, info)
        if (trouble and trouble.what) != (self._trouble and self._trouble.what):
            told = self._told
            self._well()
            self._trouble, self._since = trouble, now
            if told:
                self._say(now, "" if trouble else f"workers of {self._name} are there again")
        if trouble is None:
            return
        lasted = now - self._since
        hopeless = self._keeper is not None and self._keeper.hopeless and lasted > WORD
        if hopeless or lasted > trouble.patience:
            self._end(
                client, f"{trouble.what}, {trouble.end.replace(_SECONDS, str(round(lasted)))}"
            )
        elif lasted >= WORD:
            who = f"{waiting} task{'s' * (waiting > 1)}" if waiting else "a call"
            waits = f"{who} wait{'s' * (waiting <= 1)}"
            self._say(now, f"{trouble.what}, and {waits}; {trouble.outlook}")

    def _trouble_of(self, client: Client, info: dict[str, Any]) -> _Trouble | None:
        """Return what keeps tasks waiting, if anything does."""
        workers = list(info["workers"].values())
        needs = {wait.resource for wait in self._waits} - {None}
        useful = [w for w in workers if not needs or needs & set(w.get("resources") or {})]
        if useful:
            self._seen = True
            whole = len(workers) == info.get("n_workers", len(workers))
            if not whole or not all(w.get("status") == "paused" and _idle(w) for w in useful):
                return None
            return _Trouble(
                f"all workers of {self._name} are paused for want of memory",
                PAUSED,
                _ends_within(PAUSED),
                f"for {_SECONDS} s; give them more memory, or restart them",
            )
        with_ = f" with a {', '.join(map(str, needs))}" if needs and workers else ""
        what = f"no worker{with_} of {self._name} is {'left' if self._seen else 'there'}"
        end = f"and none came within {_SECONDS} s"
        if self._keeper is not None:
            patience = self._keeper.patience or LONG_PATIENCE
            outlook = "those that are gone for good are started anew"
            return _Trouble(what, patience, outlook, end + self._keeper.why())
        if expects_more(client.cluster):
            return _Trouble(what, float("inf"), "they are queued, or scaled on demand", end)
        return _Trouble(what, PATIENCE, _ends_within(PATIENCE), end)

    def _ask(self, client: Client) -> dict[str, Any] | None:
        """Return what the scheduler says of itself and its workers; ``None`` before it answers."""
        if self._answer is None:
            needs = any(wait.resource for wait in self._waits)
            asked = _identity(client, -1 if needs else _SOME)
            self._answer = asyncio.run_coroutine_threadsafe(asked, _loop_of(client))
        try:
            info = self._answer.result(_ANSWER)
        except TimeoutError:
            if self._answer.done():  # its own time ran out
                self._answer = None
            return None
        except Exception:
            self._answer = None
            return None
        self._answer = None
        return info

    def _say(self, now: float, what: str) -> None:
        """Say it in the log and on the bars; the same thing again after a minute only."""
        if what and (what != self._told or now - self._told_at > _REMIND):
            logger.warning("%s", what)
            self._told, self._told_at = what, now
        for wait in list(self._waits):
            if wait.bar is not None:
                with suppress(Exception):
                    wait.bar.set_postfix_str(what)

    def _end(self, client: Client, what: str) -> None:
        """End every wait of the client, with an error."""
        error = WorkersLostError(what)
        logger.warning("%s", error)
        for wait in list(self._waits):
            if wait.for_worker:
                wait.error = error
        _loop_of(client).call_soon_threadsafe(_fail, client, error)
        if self._keeper is not None:
            self._keeper.begin_again()
        self._well()


def watch_for_good(client: Client, name: str, keeper: Keeper | None = None) -> None:
    """Watch a client until it is closed, and replace workers if there is who can."""
    watch = _watches[client] = Watch(client, name, keeper, seen=True)
    watch.enter(_Wait())


def end_watch(client: Client) -> None:
    """Stop watching a client, before it is closed."""
    watch = _watches.pop(client, None)
    if watch is not None:
        for wait in list(watch._waits):
            watch.leave(wait)


@contextmanager
def watched(client: Client, **wait: Any) -> Iterator[_Wait]:
    """Watch a client while the block waits for its workers."""
    with _lock:
        watch = _watches.get(client)
        if watch is None:
            scheduler: Any = client.scheduler
            watch = _watches[client] = Watch(client, str(scheduler.address))
    mine = _Wait(**wait)
    watch.enter(mine)
    try:
        yield mine
    finally:
        with suppress(ValueError):  # it was closed meanwhile
            watch.leave(mine)


def worker_infos(client: Client) -> list[dict[str, Any]]:
    """Return what the scheduler knows of its workers, waiting for one to be there.

    Raises
    ------
    WorkersLostError
        None is there, and none came.
    """
    with watched(client, for_worker=True) as wait:
        while not (workers := list(client.scheduler_info(n_workers=-1)["workers"].values())):
            if wait.error is not None:
                raise wait.error
            if client.status in ("closing", "closed"):
                raise WorkersLostError("the client was closed, or its scheduler is gone")
            time.sleep(0.1)
    return workers


def connection_lost(client: Client, error: BaseException) -> bool:
    """Say whether futures were cancelled since the scheduler is gone."""
    return client.status != "running" or "scheduler-connection-lost" in str(error)


def _pending(client: Client) -> int:
    return sum(state.status in ("pending", "lost") for state in list(client.futures.values()))


def _ends_within(seconds: float) -> str:
    return f"this ends in an error unless that changes within {seconds:g} s"


def _idle(worker: dict[str, Any]) -> bool:
    counts = (worker.get("metrics") or {}).get("task_counts") or {}
    return not any(counts.get(state) for state in ("executing", "long-running"))


async def _identity(client: Client, workers: int) -> dict[str, Any]:
    scheduler: Any = client.scheduler
    return dict(await scheduler.identity(n_workers=workers))


def _loop_of(client: Client) -> asyncio.AbstractEventLoop:
    loop: Any = client.loop
    return loop.asyncio_loop


def _fail(client: Client, error: WorkersLostError) -> None:
    """Let all futures that wait end with an error, on the client's own loop."""
    for state in list(client.futures.values()):
        if state.status in ("pending", "lost"):
            state.set_error(error, None)
