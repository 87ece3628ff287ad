"""Is everything that counts really there, and what was written? Every chunk is read and checked.

Three kinds of check: a chunk's own checksum; the checksums that commits kept of chunks
(`digests`) and the seals of groups (`seals`), which tell sound chunks in wrong places and edited
metadata; and what must agree, such as sizes, labels and their hash, settings and the fingerprint.
Damage is never raised: each piece is checked by itself, whatever is wrong with the others.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from functools import partial
from typing import Any

import zarr
from zarr.core.sync import sync

from lkarray import schema
from lkarray.arguments import checked
from lkarray.errors import DamagedError, StoreError, StoreVersionError
from lkarray.store.audits import audit_fingerprints
from lkarray.store.features import feature_fingerprint
from lkarray.store.gradients import gradient_fingerprints
from lkarray.store.layout import stored_fingerprint
from lkarray.store.location import StoreLike, as_store, describe, is_sealed, open_root
from lkarray.store.names import DERIVED, folders, own_group
from lkarray.store.nodes import node_at
from lkarray.store.parts import part_store, parts_of
from lkarray.store.problems import Problem
from lkarray.store.results import below_diagonal, results, saved_elsewhere
from lkarray.store.seals import seal_of, stored_metadata
from lkarray.store.trace_layout import ROOT
from lkarray.store.trajectory import trace_fingerprint
from lkarray.store.verifying_pieces import (
    METADATA,
    chunk_problems,
    group_problems,
    guarded,
    misplaced,
    unreadable,
    without_metadata,
)
from lkarray.store.verifying_runs import consolidated_problems, run_problems
from lkarray.store.verifying_training import (
    audit_problems,
    feature_problems,
    gradient_problems,
    trace_problems,
)

logger = logging.getLogger("lkarray")


@checked()
def verify(path: StoreLike) -> list[Problem]:
    """Check that every chunk that the store's records imply is whole, and the one written there.

    Reads every committed chunk once, one at a time. A store that is still being written may
    be verified: only what is committed is required. That a store of lkarray 0.1.0 has fewer
    checksums is logged.

    Parameters
    ----------
    path
        A folder, a URL or a Zarr store.

    Returns
    -------
    list of Problem
        One for each missing, truncated, corrupt or mismatching piece, with its path; empty
        for a sound store.

    Raises
    ------
    StoreError, StoreVersionError
        There is no store that could be verified.

    Examples
    --------
    >>> import torch, lkarray as lk
    >>> from torch.utils.data import TensorDataset
    >>> _ = torch.manual_seed(0)
    >>> model = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.Tanh(), torch.nn.Linear(3, 2))
    >>> inputs = torch.randn(8, 2)
    >>> data = TensorDataset(inputs, (inputs[:, 0] > 0).long())
    >>> from zarr.storage import MemoryStore
    >>> posterior = lk.LocalPosterior(model, data, nbeta=10.0, gamma=100.0)
    >>> options = {"chains": 2, "draws": 4, "burn_in": 1, "batch_size": 4, "progress": False}
    >>> store = MemoryStore()
    >>> tree = lk.sample(posterior, data, sampler=lk.SGLD(step_size=1e-3), store=store, **options)
    >>> lk.verify(store)
    []
    """
    problems, notes = check(path)
    for note in notes:
        logger.warning(note)
    return problems


def check(path: StoreLike) -> tuple[list[Problem], list[str]]:
    """Return what `verify` does, and what it logs."""
    try:
        root = open_root(path)
    except DamagedError as error:
        return [Problem("corrupt", "zarr.json", str(error))], []
    except StoreVersionError:
        raise
    except StoreError as error:
        if not _was_ours(path):
            raise
        what = f"of what must have been a store: {error}"
        return [Problem("corrupt", "zarr.json", what)], []
    notes = [] if is_sealed(root) else [f"{describe(root.store)}: {_UNSEALED}"]
    distinct = {(p.kind, p.path, p.detail if p.kind == "mismatch" else ""): p for p in _all(root)}
    return list(distinct.values()), notes


_UNSEALED = (
    "it was written by lkarray 0.1.0, which kept checksums of chunks only: text labels have none, "
    "and chunks in each other's places or edited metadata may go unseen"
)


def _was_ours(path: StoreLike) -> bool:
    """Say whether a place without a root group has what only a store of lkarray has."""
    store = as_store(path)
    ours = {schema.COMMIT, ROOT, schema.LOSSES}
    try:
        return bool(ours & set(folders(store, "")))
    except (OSError, StoreError):
        return False


def _all(root: zarr.Group) -> Iterator[Problem]:
    yield from guarded("zarr.json", partial(_top, root))
    yield from guarded(DERIVED, partial(_derived, root))
    parts = parts_of(root)
    if parts is not None:
        yield from _parts(root, parts)
        return
    yield from _training(root)
    sampled = stored_fingerprint(root) is not None
    if sampled:
        yield from run_problems(root)
    yield from guarded("zarr.json", partial(consolidated_problems, root))
    if sampled:
        return
    made = trace_fingerprint(root) or gradient_fingerprints(root) or audit_fingerprints(root)
    made = made or feature_fingerprint(root)
    if not made and not results(root) and not saved_elsewhere(root):
        yield Problem("missing", schema.LOSSES, "sampling was stopped before it began")


def _top(root: zarr.Group) -> Iterator[Problem]:
    """Check the root's own metadata, and that no group lost its own."""
    unknown = sorted(set(stored_metadata(root)) - METADATA)
    if unknown:
        yield Problem("mismatch", "zarr.json", f"unknown keys {unknown}")
    if not is_sealed(root) and _has_seals(root):
        yield Problem("mismatch", "zarr.json", "the seal of what lkarray keeps there is gone")
    for name in folders(root.store, ""):
        if without_metadata(root.store, name):
            if own_group(name) or _holds_nodes(root, name):
                detail = "the folder has content, but no metadata"
                yield Problem("missing", f"{name}/zarr.json", detail)
        elif name == DERIVED:
            yield from group_problems(root, name, sealed=False)


def _holds_nodes(root: zarr.Group, path: str) -> bool:
    """Say whether groups or arrays lie directly in a folder."""
    inner = folders(root.store, path)
    return any(sync(root.store.exists(f"{path}/{name}/zarr.json")) for name in inner)


def _has_seals(root: zarr.Group) -> bool:
    for path in (schema.COMMIT, schema.LOSSES):
        try:
            node = node_at(root, path)
        except DamagedError:
            continue
        if isinstance(node, zarr.Group) and seal_of(node) is not None:
            return True
    return False


def _parts(root: zarr.Group, parts: dict[str, Any]) -> Iterator[Problem]:
    """Check each of several runs."""
    yield from group_problems(root, parts["dim"], sealed=False)
    for label in parts["labels"]:
        at = f"{parts['dim']}/{label}"
        inner = part_store(root.store, parts["dim"], label)
        try:
            problems = verify(inner)
        except StoreError as error:
            problems = [Problem("missing", "zarr.json", str(error))]
        yield from (problem._replace(path=f"{at}/{problem.path}") for problem in problems)


def _training(root: zarr.Group) -> Iterator[Problem]:
    """Check the committed steps of a training run, and the finished shards of its tensors."""
    if trace_fingerprint(root) is not None:
        yield from trace_problems(root)
    for group in gradient_fingerprints(root):
        yield from gradient_problems(root, group)
    for group in audit_fingerprints(root):
        yield from audit_problems(root, group)
    if feature_fingerprint(root):
        yield from feature_problems(root)


def _derived(root: zarr.Group) -> Iterator[Problem]:
    """Check the results that the store keeps, whatever it holds besides."""
    for path, problem in [*results(root), *saved_elsewhere(root)]:
        if problem is not None and (
            problem.kind == "unfinished" or problem.path == f"{path}/zarr.json"
        ):
            yield problem
        else:  # chunks that are gone, and arrays that cannot be opened, are named one by one
            yield from guarded(path, partial(_result, root, path))


def _result(root: zarr.Group, group: str) -> Iterator[Problem]:
    if without_metadata(root.store, group):
        yield Problem("missing", f"{group}/zarr.json", "the folder has content, but no metadata")
        return
    sealed = list(group_problems(root, group, sealed=False))
    yield from (problem for problem in sealed if problem.path.endswith("zarr.json"))
    faults = []
    for name in folders(root.store, group):
        path = f"{group}/{name}"
        try:
            array = node_at(root, path)
        except DamagedError as error:
            if not any(problem.path == f"{path}/zarr.json" for problem in sealed):
                yield unreadable(path, error)
            continue
        if isinstance(array, zarr.Array):
            faults += [p for p in chunk_problems(array, ()) if not _left_out(array, p)]
    yield from faults
    # Of content that the seal does not know, where nothing worse is known of it already.
    yield from misplaced(sealed, faults)


def _left_out(array: zarr.Array, problem: Problem) -> bool:
    """Say whether a missing chunk is one below the diagonal of a kernel saved as a triangle."""
    if array.attrs.get("triangle") != "upper":
        return False
    return problem.kind == "missing" and below_diagonal(problem.path)
