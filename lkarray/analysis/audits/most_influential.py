"""The training examples that helped and harmed each audited example most."""

from __future__ import annotations

from collections.abc import Hashable
from functools import partial
from typing import Any

import dask.array as da
import numpy as np
import xarray as xr

from lkarray.analysis.audits.influence import (
    as_influence,
    require_finite,
    small_computed,
    whole_influence,
)
from lkarray.arguments import COUNT, checked
from lkarray.engine.numbers import top_k
from lkarray.kernels.coords import sample_coords
from lkarray.kernels.groups import group_codes
from lkarray.labels import require_unique
from lkarray.results import Result
from lkarray.schema import RANK

_MERGED = 8  # blocks whose best are merged at once
_ENTRY = np.dtype([("score", np.float64), ("place", np.int64)])
_SIGNS = {"helpful": -1, "harmful": 1}


@checked(k=COUNT, audit=None)
def most_influential(audit: Result, k: int = 25, *, by: Hashable | Any | None = None) -> xr.Dataset:
    """Return the training examples that helped and harmed each audited example most.

    Helpful examples drove the audited quantity down (its loss, unless the audit's target says
    otherwise) and harmful ones up (Anonymous 2026, section 6.1, figures 3 and 4).

    Parameters
    ----------
    audit
        What `lkarray.audit` returned, its node in a store, or its ``influence``; summed over layers
        and epochs.
    k
        Examples at each end; all where there are fewer.
    by
        Coordinate of the training examples, such as ``"train_label"``, or one label for each, as
        for `lkarray.group_mean`: the ``k`` of each class. It is read at once.

    Returns
    -------
    xarray.Dataset
        ``helpful(rank, audit[, output])``, labels of the training examples (positions if they
        have none), lowest influence first, and ``helpful_influence``, float64; ``harmful`` and
        ``harmful_influence``, highest first. With ``by``, a dim of that name before ``rank``,
        and its classes as coordinate. Rows of a class with fewer than k end in -1 (or an empty
        label) and NaN. Ties go to the example that comes first. Those furthest down the ranks may
        be of the other sign: the influence says. Computed up to a million entries; beyond, lazy
        if the audit is on Dask: compute all variables at once.

    Raises
    ------
    ValueError
        ``k`` is below 1.
    SchemaError, TypeError
        There is no influence, no such coordinate along its training examples, or two of these
        have one label.
    NonFiniteError
        Influence is NaN or infinite.

    Notes
    -----
    One pass over the influence, chunk by chunk, each of which leaves its own k best: 32 bytes for
    each rank, class and audited example, so take few ranks of many classes.

    References
    ----------
    - Anonymous 2026, section 6.1, figures 3 and 4: "Path-Integrated Loss-Gradient Kernels".

    Examples
    --------
    >>> import xarray as xr, lkarray as lk
    >>> influence = xr.DataArray([[-3.0, 1.0], [1.0, 0.5], [0.0, -0.5]], dims=("example", "audit"))
    >>> table = lk.most_influential(influence, k=1)
    >>> table["helpful"].values.tolist(), table["harmful"].values.tolist()
    ([[0, 2]], [[1, 0]])
    """
    x, source = as_influence(audit)
    classes, codes = np.zeros(1), np.zeros(x.sizes[source], np.int64)
    if source in x.indexes:
        require_unique(x.indexes[source], f"the index of {source!r}")
    if by is not None:
        by, classes, codes = group_codes(x, source, by, what="by")
    k = min(k, int(np.bincount(codes).max()))
    whole = whole_influence(x, source)
    best = _best_entries(whole.data, codes, len(classes), k)
    rest = [str(dim) for dim in whole.dims if dim != source]
    split = "lkarray_class" if by is None else by
    require_unique(x.indexes.get(source), f"the index of {source!r}")
    labels = np.asarray(x.indexes[source]) if source in x.indexes else np.arange(len(codes))
    columns: dict[str, xr.DataArray] = {}
    for end, (name, sign) in enumerate(_SIGNS.items()):
        entries = best[..., end, :, :]
        dims = (*rest, split, RANK)
        columns[name] = xr.DataArray(_labels_of(entries, labels), dims=dims)
        signed = da.map_blocks(_influences, entries, sign, dtype=np.float64)
        columns[f"{name}_influence"] = xr.DataArray(signed, dims=dims)
    out = xr.Dataset(columns).transpose(split, RANK, *rest)
    out = out.isel({split: 0}) if by is None else out.assign_coords({by: classes})
    for name, sign in _SIGNS.items():
        verb = "lowered" if sign < 0 else "raised"
        out[name].attrs["long_name"] = f"{source} that {verb} what is audited"
        out[f"{name}_influence"].attrs = {"units": x.attrs.get("units", "nat")}
    out = out.assign_coords(sample_coords(x, *rest) | {RANK: np.arange(k)})
    return small_computed(x, out.assign_attrs(k=k, by=by or "none", source=source))


def _best_entries(data: da.Array, codes: np.ndarray, classes: int, k: int) -> da.Array:
    """Return the k best at each end: ``(*rest, end, class, k)`` of `_ENTRY`."""
    lengths = data.chunks[-1]
    place, code = (
        da.from_array(values, chunks=(lengths,)) for values in (np.arange(len(codes)), codes)
    )
    spans = np.split(codes, np.cumsum(lengths)[:-1])
    kept = tuple(min(k, int(np.bincount(span).max())) for span in spans)
    *rest, last, end, group = range(data.ndim + 2)
    meta = np.empty((0,) * (data.ndim + 2), _ENTRY)
    candidates = da.blockwise(
        _candidates,
        (*rest, end, group, last),
        data,
        (*rest, last),
        place,
        (last,),
        code,
        (last,),
        new_axes={end: len(_SIGNS), group: classes},
        adjust_chunks={last: kept},
        align_arrays=False,
        meta=meta,
        dtype=_ENTRY,
        classes=classes,
        k=k,
    )
    keep = partial(_keep, k=k)
    return da.reduction(
        candidates,
        chunk=keep,
        aggregate=keep,
        axis=-1,
        keepdims=True,
        split_every=_MERGED,
        output_size=k,
        meta=meta,
        dtype=_ENTRY,
    )


def _candidates(
    values: np.ndarray, place: np.ndarray, code: np.ndarray, *, classes: int, k: int
) -> np.ndarray:
    require_finite(values)
    k = min(k, int(np.bincount(code).max()))
    flat = values.reshape(-1, values.shape[-1])
    out = np.empty((len(flat), len(_SIGNS), classes, k), _ENTRY)
    out["score"], out["place"] = -np.inf, -1
    for c in np.unique(code):
        members = np.flatnonzero(code == c)
        influences, count = flat[:, members], min(k, len(members))
        for end, sign in enumerate(_SIGNS.values()):
            score = sign * influences
            index = top_k(score, count)
            out["score"][:, end, c, :count] = np.take_along_axis(score, index, axis=1)
            out["place"][:, end, c, :count] = place[members[index]]
    return out.reshape(*values.shape[:-1], *out.shape[1:])


def _keep(entries: np.ndarray, axis: Any, keepdims: bool, *, k: int) -> np.ndarray:
    # Blocks come in order, so that a stable sort leaves ties to the lower place.
    order = np.argsort(-entries["score"], axis=-1, kind="stable")[..., :k]
    return np.take_along_axis(entries, order, axis=-1)


def _labels_of(entries: da.Array, labels: np.ndarray) -> Any:
    """Return the labels of the examples at the entries' places; a missing one where it is -1."""
    missing: Any = ""
    if labels.dtype.kind in "iub":
        labels, missing = labels.astype(np.int64), -1
    elif labels.dtype.kind == "f":
        missing = np.nan
    padded = np.append(labels, np.array([missing], labels.dtype))  # which place -1 finds
    return da.map_blocks(lambda e: padded[e["place"]], entries, dtype=padded.dtype)


def _influences(entries: np.ndarray, sign: int) -> np.ndarray:
    return np.where(entries["place"] < 0, np.nan, sign * entries["score"])
