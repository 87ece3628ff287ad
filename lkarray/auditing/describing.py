"""What an audit is stored as: its layout, labels, attributes, and how well it adds up."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import numpy as np
import xarray as xr

from lkarray.auditing.budget import panel_size, state_bytes
from lkarray.auditing.problem import Problem
from lkarray.auditing.realised import PlainDescent
from lkarray.errors import SchemaError
from lkarray.kernels.kinds import INFLUENCE_OPERATOR
from lkarray.labels import given_coords
from lkarray.schema import AUDIT, EPOCH, EXAMPLE, GROUP, LAYER, OUTPUT, PARAM, TIME
from lkarray.store.audit_layout import AuditLayout

_UNITS = {"loss": "nat"}


def errors(estimate: np.ndarray, true: np.ndarray) -> tuple[float, float]:
    """Return the mean reconstruction error and the correlation.

    See Anonymous 2026, definitions 12, 13.
    """
    a, b = estimate.ravel(), true.ravel()
    varied = len(a) > 1 and a.std() > 0 and b.std() > 0
    lc = float(np.corrcoef(a, b)[0, 1]) if varied else float("nan")
    return float(np.abs(a - b).mean()), lc


def layout_of(
    problem: Problem,
    group: str,
    budget: int,
    coords: Any,
    example_coords: Any,
    per_panel: int | None = None,
) -> AuditLayout:
    """Return what the result is stored as, in panels that fit the budget, or of a given size."""
    by = problem.groups
    first = GROUP if EXAMPLE in by else EXAMPLE
    sizes = {first: problem.places.length, AUDIT: problem.data.n}
    if problem.audited.outputs is not None:
        sizes[OUTPUT] = problem.audited.outputs
    if PARAM in by:
        sizes[LAYER] = problem.layers
    windows = by[TIME].dim if TIME in by else None
    if windows is not None:
        sizes[windows] = len(problem.windows)
    per_panel = per_panel or panel_size(problem, budget)
    attrs = _attrs(problem)
    return AuditLayout(
        group=group,
        per_panel=per_panel,
        sizes=sizes,
        windows=windows,
        split=problem.by_acted and windows is not None,
        epochs=np.asarray([e for e, _, _ in problem.epochs]),
        dtype=problem.trace.fingerprint.dtype,
        coords=_labels(problem, sizes, coords, example_coords),
        attrs=attrs,
        units=attrs["units"],
        state=state_bytes(problem, per_panel),
    )


def _labels(
    problem: Problem, sizes: Mapping[str, int], coords: Any, example_coords: Any
) -> dict[str, tuple[str, np.ndarray]]:
    by = problem.groups
    first = next(iter(sizes))
    index = by[EXAMPLE].labels if EXAMPLE in by else problem.examples
    numbered = np.arange(sizes[first]) if EXAMPLE in by else problem.examples
    given = {AUDIT: (coords, problem.index), first: (example_coords, numbered)}
    out: dict[str, tuple[str, np.ndarray]] = {}
    for dim, (labels, numbers) in given.items():
        for key, values in given_coords(labels, sizes[dim], dim=dim, index=numbers).items():
            if key in out or (key in (*sizes, EPOCH) and key != dim):
                raise SchemaError(
                    f"coords: {key!r} is a label of audited and of training examples, or a dim; "
                    "give them different names"
                )
            out[key] = (dim, values)
    out[first] = (first, _text(index))
    for key, groups in by.items():
        if key != EXAMPLE and groups.dim != EPOCH:
            out[groups.dim] = (groups.dim, _text(groups.labels))
    return out


def _text(values: np.ndarray) -> np.ndarray:
    return values.astype(np.dtypes.StringDType()) if values.dtype.kind in "UO" else values


def _attrs(problem: Problem) -> dict[str, Any]:
    request = problem.request
    target = problem.audited.name
    return {
        "kernel": INFLUENCE_OPERATOR,
        "target": target,
        "rule": request.rule,
        "supersample": request.supersample,
        "stride": request.stride,
        "steps": [problem.start, problem.stop],
        "credit": request.credit,
        "complete": not problem.incomplete,
        "incomplete": "; ".join(problem.incomplete),
        "units": _UNITS.get(target, "1"),
    }


def metrics(problem: Problem, audit: xr.Dataset) -> dict[str, float]:
    """Return definitions 12 and 13 of Anonymous 2026, and how exactly influences add up.

    Of a partial audit only the correlation says something: the parts left out are missing from
    the sum, and a good rule's sum still goes with the change (ibid., A.1.3).
    """
    sums = {name: audit[name].values for name in ("total", "change", "path", "length")}
    residual = audit["residual"].values
    if residual.ndim > sums["total"].ndim:
        residual = residual.sum(-1)
    whole = sums["total"] + residual
    mre, lc = errors(whole, sums["change"])
    if problem.incomplete:
        return {"mre": float("nan"), "lc": lc, "closure": float("nan")}
    off = np.abs(whole - sums["path"]) / np.maximum(sums["length"], np.finfo(float).tiny)
    return {
        "mre": mre,
        "lc": lc,
        "closure": float(off.max()),
    }


def fingerprint(problem: Problem) -> dict[str, Any]:
    """Return what an audit in the same group must share with this one to be gone on with."""
    request, trace = problem.request, problem.trace

    def digest(value: Any) -> str:
        return hashlib.sha256(repr(value).encode()).hexdigest()[:16]

    groups = {
        key: [by.labels.tolist(), [members.tolist() for members in by.members]]
        for key, by in problem.groups.items()
    }
    return {
        "trace": digest(sorted(trace.fingerprint.stored().items())),
        "steps": [problem.start, problem.stop],
        "audit_set": problem.data.identity,
        "target": problem.audited.name,
        "rule": [request.rule, request.supersample, request.stride],
        "params": [trace.names[i] for i in problem.tensors],
        "examples": digest(problem.examples.tolist()),
        "groups": digest(sorted(groups.items())),
        "credit": request.credit,
        "plain": request.updates is PlainDescent,
    }
