"""`mode_shifts` measures which modes a perturbation of inputs moved.

See Anonymous 2026, section 6.3.
"""

from __future__ import annotations

import numpy as np
import xarray as xr

from lkarray.analysis.gradients.modes import of_modes
from lkarray.arguments import checked
from lkarray.errors import NonFiniteError, SchemaError
from lkarray.kernels.ranks import participation_ratio
from lkarray.labels import in_order
from lkarray.results import Result, as_array, as_dataset
from lkarray.schema import EXAMPLE, MODE
from lkarray.values import require_real

FACTOR = "factor"
_OF_MODES = ("singular_value", "alignment", "drive")


@checked(modes=None)
def mode_shifts(
    modes: Result,
    before: Result,
    after: Result,
    sensitivity: Result | None = None,
) -> xr.Dataset:
    r"""Measure how far inputs' mode coefficients moved, beside drive and sensitivity, computed.

    It is given inputs' coefficients and moves none; `lkarray.shift_modes` moves inputs.

    The change of what a step of full-batch gradient descent does to a loss is
    :math:`\sum_k \Lambda_k \Delta c_{kn}` but for :math:`-\eta/M` (Anonymous 2026, section 6.3.1).

    Parameters
    ----------
    modes
        With ``singular_value``, ``alignment`` and ``drive``, as `modes` returns it.
    before, after
        `mode_coefficients` of the same examples before they were perturbed and after: clean and
        adversarial images. Where both have labels of the examples, in any order; else in the same.
    sensitivity
        ``(example, mode)`` of the perturbed examples, as `lkarray.mode_sensitivity` gives.

    Returns
    -------
    xarray.Dataset
        Over ``mode``, means over examples in float64: ``change``, signed, ``shift``, of the
        magnitudes :math:`|\Delta c|`, and ``contribution``, of :math:`|\Lambda \Delta c|`;
        ``share``, that of ``contribution`` in its sum. Over ``factor`` (shift, drive, contribution
        and, if given, sensitivity): ``effective_modes``, the participation ratio
        :math:`(\sum_k w_k)^2 / \sum_k w_k^2` of the magnitudes; ``(factor, factor_2)``:
        ``correlation`` over modes, and ``rank_correlation`` (Spearman), NaN of what does not
        vary over modes. ``share`` is NaN where nothing moved.

    Raises
    ------
    SchemaError
        Dims, sizes or labels do not fit, or there are fewer than three modes.
    NonFiniteError
        A number is infinite.

    References
    ----------
    - Anonymous 2026, section 6.3.1: "Path-Integrated Loss-Gradient Kernels".
    """
    modes = as_dataset(modes, "modes")
    of = of_modes(modes, "drive")
    drive = np.abs(_bare(of, (MODE,), "modes: drive"))
    before = _like(of, as_array(before, "before"), "before", MODE)
    after = _like(of, as_array(after, "after"), "after", MODE)
    first = _bare(before, (EXAMPLE, MODE), "before")
    last = _bare(_like(before, after, "after", EXAMPLE), (EXAMPLE, MODE), "after")
    if first.shape != last.shape or first.shape[1] != len(drive):
        raise SchemaError(
            f"before and after have the shapes {first.shape} and {last.shape}, and there are "
            f"{len(drive)} modes; pass mode_coefficients of the same examples and modes"
        )
    if len(drive) < 3:
        raise SchemaError(f"correlations over modes need at least three of them, not {len(drive)}")
    moved = last - first
    factors = {
        "shift": np.abs(moved).mean(0),
        "drive": drive,
        "contribution": np.abs(moved * drive).mean(0),
    }
    if sensitivity is not None:
        slopes = _like(of, as_array(sensitivity, "sensitivity"), "sensitivity", MODE)
        factors["sensitivity"] = _bare(slopes, (EXAMPLE, MODE), "sensitivity").mean(0)
        if factors["sensitivity"].shape != drive.shape:
            raise SchemaError(
                f"sensitivity is of {len(factors['sensitivity'])} modes, and there are "
                f"{len(drive)}: select the same, modes.isel(mode=slice(K))"
            )
    table = np.stack(list(factors.values()))
    # The participation ratio takes square roots of weights.
    effective = participation_ratio(np.sqrt(table))
    square = (FACTOR, f"{FACTOR}_2")
    names = list(factors)
    return xr.Dataset(
        {
            "change": (MODE, moved.mean(0)),
            **{name: (MODE, factors[name]) for name in names if name != "drive"},
            "share": (MODE, _share(factors["contribution"])),
            "effective_modes": (FACTOR, effective),
            "correlation": (square, _correlations(table)),
            "rank_correlation": (square, _correlations(_ranks(table))),
        },
        coords={
            MODE: modes[MODE],
            **{dim: np.array(names, dtype=object) for dim in square},
            **{name: modes[name] for name in _OF_MODES if name in modes},
        },
    )


def _share(values: np.ndarray) -> np.ndarray:
    whole = values.sum()
    return values / whole if whole > 0 else np.full_like(values, np.nan)


def _correlations(table: np.ndarray) -> np.ndarray:
    with np.errstate(divide="ignore", invalid="ignore"):  # NaN of a constant row, as documented
        return np.asarray(np.corrcoef(table))


def _ranks(table: np.ndarray) -> np.ndarray:
    from scipy.stats import rankdata

    return np.asarray(rankdata(table, axis=1))


def _like(lead: xr.DataArray, x: xr.DataArray, name: str, dim: str) -> xr.DataArray:
    """Return ``x`` in the order of another along a dim, where both have labels of it."""
    if dim not in x.dims or x.sizes[dim] != lead.sizes[dim]:
        return x  # said with the shapes of all
    return in_order(x, dim, lead.indexes.get(dim), lead.sizes[dim], what=name)


def _bare(x: xr.DataArray, dims: tuple[str, ...], name: str) -> np.ndarray:
    if set(x.dims) != set(dims) or not x.size:
        raise SchemaError(f"{name} has dims {dict(x.sizes)}; expected {dims}, none of them empty")
    require_real(name, x)
    values = np.asarray(x.transpose(*dims).values, np.float64)
    if np.isinf(values).any():
        raise NonFiniteError(f"{name} holds infinity; take modes and examples without")
    return values
