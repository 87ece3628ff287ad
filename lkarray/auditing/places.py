"""Where in the result a training example's influence is added."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from lkarray.auditing.grouping import Groups


@dataclass(frozen=True, kw_only=True)
class BatchPlaces:
    """What of a step's batch counts.

    Attributes
    ----------
    examples
        Those whose gradients are needed.
    members, places
        Which of ``examples`` (by position) go where in the result; several times where groups
        overlap.
    size
        Of the whole batch.
    """

    examples: np.ndarray
    members: np.ndarray
    places: np.ndarray
    size: int

    @property
    def whole(self) -> bool:
        """Whether the gradients are those of every example of the batch."""
        return len(self.examples) == self.size

    @property
    def each_once(self) -> bool:
        """Whether every example goes to one place, in order."""
        count = len(self.members)
        return count == len(self.examples) == len(np.unique(self.members))


@dataclass(frozen=True, kw_only=True)
class Places:
    """Places of the training examples along the first dim of the result.

    Attributes
    ----------
    length
        Of that dim.
    first
        Of each example where its places begin in ``place``, and where the last one's end.
    place
        Places, by example.
    """

    length: int
    first: np.ndarray
    place: np.ndarray

    def counts(self, examples: np.ndarray) -> np.ndarray:
        """Return how many places each of some examples has."""
        return np.asarray(self.first[examples + 1] - self.first[examples])

    def of_batch(self, batch: np.ndarray, *, whole: bool) -> BatchPlaces:
        """Return what of a batch counts; ``whole``: the gradients of all of it are needed."""
        needed = batch if whole else batch[self.counts(batch) > 0]
        members = np.repeat(np.arange(len(needed)), self.counts(needed))
        places = [self.place[self.first[e] : self.first[e + 1]] for e in needed]
        joined = np.concatenate(places) if places else np.zeros(0, np.int64)
        return BatchPlaces(examples=needed, members=members, places=joined, size=len(batch))


def places_of(n: int, examples: np.ndarray, groups: Groups | None) -> Places:
    """Return the places of some of ``n`` training examples: one each, or those of their groups."""
    if groups is None:
        members = [np.asarray([i]) for i in examples.tolist()]
    else:
        kept = np.zeros(n, bool)
        kept[examples] = True
        members = [group[kept[group]] for group in groups.members]
    pairs = sorted((e, place) for place, group in enumerate(members) for e in group.tolist())
    owners = np.asarray([e for e, _ in pairs], np.int64)
    return Places(
        length=len(members),
        first=np.searchsorted(owners, np.arange(n + 1)),
        place=np.asarray([place for _, place in pairs], np.int64),
    )
