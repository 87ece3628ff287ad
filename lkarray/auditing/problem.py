"""An audit that was asked for, checked, and made ready to run on a panel of examples."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from torch import Tensor

from lkarray.auditing.blocks import Block, blocks_of
from lkarray.auditing.checking import refuse_unlike
from lkarray.auditing.grouping import Groups, epochs, groupings
from lkarray.auditing.places import BatchPlaces, Places, places_of
from lkarray.auditing.quadrature import Stencil, stencil, stretches
from lkarray.auditing.realised import Updates
from lkarray.auditing.reproducing import RecordedNorms, recorded_norms
from lkarray.auditing.request import ACTED, SEEN, Request
from lkarray.auditing.targets import Audited
from lkarray.nn.batches import Batches
from lkarray.nn.flat import FlatModel
from lkarray.nn.gradients import ExampleGradients
from lkarray.schema import EXAMPLE, PARAM, TIME
from lkarray.training.checking import literal
from lkarray.training.choosing import as_examples, select
from lkarray.training.trace import Trace
from lkarray.values import array


@dataclass(frozen=True, kw_only=True)
class Problem:
    """A request on a trace, checked, with the engines that it needs: see `problem_of`.

    Attributes
    ----------
    trace, request
        What it is made of.
    start, stop, stretches
        Steps audited, and the stretches between evaluations of the audited examples.
    stencil
        Where in a stretch these are evaluated.
    data, index
        The audited examples, and their labels along ``audit``.
    examples, places
        Training examples that influence is of, ascending, and where in the result it goes.
    tensors
        Indices of the parameters audited, among the trace's tensors.
    groups
        What influence is added up by: of examples, of parameters, of time, where asked for.
    updates
        What each step is taken for.
    epochs
        Number, first step and the one beyond the last of each.
    flat, audited
        The model, by the tensors audited; what is audited of each example.
    engines, training
        Gradients of each audited number, and of the training loss.
    recorded
        Norms of the gradients of the run.
    """

    trace: Trace
    request: Request
    start: int
    stop: int
    stretches: list[tuple[int, int]]
    stencil: Stencil
    data: Batches
    index: np.ndarray
    examples: np.ndarray
    places: Places
    tensors: list[int]
    groups: Mapping[str, Groups]
    updates: Updates
    epochs: list[tuple[int, int, int]]
    flat: FlatModel
    audited: Audited
    engines: Sequence[ExampleGradients]
    training: ExampleGradients
    recorded: RecordedNorms

    @property
    def windows(self) -> list[tuple[int, int]]:
        """Windows of time, ``[first step, one beyond the last)``; one of all steps by default."""
        by = self.groups.get(TIME)
        if by is None:
            return [(self.start, self.stop)]
        return [(int(a), int(b)) for a, b in by.members]

    @property
    def outputs(self) -> int:
        """Audited numbers of each example."""
        return self.audited.outputs or 1

    @property
    def layers(self) -> int:
        """Number of the groups of parameters, at least 1."""
        return len(self.groups[PARAM]) if PARAM in self.groups else 1

    @property
    def by_acted(self) -> bool:
        """Whether influence counts in the windows in which it moved the parameters."""
        return self.request.credit == ACTED

    def blocks(self) -> list[Block]:
        """Return the tensors by the form of their gradients, which `materialise` changes."""
        starts = [int(self.trace.starts[i]) for i in self.tensors]
        by = self.groups.get(PARAM)
        # A tensor in several groups of parameters (overlap=True) is multiplied in each.
        layers = [self.tensors] if by is None else [members.tolist() for members in by.members]
        out = []
        for layer, members in enumerate(layers):
            inside = set(members)
            layer_of = [layer if i in inside else -1 for i in self.tensors]
            blocks = blocks_of(self.training, self.tensors, starts, layer_of)
            out += [block for block in blocks if block.layer == layer]
        return out

    def materialise(self, names: Iterable[str]) -> None:
        """Let the engines take gradients by some tensors whole, also where factors are cheaper."""
        tensors = list(names)
        for engine in (*self.engines, self.training):
            engine.materialise(tensors)

    def batch(self, step: int) -> BatchPlaces:
        """Return what of a step's batch counts."""
        # The gradients of all examples may be needed, also of those not audited.
        whole = self.partial_examples and self.updates.needs_gradient(step, self.start)
        return self.places.of_batch(self.trace.batch(step), whole=whole)

    @cached_property
    def partial_examples(self) -> bool:
        """Whether some training examples are left out."""
        taken = np.unique(self.trace.batches.clip(0))  # short batches are filled up with -1
        return bool((self.places.counts(taken) == 0).any())

    @property
    def incomplete(self) -> list[str]:
        """Reasons why influences do not add up to the change; none for a whole audit."""
        out = []
        if self.partial_examples:
            out.append("some training examples are left out")
        if len(self.tensors) < len(self.trace.names):
            out.append("some parameters are left out")
        out += [f"groups of {key} overlap" for key, by in self.groups.items() if by.overlapping]
        by_time = self.groups.get(TIME)
        if by_time is not None and not by_time.covers(np.arange(self.start, self.stop)):
            out.append("some steps are in no group")
        if self.updates.incomplete:
            out.append(self.updates.incomplete)
        return out

    def set(self, theta: Tensor) -> None:
        """Give the model some parameters."""
        self.flat.load(theta, self.recorded.places)

    def require_recorded(self, step: int, gradients: Sequence[Tensor | None]) -> None:
        """Raise unless a batch's gradient, given by blocks, is the one that was recorded.

        Nothing is said of a gradient that some blocks or tensors are missing of.
        """
        known = [gradient for gradient in gradients if gradient is not None]
        # A tensor in two groups of parameters would count twice.
        if len(known) < len(gradients) or self.incomplete:
            return
        square = sum(float(gradient.double().square().sum()) for gradient in known)
        if not self.recorded.agree(step, square):
            self.recorded.refuse_other_gradients(range(self.start, step + 1))


def problem_of(trace: Trace, request: Request) -> Problem:
    """Return a request on a trace, checked and ready to run.

    Raises
    ------
    ValueError, TypeError
        An option is none that `lkarray.audit` knows; the audit set was prepared otherwise.
    FingerprintError
        Gradients of the run's first, middle or last step are not the recorded ones.
    """
    # From the cheapest check to the dearest.
    rule = stencil(request.rule, request.supersample)
    start, stop = _steps(trace, request.steps)
    if not isinstance(request.stride, int) or request.stride < 1:
        raise ValueError(f"stride must be a positive integer, not {request.stride!r}")
    if request.credit not in (SEEN, ACTED):
        raise ValueError(f"credit must be 'seen' or 'acted', not {request.credit!r}")
    data, index = as_examples(trace, request.audit_set)
    if not request.unlike:
        refuse_unlike(trace.train, data)
    tensors = _tensors(trace, request)
    groups = groupings(request.groups, trace, (start, stop), overlap=request.overlap)
    examples = _examples(trace, request.examples)
    flat = FlatModel(
        trace.flat.module, trainable=[literal(name) for name in _names(trace, tensors)]
    )
    probe = data.take(np.arange(min(3, data.n)))
    audited = Audited(request.target, request.module, trace, flat, probe)
    problem = Problem(
        trace=trace,
        request=request,
        start=start,
        stop=stop,
        stretches=stretches(start, stop, request.stride),
        stencil=rule,
        data=data,
        index=index,
        examples=examples,
        places=places_of(trace.train.n, examples, groups.get(EXAMPLE)),
        tensors=tensors,
        groups=groups,
        updates=request.updates(trace),
        epochs=epochs(trace, (start, stop)),
        flat=flat,
        audited=audited,
        engines=[ExampleGradients(flat, number, probe) for number in audited.numbers],
        training=ExampleGradients(flat, trace.loss, trace.train.take(trace.batch(start)[:3])),
        recorded=recorded_norms(trace),
    )
    problem.materialise(_whole_somewhere(problem))
    problem.recorded.refuse_other_run(start, stop)
    return problem


def _whole_somewhere(problem: Problem) -> set[str]:
    """Return the tensors whose gradients have no factors for one engine or more."""
    return {
        site.name
        for engine in (*problem.engines, problem.training)
        for site in engine.plan.sites
        if site.form == "materialised"
    }


def _names(trace: Trace, tensors: Sequence[int]) -> list[str]:
    return [trace.names[i] for i in tensors]


def _tensors(trace: Trace, request: Request) -> list[int]:
    chosen = select(trace, request.params)
    by = (request.groups or {}).get(PARAM)
    if isinstance(by, Mapping):
        named = {i for patterns in by.values() for i in select(trace, patterns)}
        chosen = [i for i in chosen if i in named]
    if not chosen:
        raise ValueError("params and groups['param'] have no tensor in common")
    return chosen


def _steps(trace: Trace, steps: tuple[int, int] | None) -> tuple[int, int]:
    if steps is None:
        return 0, trace.steps
    start, stop = (int(step) for step in steps)
    if not 0 <= start < stop <= trace.steps:
        raise ValueError(
            f"steps={steps!r} must be (first, one beyond the last) within 0 to {trace.steps}"
        )
    return start, stop


def _examples(trace: Trace, examples: Any) -> np.ndarray:
    n = trace.train.n
    if examples is None:
        return np.arange(n)
    index = array("examples", examples)
    if index.ndim != 1 or not index.size or index.dtype.kind not in "iu":
        raise ValueError("examples must be a list of indices of the training set")
    if index.min() < 0 or index.max() >= n or len(np.unique(index)) < len(index):
        raise ValueError(f"examples must be distinct indices from 0 to {n - 1}")
    return np.sort(index)
