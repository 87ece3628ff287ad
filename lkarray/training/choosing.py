"""What of a run is asked for: which times, examples and tensors."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase
from typing import Any, cast

import numpy as np
from torch import Tensor
from torch.utils.data import Subset

from lkarray.nn.batches import Batches, MapDataset
from lkarray.training.recorder import Recorder
from lkarray.training.trace import Trace
from lkarray.values import array


def as_trace(trace: Trace | Recorder) -> Trace:
    """Return a trace, opened if it is a recorder that has finished."""
    if isinstance(trace, Recorder):
        return trace.trace()
    if not isinstance(trace, Trace):
        raise TypeError(
            f"trace must come from lk.open_trace or lk.record, not {type(trace).__name__}"
        )
    return trace


def as_steps(trace: Trace, times: str | Iterable[int]) -> np.ndarray:
    """Return step numbers: of ``"epoch"``, of ``"step"``, or those given, checked."""
    if isinstance(times, str):
        if times not in ("epoch", "step"):
            raise ValueError(f"times must be 'epoch', 'step' or a list of steps, not {times!r}")
        return trace.epochs if times == "epoch" else np.arange(trace.steps)
    steps = np.asarray(list(times))
    if steps.ndim != 1 or not steps.size or steps.dtype.kind not in "iu":
        raise ValueError("times must be a list of integers, at least one")
    if steps.min() < 0 or steps.max() > trace.steps or (np.diff(steps) <= 0).any():
        raise ValueError(
            f"times must ascend within 0 to {trace.steps} (the state after the last step)"
        )
    return steps.astype(np.int64)


def as_examples(
    trace: Trace, examples: MapDataset | Sequence[int] | np.ndarray | Tensor
) -> tuple[Batches, np.ndarray]:
    """Return examples and their index: a dataset's, or those at indices of the training set."""
    device = trace.flat.device
    if isinstance(examples, np.ndarray | Tensor) or (
        isinstance(examples, list | tuple | range)
        and not (len(examples) and isinstance(examples[0], tuple))
    ):
        index = array("examples", examples)
        n = trace.train.n
        if index.ndim != 1 or not index.size or index.dtype.kind not in "iu":
            raise ValueError("examples must be a dataset, or a list of indices of the training set")
        if index.min() < 0 or index.max() >= n or len(np.unique(index)) < len(index):
            raise ValueError(f"examples must be distinct indices from 0 to {n - 1}")
        subset = Subset(cast(Any, trace.train_set), index.tolist())
        return Batches(subset, name="examples", device=device), index.astype(np.int64)
    batches = Batches(cast(MapDataset, examples), name="examples", device=device)
    return batches, np.arange(batches.n)


def select(trace: Trace, params: str | Iterable[str] | None) -> list[int]:
    """Return which tensors some patterns of tensor or module names mean."""
    if params is None:
        return list(range(len(trace.names)))
    chosen: set[int] = set()
    for pattern in [params] if isinstance(params, str) else params:
        matching = {
            i
            for i, names in enumerate(zip(trace.names, trace.modules, strict=True))
            if any(fnmatchcase(name, pattern) for name in names)
        }
        if not matching:
            raise ValueError(f"params: {pattern!r} matches none of {trace.names}")
        chosen |= matching
    return sorted(chosen)
