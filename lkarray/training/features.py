"""`gradient_features`: gradients of chosen examples along a recorded run, as one tensor."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from fnmatch import fnmatchcase
from functools import partial
from typing import Any, cast

import numpy as np
import torch
import xarray as xr
from torch import Tensor
from torch.utils.data import Subset

from lkarray import progress as bars
from lkarray import schema
from lkarray import store as store_
from lkarray.engine.plan import memory_budget
from lkarray.errors import MemoryBudgetError, NonFiniteError
from lkarray.nn.batches import Batches, Inputs, MapDataset, Target
from lkarray.nn.flat import FlatModel
from lkarray.nn.gradients import ExampleGradients
from lkarray.nn.losses import identity, logits
from lkarray.schema import EXAMPLE, TENSOR
from lkarray.store.gradients import TensorLayout, TensorWriter, gradient_group, open_gradients
from lkarray.training.checking import literal
from lkarray.training.projection import Projection
from lkarray.training.recorder import Recorder
from lkarray.training.trace import Trace

_SHARD_BYTES = 64 << 20
#: Copies of a shard in memory: being made, its layers' parts, being written.
_COPIES = 5
#: Rows of the projection that are made at once.
_PROJECTED = 16384
_COMMIT_SECONDS = 5.0


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

    The gradient-feature tensor of PLGK A.6, without the learning rate: that stands beside it,
    and is an option of the contractions.

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
    MemoryBudgetError
        The budget does not hold the gradients of one example.

    Notes
    -----
    One forward and backward pass of each example at each time (one for each output, with
    ``of="output"``), and ``2 P`` operations for an element of the projection. Memory: five shards
    of up to 64 MiB. Shards that are stored are not computed again.
    """
    if dtype not in ("float32", "float64"):
        raise ValueError(f"dtype must be 'float32' or 'float64', not {dtype!r}")
    if not callable(of) and of not in ("loss", "output"):
        raise ValueError(f"of must be 'loss', 'output' or a function, not {of!r}")
    source = as_trace(trace)
    steps = as_steps(source, times)
    if preconditioned and (steps[-1] >= source.steps or source.denominator(0) is None):
        raise ValueError(
            "preconditioned=True needs an optimizer that divides by something (Adam, RMSprop, "
            f"Adagrad; this was {source.mark['optimizer']}) and steps, not the final parameters"
        )
    projection = None if project is None else Projection(project, seed)
    maker = _Maker(source, examples, of, params, projection)
    layout = _layout(maker, steps, coords=coords, dtype=dtype, memory=memory, name=name)
    fingerprint = {
        "trace": hashlib.sha256(repr(sorted(source.mark.items())).encode()).hexdigest()[:16],
        "examples": maker.data.identity,
        "index": hashlib.sha256(maker.index.tobytes()).hexdigest()[:16],
        "times": steps.tolist(),
        "of": identity(of) if callable(of) else of,
        "params": [source.names[i] for i in maker.tensors],
        "projection": None if projection is None else asdict(projection),
        "preconditioned": preconditioned,
        "dtype": dtype,
    }
    target = store_.as_store(store)
    with store_.writer_lock(target):
        writer = TensorWriter(target, layout, fingerprint)
        _write(maker, writer, preconditioned, progress)
        store_.finish(writer.root)
    return open_gradients(writer.root, layout.group)


def as_trace(trace: Trace | Recorder) -> Trace:
    """Return a trace, opened if it is a recorder that has finished."""
    if isinstance(trace, Recorder):
        return trace.trace()
    if not isinstance(trace, Trace):
        raise TypeError(
            f"trace must come from lk.open_trace or lk.record, not {type(trace).__name__}"
        )
    return trace


def as_steps(trace: Trace, times: str | Iterable[int]) -> np.ndarray:
    """Return step numbers: of ``"epoch"``, of ``"step"``, or those given, checked."""
    if isinstance(times, str):
        if times not in ("epoch", "step"):
            raise ValueError(f"times must be 'epoch', 'step' or a list of steps, not {times!r}")
        return trace.epochs if times == "epoch" else np.arange(trace.steps)
    steps = np.asarray(list(times))
    if steps.ndim != 1 or not steps.size or steps.dtype.kind not in "iu":
        raise ValueError("times must be a list of integers, at least one")
    if steps.min() < 0 or steps.max() > trace.steps or (np.diff(steps) <= 0).any():
        raise ValueError(
            f"times must ascend within 0 to {trace.steps} (the state after the last step)"
        )
    return steps.astype(np.int64)


def as_examples(
    trace: Trace, examples: MapDataset | Sequence[int] | np.ndarray
) -> tuple[Batches, np.ndarray]:
    """Return examples and their index: a dataset's, or those at indices of the training set."""
    device = trace.flat.device
    if isinstance(examples, (np.ndarray, list, tuple, range)) and not isinstance(
        examples[0] if len(examples) else 0, tuple
    ):
        index = np.asarray(examples)
        n = trace.train.n
        if index.ndim != 1 or not index.size or index.dtype.kind not in "iu":
            raise ValueError("examples must be a dataset, or a list of indices of the training set")
        if index.min() < 0 or index.max() >= n or len(np.unique(index)) < len(index):
            raise ValueError(f"examples must be distinct indices from 0 to {n - 1}")
        subset = Subset(cast(Any, trace.train_set), index.tolist())
        return Batches(subset, name="examples", device=device), index.astype(np.int64)
    batches = Batches(cast(MapDataset, examples), name="examples", device=device)
    return batches, np.arange(batches.n)


def select(trace: Trace, params: str | Iterable[str] | None) -> list[int]:
    """Return which tensors some patterns of tensor or module names mean."""
    if params is None:
        return list(range(len(trace.names)))
    chosen: set[int] = set()
    for pattern in [params] if isinstance(params, str) else params:
        found = {
            i
            for i, names in enumerate(zip(trace.names, trace.modules, strict=True))
            if any(fnmatchcase(name, pattern) for name in names)
        }
        if not found:
            raise ValueError(f"params: {pattern!r} matches none of {trace.names}")
        chosen |= found
    return sorted(chosen)


class _Maker:
    """Makes shards of a tensor: gradients of some examples at the weights that are set.

    Attributes
    ----------
    data, index
        The examples, and their labels along ``example``.
    tensors
        Which of the trace's tensors, in their order.
    outputs
        Number of the model's outputs, ``None`` where one number is differentiated.
    columns
        Length of ``param`` as it is stored.
    """

    def __init__(
        self, trace: Trace, examples: Any, of: Any, params: Any, project: Projection | None
    ) -> None:
        self.trace, self.project = trace, project
        self.data, self.index = as_examples(trace, examples)
        self.tensors = select(trace, params)
        names = [trace.names[i] for i in self.tensors]
        self.flat = FlatModel(trace.flat.module, trainable=[literal(name) for name in names])
        probe = self.data.take(np.arange(2) % self.data.n)
        self.outputs, numbers = _numbers(of, trace, self.flat, probe)
        self._engines = [ExampleGradients(self.flat, number, probe) for number in numbers]
        self.params = self.flat.theta.shape[1]
        self.columns = self.params if project is None else project.size
        # A selection's own places, by those in the whole vector.
        self.spans = [(int(trace.starts[i]), int(trace.stops[i])) for i in self.tensors]
        self._scale: Tensor | None = None

    def set(self, theta: np.ndarray, denominator: np.ndarray | None) -> None:
        """Take the weights of one time, and the preconditioner that gradients are scaled by."""
        values = torch.from_numpy(theta)
        parameters = dict(self.flat.module.named_parameters())
        for name, start, stop in zip(
            self.trace.names, self.trace.starts, self.trace.stops, strict=True
        ):
            p = parameters[name]
            p.data.copy_(values[start:stop].view(p.shape))
        if denominator is not None:
            parts = [denominator[start:stop] for start, stop in self.spans]
            self._scale = torch.from_numpy(np.concatenate(parts)).to(self.flat.device).rsqrt()

    def shard(self, rows: slice) -> Tensor:
        """Return gradients ``(example, [output,] param)`` of some examples."""
        inputs, target = self.data.take(np.arange(rows.start, rows.stop))
        parts = [self._finish(e.gradients(inputs, target)) for e in self._engines]
        return parts[0] if self.outputs is None else torch.stack(parts, 1)

    def _finish(self, gradients: Tensor) -> Tensor:
        if self._scale is not None:
            gradients *= self._scale
        if self.project is None:
            return gradients
        out = gradients.new_zeros(len(gradients), self.project.size)
        column = 0
        for start, stop in self.spans:
            for a in range(start, stop, _PROJECTED):
                b = min(a + _PROJECTED, stop)
                signs = torch.from_numpy(self.project.rows(a, b)).to(gradients)
                out += gradients[:, column : column + b - a] @ signs
                column += b - a
        return out


def _numbers(
    of: Any, trace: Trace, flat: FlatModel, probe: tuple[Inputs, Target]
) -> tuple[int | None, list[Callable[[Any, Any], Tensor]]]:
    """Return what is differentiated: one number, or one for each output of the model."""
    if callable(of):
        return None, [of]
    if of == "loss":
        return None, [trace.loss]
    with torch.no_grad():
        found = logits(flat(probe[0]))
    if found.ndim != 2:
        raise ValueError(
            f"of='output' needs outputs (batch, output), and the model gives {tuple(found.shape)}; "
            "pass a function of (output, target) that gives (batch,)"
        )
    count = found.shape[1]
    return count, [partial(_output, c) for c in range(count)]


def _output(index: int, output: Any, target: Any) -> Tensor:
    return logits(output)[:, index]


def _layout(
    maker: _Maker, steps: np.ndarray, *, coords: Any, dtype: str, memory: Any, name: str | None
) -> TensorLayout:
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
    labels = schema.sample_coords(coords, n, dim=EXAMPLE, index=maker.index)
    described: dict[str, tuple[str, np.ndarray]] = {k: (EXAMPLE, v) for k, v in labels.items()}
    if maker.project is None:
        text = np.dtypes.StringDType()
        stops = np.cumsum([stop - start for start, stop in maker.spans])
        starts = np.concatenate(([0], stops[:-1]))
        described |= {
            TENSOR: (TENSOR, np.asarray([trace.names[i] for i in maker.tensors]).astype(text)),
            schema.MODULE.name: (
                TENSOR, np.asarray([trace.modules[i] for i in maker.tensors]).astype(text)
            ),
            schema.START.name: (TENSOR, starts.astype(np.int64)),
            schema.STOP.name: (TENSOR, stops.astype(np.int64)),
        }  # fmt: skip
    rates = np.append(trace.learning_rates, np.nan)[steps]
    return TensorLayout(
        gradient_group(name), steps, rates, n, maker.outputs, maker.columns, min(rows, n), dtype,
        described, {},
    )  # fmt: skip


def _write(maker: _Maker, writer: TensorWriter, preconditioned: bool, progress: bool) -> None:
    """Compute what is missing, each shard written while the next is computed."""
    layout, trace = writer.layout, maker.trace
    todo = [t for t in range(len(layout.times)) if not writer.done[t].all()]
    count = int((~writer.done).sum())
    last = time.monotonic()
    with (
        ThreadPoolExecutor(1, thread_name_prefix="lkarray-gradients") as executor,
        bars.bar("gradients", total=count, unit="shard", show=progress) as bar,
    ):
        pending = None
        states = trace.states(layout.times[todo].tolist())
        for t, (step, theta) in zip(todo, states, strict=True):
            maker.set(theta, trace.denominator(step) if preconditioned else None)
            for shard in np.flatnonzero(~writer.done[t]).tolist():
                values = maker.shard(layout.shards[shard]).cpu().numpy()
                bad = ~np.isfinite(values).all(tuple(range(1, values.ndim)))
                if bad.any():
                    first = layout.shards[shard].start + int(bad.argmax())
                    raise NonFiniteError(f"the gradient of example {first} is not finite at {step}")
                if pending is not None:
                    pending.result()
                    if time.monotonic() - last > _COMMIT_SECONDS:
                        writer.commit()
                        last = time.monotonic()
                pending = executor.submit(writer.write, t, shard, values.astype(layout.dtype))
                bar.update()
        if pending is not None:
            pending.result()
        writer.commit()
