"""An audit that was asked for, checked, and made ready to run on a panel of examples."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lkarray.auditing.blocks import blocks_of
from lkarray.auditing.checking import refuse_unlike
from lkarray.auditing.grouping import epochs, groupings
from lkarray.auditing.quadrature import Stencil, stencil, stretches
from lkarray.auditing.realised import Realised
from lkarray.auditing.targets import Audited
from lkarray.errors import FingerprintError
from lkarray.nn.features import Features
from lkarray.nn.flat import FlatModel
from lkarray.nn.gradients import ExampleGradients
from lkarray.nn.reference import Reference
from lkarray.schema import EXAMPLE, PARAM, TIME
from lkarray.store import trace_layout, trajectory
from lkarray.training.checking import literal
from lkarray.training.choosing import as_examples, select
from lkarray.training.trace import Trace
from lkarray.values import array

SEEN, ACTED = "seen", "acted"

#: Relative difference of gradient norms beyond which a step is not the recorded one.
_TOLERANCE = {torch.float64: 1e-5, torch.float32: 5e-3}


@dataclass(frozen=True)
class Request:
    """What was asked for; plain values and functions, that another process can be sent.

    Attributes
    ----------
    audit_set
        The examples to audit.
    target, module, params, rule, supersample, stride, steps, examples
        As for `lkarray.audit`.
    groups, overlap, credit, unlike
        As for `lkarray.audit`.
    plain
        Take the steps for plain gradient descent: see `Realised`.
    bare
        Integrate along the path, and leave the training examples out.
    """

    audit_set: Any
    target: str | int | Callable[[Any, Any], Tensor] = "loss"
    module: str | None = None
    params: Any = None
    rule: str = "trapezoid"
    supersample: int = 1
    stride: int = 1
    steps: tuple[int, int] | None = None
    examples: Sequence[int] | np.ndarray | None = None
    groups: Mapping[str, Any] | None = None
    overlap: bool = False
    credit: str = SEEN
    unlike: bool = False
    plain: bool = False
    bare: bool = False


class Problem:
    """A request on a trace, checked, with the engines that it needs.

    Attributes
    ----------
    trace, request
        What it is made of.
    start, stop
        Steps audited.
    data, index
        The audited examples, and their labels along ``audit``.
    examples
        Training examples that influence is found of, ascending; their rows in the result where
        they are not grouped.
    layers, windows
        Numbers of the groups of parameters and of time: at least 1.
    blocks
        Tensors, by the form of their gradients.
    """

    def __init__(self, trace: Trace, request: Request) -> None:
        self.trace, self.request = trace, request
        self.stencil: Stencil = stencil(request.rule, request.supersample)
        self.start, self.stop = _steps(trace, request.steps)
        if not isinstance(request.stride, int) or request.stride < 1:
            raise ValueError(f"stride must be a positive integer, not {request.stride!r}")
        if request.credit not in (SEEN, ACTED):
            raise ValueError(f"credit must be 'seen' or 'acted', not {request.credit!r}")
        self.stretches = stretches(self.start, self.stop, request.stride)
        self.data, self.index = as_examples(trace, request.audit_set)
        if not request.unlike:
            refuse_unlike(trace.train, self.data)
        self.tensors = self._tensors(request)
        self.groups = groupings(
            request.groups, trace, (self.start, self.stop), overlap=request.overlap
        )
        self.examples = _examples(trace, request.examples)
        self.realised = Realised(trace, plain=request.plain)
        self._build()
        self.epochs = epochs(trace, (self.start, self.stop))
        self._place_examples()
        self._check_steps()

    def _tensors(self, request: Request) -> list[int]:
        chosen = select(self.trace, request.params)
        by = (request.groups or {}).get(PARAM)
        if isinstance(by, Mapping):
            named = {i for patterns in by.values() for i in select(self.trace, patterns)}
            chosen = [i for i in chosen if i in named]
        if not chosen:
            raise ValueError("params and groups['param'] have no tensor in common")
        return chosen

    def _build(self) -> None:
        trace, chosen = self.trace, self.tensors
        names = [trace.names[i] for i in chosen]
        self.flat = FlatModel(trace.flat.module, trainable=[literal(name) for name in names])
        probe = self.data.take(np.arange(min(3, self.data.n)))
        self.audited = Audited(self.request.target, self.request.module, trace, self.flat, probe)
        self.engines = [
            ExampleGradients(self.flat, number, probe) for number in self.audited.numbers
        ]
        first = trace.train.take(trace.batch(self.start)[:3])
        self.training = ExampleGradients(self.flat, trace.loss, first)
        whole = {
            site.name
            for engine in (*self.engines, self.training)
            for site in engine.plan.sites
            if site.form == "materialised"
        }
        self.materialise(whole)

    def materialise(self, names: Iterable[str]) -> None:
        """Take the gradients by some tensors whole, also where factors are cheaper."""
        trace, chosen = self.trace, self.tensors
        wanted = list(names)
        for engine in (*self.engines, self.training):
            engine.materialise(wanted)
        starts = [int(trace.starts[i]) for i in chosen]
        self.blocks = []
        # A tensor in several groups of parameters (overlap=True) is multiplied in each.
        by = self.groups.get(PARAM)
        sets = [set(chosen)] if by is None else [set(members.tolist()) for members in by.members]
        for layer, members in enumerate(sets):
            layers = [layer if i in members else -1 for i in chosen]
            found = blocks_of(self.training, chosen, starts, layers)
            self.blocks += [block for block in found if block.layer == layer]
        self.layers = len(sets)

    def _place_examples(self) -> None:
        """Say where in the result a training example's influence is added, perhaps in several."""
        n = self.trace.train.n
        by = self.groups.get(EXAMPLE)
        kept = np.zeros(n, bool)
        kept[self.examples] = True
        if by is None:
            members: Sequence[np.ndarray] = [np.asarray([i]) for i in self.examples.tolist()]
            self.length = len(self.examples)
        else:
            members = [m[kept[m]] for m in by.members]
            self.length = len(by)
        pairs = [(e, g) for g, group in enumerate(members) for e in group.tolist()]
        pairs.sort()
        owners = np.asarray([e for e, _ in pairs], np.int64)
        self._first = np.searchsorted(owners, np.arange(n + 1))
        self._place = np.asarray([g for _, g in pairs], np.int64)

    # --- what is asked of it ------------------------------------------------------------------

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

    def batch(self, step: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, int]:
        """Return what of a step's batch counts.

        Returns
        -------
        examples
            Those whose gradients are needed.
        rows, places
            Which of these go where in the result; several times where groups overlap.
        size
            Of the whole batch.
        """
        batch = self.trace.batch(step)
        counts = self._first[batch + 1] - self._first[batch]
        wanted = batch[counts > 0]
        if self.needs_whole(step):
            wanted = batch
        counts = self._first[wanted + 1] - self._first[wanted]
        rows = np.repeat(np.arange(len(wanted)), counts)
        places = [self._place[self._first[e] : self._first[e + 1]] for e in wanted]
        joined = np.concatenate(places) if places else np.zeros(0, np.int64)
        return wanted, rows, joined, len(batch)

    def needs_whole(self, step: int) -> bool:
        """Say whether the gradients of a whole batch are needed, also of examples not audited."""
        bound = float(self.trace.clip_bounds[step])
        clipped = np.isfinite(bound) and self.trace.every > 1
        return (
            self.partial_examples and not self.request.plain and (clipped or step == self.start > 0)
        )

    @cached_property
    def partial_examples(self) -> bool:
        """Whether some training examples are left out."""
        return bool((np.diff(self._first) == 0)[np.unique(self.trace.batches.clip(0))].any())

    @property
    def incomplete(self) -> list[str]:
        """Reasons why influences do not add up to the change; none for a whole audit."""
        out = []
        if self.partial_examples:
            out.append("some training examples are left out")
        if len(self.tensors) < len(self.trace.names):
            out.append("some parameters are left out")
        out += [
            f"groups of {key} overlap" for key, found in self.groups.items() if found.overlapping
        ]
        by = self.groups.get(TIME)
        if by is not None and not by.covers(np.arange(self.start, self.stop)):
            out.append("some steps are in no group")
        if self.request.plain:
            out.append("steps are taken for plain gradient descent")
        return out

    def set(self, theta: Tensor) -> None:
        """Give the model some parameters."""
        self.flat.load(theta, self._places)

    @cached_property
    def _places(self) -> dict[str, slice]:
        trace = self.trace
        return dict(zip(trace.names, map(slice, trace.starts, trace.stops), strict=True))

    # --- is it the run that was recorded? -------------------------------------------------------

    @cached_property
    def _norms(self) -> np.ndarray:
        return trajectory.step_rows(self.trace.root, trace_layout.NORM.name, 0, self.trace.steps)

    def check_norm(self, step: int, square: float) -> bool:
        """Say whether a batch gradient of a squared norm is the recorded one."""
        recorded = float(self._norms[step])
        tolerance = _TOLERANCE.get(self.flat.theta.dtype, 1e-2)
        return bool(abs(square**0.5 - recorded) <= tolerance * recorded + 1e-7)

    def refuse_other_gradients(self, steps: Sequence[int]) -> None:
        """Raise for the first of some steps whose batch gradient is not the recorded one."""
        moving = [literal(name) for name in self.trace.names]
        flat = FlatModel(self.trace.flat.module, trainable=moving)
        reference = Reference(flat, self.trace.loss)
        for step, theta in self.trace.states(steps):
            flat.load(theta, self._places)
            batch = self.trace.batch(step)
            mean = reference.total(*self.trace.train.take(batch)) / len(batch)
            square = float(mean.square().sum())
            if not self.check_norm(step, square):
                raise FingerprintError(
                    f"{self.trace.where}: the gradient of step {step} has the norm "
                    f"{square**0.5:.6g}, and {float(self._norms[step]):.6g} was recorded; the "
                    "data, the model's code or its buffers have changed since, so that the run "
                    "cannot be audited"
                )

    def _check_steps(self) -> None:
        for step in sorted({self.start, (self.start + self.stop) // 2, self.stop - 1}):
            try:
                self.refuse_other_gradients([step])
            except FingerprintError:
                self.refuse_other_gradients(range(self.start, step + 1))  # to name the first
                raise


def join(parts: list[Features]) -> Features:
    """Return the features of several batches as those of one."""
    if len(parts) == 1:
        return parts[0]
    factors = {}
    for name, f in parts[0].factors.items():
        a = torch.cat([part.factors[name].a for part in parts])
        b = torch.cat([part.factors[name].b for part in parts])
        factors[name] = type(f)(f.kind, a, b)
    numbers = [part.numbers for part in parts if part.numbers is not None]
    return Features(torch.cat([part.dense for part in parts]), factors, torch.cat(numbers))


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
