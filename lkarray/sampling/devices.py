"""Where a run computes, and in which modes: what last bits depend on beside the code."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from lkarray.nn.modes import gradients_on


def choose_device(asked: torch.device | str | None, stored: str | None) -> torch.device:
    """Return the device asked for, or the stored one, or CUDA where there is one."""
    if asked is not None:
        try:
            chosen = torch.device(asked)
        except (RuntimeError, ValueError, TypeError) as error:
            raise ValueError(f"device must be such as 'cpu' or 'cuda:0': {error}") from None
    elif stored is not None:
        chosen = torch.device(stored)
    else:
        chosen = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if chosen.type == "cuda":
        if not torch.cuda.is_available():
            raise ValueError(f"device {chosen} was asked for or stored, but CUDA is not available")
        if chosen.index is None:
            chosen = torch.device("cuda", torch.cuda.current_device())
    return chosen


@contextmanager
def numerics(threads: int) -> Iterator[None]:
    """Run with gradients on and the stored number of threads, on which last bits depend."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    cudnn = torch.backends.cudnn
    try:
        with (
            gradients_on(),
            # Benchmarking would choose convolutions by a clock; not all of them add in one order.
            cudnn.flags(enabled=cudnn.enabled, benchmark=False, deterministic=True),
        ):
            yield
    finally:
        torch.set_num_threads(before)
