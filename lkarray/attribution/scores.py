"""What attribution by every rule shares: choices of a run, and labelled scores."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import xarray as xr

from lkarray.errors import MemoryBudgetError, SchemaError
from lkarray.kernels.kinds import INFLUENCE_OPERATOR
from lkarray.labels import given_coords
from lkarray.schema import AUDIT, EXAMPLE, OUTPUT
from lkarray.training.checking import literal
from lkarray.training.choosing import as_steps
from lkarray.training.trace import Trace

#: What ``params`` calls the module of the model's last tensor.
LAST = "last"

Params = str | Iterable[str] | None


def as_params(trace: Trace, params: Params) -> Params:
    """Return patterns of tensor or module names; those of the last layer for ``"last"``."""
    if params != LAST:
        return params
    pairs = zip(trace.names, trace.modules, strict=True)
    return [literal(name) for name, module in pairs if module == trace.modules[-1]]


def as_checkpoints(trace: Trace, checkpoints: str | Iterable[int]) -> np.ndarray:
    """Return the states meant by ``"epoch"``, ``"step"`` or a list of step numbers."""
    try:
        return as_steps(trace, checkpoints)
    except ValueError as error:
        raise ValueError(f"checkpoints: {error}") from None


def as_state(trace: Trace, at: int) -> int:
    """Return the number of one state of the run; negative ones count from the last."""
    count = trace.steps + 1
    if isinstance(at, bool) or not isinstance(at, int | np.integer) or not -count <= at < count:
        raise ValueError(
            f"at must be the number of a state, 0 to {trace.steps} (after the last step), or "
            f"-1 to {-count} from the end, not {at!r}"
        )
    return int(at) % count


def audit_labels(
    coords: Mapping[str, Any] | None, index: np.ndarray
) -> dict[str, tuple[str, np.ndarray]]:
    """Return the coordinates of the ``audit`` dim, checked."""
    labels = given_coords(coords, len(index), dim=AUDIT, index=index)
    for taken in (EXAMPLE, OUTPUT):
        if taken in labels:
            raise SchemaError(f"coords: {taken!r} is a dim of the result; choose another name")
    return {name: (AUDIT, values) for name, values in labels.items()}


def refuse_large(shape: tuple[int, ...], item: int, budget: int) -> None:
    """Raise ``MemoryBudgetError`` where a result would not fit a budget."""
    needed = item * int(np.prod(shape))
    if needed > budget:
        raise MemoryBudgetError(
            f"the result takes {needed / 2**20:.0f} MiB, and the budget is {budget / 2**20:.0f} "
            "MiB; choose some examples=, audit fewer at once, or set memory="
        )


def labelled(
    name: str,
    values: np.ndarray,
    examples: np.ndarray,
    labels: Mapping[str, tuple[str, np.ndarray]],
    **attrs: Any,
) -> xr.DataArray:
    """Return scores ``(example, audit[, output])`` with their coordinates and attributes."""
    dims = (EXAMPLE, AUDIT, OUTPUT)[: values.ndim]
    coords = {EXAMPLE: (EXAMPLE, examples), **labels}
    return xr.DataArray(values, coords, dims, name, {"kernel": INFLUENCE_OPERATOR, **attrs})
