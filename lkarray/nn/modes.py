"""The modes that torch computes in: whatever the caller's are, gradients need their own."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import ParamSpec, TypeVar

import torch

Given = ParamSpec("Given")
Result = TypeVar("Result")


@contextmanager
def gradients_on() -> Iterator[None]:
    """Run with gradients on, also inside ``torch.no_grad()`` and ``torch.inference_mode()``."""
    with torch.inference_mode(False), torch.enable_grad():
        yield


def with_gradients(function: Callable[Given, Result]) -> Callable[Given, Result]:
    """Let a function run with gradients on, whatever the mode of its caller."""

    @wraps(function)
    def call(*args: Given.args, **kwargs: Given.kwargs) -> Result:
        with gradients_on():
            return function(*args, **kwargs)

    return call
