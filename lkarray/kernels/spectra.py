"""Singular values and vectors of unfoldings, eigenvalues of kernels, and what sums them up."""

from __future__ import annotations

from collections.abc import Hashable, Iterable
from dataclasses import dataclass
from math import prod
from typing import Any, NamedTuple

import dask.array as da
import numpy as np
import xarray as xr

from lkarray.arguments import COUNT, POSITIVE, checked
from lkarray.engine import Operand, as_device
from lkarray.engine.devices import made_on
from lkarray.engine.numbers import matmul
from lkarray.engine.passes import Passes, gram_step, joined_lengths
from lkarray.engine.plan import memory_budget
from lkarray.engine.strips import Strips, along_rows, make_strips
from lkarray.engine.tasks import Key
from lkarray.errors import SchemaError
from lkarray.kernels.coords import sample_coords
from lkarray.kernels.krylov import Krylov, decompose, iterate, project
from lkarray.kernels.operands import (
    CENTERS,
    NORMALIZERS,
    as_tensor,
    degrees_of_freedom,
    dim_names,
    free_dim,
)
from lkarray.kernels.unfolding import merge
from lkarray.results import Result
from lkarray.schema import MODE
from lkarray.values import one_of

_EXTRA = 10  # vectors beyond those asked for (Halko, Martinsson and Tropp 2011)
_EXACT_OPERATIONS = 1e11  # of the short side's Gram, up to which it is decomposed at once
_EXACT = 1000  # a short side up to which its Gram is made in float64
_DECOMPOSE = 5  # matrices that a dense decomposition holds: its own, vectors, work space
_ROWS = "lkarray_rows"  # of a tensor whose several free dims are stacked
_OWN_MODE = "element"  # what a dim `mode` of the tensor itself is called in its decomposition


@checked(max_passes=COUNT, tolerance=POSITIVE)
def svd(
    x: Result,
    k: int,
    *,
    over: str | Iterable[str],
    center: str | None = None,
    normalize: str | None = None,
    tolerance: float = 1e-3,
    max_passes: int = 4,
    memory: int | str | None = None,
    device: str | None = None,
    device_memory: int | str | None = None,
) -> xr.Dataset:
    r"""Return the ``k`` largest singular values and vectors of an unfolding, lazily.

    The tensor is the matrix ``X`` with rows ``free dims`` and columns ``over``, and
    :math:`X \approx \sum_m u_m s_m v_m'`.

    Parameters
    ----------
    x
        Any tensor, or the Dataset or node that holds one.
    k
        Modes.
    over
        Dims of the columns; all others are rows.
    center, normalize
        As for `gram` (``"count"`` divides ``X`` by the root of the degrees of freedom).
    tolerance
        Passes stop once :math:`|XX'u - s^2 u| \le` tolerance :math:`s^2` for every mode (the
        values themselves are then off by about the square of it).
    max_passes
        Passes of the iteration at most.
    memory
        Byte budget of a process.
    device, device_memory
        Where products are made, and the bytes to use there; see `lkarray.gram`.

    Returns
    -------
    xarray.Dataset
        ``u(*free dims, mode)``, ``singular_value(mode)``, ``v(*over, mode)``, ``residual(mode)``
        (relative, of the last pass before the final one; 0 where the short side was decomposed at
        once) and ``passes``. The entry of each ``u`` of largest magnitude is positive. Modes
        beyond the rank have zero vectors. A dim ``mode`` that is contracted (of features) is called
        ``element`` in ``v``. Compute it at once: ``svd(...).compute()``.

    Raises
    ------
    SchemaError, ValueError
        Dims are missing, or ``k`` exceeds the shorter side.
    MemoryBudgetError
        The budget cannot hold the iterates.

    Notes
    -----
    Where the Gram of the shorter side q takes at most 1e11 operations (or q is little more than
    the iteration would span), two passes: its Gram (in float64 up to q = 1,000), and the
    projection. Otherwise a block Krylov iteration with full reorthogonalisation (Musco and
    Musco 2015) on k + 10 vectors of the short side,
    each pass of which reads the data once and costs ``4 n S (k + 10)`` operations; at most
    ``max_passes``, and one more for the projection, whose own singular values are taken, so that
    their error is of the order of float32 rounding of the largest, not of its square. Memory:
    strips, and ``q (k + 10) max_passes`` float64.

    References
    ----------
    - Musco and Musco 2015: "Randomized block Krylov methods for stronger and faster approximate
      singular value decomposition", arXiv:1504.05477.
    - Halko, Martinsson and Tropp 2011: "Finding structure with randomness", doi:10.1137/090771806.

    Examples
    --------
    >>> import xarray as xr, lkarray as lk
    >>> x = xr.DataArray([[3.0, 0.0], [0.0, -2.0], [0.0, 0.0]], dims=("sample", "feature"))
    >>> modes = lk.svd(x, 2, over="feature").compute()
    >>> modes["singular_value"].values.round(6).tolist()
    [3.0, 2.0]
    >>> abs(modes["u"]).values.round(6).tolist()
    [[1.0, 0.0], [0.0, 1.0], [0.0, 0.0]]
    """
    x, over = _unfolded(x, over)
    operand, free, scale = _operand(x, over, center, normalize)
    rows = along_rows(operand, memory_budget(memory))
    short, long = _sides(operand, rows)
    if not 1 <= k <= min(short, long):
        raise ValueError(
            f"k must be between 1 and {min(short, long)}, the shorter side of the unfolding, not "
            f"{k}"
        )
    width = min(k + _EXTRA, short)
    operations = 2 * operand.n * prod(operand.shape) * short
    # At once where that is cheap, or where the iteration would span most of the short side anyway.
    fits = _DECOMPOSE * 8 * short**2 <= 3 * memory_budget(memory) // 4
    exact = fits and (short <= 2 * width * max_passes or operations <= _EXACT_OPERATIONS)
    if exact:
        needs = _exact_needs(short, width, long)
    else:
        vectors = 8 * short * width
        needs = {
            "held": 2 * vectors,
            "kept": vectors * (max_passes + 1),
            "alone": max(vectors * (2 * max_passes + 8), 16 * long * width),
        }
    place = as_device(device, device_memory)
    strips = make_strips(operand, memory=memory, rows=rows, needs=needs, device=place)
    passes = Passes("svd", strips, k, exact, tolerance, max_passes, scale)
    if exact:
        gram = passes.total(strips, gram_step, short <= _EXACT)
        state = passes.then(decompose, gram, width)
    else:
        state = iterate(passes, strips, k, width, tolerance, max_passes)
    out = _assemble(_project(passes, strips, state, k, scale), operand, x, free)
    return out.assign_attrs(made_on(place, operand.dtype))


@checked()
def eigh(
    x: Result,
    *,
    over: str | Iterable[str],
    center: str | None = None,
    normalize: str | None = None,
    memory: int | str | None = None,
) -> xr.Dataset:
    """Return all eigenvalues and vectors of a Gram that may differ from zero, lazily.

    Parameters
    ----------
    x, over, center, normalize, memory
        As for `gram`; the Gram itself is made only where n is the shorter side.

    Returns
    -------
    xarray.Dataset
        ``eigenvalue(mode)``, descending, and ``eigenvector(row, mode)``, for min(n, S) modes; the
        entry of each vector of largest magnitude is positive, and vectors of zero eigenvalues
        are zero where S is the shorter side.

    Notes
    -----
    Two passes over the data, ``2 n S q`` operations for the shorter side q, and a dense
    ``q x q`` decomposition (``O(q**3)``: minutes beyond q = 10,000; for a few modes use `svd`).

    Examples
    --------
    >>> import xarray as xr, lkarray as lk
    >>> x = xr.DataArray([[3.0, 0.0], [0.0, -2.0], [0.0, 0.0]], dims=("sample", "feature"))
    >>> lk.eigh(x, over="feature")["eigenvalue"].values.round(6).tolist()
    [9.0, 4.0]
    """
    x, over = _unfolded(x, over)
    operand, free, scale = _operand(x, over, center, normalize)
    rows = operand.n >= prod(operand.shape)
    short, long = _sides(operand, rows)
    needs = _exact_needs(short, short, long)
    strips = make_strips(operand, memory=memory, rows=rows, needs=needs)
    passes = Passes("eigh", strips, scale)
    gram = passes.total(strips, gram_step, short <= _EXACT)
    state = passes.then(decompose, gram, short)
    out = _assemble(_project(passes, strips, state, short, scale), operand, x, free)
    values = (out["singular_value"] ** 2).rename("eigenvalue")
    vectors = out["u"].rename("eigenvector")
    return xr.Dataset({"eigenvalue": values, "eigenvector": vectors})


def _unfolded(x: Result, over: str | Iterable[str]) -> tuple[xr.DataArray, tuple[str, ...]]:
    """Return the tensor and what it is contracted over; a dim ``mode`` of its own is renamed."""
    tensor, dims = as_tensor(x, "x"), dim_names(over)
    if MODE not in tensor.dims:
        return tensor, dims
    return tensor.rename({MODE: _OWN_MODE}), tuple(_OWN_MODE if d == MODE else d for d in dims)


def _sides(operand: Operand, rows: bool) -> tuple[int, int]:
    """Return the sizes of the side that is not cut, usually the shorter, and of the one that is."""
    sizes = prod(operand.shape), operand.n
    return sizes if rows else sizes[::-1]


def _exact_needs(short: int, width: int, long: int) -> dict[str, int]:
    """Return the bytes of decomposing the whole Gram of the short side."""
    gram = 8 * short**2
    return {
        "widened": 8 if short <= _EXACT else 0,
        "held": 2 * gram,
        "kept": 8 * short * width,
        "alone": max(_DECOMPOSE * gram, 16 * long * width),
    }


def _operand(
    x: xr.DataArray, over: tuple[str, ...], center: str | None, normalize: str | None
) -> tuple[Operand, tuple[str, ...], float]:
    """Return the unfolding, the dims of its rows, and the factor of its entries."""
    one_of("center", center, (None, *CENTERS))
    one_of("normalize", normalize, (None, *NORMALIZERS))
    free = tuple(str(dim) for dim in x.dims if dim not in over)
    if not free:
        raise SchemaError(f"over={over} leaves no dim of {x.dims} for the rows")
    flat, rows = x, free[0]
    if len(free) > 1:
        flat = xr.DataArray(merge(x.variable, free, _ROWS), name=x.name)
        rows = _ROWS
    free_dim(flat, "x", over, ())
    degrees = degrees_of_freedom(x, over, center)
    cosine = normalize == "cosine"
    operand = Operand(flat, over=over, each=(), rows=rows, center=center, cosine=cosine)
    return operand, free, degrees**-0.5 if normalize == "count" else 1.0


class _Modes(NamedTuple):
    """Lazy arrays of modes; the vectors of the rows ``(row, mode)`` and of the columns."""

    u: da.Array
    v: da.Array
    singular_value: da.Array
    residual: da.Array
    passes: da.Array


def _project(passes: Passes, strips: Strips, state: Key, k: int, scale: float) -> _Modes:
    """Project onto the vectors of the short side, and decompose the projection."""
    blocks = passes.joined(strips, project, state)  # each (stretch of the long side, width)
    squares = [passes.then(_square, block) for block in blocks]
    small = passes.then(_small, squares, state, k)
    tops = [passes.then(_long_side, block, small) for block in blocks]
    # Signs are those of u, the rows: the long side or the short one.
    sign = passes.then(_signs, tops if strips.rows else small)
    dtype = strips.operands[0].dtype
    longs = [passes.then(_signed, top, sign) for top in tops]
    shorts = [passes.then(_signed_short, small, sign, dtype)]
    values = [passes.then(_values, small, scale)]
    residual, number = [passes.then(_residual, state, k)], [passes.then(_passes, state)]
    long = passes.array(longs, (joined_lengths(strips), k), dtype)
    short = passes.array(shorts, (strips.short, k), dtype)
    return _Modes(
        *((long, short) if strips.rows else (short, long)),
        passes.array(values, (k,), np.float64),
        passes.array(residual, (k,), np.float64),
        passes.array(number, (), np.int64),
    )


def _assemble(
    modes: _Modes, operand: Operand, x: xr.DataArray, free: tuple[str, ...]
) -> xr.Dataset:
    """Return modes with the dims and coordinates of the tensor that was unfolded."""
    u, v, k = modes.u, modes.v, modes.u.shape[1]
    sizes = [x.sizes[dim] for dim in free]
    vectors = {
        "u": ((*free, MODE), u.reshape((*sizes, k)) if len(free) > 1 else u),
        "v": (
            (*operand.over, MODE),
            v.reshape((*operand.shape, k)) if len(operand.over) > 1 else v,
        ),
        "singular_value": (MODE, modes.singular_value),
        "residual": (MODE, modes.residual),
        "passes": ((), modes.passes),
    }
    coords: dict[Hashable, Any] = sample_coords(x, *free) | sample_coords(x, *operand.over)
    attrs = {"over": list(operand.over), "center": operand.center or "none"}
    return xr.Dataset(vectors, coords=coords | {MODE: np.arange(k)}, attrs=attrs)


def _square(block: np.ndarray) -> np.ndarray:
    block = block.astype(np.float64)
    return matmul(block.T, block)


@dataclass
class _Small:
    """The decomposition of the projection: values, its own vectors, those of the short side."""

    value: np.ndarray
    vector: np.ndarray
    short: np.ndarray


def _small(squares: list[np.ndarray], state: Krylov, k: int) -> _Small:
    gram = squares[0]  # (width, width), of the projection
    for square in squares[1:]:
        gram = gram + square
    energy, vector = np.linalg.eigh(gram)  # ascending
    energy, vector = energy[::-1][:k], vector[:, ::-1][:, :k]
    value = np.sqrt(np.maximum(energy, 0))
    # The rank ends here: modes beyond it get zero vectors, not those of rounding.
    value[value <= value[:1] * 1e-10] = 0
    return _Small(value, vector, (state.ritz @ vector) * (value > 0))


def _long_side(block: np.ndarray, small: _Small) -> np.ndarray:
    """Return vectors of the long side, of norm one; zero where the value is."""
    inverse = np.divide(1.0, small.value, out=np.zeros_like(small.value), where=small.value > 0)
    return (block @ (small.vector * inverse).astype(block.dtype)).astype(block.dtype)


def _signs(rows: list[np.ndarray] | _Small) -> np.ndarray:
    """Return the sign of the entry of largest magnitude of each vector of the rows."""
    blocks = [rows.short] if isinstance(rows, _Small) else rows
    # (block, mode): the largest of each block, then the largest of those; ties go to the first.
    best = np.stack([np.take_along_axis(b, np.abs(b).argmax(0)[None], 0)[0] for b in blocks])
    top = np.take_along_axis(best, np.abs(best).argmax(0)[None], 0)[0]
    return np.where(top < 0, -1, 1)


def _signed(block: np.ndarray, sign: np.ndarray) -> np.ndarray:
    return block * sign.astype(block.dtype)


def _signed_short(small: _Small, sign: np.ndarray, dtype: np.dtype) -> np.ndarray:
    return (small.short * sign).astype(dtype)


def _values(small: _Small, scale: float) -> np.ndarray:
    return small.value * scale


def _residual(state: Krylov, k: int) -> np.ndarray:
    return state.residual[:k]


def _passes(state: Krylov) -> np.ndarray:
    return np.asarray(state.passes + 1)  # and the projection
