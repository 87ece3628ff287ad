"""What an audit is asked for, before it is checked against a run."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

from lkarray.auditing.realised import RecordedUpdates, Updates
from lkarray.training.trace import Trace

#: Which window of time influence counts in: the one its batch was in, or those it moved.
SEEN, ACTED = "seen", "acted"


@dataclass(frozen=True, kw_only=True)
class Request:
    """What was asked for; plain values and functions, that another process can be sent.

    Attributes
    ----------
    audit_set
        The examples to audit.
    target, module, params, rule, supersample, stride, steps, examples
        As for `lkarray.audit`.
    groups, overlap, credit, unlike
        As for `lkarray.audit`.
    updates
        What each step is taken for.
    """

    audit_set: Any
    target: str | int | Callable[[Any, Any], Tensor] = "loss"
    module: str | None = None
    params: Any = None
    rule: str = "trapezoid"
    supersample: int = 1
    stride: int = 1
    steps: tuple[int, int] | None = None
    examples: Sequence[int] | np.ndarray | None = None
    groups: Mapping[str, Any] | None = None
    overlap: bool = False
    credit: str = SEEN
    unlike: bool = False
    updates: Callable[[Trace], Updates] = RecordedUpdates
