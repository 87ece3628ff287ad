"""What an array says that it is: a kernel, or an influence operator, which is none."""

from __future__ import annotations

import xarray as xr

from lkarray.schema import (
    AUDIT,
)

#: What the attribute ``kernel`` calls an array that is no kernel: not symmetric, not PSD.
INFLUENCE_OPERATOR = "influence operator"


def require_kernel(k: xr.DataArray | xr.Dataset, what: str) -> None:
    """Raise ``ValueError`` where ``k`` says of itself that it is an influence operator.

    Parameters
    ----------
    k
        Any array; with neither the attribute ``kernel`` nor the dim ``audit`` it passes. Or a
        Dataset, such as an audit.
    what
        What needs a kernel, for the message.
    """
    if isinstance(k, xr.Dataset):
        k = k["influence"] if "influence" in k.data_vars else xr.DataArray()
    if k.attrs.get("kernel") == INFLUENCE_OPERATOR or AUDIT in k.dims:
        raise ValueError(
            f"{what} needs a kernel, and {k.name!r} is an influence operator: weighted on one side "
            "only, it is neither symmetric nor positive semi-definite (Anonymous 2026, definition "
            "2), so it measures no similarity; use lk.plgk or lk.ips of the loss gradients"
        )
