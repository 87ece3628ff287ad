"""Attribution by the projected kernel of a classifier's margins: TRAK (arXiv:2303.14186)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
import xarray as xr
from torch import Tensor

from lkarray import progress as bars
from lkarray.arguments import checked
from lkarray.attribution.scores import (
    Params,
    as_checkpoints,
    as_params,
    audit_labels,
    labelled,
    refuse_large,
)
from lkarray.auditing.checking import refuse_unlike
from lkarray.engine.plan import memory_budget
from lkarray.errors import MemoryBudgetError
from lkarray.nn.batches import MapDataset
from lkarray.nn.losses import logits
from lkarray.nn.modes import with_gradients
from lkarray.training.choosing import as_examples, as_trace
from lkarray.training.makers import Maker
from lkarray.training.projection import Projection
from lkarray.training.recorder import Recorder
from lkarray.training.trace import Trace

MARGIN, LOSS = "margin", "loss"

#: Shares of the budget for gradients in flight, and for projected ones that are kept.
_FLIGHT, KEPT = 1 / 4, 1 / 2
#: Numbers of a gradient's length that are held for each example in flight, and examples at most.
_COPIES = 3
ROWS = 2048


@checked()
@with_gradients
def trak(
    trace: Trace | Recorder,
    audit_set: MapDataset | Sequence[int] | np.ndarray,
    *,
    target: str = MARGIN,
    checkpoints: str | Iterable[int] | None = None,
    size: int | None = 2048,
    seed: int = 0,
    regularization: float = 0.0,
    examples: Sequence[int] | np.ndarray | None = None,
    params: Params = None,
    coords: Mapping[str, Any] | None = None,
    unlike: bool = False,
    memory: int | str | None = None,
    progress: bool = False,
) -> xr.DataArray:
    r"""Attribute by TRAK: what leaving an example out would do to a classifier's margins.

    With the margin :math:`f = \log(p / (1 - p))` of an example's own class, and its projected
    gradients :math:`\phi = R^\top \nabla_\theta f`, rows of :math:`\Phi` for training examples,

    .. math::

        \tau_{mn} = \overline{(1 - p_m)} \;\; \overline{
            \phi_n^\top (\Phi^\top \Phi + \lambda I)^{-1} \phi_m}

    with means over checkpoints (Park et al. 2023, section 3 and algorithm 1, without its soft
    threshold). It is about training again without an example (a counterfactual), by a model
    linearised at its final weights, and not about what happened in this run (Anonymous 2026, remark
    5.3); the paper takes checkpoints of runs of their own.

    Parameters
    ----------
    trace
        What `open_trace` returned, or a finished `record`, of a model with outputs
        ``(batch, class)`` and integer labels.
    audit_set
        The examples whose predictions are attributed: a dataset like the training set, or indices
        into it.
    target
        ``"margin"``, or ``"loss"``: scores times the slope of the cross-entropy by the margin,
        ``-(1 - p_n)`` (its mean over checkpoints), which compares with `lkarray.audit`.
    checkpoints
        States of the run, as for `lkarray.tracin`; the final one by default.
    size
        Columns of the projection, independent for each checkpoint; at most as many as there are
        training examples, unless ``regularization`` is positive. ``None``: no projection.
    seed
        Of the first projection; the following seeds are those of the other checkpoints.
    regularization
        The :math:`\lambda` above, in units of squared gradients. (Projections keep these on
        average, while the authors' package scales them by ``size / param``.)
    examples
        Indices of the training set, to which :math:`\Phi` is then restricted; all by default.
    params
        Patterns of tensor or module names; ``"last"`` for the last layer.
    coords
        Labels of the audited examples.
    unlike
        Allow an audit set whose inputs or labels lie outside what was trained on.
    memory
        Byte budget; ``LKARRAY_MEMORY`` or a quarter of the memory by default.
    progress
        Show a progress bar.

    Returns
    -------
    xarray.DataArray
        ``trak(example, audit)``, in memory. Of margins (log odds), **positive** where the example
        supports the audited one's own class: the opposite of an influence on its loss. Of losses,
        in nats, **negative** where it supports it, as in an audit.

    Raises
    ------
    ValueError
        An option is none of the above; the model is no classifier; the audit set was prepared
        otherwise; :math:`\Phi^\top \Phi` is singular.
    MemoryBudgetError
        The budget does not hold the result, or the matrices of ``size``.

    Notes
    -----
    At each checkpoint a forward and backward pass of every example; ``2 P size`` operations to
    project a gradient, and ``2 size (size + N)`` for its products with ``N`` audited examples.
    Memory: four matrices of ``size`` squared numbers and ``2 N size`` in float64; projected
    gradients are kept where half the budget holds them, and computed twice otherwise.

    References
    ----------
    - Park et al. 2023, section 3 and algorithm 1: "TRAK: attributing model behavior at scale",
      arXiv:2303.14186.
    - Anonymous 2026, remark 5.3: "Path-Integrated Loss-Gradient Kernels".
    """
    source = as_trace(trace)
    if target not in (MARGIN, LOSS):
        raise ValueError(f"target must be 'margin' or 'loss', not {target!r}")
    if not regularization >= 0:
        raise ValueError(f"regularization must not be negative, not {regularization!r}")
    steps = [source.steps] if checkpoints is None else as_checkpoints(source, checkpoints).tolist()
    projections = [None if size is None else Projection(size, seed + i) for i in range(len(steps))]
    index = _training(source, examples)
    chosen = as_params(source, params)
    # The training set itself need not be copied.
    given = source.train_set if examples is None else index
    sides = [Maker(source, data, margin, chosen, projections[0]) for data in (given, audit_set)]
    if not unlike:
        refuse_unlike(source.train, sides[1].data)
    labels = audit_labels(coords, sides[1].index)
    kernel = _Kernel(sides[0], sides[1], float(regularization), memory_budget(memory))
    count = len(steps) * (sides[0].data.n + sides[1].data.n)
    with bars.bar("trak", total=count, unit="example", show=progress) as bar:
        for (_, theta), projection in zip(source.states(steps), projections, strict=True):
            kernel.add(theta, projection, bar)
    scores, (slopes, own) = kernel.scores / len(steps), (q / len(steps) for q in kernel.slopes)
    scores *= slopes[:, None]
    if target == LOSS:
        scores *= -own
    return labelled(
        "trak",
        scores,
        index,
        labels,
        method="TRAK",
        target=target,
        checkpoints=steps,
        size=size or "none",
        seed=seed,
        regularization=float(regularization),
        params=[source.names[i] for i in sides[0].tensors],
        sign="positive supports the audited class"
        if target == MARGIN
        else "negative lowers the loss",
        units="1" if target == MARGIN else "nat",
    )


def margin(output: Any, target: Any) -> Tensor:
    """Return the log odds of each example's own class, ``(batch,)``."""
    scores = logits(output)
    if scores.ndim != 2 or scores.shape[1] < 2 or target.ndim != 1 or target.is_floating_point():
        raise ValueError(
            "trak needs a classifier: outputs (batch, class) of two classes or more, and one "
            f"integer label an example; this gives {tuple(scores.shape)} and {tuple(target.shape)}"
        )
    own = target[:, None].long()
    rest = scores.scatter(1, own, -torch.inf).logsumexp(1)
    return scores.gather(1, own).squeeze(1) - rest


def _training(trace: Trace, examples: Sequence[int] | np.ndarray | None) -> np.ndarray:
    """Return the indices of training examples, ascending, as of an audit."""
    if examples is None:
        return np.arange(trace.train.n)
    return as_examples(trace, np.sort(np.asarray(examples)))[1]


class _Kernel:
    """Sums over checkpoints: products of both sides' features, and ``1 - p`` of each side.

    Attributes
    ----------
    scores
        ``(example, audit)``.
    slopes
        ``1 - p`` of the training examples, and of the audited ones.
    """

    def __init__(self, training: Maker, audited: Maker, regularization: float, budget: int) -> None:
        self._sides, self._regularization = (training, audited), regularization
        m, n = training.data.n, audited.data.n
        self._item = training.flat.theta.element_size()
        refuse_large((m, n), self._item, budget // 2)
        self._columns, self._budget = training.columns, budget
        self._refuse_singular(m)
        self._in_flight = self._fit(n)
        self._keep = m * self._columns * self._item <= budget * KEPT
        dtype = training.flat.theta.new_empty(0).cpu().numpy().dtype
        self.scores = np.zeros((m, n), dtype)
        self.slopes = np.zeros(m, dtype), np.zeros(n, dtype)

    def _refuse_singular(self, m: int) -> None:
        if self._columns > m and self._regularization == 0:
            raise ValueError(
                f"{m} training examples have a singular matrix of {self._columns} columns; set "
                f"size={m // 2} or less, or regularization= to something positive"
            )

    def _fit(self, n: int) -> int:
        """Return the examples in flight, where the matrices fit."""
        fixed = 8 * (4 * self._columns**2 + 2 * n * self._columns)
        each = _COPIES * self._item * (self._sides[0].params + self._columns)
        share = 1 - _FLIGHT
        if fixed > share * self._budget or each > _FLIGHT * self._budget:
            needed = max(fixed / share, each / _FLIGHT)
            raise MemoryBudgetError(
                f"the matrices of {self._columns} columns, and the gradient of one example, take "
                f"more than {self._budget / 2**20:.0f} MiB; set memory= to {needed / 2**20:.0f} "
                "MiB or more, or a smaller size="
            )
        return min(int(_FLIGHT * self._budget // each), ROWS)

    @torch.no_grad()
    def add(self, theta: np.ndarray, projection: Projection | None, bar: Any) -> None:
        """Add one checkpoint."""
        for side in self._sides:
            side.project = projection
            side.set(theta, None)
        training, audited = self._sides
        kept = []
        gram: Any = 0.0
        for _, phi in self._features(training, self.slopes[0], bar):  # (example, column)
            gram = gram + phi.T.double() @ phi.double()
            if self._keep:
                kept.append(phi)
        other = torch.cat(
            [phi for _, phi in self._features(audited, self.slopes[1], bar)]
        )  # (audit, column)
        solved = self._solve(gram, other)
        again = zip(self._batches(training), kept, strict=True) if kept else None
        for batch, phi in again or self._features(training):
            self.scores[batch] += (phi.double() @ solved).cpu().numpy()

    def _batches(self, side: Maker) -> Iterator[slice]:
        for start in range(0, side.data.n, self._in_flight):
            yield slice(start, min(start + self._in_flight, side.data.n))

    def _features(
        self, side: Maker, slopes: np.ndarray | None = None, bar: Any = None
    ) -> Iterator[tuple[slice, Tensor]]:
        """Yield projected gradients of some examples; add their ``1 - p`` to ``slopes``."""
        for batch in self._batches(side):
            if slopes is not None:
                inputs, target = side.data.take(np.arange(batch.start, batch.stop))
                # 1 - p is the logistic function of minus the log odds
                slopes[batch] += torch.sigmoid(-margin(side.flat(inputs), target)).cpu().numpy()
                bar.update(batch.stop - batch.start)
            yield batch, side.shard(batch)

    def _solve(self, gram: Tensor, other: Tensor) -> Tensor:
        """Return the audited features by the inverse, ``(column, audit)`` float64."""
        gram.diagonal().add_(self._regularization)
        factor, failed = torch.linalg.cholesky_ex(gram)
        pivots = factor.diagonal().square()
        # Rounding leaves pivots of a singular matrix small, of either sign.
        least = len(gram) * torch.finfo(gram.dtype).eps * gram.diagonal().max()
        if bool(failed) or not bool(pivots.min() > least):
            raise ValueError(
                "the training examples' gradients do not span the columns of the projection, so "
                "that their matrix is singular; set a smaller size=, or regularization= to "
                f"something positive ({1e-6 * float(gram.diagonal().mean()):.1g}, say)"
            )
        return torch.cholesky_solve(other.T.double(), factor)
