"""How a run ends: its exit code, its line of JSON, and what a signal to stop does.

Exit codes: 0 done, or unchanged; 1 failed; 2 refused (wrong usage or settings, a missing
input); 3 locked, in use by another process; 130 and 143 stopped, by Ctrl-C and by SIGTERM.
"""

from __future__ import annotations

import ctypes
import json
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

import click

from lkarray._version import __version__
from lkarray.errors import FingerprintError, LockedError, SettingsError
from lkarray.store.objects import without_credentials
from lkarray.workflow.running import read_record

_GRACE = 5.0  # seconds in which a stopped run may close what it has open


class Stopped(BaseException):
    """A signal asked the run to stop."""

    def __init__(self, number: int) -> None:
        super().__init__("stopped; run again to continue")
        self.exit_code = 128 + number


def ending_of(error: BaseException) -> tuple[str, int]:
    """Return the status and the exit code of a run that an error ended."""
    if isinstance(error, Stopped):
        return "stopped", error.exit_code
    if isinstance(error, LockedError):
        return "locked", 3
    if isinstance(error, SettingsError | FingerprintError | click.UsageError):
        return "refused", 2
    return "failed", 1


class Ending:
    """How one run ends, as one line of JSON.

    Parameters
    ----------
    workflow
        The study's name, where it is known.
    """

    def __init__(self, workflow: str | None) -> None:
        self.workflow = workflow
        self.status, self.exit_code = "done", 0
        self.error: str | None = None
        self.folder: Path | None = None
        self._before: dict[str, Any] = {}
        self._began = time.perf_counter()

    def begin_in(self, folder: Path) -> None:
        """Note the run's folder, before anything runs in it."""
        self.folder, self._before = folder, read_record(folder).get("stages", {})

    def failed(self, error: BaseException) -> None:
        """Note the error that ended the run."""
        self.status, self.exit_code = ending_of(error)
        text = error.format_message() if isinstance(error, click.ClickException) else str(error)
        self.error = text or type(error).__name__

    def line(self) -> str:
        """Return the line; docs/scheduling.md says what its fields are."""
        ran = self.folder is not None and self.status not in ("refused", "locked")
        stages = read_record(self.folder).get("stages", {}) if ran and self.folder else {}
        fields = {
            "workflow": self.workflow,
            "status": self.status,
            "exit_code": self.exit_code,
            "folder": self.folder and str(self.folder.absolute()),
            "lkarray": __version__,
            "seconds": round(time.perf_counter() - self._began, 3),
            "stages": {name: entry["seconds"] for name, entry in stages.items()},
            "reused": [name for name, entry in stages.items() if entry == self._before.get(name)],
            "metrics": self._made("metrics.json"),
            "report": self._made("index.html"),
            "error": self.error,
        }
        kept = {k: without_credentials(v) if isinstance(v, str) else v for k, v in fields.items()}
        return json.dumps(kept)

    def _made(self, name: str) -> str | None:
        if self.folder is None or self.exit_code:
            return None  # what lies there may be of an earlier run
        path = self.folder.absolute() / "report" / name
        return str(path) if path.exists() else None


@contextmanager
def reporting(ending: Ending, *, as_json: bool) -> Iterator[None]:
    """Note how what is done inside ends, and let SIGTERM and Ctrl-C end it in good order.

    With ``as_json``, all that is written to standard output meanwhile goes to standard error,
    and the line of JSON follows.
    """
    if not as_json:
        with _noting(ending), _stoppable(lambda line: None, ending):
            yield
        return
    sys.stdout.flush()
    real = os.dup(1)
    os.dup2(2, 1)  # for child processes and for libraries that are not Python
    try:
        stoppable = _stoppable(lambda line: os.write(real, line), ending)
        with redirect_stdout(sys.stderr), _noting(ending), stoppable:
            yield
    finally:
        ctypes.CDLL(None).fflush(None)  # what C has printed and not yet written
        os.dup2(real, 1)
        click.echo(ending.line())


@contextmanager
def _noting(ending: Ending) -> Iterator[None]:
    try:
        yield
    except BaseException as error:
        ending.failed(error)
        raise


@contextmanager
def _stoppable(write: Callable[[bytes], object], ending: Ending) -> Iterator[None]:
    """Raise `Stopped` where SIGTERM or Ctrl-C arrives; leave hard where that does not end it."""
    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread may handle signals
        return
    numbers = [n for n in (signal.SIGINT, signal.SIGTERM) if signal.getsignal(n) != signal.SIG_IGN]
    asked: list[int] = []
    once = threading.Lock()  # held by whichever thread ends the run, and never released
    reader, writer = os.pipe()
    os.set_blocking(writer, False)

    def stop(number: int, frame: FrameType | None) -> None:
        asked.append(number)
        for each in numbers:
            signal.signal(each, signal.SIG_IGN)  # once is enough
        raise Stopped(number)

    def give_up(number: int) -> None:
        if once.acquire(blocking=False):
            error = Stopped(number)
            ending.failed(error)
            os.write(2, f"lkarray: {error}\n".encode())
            write(f"{ending.line()}\n".encode())
            leave(error)

    # The pipe is written by the C handler: Python's own waits while the main thread is deep in
    # a library.
    woken = signal.set_wakeup_fd(writer)
    before = {number: signal.signal(number, stop) for number in numbers}
    threading.Thread(target=_watch, args=(reader, give_up), daemon=True).start()
    try:
        yield
    except BaseException as error:
        if asked and not isinstance(error, Stopped):
            raise Stopped(asked[0]) from error  # what a library has made of it
        raise
    finally:
        once.acquire()
        if not asked:  # else signals stay ignored until the process ends
            signal.set_wakeup_fd(woken)
            for number, handler in before.items():
                signal.signal(number, handler)
            os.close(writer)


def _watch(reader: int, give_up: Callable[[int], object]) -> None:
    while number := os.read(reader, 1):
        if number[0] in (signal.SIGINT, signal.SIGTERM):
            time.sleep(_GRACE)
            give_up(number[0])
    os.close(reader)


def leave(error: Stopped) -> NoReturn:
    """End the process and its children now, without waiting for threads or event loops."""
    for child in multiprocessing.active_children():
        child.kill()
        child.join(1.0)
    sys.stderr.flush()
    os._exit(error.exit_code)
