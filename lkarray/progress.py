"""Progress bars, by tqdm, for whatever takes longer than two seconds."""

from __future__ import annotations

import importlib.util
import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

_DELAY = 2.0


def _tqdm() -> Any:
    """Return tqdm's class for here: that of notebooks needs ipywidgets, and warns without it."""
    if importlib.util.find_spec("ipywidgets") is None:
        from tqdm import tqdm
    else:
        from tqdm.auto import tqdm
    return tqdm


def bar(
    description: str, *, total: int, done: int = 0, unit: str = "step", show: bool = True
) -> Any:
    """Return a tqdm bar that appears after two seconds, in terminals and notebooks alike."""
    return _tqdm()(
        desc=description,
        total=total,
        initial=done,
        unit=unit,
        disable=not show,
        delay=_DELAY,
        dynamic_ncols=True,
    )


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

    bars: AbstractContextManager[Any] = TqdmCallback(
        desc=description, unit="task", delay=_DELAY, tqdm_class=_tqdm(), dynamic_ncols=True
    )
    return bars


@contextmanager
def busy(description: str, *, show: bool = True) -> Iterator[None]:
    """Show the time that passes during work that cannot count its steps."""
    done = threading.Event()
    bar_ = bar(description, total=0, show=show)
    bar_.bar_format = "{desc}: {elapsed}"

    def tick() -> None:
        pause = _DELAY
        while not done.wait(pause):
            bar_.refresh()
            pause = 0.5

    with bar_:
        thread = threading.Thread(target=tick, daemon=True)
        thread.start()
        try:
            yield
        finally:
            done.set()
            thread.join()
