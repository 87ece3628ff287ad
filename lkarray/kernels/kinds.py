"""What an array says of itself: a kernel or an influence operator, and how far to believe it."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import xarray as xr

from lkarray.errors import UnreliableWarning
from lkarray.schema import AUDIT, CHAIN, DRAW

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


#: Attributes that `lkarray.judge` gives to losses, and that what is made of them carries on.
VERDICT = ("reliability", "rhat", "acceptance")
#: Of which losses they are: the numbers of chains and of draws.
JUDGED = "judged"
_RELIABLE, _RHAT, _ACCEPTANCE = 0.5, 1.1, 0.5  # below, above, below which is warned
_warned: set[tuple[Any, ...]] = set()


def verdict_of(x: xr.DataArray | xr.Dataset) -> dict[str, Any]:
    """Return what is known of the draws behind ``x``, to be carried on; nothing is computed.

    Of losses from which chains or draws were taken since, nothing is known. Warns, once for each
    verdict in a process, where it is below a floor.
    """
    known = {name: x.attrs[name] for name in (*VERDICT, JUDGED) if name in x.attrs}
    sizes = [int(x.sizes[dim]) for dim in (CHAIN, DRAW) if dim in x.sizes]
    if JUDGED not in known or (sizes and [int(size) for size in known[JUDGED]] != sizes):
        return {}
    values = tuple(known.get(name) for name in VERDICT)
    if values not in _warned and (remedy := _remedy(known)):
        _warned.add(values)
        warnings.warn(f"{verdict_text(known)}: {remedy}", UnreliableWarning, stacklevel=3)
    return known


def verdict_text(attrs: Mapping[Any, Any]) -> str:
    """Return a verdict in a few words, as figures print it; empty where nothing is known."""
    words = {"reliability": "reliability of R", "rhat": "worst R-hat", "acceptance": "acceptance"}
    return ", ".join(f"{words[name]} {attrs[name]:.2f}" for name in VERDICT if name in attrs)


def _remedy(known: Mapping[str, Any]) -> str:
    if known.get("acceptance", 1.0) < _ACCEPTANCE:
        return "discretisation biases the draws; reduce step_size"
    if known.get("rhat", 1.0) > _RHAT:
        return "the chains do not agree yet; raise burn_in or take more draws (see lk.diagnostics)"
    if known.get("reliability", 1.0) < _RELIABLE:
        return (
            "most of R is noise; take more draws or chains, use neighbors(crossfit=True), and "
            "compare with lk.at_equal_reliability"
        )
    return ""
