"""How a sampled run is laid out in a store: the making and growing of its arrays."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import prod
from typing import Any

import numpy as np
import zarr
from zarr.core.sync import sync

from lkarray import schema
from lkarray.errors import GroupError, StoreError
from lkarray.store.arrays import create_array, create_coord, listed, require_space, stored
from lkarray.store.chunks import chunk_keys, flush, flush_tree, missing
from lkarray.store.location import (
    StoreLike,
    as_store,
    create_root,
    describe,
    enter,
    entries_of,
    is_sealed,
    writing,
)
from lkarray.store.names import SAVED
from lkarray.store.nodes import group_at, stored_at
from lkarray.store.seals import seal
from lkarray.store.typed import dims_of

#: Bytes that one chain buffers before it must write a block; and the draws of a block beyond
#: which it is not worth more than a few bytes, so that memory stays flat in draws.
_BLOCK_BYTES = 64 << 20
_BLOCK_DRAWS, _FEW_BYTES = 512, 8 << 20
_STATE_CHUNK = 1 << 22

#: Attributes of each group of losses that the run's fingerprint has too.
SETTINGS = (
    "loss",
    "nbeta",
    "gamma",
    "sampler",
    "burn_in",
    "thin",
    "batch_size",
    "seed",
    "start",
)

#: Numbers before the checksums of `schema.LATEST`, and of `schema.BLOCKS`.
HEAD, BLOCK_HEAD = 4, 2


@dataclass(frozen=True)
class OutcomeSet:
    """An outcome that is recorded beside losses: its spec, its link, its values at w*."""

    spec: schema.VariableSpec
    link: str
    center: np.ndarray


@dataclass(frozen=True)
class LossSet:
    """An observed set, as the group that holds its losses.

    Attributes
    ----------
    group
        ``losses``, or ``losses_<name>`` for a further set.
    coords
        Labels of its samples.
    center_loss
        Losses at w*, shape ``(sample, *dims)``.
    dims
        Names of the dims after ``sample``.
    attrs
        Attributes of the group: what kernels need to know of the posterior.
    outcomes
        What is recorded beside losses, by name, in the order of the fingerprint.
    predictions
        What a control predicts of them, by name: spec and attributes.
    """

    group: str
    coords: Mapping[str, np.ndarray]
    center_loss: np.ndarray
    dims: tuple[str, ...] = ()
    attrs: Mapping[str, Any] = field(default_factory=dict)
    outcomes: Mapping[str, OutcomeSet] = field(default_factory=dict)
    predictions: Mapping[str, tuple[schema.VariableSpec, Mapping[str, Any]]] = field(
        default_factory=dict
    )

    @property
    def recorded(self) -> list[str]:
        """Names of what is recorded at each draw."""
        return [schema.LOSS.name, *self.outcomes, *self.predictions]


def block_draws(draws: int, values: int) -> int:
    """Return the draws of a block: of one chain, with ``values`` recorded at each draw.

    A block is buffered whole, so its depth falls with the number of values.
    """
    size = 4 * max(values, 1)
    block = min(_BLOCK_BYTES // size, max(_BLOCK_DRAWS, _FEW_BYTES // size))
    return min(max(draws, 32), max(100, block))


def loss_chunks(depth: int, samples: int, tail: tuple[int, ...] = ()) -> tuple[int, ...]:
    """Return the chunk shape of ``loss(chain, draw, sample, ...)`` (docs/architecture.md).

    Chunks stay near 2 MiB, large enough to read fast and small enough to select.
    """
    width = 2048 if depth >= 200 or samples <= 2048 else 8192
    return 1, depth, min(max(width // prod(tail), 1), samples), *tail


def create_run(
    path: StoreLike,
    *,
    chains: int,
    draws: int,
    sets: Sequence[LossSet],
    observables: Mapping[str, tuple[int, ...]],
    state: Mapping[str, int],
    state_dtype: Any,
    fingerprint: Mapping[str, Any],
) -> zarr.Group:
    """Create the groups of a sampled store and return its root.

    ``observables`` gives the shape of each at one draw, ``state`` the length of each vector
    that a chain carries. The fingerprint is written last: a store that has none was killed
    while it was being made, holds no draw, and is made again by the next run.
    """
    store = as_store(path)
    values = sum(s.center_loss.size * len(s.recorded) for s in sets)
    values += sum(map(prod, observables.values()))
    depth = block_draws(draws, values)
    require_space(store, 4 * chains * (draws * values + 2 * sum(state.values())))
    root = create_root(store)
    with writing(root.store):
        for observed in sets:
            _create_set(root, observed, chains, draws, depth)
        stats = root.create_group(schema.SAMPLE_STATS)
        for spec in schema.STATS:
            create_array(stats, spec, (chains, draws), (1, depth))
        if observables:
            group = root.create_group(schema.OBSERVABLES)
            n = sets[0].center_loss.shape[0]
            for name, tail in observables.items():
                spec = schema.observable(name, tail, n)
                create_array(group, spec, (chains, draws, *tail), (1, depth, *tail))
        vectors = root.create_group(schema.STATE)
        for name, size in state.items():
            chunk = (1, 1, min(size, _STATE_CHUNK))
            spec = replace(schema.PARAMETERS, name=name)
            create_array(vectors, spec, (chains, 2, size), chunk, dtype=state_dtype)
        _create_commit(root, sets, observables, state, chains, draws)
        for observed in sets:
            seal(group_at(root, observed.group), growing=set(observed.recorded))
        for name in {schema.SAMPLE_STATS, schema.OBSERVABLES, schema.STATE, schema.COMMIT}:
            if name != schema.OBSERVABLES or observables:
                seal(group_at(root, name), growing=set(group_at(root, name).array_keys()))
        made = [s.group for s in sets] + [schema.SAMPLE_STATS, schema.STATE, schema.COMMIT]
        flush_tree(root.store, *made, *[schema.OBSERVABLES] * bool(observables))
        enter(root, **{schema.LOSSES: dict(fingerprint)})
    return root


def _create_commit(
    root: zarr.Group,
    sets: Sequence[LossSet],
    observables: Mapping[str, tuple[int, ...]],
    state: Mapping[str, int],
    chains: int,
    draws: int,
) -> None:
    """Create the records, zero for each chain, and the room for checksums (see `digests`)."""
    commit = root.create_group(schema.COMMIT)
    fields = {"fields": ["draws", "step", "slot"]}
    record = create_array(commit, schema.RECORD, (chains, 3), (1, 3), attrs=fields)
    paths = [f"{observed.group}/{name}" for observed in sets for name in observed.recorded]
    paths += [f"{schema.SAMPLE_STATS}/{spec.name}" for spec in schema.STATS]
    paths += [f"{schema.OBSERVABLES}/{name}" for name in observables]
    written = [stored_at(root, path) for path in paths]
    vectors = [stored_at(root, f"{schema.STATE}/{name}") for name in state]
    width, blocks = pieces(written), -(-draws // written[0].chunks[1])
    row, whole = HEAD + pieces(vectors) + width, BLOCK_HEAD + width
    fields = {"first": ["chain", "slot", "draws", "step"]}
    create_array(commit, schema.LATEST, (chains, 2, row), (1, 1, row), attrs=fields)
    fields = {"first": ["chain", "block"]}
    create_array(commit, schema.BLOCKS, (chains, blocks, whole), (1, 1, whole), attrs=fields)
    record[...] = 0
    flush(root.store, chunk_keys(record))


def pieces(arrays: Iterable[zarr.Array]) -> int:
    """Return how many chunks the arrays have for one chain, and one block or slot."""
    return sum(prod(array.cdata_shape[2:]) for array in arrays)


def _create_set(root: zarr.Group, of: LossSet, chains: int, draws: int, depth: int) -> None:
    samples, *tail = of.center_loss.shape
    group = root.create_group(of.group, attributes=dict(of.attrs))
    labels = " ".join(name for name in of.coords if name != schema.SAMPLE)
    extra = {"coordinates": labels} if labels else {}
    shape = (chains, draws, samples, *tail)
    chunks = loss_chunks(depth, samples, tuple(tail))
    kinds = [(schema.LOSS, of.center_loss, extra)]
    for outcome in of.outcomes.values():
        kinds.append((outcome.spec, outcome.center, extra | {schema.LINK: outcome.link}))
    for spec, center, attrs in kinds:
        each, whole = (replace(s, dims=(*s.dims, *of.dims)) for s in (spec, schema.center(spec)))
        create_array(group, each, shape, chunks, attrs=attrs)
        create_array(group, whole, center.shape, center.shape, attrs=attrs)[...] = center
    for spec, known in of.predictions.values():  # at w* they are 0
        create_array(group, spec, shape, chunks, attrs=extra | dict(known))
    for name, values in of.coords.items():
        create_coord(group, name, values, schema.SAMPLE)


def stored_fingerprint(root: zarr.Group) -> dict[str, Any] | None:
    """Return the settings that the stored losses were made with, ``None`` before that."""
    return entries_of(root).get(schema.LOSSES)


def drop_unfinished(root: zarr.Group) -> None:
    """Remove the groups of a store whose making was interrupted: they hold no draw."""
    if stored_fingerprint(root) is not None:
        raise StoreError(f"{describe(root.store)} holds losses; nothing was removed")
    ours = {*schema.GROUPS, schema.OBSERVABLES}
    goes = [
        name
        for name in listed(root.store)  # even groups whose metadata was removed already
        if name in ours or name.startswith(f"{schema.LOSSES}_")
    ]
    for name in goes:
        if name in root and SAVED in root[name].attrs:
            raise GroupError(
                f"group {name!r} of {describe(root.store)} is a kernel that lk.save wrote, where "
                "losses would go; nothing was removed. Sample into another store"
            )
    for name in goes:
        sync(root.store.delete_dir(name))


def loss_groups(root: zarr.Group) -> list[str]:
    """Return the groups of the observed sets, ``losses`` first."""
    sets = (stored_fingerprint(root) or {}).get("observed_data")
    return list(sets) if isinstance(sets, Mapping) else [schema.LOSSES]


def recorded_names(root: zarr.Group) -> list[str]:
    """Return what is recorded of each observed sample at each draw: also what is predicted."""
    control = (stored_fingerprint(root) or {}).get("control")
    predicted = [] if control is None else [schema.prediction(control["outcome"]).name]
    return [*centered_names(root), *predicted]


def centered_names(root: zarr.Group) -> list[str]:
    """Return what is recorded, and has values at w*: ``loss``, then outcomes."""
    return [schema.LOSS.name, *(stored_fingerprint(root) or {}).get("outcomes", {})]


def recorded_specs(root: zarr.Group) -> list[schema.VariableSpec]:
    """Return the specs of a group of losses: of losses and outcomes, each with that of w*.

    Then that of what a control predicts.
    """
    specs = [schema.outcome(name) for name in centered_names(root)]
    control = (stored_fingerprint(root) or {}).get("control")
    predicted = [] if control is None else [schema.prediction(control["outcome"])]
    return [*(each for spec in specs for each in (spec, schema.center(spec))), *predicted]


def center_path(path: str) -> str:
    """Return the path of the values at w* of the losses or outcomes at a path."""
    group, name = path.split("/")
    return f"{group}/{schema.at_center(name)}"


def recorded_paths(root: zarr.Group) -> dict[str, tuple[str, ...]]:
    """Return what chains write a block of at each commit: paths, and their first dims."""
    observables = (stored_fingerprint(root) or {}).get("observables", {})
    names = recorded_names(root)
    paths = {f"{group}/{name}": schema.LOSS.dims for group in loss_groups(root) for name in names}
    paths |= {f"{schema.SAMPLE_STATS}/{spec.name}": spec.dims for spec in schema.STATS}
    return paths | {f"{schema.OBSERVABLES}/{name}": schema.POSTERIOR for name in observables}


def carried_paths(root: zarr.Group) -> dict[str, tuple[str, ...]]:
    """Return the vectors that chains carry from step to step: paths and dims."""
    names = (stored_fingerprint(root) or {}).get("state", [schema.PARAMETERS.name])
    return {f"{schema.STATE}/{name}": schema.PARAMETERS.dims for name in names}


def run_groups(root: zarr.Group) -> list[str]:
    """Return the groups of a sampled run."""
    groups = [*loss_groups(root), schema.SAMPLE_STATS, schema.STATE, schema.COMMIT]
    seen = any(path.startswith(f"{schema.OBSERVABLES}/") for path in recorded_paths(root))
    return [*groups, schema.OBSERVABLES] if seen else groups


def recorded(root: zarr.Group) -> dict[str, zarr.Array]:
    """Return the arrays of `recorded_paths`."""
    return {path: stored_at(root, path) for path in recorded_paths(root)}


def carried(root: zarr.Group) -> dict[str, zarr.Array]:
    """Return the arrays of `carried_paths`, by name."""
    return {path.split("/")[1]: stored_at(root, path) for path in carried_paths(root)}


def grow(root: zarr.Group, *, chains: int, draws: int) -> None:
    """Enlarge the arrays to at least ``chains`` and ``draws``; nothing stored is touched."""
    loss = stored(root, schema.LOSSES, schema.LOSS)
    before, depth = loss.shape[0], loss.chunks[1]
    want = {schema.CHAIN: max(chains, before), schema.DRAW: max(draws, loss.shape[1])}
    want["block"] = -(-want[schema.DRAW] // depth)
    # The losses come last: readers take their sizes and cut the others to them, so that a kill
    # in between is harmless.
    record = stored(root, schema.COMMIT, schema.RECORD)
    arrays = [record, *carried(root).values()]
    if is_sealed(root):
        arrays += [stored(root, schema.COMMIT, spec) for spec in (schema.LATEST, schema.BLOCKS)]
    arrays += reversed(recorded(root).values())
    grown = []
    for array in arrays:
        sizes = zip(dims_of(array), array.shape, strict=True)
        grown.append((array, tuple(max(n, want.get(dim, n)) for dim, n in sizes)))
    if all(shape == array.shape for array, shape in grown):
        return
    new = [4 * (prod(shape) - prod(array.shape)) for array, shape in grown]
    require_space(root.store, sum(new))
    with writing(root.store, safe="Nothing that was stored is lost"):
        root.update_attributes({})  # drops the consolidated metadata, which would be stale
        flush(root.store, ["zarr.json"])
        for array, shape in grown:
            if shape != array.shape:
                array.resize(shape)
                flush(root.store, [f"{array.path}/zarr.json"])
            if array is record and is_sealed(root):
                _add_records(stored_at(root, record.path), range(before, want[schema.CHAIN]))


def _add_records(record: zarr.Array, chains: Iterable[int]) -> None:
    """Write zero records of new chains, so that a missing one is always a fault."""
    keys = [key for chain in chains for key in chunk_keys(record, (chain,))]
    for key in missing(record.store, keys):
        record[int(key.split("/")[-2])] = 0
    flush(record.store, keys)
