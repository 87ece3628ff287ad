"""`repair`: what is damaged of a store is taken again, where it can be."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import zarr

from lkarray import progress as progress_bars
from lkarray import schema
from lkarray import store as stores
from lkarray.errors import DamagedError, LkarrayError
from lkarray.nn.batches import MapDataset
from lkarray.nn.outcomes import Outcome, chosen_outcomes
from lkarray.sampling import checking as checks
from lkarray.sampling.chain import Schedule, Seat, Stack
from lkarray.sampling.devices import numerics
from lkarray.sampling.fingerprints import Fingerprint
from lkarray.sampling.job import Job
from lkarray.sampling.posterior import LocalPosterior
from lkarray.sampling.preparing import center_values, check_center, prepare
from lkarray.sampling.randomness import ChainRandomness
from lkarray.sampling.remembering import remembered
from lkarray.sampling.samplers import Sampler
from lkarray.sampling.stored_samplers import control_from, sampler_from, start_from
from lkarray.sampling.target import Observable, Target
from lkarray.store.audits import audit_fingerprints
from lkarray.store.gradients import gradient_fingerprints
from lkarray.store.layout import (
    carried_paths,
    center_path,
    loss_groups,
    recorded_names,
    recorded_paths,
)
from lkarray.store.location import StoreLike
from lkarray.store.mending import (
    ChainMender,
    Repair,
    mend_index,
    mend_metadata,
    mend_records,
    mend_whole,
)
from lkarray.store.nodes import group_at, stored_at
from lkarray.store.problems import Problem
from lkarray.store.seals import seal_of
from lkarray.store.trace_layout import ROOT

_CHECKSUMS = {f"{schema.COMMIT}/{spec.name}" for spec in (schema.LATEST, schema.BLOCKS)}
_COMMITTED = re.compile(r"(.+)/c/(\d+)(?:/\d+)*")


def repair(
    store: StoreLike,
    posterior: LocalPosterior | None = None,
    *,
    observed: MapDataset | Mapping[str, MapDataset] | None = None,
    sampler: Sampler | None = None,
    observables: Mapping[str, Observable] | None = None,
    outcomes: Sequence[str | Outcome] | None = None,
    progress: bool = True,
) -> list[Repair]:
    """Mend what `verify` finds, as far as it can be made again; say what could not be.

    Metadata and settings come from the copies that a store keeps of them. Chunks of chains
    (losses, statistics, observables, state, checksums) are taken again: the chain is replayed
    from w* with the store's own settings, compared bit for bit with all of it that is sound, and
    what is damaged is written only if nothing differs. So nothing sound is ever replaced by
    something else, and what was killed halfway can be run again.

    Parameters
    ----------
    store
        A folder, a URL or a Zarr store.
    posterior
        The posterior that was sampled. Not needed in the process that sampled, where it is
        remembered, nor where no chain is damaged.
    observed
        The observed sets, as they were given to `sample`. Not needed where they are remembered,
        or the training set was observed.
    sampler
        The sampler, if its schedule is a function of your own, which a store cannot hold.
    observables
        The observables that were recorded, if there were any.
    outcomes
        The outcomes that were recorded, as they were given to `sample`, if one is of your own.
    progress
        Whether to show a progress bar when it takes longer than two seconds.

    Returns
    -------
    list of Repair
        One for each fault, with ``path``, ``mended`` and ``detail``; empty for a sound store.
        Labels, results under ``derived`` and recorded training runs cannot be made again here:
        their entries say what to do.

    Raises
    ------
    StoreError
        There is no store.
    LockedError
        Another process is writing to the store.
    """
    given = _Given(posterior, observed, sampler, observables, outcomes, progress)
    return _repair(stores.as_store(store), given)


@dataclass(frozen=True)
class _Given:
    posterior: LocalPosterior | None
    observed: MapDataset | Mapping[str, MapDataset] | None
    sampler: Sampler | None
    observables: Mapping[str, Observable] | None
    outcomes: Sequence[str | Outcome] | None
    progress: bool


def _repair(place: Any, given: _Given) -> list[Repair]:
    before = stores.verify(place)
    if not before:
        return []
    try:
        root = stores.open_root(place, mode="r+")
    except DamagedError as error:
        return [Repair(problem.path, False, str(error)) for problem in before]
    parts = stores.parts_of(root)
    if parts is not None:
        return _parts(root, parts, before, given)
    with stores.writer_lock(place):
        reasons, uncovered = _mend(root, given)
    before += uncovered  # seen only once what hid it was mended
    after = {problem.path: problem for problem in stores.verify(place)}
    return _told(root, before, after, reasons)


def _parts(
    root: zarr.Group, parts: Mapping[str, Any], before: list[Problem], given: _Given
) -> list[Repair]:
    """Repair each of several runs."""
    repairs = []
    for label in parts["labels"]:
        folder = f"{parts['dim']}/{label}/"
        if any(problem.path.startswith(folder) for problem in before):
            own = given
            inner = stores.part_store(root.store, parts["dim"], label)
            if given.posterior is not None and parts["dim"] == schema.COMPONENT:
                trainable = (stores.stored_fingerprint(stores.open_root(inner)) or {})["trainable"]
                own = dataclasses.replace(given, posterior=given.posterior.moving(trainable))
            inside = _repair(inner, own)
            repairs += [repair._replace(path=folder + repair.path) for repair in inside]
    folders = tuple(f"{parts['dim']}/{label}/" for label in parts["labels"])
    others = [problem for problem in before if not problem.path.startswith(folders)]
    if others:
        with stores.writer_lock(root.store):
            mend_metadata(root, others)
            stores.finish(root)
        after = {problem.path: problem for problem in stores.verify(root.store)}
        repairs += _told(root, others, after, {})
    return repairs


def _mend(root: zarr.Group, given: _Given) -> tuple[dict[str, str], list[Problem]]:
    """Mend what can be; return why the rest could not, by path, and the faults seen meanwhile."""
    problems = stores.verify(root.store)
    if stores.stored_fingerprint(root) is not None:
        # What says where things are and what counts comes first: chunks are compared by it.
        mend_metadata(root, problems)
        mend_index(root, problems)
        mend_records(root, problems)
        problems = stores.verify(root.store)
    chains = _damaged_chains(root, problems)
    centers = [
        path
        for path in _observed_paths(root)
        if any(p.path.split("/c/")[0] == center_path(path) for p in problems)
    ]
    reasons: dict[str, str] = {}
    if chains or centers:
        try:
            reasons = _replay(root, chains, centers, given)
        except (LkarrayError, ValueError, TypeError) as error:
            paths = [key for keys in chains.values() for key in keys]
            paths += map(center_path, centers)
            reasons = dict.fromkeys(paths, str(error))
    if any(problem.path == "zarr.json" for problem in problems):
        root.update_attributes({})
    if not any(p.path.endswith("/zarr.json") for p in stores.verify(root.store)):
        stores.finish(root)
    return reasons, problems


def _observed_paths(root: zarr.Group) -> list[str]:
    """Return the paths of losses and outcomes."""
    if stores.stored_fingerprint(root) is None:
        return []
    return [f"{group}/{name}" for group in loss_groups(root) for name in recorded_names(root)]


def _damaged_chains(root: zarr.Group, problems: Iterable[Problem]) -> dict[int, set[str]]:
    """Return the chunks to take again, by chain."""
    if stores.stored_fingerprint(root) is None:
        return {}
    ours = {*recorded_paths(root), *carried_paths(root), *_CHECKSUMS}
    chunks: dict[int, set[str]] = {}
    for problem in problems:
        match = _COMMITTED.fullmatch(problem.path)
        if match and match[1] in ours:
            chunks.setdefault(int(match[2]), set()).add(problem.path)
    return chunks


def _replay(
    root: zarr.Group, chains: Mapping[int, set[str]], centers: Iterable[str], given: _Given
) -> dict[str, str]:
    """Replay chains with damage, and write what of them is damaged; return what was refused."""
    stored = stores.stored_fingerprint(root) or {}
    fingerprint = Fingerprint.of(stored)
    job = _job(fingerprint, given)
    width = fingerprint.chains_per_device
    prepared, target = prepare(job, chains=max([*chains, 0]) + 1, layout=fingerprint.layout)
    now = prepared.fingerprint.stored()
    stores.refuse_changes(  # labels are not given again: nothing of a chain depends on them
        {key: value for key, value in stored.items() if key != "coords"},
        {key: value for key, value in now.items() if key != "coords"},
        stores.describe(root.store),
        remedy="pass the posterior, observed sets and observables that it was made with",
    )
    reasons: dict[str, str] = {}
    with numerics(fingerprint.threads):
        # Losses at w* first: what is stored of them is then what the replay must agree with.
        reasons |= _mend_centers(root, target, centers)
        if not reasons:
            check_center(root, target)
        records = {}
        for chain, keys in chains.items():
            try:
                records[chain] = stores.read_record(root, chain)
            except DamagedError as error:
                reasons |= dict.fromkeys(keys, str(error))
        steps = sum(record.step for record in records.values())
        with progress_bars.bar("replaying", total=steps, show=given.progress) as bar:
            for chain, record in records.items():
                mender = ChainMender(root, chain, record, chains[chain])
                group = f"{chain // width * width}"
                with stores.region_lock(root.store, group):
                    _run(job, target, chain, mender, record, bar.update)
                    with stores.writing(root.store, safe="Nothing that was stored is lost"):
                        mender.write()
                if mender.refused is not None:
                    reasons |= dict.fromkeys(chains[chain], mender.refused)
    return reasons


def _job(fingerprint: Fingerprint, given: _Given) -> Job:
    """Return the run that a store was made by, of what was given and what is remembered."""
    known = remembered(fingerprint, observed=True) or remembered(fingerprint)
    posterior = given.posterior or (known.posterior if known else None)
    if posterior is None:
        raise ValueError(
            "the model that was sampled is not known in this process; pass posterior=, made of the "
            "same model, weights and training set"
        )
    sampler = given.sampler or (known.sampler if known else sampler_from(fingerprint.sampler))
    checks.check_types(posterior, sampler)
    sets = fingerprint.observed_data
    if given.observed is not None:
        observed: Mapping[str, MapDataset] = checks.observed_sets(given.observed)
    elif known is not None and set(known.observed) == set(sets):
        observed = known.observed
    elif all(identity == fingerprint.train_data for identity in sets.values()):
        observed = dict.fromkeys(sets, posterior.train_set)
    else:
        raise ValueError(
            "the observed sets are not known in this process; pass observed=, as it was given to "
            "lk.sample"
        )
    functions = given.observables or (known.observables if known else {})
    if set(functions) != set(fingerprint.observables):
        raise ValueError(
            f"pass observables=, the functions that were recorded: "
            f"{sorted(fingerprint.observables)}"
        )
    return Job(
        posterior=posterior,
        observed=observed,
        coords={group: {} for group in observed},
        sampler=sampler,
        schedule=Schedule(1, fingerprint.burn_in, fingerprint.thin),
        batch_size=fingerprint.batch_size,
        seed=fingerprint.seed,
        autocast=fingerprint.autocast,
        compile=fingerprint.compile,
        observables=dict(functions),
        outcomes=_outcomes(fingerprint, posterior, given, known),
        start=start_from(fingerprint.start, sampler),
        control=control_from(fingerprint.control),
    )


def _outcomes(
    fingerprint: Fingerprint, posterior: LocalPosterior, given: _Given, known: Job | None
) -> tuple[Outcome, ...]:
    """Return the outcomes that a store was made with, of what was given, known and built in."""
    if given.outcomes is not None:
        chosen = chosen_outcomes(posterior.loss, given.outcomes)
    else:
        at_hand = {outcome.name: outcome for outcome in (known.outcomes if known else ())}
        for name, made_with in fingerprint.outcomes.items():
            if made_with.function == name:
                at_hand[name] = chosen_outcomes(posterior.loss, (schema.LOSS.name, name))[0]
        chosen = tuple(at_hand[name] for name in fingerprint.outcomes if name in at_hand)
    if {outcome.name for outcome in chosen} != set(fingerprint.outcomes):
        raise ValueError(
            "pass outcomes=, as they were given to lk.sample: "
            f"{[schema.LOSS.name, *fingerprint.outcomes]}"
        )
    return chosen


@dataclass(frozen=True)
class _Until(Schedule):
    """A schedule that ends where a record does, which may be between two draws."""

    last: int = 0

    @property
    def steps(self) -> int:
        """Steps to take."""
        return self.last


def _run(job: Job, target: Target, chain: int, mender: ChainMender, record: Any, tick: Any) -> None:
    """Replay one chain, in the row of the stack that it had."""
    random = ChainRandomness(
        job.seed, chain, n=target.train.n, batch_size=job.batch_size, like=target.center
    )
    region = cast(stores.ChainRegion, mender)
    seat = Seat(chain % target.flat.width, chain, region, random)
    schedule = _Until(record.draws, job.schedule.burn_in, job.schedule.thin, record.step)
    Stack(target, job.sampler, schedule, [seat], tick).run()


def _mend_centers(root: zarr.Group, target: Target, paths: Iterable[str]) -> dict[str, str]:
    """Compute lost losses and outcomes at w* again; return why some could not be."""
    reasons = {}
    now = center_values(target) if paths else {}
    for path in paths:
        group, name = center_path(path).split("/")
        entries = (seal_of(group_at(root, group)) or {"arrays": {}})["arrays"]
        known = entries.get(name, {}).get("content")
        with stores.writing(root.store):
            if not mend_whole(stored_at(root, center_path(path)), now[path], known):
                reasons[center_path(path)] = (
                    "the values at w* computed now are not those that were stored, to the last bit"
                )
    return reasons


def _told(
    root: zarr.Group,
    before: Iterable[Problem],
    after: Mapping[str, Problem],
    reasons: Mapping[str, str],
) -> list[Repair]:
    """Return what became of each fault."""
    repairs = []
    for problem in {p.path: p for p in [*before, *after.values()]}.values():
        left = after.get(problem.path)
        if left is None:
            repairs.append(Repair(problem.path, True, f"{problem.detail}; made again"))
        else:
            causes = (why for path, why in reasons.items() if problem.path.startswith(path))
            why = next(causes, None) or _remedy(root, problem)
            repairs.append(Repair(problem.path, False, f"{problem.detail}; {why}"))
    return repairs


def _remedy(root: zarr.Group, problem: Problem) -> str:
    group, _, name = problem.path.partition("/")
    if group == "derived":
        return "a result is not made again here: compute it again"
    if group == ROOT or group in gradient_fingerprints(root) or group in audit_fingerprints(root):
        return "what was recorded of a training run cannot be taken again here: record it again"
    of_losses = group == schema.LOSSES or group.startswith(f"{schema.LOSSES}_")
    chains = {each for path in _observed_paths(root) for each in (path, center_path(path))}
    array = f"{group}/{name.split('/')[0]}"
    if of_losses and not name.endswith("zarr.json") and array not in chains:
        return "labels cannot be made again: restore the file from a copy of the store"
    return "it cannot be made again: restore the file from a copy of the store"
