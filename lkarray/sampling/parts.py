"""Several runs in one store: by component of the model, or by checkpoint of its training."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any

import xarray as xr
from torch import nn
from zarr.abc.store import Store

from lkarray import schema
from lkarray import store as stores
from lkarray.nn.trainable import moving_names
from lkarray.nn.weights import with_weights
from lkarray.sampling.job import Job, RunOptions
from lkarray.sampling.posterior import LocalPosterior
from lkarray.sampling.running import run_job
from lkarray.store.location import StoreLike, exists, inner_store

Posteriors = dict[Any, Callable[[], LocalPosterior]]


def sample_parts(
    job: Job,
    store: StoreLike,
    options: RunOptions,
    *,
    components: Mapping[str, Any] | None,
    checkpoints: Mapping[Any, Any] | Iterable[Any] | None,
) -> xr.DataTree:
    """Run a job once for each component or checkpoint, each into a store of its own inside.

    Each is resumed on its own, and opens by itself too. With both, each checkpoint has its
    components.
    """
    place = stores.as_store(store)
    inner_store(place, "")  # refused here, before any work, where there can be none
    if checkpoints is not None:
        dim, posteriors = schema.CHECKPOINT, _checkpoints(job.posterior, checkpoints)
    else:
        dim, posteriors = schema.COMPONENT, _components(job.posterior, components or {})
    if components is not None:
        _components(job.posterior, components)
    if not _has_parts(place, dim, posteriors):  # nothing to write, nothing to lock
        with stores.writer_lock(place):
            stores.create_parts(place, dim, list(posteriors))
    for label, make in posteriors.items():
        part, where = replace(job, posterior=make()), stores.part_store(place, dim, label)
        if checkpoints is not None and components is not None:
            sample_parts(part, where, options, components=components, checkpoints=None)
        else:
            run_job(part, where, options)
    return stores.open_rectangle(place, chains=options.chains, draws=job.schedule.draws)


def _has_parts(place: Store, dim: str, labels: Iterable[Any]) -> bool:
    """Say whether a store is of several runs that differ in ``dim``, these labels among them."""
    parts = stores.parts_of(stores.open_root(place)) if exists(place) else None
    return parts is not None and parts["dim"] == dim and set(labels) <= set(parts["labels"])


def _components(posterior: LocalPosterior, components: Mapping[str, Any]) -> Posteriors:
    if not isinstance(components, Mapping) or not components:
        raise ValueError(
            "components must map names to patterns of parameters, for example "
            "{'first': 'layers.0.*', 'head 1': 'attn.weight[0:32, :]'}"
        )
    out: Posteriors = {}
    for name, patterns in components.items():
        _check_label("components", name)
        moving_names(posterior.model, patterns)
        out[name] = lambda patterns=patterns: posterior.moving(patterns)  # type: ignore[misc]
    return out


def _checkpoints(
    posterior: LocalPosterior, checkpoints: Mapping[Any, Any] | Iterable[Any]
) -> Posteriors:
    if not isinstance(checkpoints, Mapping):
        checkpoints = dict(enumerate(checkpoints))
    if not checkpoints:
        raise ValueError("checkpoints is empty; give weights by label, or a list of them")
    out: Posteriors = {}
    for label, weights in checkpoints.items():
        _check_label("checkpoints", label)
        if not isinstance(weights, nn.Module):
            try:  # here, before any work; read again when its turn comes, so that one is held
                with_weights(posterior.model, weights)
            except (TypeError, ValueError) as error:
                raise type(error)(f"checkpoints[{label!r}]: {error}") from None
        out[label] = lambda weights=weights: posterior.at(weights)  # type: ignore[misc]
    return out


def _check_label(name: str, label: Any) -> None:
    if isinstance(label, bool) or not isinstance(label, (int, str)):
        raise TypeError(f"{name}: label {label!r} must be a string or an integer")
    if not re.fullmatch(r"[^/.][^/]*", str(label)):
        raise ValueError(
            f"{name}: label {label!r} must not be empty, hold a slash or begin with a dot"
        )
