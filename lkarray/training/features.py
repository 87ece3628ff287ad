"""`gradient_features`: gradients of chosen examples along a recorded run, as one tensor."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, replace
from typing import Any

import numpy as np
import xarray as xr
from torch import Tensor

from lkarray import progress as bars
from lkarray import schema
from lkarray import store as store_
from lkarray.arguments import checked
from lkarray.engine.plan import memory_budget
from lkarray.errors import MemoryBudgetError, NonFiniteError
from lkarray.labels import given_coords
from lkarray.nn.batches import MapDataset
from lkarray.nn.features import GradientPlan
from lkarray.nn.losses import identity
from lkarray.nn.modes import with_gradients
from lkarray.schema import EXAMPLE, TENSOR
from lkarray.store.gradients import (
    TensorLayout,
    TensorWriter,
    gradient_group,
    open_gradients,
    whole_gradients,
)
from lkarray.training.choosing import as_steps, as_trace
from lkarray.training.makers import FactorMaker, Maker
from lkarray.training.projection import Projection
from lkarray.training.recorder import Recorder
from lkarray.training.trace import Trace

_SHARD_BYTES = 64 << 20
#: Shards that are held at most: being made, its layers' parts, being written, in Zarr's buffers.
_COPIES = 8
_COMMIT_SECONDS = 5.0


@checked()
@with_gradients
def gradient_features(
    trace: Trace | Recorder,
    examples: MapDataset | Sequence[int] | np.ndarray,
    times: str | Iterable[int] = "epoch",
    *,
    of: str | Callable[[Any, Any], Tensor] = "loss",
    params: str | Iterable[str] | None = None,
    project: int | None = None,
    seed: int = 0,
    preconditioned: bool = False,
    coords: Mapping[str, Any] | None = None,
    store: Any,
    name: str | None = None,
    dtype: str = "float32",
    memory: int | str | None = None,
    progress: bool = False,
) -> xr.Dataset:
    r"""Store the gradients of examples along a run, and return them lazily.

    The gradient-feature tensor of Anonymous 2026, A.6, without the learning rate: that stands
    beside it, and is an option of the contractions.

    Parameters
    ----------
    trace
        What `open_trace` returned, or a finished `record`.
    examples
        A dataset like the training set, or indices into it.
    times
        ``"epoch"``: the first step of each epoch; ``"step"``: every step; or step numbers, where
        the number of steps itself stands for the final parameters.
    of
        ``"loss"``; ``"output"``: every output of the model, which adds a dim ``output`` (of the
        empirical NTK); or a function ``(model output, target) -> (batch,)``.
    params
        Patterns of tensor or module names (``"fc1.*"``); all by default.
    project
        Columns of a random projection of ``param``: see ``lkarray.training.Projection``.
    seed
        Of the projection.
    preconditioned
        Multiply by the square root of the realised preconditioner, ``1 / denominator`` of the
        optimizer (A.2.3, eq. 29), so that inner products are those of its geometry.
    coords
        Labels of the examples: ``{"label": labels}``.
    store
        Where to write: usually the trace's own store.
    name
        Of the tensor: group ``gradients``, or ``gradients_<name>``.
    dtype
        Stored precision, ``"float32"`` or ``"float64"``.
    memory
        Byte budget; ``LKARRAY_MEMORY`` or a quarter of the memory by default.
    progress
        Show a progress bar.

    Returns
    -------
    xarray.Dataset
        ``gradient(time, example, param)``, lazy; on ``time`` the step and ``learning_rate``; on
        ``example`` its index and labels; on ``tensor`` the names, ``start`` and ``stop`` along
        ``param`` (not where it is projected).

    Raises
    ------
    ValueError, SchemaError
        A time is outside the run, a pattern matches nothing, or a label does not fit.
    FingerprintError
        The group holds another tensor.
    DamagedError
        Something of the trace, or of the tensor in that group, is missing or cannot be read.
    MemoryBudgetError
        The budget does not hold the gradients of one example.

    Notes
    -----
    One forward and backward pass of each example at each time (one for each output, with
    ``of="output"``), and ``2 P`` operations for an element of the projection. Memory: eight shards
    of up to 64 MiB. Shards that are stored are not computed again.

    References
    ----------
    - Anonymous 2026, A.6.1, eq. 38; eq. 29: "Path-Integrated Loss-Gradient Kernels".

    Examples
    --------
    >>> import torch, lkarray as lk
    >>> from torch.utils.data import TensorDataset
    >>> _ = torch.manual_seed(0)
    >>> model = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.Tanh(), torch.nn.Linear(3, 2))
    >>> inputs = torch.randn(8, 2)
    >>> data = TensorDataset(inputs, (inputs[:, 0] > 0).long())
    >>> from zarr.storage import MemoryStore
    >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    >>> store = MemoryStore()
    >>> with lk.record(model, optimizer, data, store=store, progress=False) as trace:
    ...     for batch in [[0, 1, 2, 3], [4, 5, 6, 7]]:
    ...         with trace.step(batch):
    ...             optimizer.zero_grad()
    ...             output = model(data.tensors[0][batch])
    ...             torch.nn.functional.cross_entropy(output, data.tensors[1][batch]).backward()
    ...             optimizer.step()
    >>> G = lk.gradient_features(trace, range(4), times=[0, 1], store=store)
    >>> dict(G["gradient"].sizes)
    {'time': 2, 'example': 4, 'param': 17}
    """
    if not callable(of) and of not in ("loss", "output"):
        raise ValueError(f"of must be 'loss', 'output' or a function, not {of!r}")
    source = as_trace(trace)
    steps = as_steps(source, times)
    if preconditioned and (steps[-1] >= source.steps or source.denominator(0) is None):
        raise ValueError(
            "preconditioned=True needs an optimizer that divides by something (Adam, RMSprop, "
            f"Adagrad; this was {source.fingerprint.optimizer}) and steps, not the final parameters"
        )
    projection = None if project is None else Projection(project, seed)
    with bars.showing(progress), bars.busy("preparing gradients"):
        maker = Maker(source, examples, of, params, projection)
    layout = _layout(maker, steps, coords=coords, dtype=dtype, memory=memory, name=name)
    made = {
        "of": identity(of) if callable(of) else of,
        "projection": None if projection is None else asdict(projection),
        "preconditioned": preconditioned,
    }
    layout = replace(layout, attrs={key: value for key, value in made.items() if value})
    fingerprint = _fingerprint(maker, layout) | made
    return _make(maker, layout, fingerprint, store, preconditioned, progress)


@checked()
@with_gradients
def gradient_factors(
    trace: Trace | Recorder,
    examples: MapDataset | Sequence[int] | np.ndarray,
    times: str | Iterable[int] = "epoch",
    *,
    params: str | Iterable[str] | None = None,
    coords: Mapping[str, Any] | None = None,
    store: Any,
    name: str | None = "factors",
    dtype: str = "float32",
    memory: int | str | None = None,
    progress: bool = False,
) -> xr.Dataset:
    """Store loss gradients as factors, from which plain kernels are cheaper (ghost products).

    The gradient of a linear layer's weight by one example's loss is the outer product of
    what comes back and what went in. Inner products of such gradients are products of inner
    products (Anonymous 2026, A.2.8), so that `lkarray.lgk`, `lkarray.plgk` and `lkarray.ips` give
    the same numbers from much less: of LeNet-5, 3,604 numbers for each example instead of 61,706.
    Tensors for which factors are not smaller (convolutions, biases, layers at many positions) are
    stored whole. `gradient_plan` prints which are which.

    Parameters
    ----------
    trace, examples, times, params, coords, store, name, dtype, memory, progress
        As for `gradient_features`.

    Returns
    -------
    xarray.Dataset
        ``factor(time, example, element)``, lazy; on ``part`` the ``start``, ``stop`` and ``role``
        (``dense``, ``in``, ``out``) of each stretch of elements.

    Raises
    ------
    ValueError, SchemaError, FingerprintError, MemoryBudgetError
        As for `gradient_features`.

    References
    ----------
    - Anonymous 2026, A.2.8: "Path-Integrated Loss-Gradient Kernels".
    - Wang et al. 2024: "Data Shapley in one training run", arXiv:2406.11011.
    - docs/methods/kernels.md.
    """
    source = as_trace(trace)
    with bars.showing(progress), bars.busy("preparing gradients"):
        maker = FactorMaker(source, examples, "loss", params, None)
    steps = as_steps(source, times)
    layout = _layout(maker, steps, coords=coords, dtype=dtype, memory=memory, name=name)
    described = {k: v for k, v in layout.coords.items() if v[0] == EXAMPLE} | maker.parts()
    layout = replace(layout, coords=described, variable=schema.FACTOR)
    return _make(maker, layout, _fingerprint(maker, layout), store, False, progress)


@checked()
@with_gradients
def gradient_plan(
    trace: Trace | Recorder, params: str | Iterable[str] | None = None
) -> GradientPlan:
    """Return how each tensor's gradients are made and multiplied; prints as a table.

    Parameters
    ----------
    trace
        What `open_trace` returned, or a finished `record`.
    params
        Patterns of tensor or module names; all by default.

    Returns
    -------
    GradientPlan
        Of each tensor: the form of its gradients, and the numbers that they take. It prints.
    """
    source = as_trace(trace)
    return Maker(source, [0], "loss", params, None).plan


def _fingerprint(maker: Maker, layout: TensorLayout) -> dict[str, Any]:
    """Return what a tensor in the same group must share with this one to be gone on with."""
    trace = repr(sorted(maker.trace.fingerprint.stored().items()))
    return {
        "trace": hashlib.sha256(trace.encode()).hexdigest()[:16],
        "examples": maker.data.identity,
        "index": hashlib.sha256(maker.index.tobytes()).hexdigest()[:16],
        "times": layout.times.tolist(),
        "params": [maker.trace.names[i] for i in maker.tensors],
        "dtype": layout.dtype,
    }


def _make(
    maker: Maker,
    layout: TensorLayout,
    fingerprint: dict[str, Any],
    store: Any,
    preconditioned: bool,
    progress: bool,
) -> xr.Dataset:
    target = store_.as_store(store)
    root = whole_gradients(target, layout.group, fingerprint)
    if root is not None:  # on a read-only disk too
        return open_gradients(root, layout.group)
    with store_.writer_lock(target):
        writer = TensorWriter(target, layout, fingerprint)
        _write(maker, writer, preconditioned, progress)
        store_.finish(writer.root)
    return open_gradients(writer.root, layout.group)


def _layout(
    maker: Maker, steps: np.ndarray, *, coords: Any, dtype: str, memory: Any, name: str | None
) -> TensorLayout:
    if dtype not in ("float32", "float64"):
        raise ValueError(f"dtype must be 'float32' or 'float64', not {dtype!r}")
    trace, n = maker.trace, maker.data.n
    width = (maker.outputs or 1) * max(maker.params, maker.columns)
    item = max(np.dtype(dtype).itemsize, maker.flat.theta.element_size())
    budget = memory_budget(memory)
    rows = min(_SHARD_BYTES, budget // _COPIES) // (width * item)
    if rows < 1:
        needed = _COPIES * width * item
        raise MemoryBudgetError(
            f"the gradient of one example takes {width * item / 2**20:.1f} MiB, and {_COPIES} of "
            f"them are held; set memory= to {needed / 2**20:.0f} MiB or more, or select params="
        )
    if rows > 128:
        rows -= rows % 128
    labels = given_coords(coords, n, dim=EXAMPLE, index=maker.index)
    described: dict[str, tuple[str, np.ndarray]] = {k: (EXAMPLE, v) for k, v in labels.items()}
    if maker.project is None:
        text = np.dtypes.StringDType()
        stops = np.cumsum([stop - start for start, stop in maker.spans])
        starts = np.concatenate(([0], stops[:-1]))
        described |= {
            TENSOR: (TENSOR, np.asarray([trace.names[i] for i in maker.tensors]).astype(text)),
            schema.MODULE.name: (
                TENSOR,
                np.asarray([trace.modules[i] for i in maker.tensors]).astype(text),
            ),
            schema.START.name: (TENSOR, starts.astype(np.int64)),
            schema.STOP.name: (TENSOR, stops.astype(np.int64)),
        }
    rates = np.append(trace.learning_rates, np.nan)[steps]
    return TensorLayout(
        gradient_group(name),
        steps,
        rates,
        n,
        maker.outputs,
        maker.columns,
        min(rows, n),
        dtype,
        described,
        {},
    )


def _write(maker: Maker, writer: TensorWriter, preconditioned: bool, progress: bool) -> None:
    """Compute what is missing, each shard written while the next is computed."""
    layout, trace = writer.layout, maker.trace
    todo = [t for t in range(len(layout.times)) if not writer.done[t].all()]
    count = int((~writer.done).sum())
    last = time.monotonic()
    with (
        ThreadPoolExecutor(1, thread_name_prefix="lkarray-gradients") as executor,
        bars.bar("gradients", total=count, unit="shard", show=progress) as bar,
    ):
        pending: Future[None] | None = None
        states = trace.states(layout.times[todo].tolist())
        try:
            for t, (step, theta) in zip(todo, states, strict=True):
                maker.set(theta, trace.denominator(step) if preconditioned else None)
                for shard in np.flatnonzero(~writer.done[t]).tolist():
                    values = _finite(maker.shard(layout.shards[shard]), layout, shard, step)
                    if pending is not None:
                        pending.result()
                        if time.monotonic() - last > _COMMIT_SECONDS:
                            writer.commit()
                            last = time.monotonic()
                    pending = executor.submit(writer.write, t, shard, values)
                    bar.update()
        finally:  # Ctrl-C keeps the shards that were written
            if pending is not None:
                pending.result()
            writer.commit()


def _finite(made: Tensor, layout: TensorLayout, shard: int, step: int) -> np.ndarray:
    """Return a shard as it is stored; raise where it is not finite."""
    values = made.cpu().numpy()
    bad = ~np.isfinite(values).all(tuple(range(1, values.ndim)))
    if bad.any():
        first = layout.shards[shard].start + int(bad.argmax())
        raise NonFiniteError(f"the gradient of example {first} is not finite at {step}")
    return values.astype(layout.dtype, copy=False)
