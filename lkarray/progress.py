"""Progress bars, by tqdm, for whatever takes longer than two seconds.

A bar is drawn by the clock as well as by its counts, so that work whose first step takes a
minute shows its name and its time meanwhile.
"""

from __future__ import annotations

import importlib.util
import threading
import weakref
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from typing import Any

_DELAY, _TICK = 2.0, 0.5

_shown: ContextVar[bool] = ContextVar("lkarray_progress", default=False)


@contextmanager
def showing(show: bool) -> Iterator[None]:
    """Let bars inside, which are not told whether to show, be shown or not."""
    token = _shown.set(show)
    try:
        yield
    finally:
        _shown.reset(token)


def _tqdm() -> Any:
    """Return tqdm's class for here: that of notebooks needs ipywidgets, and warns without it."""
    if importlib.util.find_spec("ipywidgets") is None:
        from tqdm import tqdm
    else:
        from tqdm.auto import tqdm
    return tqdm


def bar(
    description: str,
    *,
    total: int,
    done: int = 0,
    unit: str = "step",
    show: bool | None = None,
) -> Any:
    """Return a tqdm bar that appears after two seconds, in terminals and notebooks alike.

    ``show=None`` does as `showing` says.
    """
    return _make(
        desc=description,
        total=total,
        initial=done,
        unit=unit,
        disable=not (_shown.get() if show is None else show),
        delay=_DELAY,
        dynamic_ncols=True,
    )


def _make(**options: Any) -> Any:
    made = _tqdm()(**options)
    if not made.disable:
        threading.Thread(target=_draw, args=(weakref.ref(made),), daemon=True).start()
    return made


def _draw(reference: weakref.ref[Any]) -> None:
    """Draw a bar by the clock until it is closed."""
    closed = threading.Event()  # never set: it only waits
    pause = _DELAY
    while not closed.wait(pause):
        bar_ = reference()
        if bar_ is None:
            return
        with bar_.get_lock():  # a bar that is being closed draws its last under the same lock
            if bar_.disable:
                return
            bar_.refresh(nolock=True)
            bar_.delay = 0  # seen, so that closing it ends the line
        del bar_
        pause = _TICK


def skip(bar_: Any, count: int) -> None:
    """Move a bar past what an earlier run did, without taking it for speed."""
    if not bar_.disable:
        bar_.initial += count
        bar_.update(count)


def dask_bar(description: str, *, show: bool = True) -> AbstractContextManager[Any]:
    """Return a context in which every computation on Dask's local schedulers has a bar."""
    if not show:
        return nullcontext()
    from tqdm.dask import TqdmCallback

    return TqdmCallback(
        desc=description, unit="task", delay=_DELAY, tqdm_class=_make, dynamic_ncols=True
    )


@contextmanager
def busy(description: str, *, show: bool | None = None) -> Iterator[None]:
    """Show the time that passes during work that cannot count its steps."""
    bar_ = bar(description, total=0, show=show)
    bar_.bar_format = "{desc}: {elapsed}"
    with bar_:
        yield
