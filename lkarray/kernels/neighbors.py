"""Nearest neighbours under the loss correlation kernel, without n x n."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import dask.array as da
import numpy as np
import xarray as xr

from lkarray import engine
from lkarray.arguments import checked
from lkarray.errors import SchemaError
from lkarray.kernels import crossfit as crossfit_
from lkarray.kernels.control import as_control, controlled_operand
from lkarray.kernels.coords import sample_coords
from lkarray.kernels.estimators import described
from lkarray.kernels.groups import with_labels
from lkarray.kernels.kinds import verdict_of
from lkarray.kernels.operands import PRECISIONS, estimated_operand
from lkarray.labels import coded, require_unique
from lkarray.schema import CONSTANT, POSTERIOR, RANK
from lkarray.tensors import Losses, contracted
from lkarray.values import one_of

#: Says which pairs not to count, from the coordinates of both sides (arrays that broadcast).
Rule = Callable[[dict[str, np.ndarray], dict[str, np.ndarray]], np.ndarray]

_CONSTANT = "losses do not vary, so that the sample has no neighbours"


@checked()
def neighbors(
    losses: Losses,
    k: int = 30,
    *,
    exclude: str | Rule | Any | None = None,
    largest: bool = True,
    crossfit: bool = False,
    center: str = "pooled",
    estimator: str = "sample",
    control: xr.Dataset | None = None,
    precision: str = "auto",
    memory: int | str | None = None,
    device: str | None = None,
    device_memory: int | str | None = None,
) -> xr.Dataset:
    """Return each sample's ``k`` most (or least) correlated samples, lazily.

    Parameters
    ----------
    losses
        Loss tensor ``(chain, draw, sample)``, or what holds one: n samples, S draws.
    k
        Neighbours of each sample.
    exclude
        A coordinate of the samples, such as ``"label"``: pairs that share its value are left
        out *before* the k are taken (Adam et al. 2025a, B: noise in the output layer alone makes
        inputs of one label correlate). Or one label for each sample, as for `lkarray.group_mean`;
        it becomes a coordinate of the result. Or any rule: a function of two mappings from the
        names of the samples' coordinates to arrays that broadcast, which is true where a pair is
        left out: ``lambda a, b: (a["label"] == b["label"]) | (a["split"] != b["split"])``.
        A sample is never its own neighbour; nor is one whose losses do not vary anybody's.
    largest
        ``False`` takes the most negatively correlated.
    crossfit
        Whether similarities are of draws that had no part in the choice. The largest of many
        noisy correlations is large from nothing: of 10,000 with errors of 0.1, about 0.4. With
        ``True`` one half of the chains (even or odd ones; of a lone chain, half its draws)
        chooses a row's neighbours and the other half says how similar they are, without bias. The
        halves take turns from row to row, so that means over rows are of both folds.
    center
        ``"pooled"``, ``"chain"`` or ``"draw"``, as for `covariance`.
    estimator
        ``"sample"`` or ``"gaussian"``, as for `covariance`. ``"gaussian"`` always takes products in
        float32.
    control
        As for `covariance`; without ``crossfit`` and ``device``.
    precision
        ``"auto"`` searches for candidates in bfloat16 where that is faster (see `gram`), takes
        every pair that the bound on its rounding cannot rule out, and ranks those by float32
        products: the same neighbours as ``"float32"``, up to ties within float32 rounding.
    memory
        Byte budget of a process.
    device, device_memory
        Where products are made, and the bytes to use there; see `gram`. The best of each tile are
        taken there too, in the same order, and only they come back.

    Returns
    -------
    xarray.Dataset
        ``neighbor(sample, rank)``, values of the (integer) ``sample`` index, and
        ``similarity(sample, rank)``, the correlation R, best first. Where fewer than k
        remain, rows end in -1 and NaN. ``constant(sample)``: losses that do not vary over the
        draws (of an input so certain that its loss is 0 in float32, say), which correlate with
        nothing: such samples have no neighbours, and are nobody's. Compute the variables at
        once: ``neighbors(...).compute()``.

        With ``crossfit``, similarities are no longer in order, and there are also
        ``similarity_error(sample, rank)``, the standard error by the spread over chains, or
        stretches of them where the half has fewer than 6 (each longer than its autocorrelation,
        one hopes: see `diagnostics`); and ``q_value(sample, rank)``, the false discovery rate at
        which the similarity exceeds 0 (with ``largest=False``, lies below), over all entries of
        the table (Benjamini and Yekutieli 2001, under any dependence; Student's t). ``constant``
        is then true also of losses that do not vary in one of the halves. The attribute
        ``crossfit`` says what the halves are of, ``"chains"`` or ``"draws"``.

    Raises
    ------
    TypeError, ValueError, SchemaError
        ``k`` is not between 1 and n - 1, ``exclude`` is no coordinate of the samples, the
        ``sample`` index has a value twice, or the losses lack dims or draws.
    NonFiniteError
        On computing: a loss is NaN or infinite.

    Notes
    -----
    ``n**2 * S`` operations and n k results: each product serves its rows and its columns. With
    ``crossfit`` as many again of half the draws, and ``n k S`` for the reports.

    References
    ----------
    - Adam et al. 2025a, section 2.3 and appendix B: "The Loss Kernel", arXiv:2509.26537.
    - Benjamini and Yekutieli 2001: "The control of the false discovery rate in multiple testing
      under dependency", doi:10.1214/aos/1013699998.

    Examples
    --------
    >>> import xarray as xr, lkarray as lk
    >>> values = [[[0.0, 1.0, 4.0], [1.0, 3.0, 3.0], [2.0, 5.0, 2.0]]]
    >>> losses = xr.DataArray(values, dims=("chain", "draw", "sample"))
    >>> losses = losses.assign_coords(label=("sample", ["cat", "cat", "dog"]))
    >>> near = lk.neighbors(losses, k=1).compute()
    >>> near["neighbor"].values.tolist()
    [[1], [0], [0]]
    >>> lk.neighbors(losses, k=1, exclude="label")["neighbor"].values.tolist()
    [[2], [2], [0]]
    """
    one_of("precision", precision, PRECISIONS)
    if control is not None and (crossfit or device is not None):
        raise ValueError(
            "control= is computed on the cores, of all draws: leave crossfit= and device= out"
        )
    made = _operand(losses, control, center, estimator, memory)
    x, rows = made.x, made.operand.rows
    if crossfit and (estimator != "sample" or contracted(x) != POSTERIOR):
        raise ValueError(
            "crossfit=True halves the draws of what it is given and correlates it: it takes "
            'estimator="sample", of losses or of an outcome (tree["losses/log_odds"]), no features'
        )
    x, exclude, ask = _asked(x, rows, exclude, k, largest)
    index = _index(x, rows)
    options: dict[str, Any] = {
        "precision": precision,
        "memory": memory,
        "place": None if control is not None else engine.as_device(device, device_memory),
    }
    attrs: dict[str, Any] = {
        "k": k,
        "exclude": exclude if isinstance(exclude, str) else "rule" if exclude else "none",
        "largest": int(largest),
        "over": list(contracted(x)),
        "center": made.center,
    }
    attrs |= made.attrs | verdict_of(x)
    if crossfit:
        contraction, position, columns = _crossfitted(x, rows, ask, center, options, attrs)
    else:
        contraction, position, value = _searched(made, ask, **options)
        meaning = {"long_name": "loss correlation R"}
        columns = {
            "similarity": ((rows, RANK), value, meaning),
            CONSTANT: ((rows,), engine.still_array(contraction), {"long_name": _CONSTANT}),
        }
    if index is not None:
        position = da.map_blocks(_labels, position, index=index, dtype=np.int64)
    named = ((rows, RANK), position, {"long_name": f"{rows} of the neighbour"})
    return xr.Dataset(
        {"neighbor": named} | columns,
        coords=sample_coords(x, rows) | {RANK: np.arange(k)},
        attrs=attrs
        | {"precision": contraction.precision}
        | described(contraction.series)
        | contraction.made_on,
    )


def _asked(
    x: xr.DataArray, rows: str, exclude: str | Rule | Any | None, k: int, largest: bool
) -> tuple[xr.DataArray, str | Rule | None, engine.Ask]:
    """Return the tensor, with labels that were given for themselves as a coordinate; the ask."""
    n = x.sizes[rows]
    if not 1 <= k < n:
        raise ValueError(f"k must be between 1 and {n - 1}, the other samples there are, not {k}")
    if exclude is not None and not isinstance(exclude, str) and not callable(exclude):
        x, exclude = with_labels(x, rows, exclude, what="exclude")
    codes = _codes(x, rows, exclude) if isinstance(exclude, str) else None
    rule = _Positions(exclude, x, rows) if callable(exclude) else None
    return x, exclude, engine.Ask(k, largest, codes, rule)


class _Operand(NamedTuple):
    """What is searched: the tensor that it is of, its operand and series, its attributes."""

    x: xr.DataArray
    operand: engine.Operand
    series: engine.Series | None
    center: str
    attrs: dict[str, Any]


def _operand(
    losses: Losses,
    control: xr.Dataset | None,
    center: str,
    estimator: str,
    memory: int | str | None,
) -> _Operand:
    """Return the operand of a correlation."""
    if control is None:
        x, operand, _, series = estimated_operand(losses, "correlation", center, estimator)
        return _Operand(x, operand, series, operand.center or "none", {})
    made = as_control(losses, control, center=center, estimator=estimator)
    operand, series, attrs = controlled_operand(made, "correlation", memory)
    return _Operand(made.x, operand, series, center, attrs)


def _searched(
    made: _Operand, ask: engine.Ask, *, precision: str, memory: int | str | None, place: Any
) -> tuple[engine.Contraction, da.Array, da.Array]:
    """Return the correlation of some draws, and positions and values of the best of each row."""
    operand, series = made.operand, made.series
    plan = engine.make_plan(
        operand,
        memory=memory,
        sink=engine.TOP_K_BYTES,
        held=engine.top_k_held(operand.n, ask.k) + (engine.table_bytes(operand) if series else 0),
        device=place,
        device_sink=engine.BEST_BYTES,
    )
    contraction = engine.Contraction(operand, None, plan, series=series)
    # Whole panels only: the certificate needs the rounding error of whole rows. And it is of the
    # products themselves, not of a series of them.
    whole = len(plan.pieces) == 1 and series is None
    if whole and plan.budget >= engine.SEARCH_BUDGET:
        contraction = contraction.at_precision(precision, search=True)
    low = contraction.precision != "float32"
    arrays = engine.search_arrays if low else engine.top_k_arrays
    return contraction, *arrays(contraction, ask)


def _crossfitted(
    x: xr.DataArray,
    rows: str,
    ask: engine.Ask,
    center: str,
    options: dict[str, Any],
    attrs: dict[str, Any],
) -> tuple[engine.Contraction, da.Array, dict[str, Any]]:
    """Return neighbours that one half of the draws chose, and what the other says of them.

    The halves take turns from row to row.
    """
    *halves, kind = crossfit_.halves_of(x)
    operands = [_operand(half, None, center, "sample", None) for half in halves]
    made = [_searched(operand, ask, **options) for operand in operands]
    turn = da.from_array((np.arange(x.sizes[rows]) % 2 == 0)[:, None])
    chosen = [
        da.where(own, position, -1)
        for own, (_, position, _) in zip((turn, ~turn), made, strict=True)
    ]
    reports = [
        crossfit_.reported(other[0], position, ask.largest)
        for other, position in zip(made[::-1], chosen, strict=True)
    ]
    report = da.where(turn[..., None], *reports)
    still = [engine.still_array(contraction) for contraction, _, _ in made]
    attrs |= {"crossfit": kind}
    dims, side = (rows, RANK), "exceeds" if ask.largest else "lies below"
    columns = {
        "similarity": (dims, report[..., 0].astype(x.dtype if x.dtype.kind == "f" else "f4")),
        "similarity_error": (dims, report[..., 1]),
        "q_value": (dims, crossfit_.q_values(report[..., 2])),
        CONSTANT: ((rows,), still[0] | still[1]),
    }
    meanings = (
        "loss correlation R, of the draws that did not choose",
        "standard error of the similarity",
        f"false discovery rate at which the similarity {side} 0",
        _CONSTANT,
    )
    named = {
        name: (*of, {"long_name": meaning})
        for (name, of), meaning in zip(columns.items(), meanings, strict=True)
    }
    return made[0][0], da.maximum(*chosen), named


def _index(x: xr.DataArray, rows: str) -> np.ndarray | None:
    """Return the samples' integer labels, by which neighbours are named; -1 means none."""
    if rows not in x.indexes:
        return None
    require_unique(x.indexes.get(rows), f"the index of {rows!r}")
    index = np.asarray(x.indexes[rows])
    if index.dtype.kind not in "iu" or index.min() < 0:
        raise SchemaError(
            f"the index of {rows!r} must be integers of at least 0, by which neighbours are named, "
            f"not {index.dtype}; keep it as a label: x.rename({rows}='name') or "
            f"x.assign_coords({rows}=np.arange({len(index)}))"
        )
    return index.astype(np.int64)


class _Positions:
    """A user's rule on coordinates as one on positions, tried on one pair before any work."""

    def __init__(self, rule: Rule, x: xr.DataArray, rows: str) -> None:
        self.rule = rule
        self.coords = {str(k): np.asarray(c) for k, c in x.coords.items() if c.dims == (rows,)}
        pair = np.arange(2)
        try:
            got = np.asarray(self(pair[:, None], pair[None, :]))
            np.broadcast_to(got, (2, 2))
        except Exception as error:
            raise ValueError(
                f"exclude: the rule fails on two samples ({type(error).__name__}: {error}); it "
                f"gets two mappings of {sorted(self.coords)} to arrays that broadcast"
            ) from error
        if got.dtype != bool:
            raise ValueError(f"exclude: the rule must give booleans, not {got.dtype}")

    def __call__(self, i: np.ndarray, j: np.ndarray) -> np.ndarray:
        first = {name: values[i] for name, values in self.coords.items()}
        return self.rule(first, {name: values[j] for name, values in self.coords.items()})


def _codes(x: xr.DataArray, rows: str, exclude: str) -> np.ndarray:
    if exclude not in x.coords or x.coords[exclude].dims != (rows,):
        labels = sorted(str(name) for name, c in x.coords.items() if c.dims == (rows,))
        raise SchemaError(
            f"exclude={exclude!r} is not a coordinate of {rows!r}; there are {labels}. Give labels "
            f"with x.assign_coords({exclude}=({rows!r}, values)), or at sampling with coords="
        )
    return coded(np.asarray(x.coords[exclude].values), what=f"exclude={exclude!r}")[1]


def _labels(position: np.ndarray, index: np.ndarray) -> np.ndarray:
    return np.where(position < 0, -1, index[position])
