"""The audit of full-batch descent, mode by mode of a path kernel.

See Anonymous 2026, appendix A.13.
"""

from __future__ import annotations

import dask.array as da
import numpy as np
import scipy.linalg
import xarray as xr

from lkarray.arguments import checked
from lkarray.engine.plan import memory_budget
from lkarray.errors import NonFiniteError, SchemaError
from lkarray.kernels.coords import sample_coords
from lkarray.kernels.kinds import require_kernel
from lkarray.kernels.operands import nan_for_infinite
from lkarray.kernels.spectra import svd
from lkarray.labels import in_order
from lkarray.results import Result, as_array, opened
from lkarray.schema import MODE, second
from lkarray.values import require_real

_DENSE = 4000  # training examples whose kernel is decomposed whole: some ten seconds
_DECOMPOSE = 5  # matrices that it holds meanwhile


@checked(kernel=None)
def audit_modes(
    kernel: Result, k: int, *, scale: float, memory: int | str | None = None
) -> xr.Dataset:
    r"""Return the leading eigenmodes of a path kernel, and how strongly training drives each.

    With :math:`P' = Q \Lambda Q'` over the training examples, the loss of one of them changes by

    .. math:: -c \sum_k \lambda_k s_k Q_{nk}, \quad s_k = \sum_m Q_{mk}

    (Anonymous 2026, appendix A.13). It is the forward Euler form for full-batch gradient descent
    that takes one step at each recorded time; what a recorded run really did is `lkarray.audit`'s.

    Parameters
    ----------
    kernel
        Square, of all training examples: ``lk.plgk(G_train)``.
    k
        Modes.
    scale
        c: what the sum of gradients is multiplied by in a step, eta/M of eq. 12, for the learning
        rate eta and M training examples. Of ``lk.plgk(G_train, weight="lr")``, which holds the
        learning rates, 1/M; and 1 of a kernel that holds both.
    memory
        Byte budget of a process.

    Returns
    -------
    xarray.Dataset
        ``eigenvalue(mode)``, descending; ``vector(example, mode)``, Q, orthonormal, of which the
        entry of largest magnitude is positive; ``drive(mode)``, s. Lazy. Compute it before
        `extend_audit`, so that it is decomposed once.

    Raises
    ------
    ValueError
        ``k`` exceeds the examples, or ``kernel`` is an influence operator.
    NonFiniteError
        On computing: the kernel holds NaN or infinity.
    SchemaError, TypeError
        ``kernel`` is not square, or not over the same examples on both sides.

    Notes
    -----
    Up to 4,000 examples, and within the budget, the kernel is decomposed whole, in float64 (some
    40 bytes an entry), and eigenvalues are as good as its entries. Larger ones by `lkarray.svd`,
    at its cost, since the singular values of a path kernel, which is positive semi-definite, are
    its eigenvalues; what is below 1e-8 of the largest is lost there.

    References
    ----------
    - Anonymous 2026, A.13 and eq. 12: "Path-Integrated Loss-Gradient Kernels".

    Examples
    --------
    >>> import xarray as xr, lkarray as lk
    >>> values = [[[3.0, 4.0], [1.0, 0.0]], [[0.0, 2.0], [1.0, 0.0]]]
    >>> G = xr.DataArray(values, dims=("time", "example", "param"))
    >>> decomposed = lk.audit_modes(lk.plgk(G), 2, scale=0.1).compute()
    >>> decomposed["eigenvalue"].values.round(4).tolist()
    [29.3293, 1.6707]
    """
    kernel = as_array(kernel, "kernel")
    require_real("kernel", kernel)
    rows, columns = _square(kernel)
    n = kernel.sizes[rows]
    if not 1 <= k <= n:
        raise ValueError(f"k must be between 1 and {n}, the training examples there are, not {k}")
    bare = kernel.drop_vars(list(kernel.coords))
    if n <= _DENSE and _DECOMPOSE * 8 * n**2 <= memory_budget(memory):
        # Eigenvalues as a first row, above their vectors: one task decomposes for both.
        shape = {"dtype": np.float64, "chunks": ((n + 1,), (k,)), "meta": np.empty((0, 0))}
        stacked = da.map_blocks(_eigh, bare.chunk(-1).data, k, **shape)
        value, vector = stacked[0], stacked[1:]
    else:
        decomposition = svd(bare, k, over=columns, memory=memory)
        value, vector = decomposition["singular_value"].data, decomposition["u"].data
    out = xr.Dataset({"eigenvalue": (MODE, value), "vector": ((rows, MODE), vector)})
    out["drive"] = out["vector"].astype(np.float64).sum(rows, skipna=False)
    coords = sample_coords(kernel, rows) | {MODE: np.arange(out.sizes[MODE])}
    attrs = {"scale": float(scale), "weight": kernel.attrs.get("weight", "none")}
    return out.drop_attrs().assign_coords(coords).assign_attrs(attrs)


@checked(modes=None)
def extend_audit(modes: Result, cross: Result, *, training: str | None = None) -> xr.Dataset:
    r"""Return the predicted change of examples' losses, and what each mode contributes, lazily.

    .. math:: \Delta_n \approx -c \sum_k s_k\, (Q_k \cdot P'_{\cdot n})

    (Anonymous 2026, appendix A.13), of examples that need not be of the training set. With all
    modes it is ``-c`` times the sum of :math:`P'_{mn}` over training examples.

    Parameters
    ----------
    modes
        What `audit_modes` returned.
    cross
        Path kernel of the new examples with the training examples, made as that of the modes was:
        ``lk.plgk(G_new, G_train)``.
    training
        Dim of ``cross`` that the training examples are along. By default the one whose labels,
        in any order, or else whose size, are those of the modes; where both dims fit, the second.

    Returns
    -------
    xarray.Dataset
        ``contribution(mode, example)`` and their sum ``change(example)``, float64, nats, along the
        dim of the new examples, with its coordinates.

    Raises
    ------
    ValueError
        ``cross`` is an influence operator, or weighs times otherwise than the modes' kernel.
    SchemaError, TypeError
        ``modes`` or ``cross`` are not such, or no dim of ``cross`` fits the modes.

    References
    ----------
    - Anonymous 2026, A.13: "Path-Integrated Loss-Gradient Kernels".

    Examples
    --------
    >>> import xarray as xr, lkarray as lk
    >>> values = [[[3.0, 4.0], [1.0, 0.0]], [[0.0, 2.0], [1.0, 0.0]]]
    >>> G = xr.DataArray(values, dims=("time", "example", "param"))
    >>> path = lk.plgk(G)
    >>> decomposed = lk.audit_modes(path, 2, scale=0.1).compute()
    >>> lk.extend_audit(decomposed, path)["change"].values.round(4).tolist()
    [-3.2, -0.5]
    >>> (-0.1 * path.sum("example")).values.round(4).tolist()
    [-3.2, -0.5]
    """
    modes, cross = opened(modes, "modes"), as_array(cross, "cross")
    if (
        not isinstance(modes, xr.Dataset)
        or not {"vector", "drive"} <= set(modes)
        or (not {"scale", "weight"} <= set(modes.attrs))
    ):
        raise SchemaError("modes must be the Dataset that lk.audit_modes returned")
    require_real("cross", cross)
    for variable, dims in (("vector", 2), ("drive", 1)):
        if MODE not in modes[variable].dims or modes[variable].ndim != dims:
            raise SchemaError(
                f"modes: {variable!r} has dims {modes[variable].dims}; expected 'mode'"
                f"{' and one more' * (dims - 1)}, as lk.audit_modes returns it"
            )
        require_real(f"modes: {variable!r}", modes[variable])
    require_kernel(cross, "extend_audit")
    own = modes.attrs["weight"]
    if (weight := cross.attrs.get("weight", own)) != own:
        raise ValueError(
            f"cross has weight={weight!r} and the modes' kernel {own!r}; make both with the same "
            "weight="
        )
    vector = modes["vector"]
    rows = str(next(dim for dim in vector.dims if dim != MODE))
    train = _training_dim(cross, modes, rows, training)
    new = str(next(dim for dim in cross.dims if dim != train))
    cross = in_order(cross, train, modes.indexes.get(rows), modes.sizes[rows], what="cross")
    operands = (nan_for_infinite(cross), vector.astype(np.float64))
    bare, thin = (x.drop_vars(list(x.coords)) for x in operands)
    # Thin products: one a tile of the cross kernel, which is read once.
    projected = xr.dot(thin.rename({rows: train}), bare, dim=train)
    terms = (
        -modes.attrs["scale"] * modes["drive"].drop_vars(MODE, errors="ignore") * projected
    ).drop_attrs()
    terms = terms.transpose(MODE, new)
    out = xr.Dataset({"change": terms.sum(MODE, skipna=False), "contribution": terms})
    for name in out.data_vars:
        out[name].attrs["units"] = "nat"
    coords = sample_coords(cross, new) | {MODE: modes[MODE].variable}
    return out.assign_coords(coords).assign_attrs(modes.attrs)


def _eigh(kernel: np.ndarray, k: int) -> np.ndarray:
    """Return the leading eigenvalues, as a first row, above their vectors, as columns."""
    if not np.isfinite(kernel).all():
        raise NonFiniteError("audit_modes: kernel holds NaN or infinity; leave such examples out")
    n = len(kernel)
    value, vector = scipy.linalg.eigh(kernel.astype(np.float64), subset_by_index=(n - k, n - 1))
    top = vector[np.abs(vector).argmax(0), np.arange(k)]
    return np.vstack((value, vector * np.where(top < 0, -1, 1)))[:, ::-1]


def _square(kernel: xr.DataArray) -> tuple[str, str]:
    require_kernel(kernel, "audit_modes")
    dims = tuple(map(str, kernel.dims))
    if len(dims) != 2 or dims[1] != second(dims[0]) or len(set(kernel.shape)) != 1:
        raise SchemaError(
            f"kernel has dims {dict(kernel.sizes)}; expected a square one, such as ('example', "
            "'example_2') of lk.plgk(G_train)"
        )
    labels = [kernel.indexes[dim] for dim in dims if dim in kernel.indexes]
    if len(labels) == 2 and not labels[0].equals(labels[1]):
        raise SchemaError(
            f"{dims[0]!r} and {dims[1]!r} are of different examples; modes are those of the "
            "training examples with themselves, lk.plgk(G_train). Pass others to lk.extend_audit"
        )
    return dims[0], dims[1]


def _training_dim(cross: xr.DataArray, modes: xr.Dataset, rows: str, training: str | None) -> str:
    """Return the dim of the training examples: the last of those that fit the modes best."""
    if cross.ndim != 2:
        raise SchemaError(
            f"cross has dims {cross.dims}; expected two, as lk.plgk(G_new, G_train) has"
        )
    if training is not None and training not in cross.dims:
        raise SchemaError(f"training={training!r} is no dim of cross, which has {cross.dims}")
    dims = [str(dim) for dim in cross.dims] if training is None else [training]
    known = modes.indexes.get(rows)
    fits: dict[str, int] = {}
    for dim in dims:
        index = cross.indexes.get(dim)
        if cross.sizes[dim] != modes.sizes[rows]:
            continue
        if index is None or known is None:
            fits[dim] = 0
        elif index.is_unique and known.isin(index).all():
            fits[dim] = 1 + index.equals(known)
    if not fits:
        raise SchemaError(
            f"cross has dims {dict(cross.sizes)}, and none of {dims} is of the "
            f"{modes.sizes[rows]} training examples of the modes (with the same labels); pass "
            "lk.plgk(G_new, G_train)"
        )
    return max(reversed(fits), key=fits.__getitem__)
