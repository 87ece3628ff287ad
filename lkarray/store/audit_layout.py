"""What an audit is stored as: its variables, and their shapes and chunks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import prod
from typing import Any

import numpy as np

from lkarray.schema import AUDIT, EPOCH, EXAMPLE, OUTPUT, VariableSpec

_CHUNK_BYTES = 8 << 20
STATE = "state"

RECORD = VariableSpec(
    "record", ("panel", "field"), "int64", "", "stretches left, slot of state, checksums"
)
INFLUENCE = VariableSpec(
    "influence", (EXAMPLE, AUDIT), "float32", "", "contribution of a training example to a change"
)
RESIDUAL = VariableSpec(
    "residual", (AUDIT,), "float64", "", "contribution of weight decay and of inherited momentum"
)
CHANGE = VariableSpec(
    "change", (AUDIT,), "float64", "", "change of what is audited, from end to end"
)
TOTAL = VariableSpec(
    "total", (AUDIT,), "float64", "", "influence, summed over all that it is split by"
)
PATH = VariableSpec(
    "path", (AUDIT,), "float64", "", "sum over steps of the mean gradient times the step"
)
LENGTH = VariableSpec(
    "length", (AUDIT,), "float64", "", "sum of the same terms without their signs"
)
RECONSTRUCTION = VariableSpec(
    "reconstruction", (EPOCH, AUDIT), "float64", "", "what the path adds up to, by each epoch's end"
)
EPOCH_CHANGE = VariableSpec(
    "epoch_change", (EPOCH, AUDIT), "float64", "", "change of what is audited, by each epoch's end"
)
SUMS = (RESIDUAL, CHANGE, TOTAL, PATH, LENGTH, RECONSTRUCTION, EPOCH_CHANGE)
#: What a panel is made of, and of which its record has checksums; the state's come before.
RESULTS = (INFLUENCE.name, *(spec.name for spec in SUMS))
FIELDS = ("left", "slot", "panel", STATE, *RESULTS)


@dataclass(frozen=True, kw_only=True)
class AuditLayout:
    """An audit to be stored.

    Attributes
    ----------
    group
        Of the store.
    per_panel
        Audited examples in a panel.
    sizes
        Of every dim of ``influence``, in order.
    windows
        The dim of time that influence is split by, if it is.
    split
        Whether the residual is split by it too.
    epochs
        Numbers of the epochs audited.
    dtype
        Of the influence.
    coords
        Labels: name to dim and values.
    units
        Of what is audited.
    state
        Bytes that a panel's state takes.
    """

    group: str
    per_panel: int
    sizes: Mapping[str, int]
    windows: str | None
    split: bool
    epochs: np.ndarray
    dtype: str
    coords: Mapping[str, tuple[str, np.ndarray]]
    attrs: Mapping[str, Any]
    units: str
    state: int

    @property
    def panels(self) -> list[slice]:
        """Audited examples of each panel."""
        n = self.sizes[AUDIT]
        return [slice(a, min(a + self.per_panel, n)) for a in range(0, n, self.per_panel)]

    @property
    def chunks(self) -> tuple[int, ...]:
        """Chunks of the influence: a panel wide, near 8 MiB."""
        item = np.dtype(self.dtype).itemsize
        first, *rest = self.sizes
        wide = {AUDIT: self.per_panel, OUTPUT: self.sizes.get(OUTPUT, 1)}
        tail = tuple(min(self.sizes[dim], wide.get(dim, 1)) for dim in rest)
        return min(self.sizes[first], max(_CHUNK_BYTES // (item * prod(tail)), 1)), *tail

    def specs(self) -> dict[str, VariableSpec]:
        """Return the specs of the sums, with the dims that they have here."""
        out = {}
        for spec in SUMS:
            dims = spec.dims + ((OUTPUT,) if OUTPUT in self.sizes else ())
            if spec is RESIDUAL and self.split and self.windows is not None:
                dims = (*dims, self.windows)
            out[spec.name] = replace(spec, dims=dims, units=self.units)
        return out

    def shape(self, dims: tuple[str, ...]) -> tuple[int, ...]:
        """Return the sizes of some dims."""
        sizes = dict(self.sizes) | {EPOCH: len(self.epochs)}
        return tuple(sizes[dim] for dim in dims)
