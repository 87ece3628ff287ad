"""`record`: a training run, kept step by step while the user's own loop trains."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.optim import Optimizer

from lkarray import progress as bars
from lkarray.arguments import checked
from lkarray.nn.batches import MapDataset, check_workers
from lkarray.nn.losses import LossFunction
from lkarray.nn.modes import with_gradients
from lkarray.store.location import StoreLike
from lkarray.training.recorder import Recorder


@checked()
@with_gradients
def record(
    model: nn.Module,
    optimizer: Optimizer,
    train_set: MapDataset,
    *,
    loss: str | LossFunction = "cross_entropy",
    store: StoreLike,
    scheduler: Any = None,
    every: int = 1,
    check_every: int = 100,
    num_workers: int | None = None,
    progress: bool = True,
) -> Recorder:
    """Record a training run while your own loop trains.

    ::

        with lk.record(model, optimizer, train_set, store="train.zarr") as trace:
            for indices in batches:
                with trace.step(indices):
                    optimizer.zero_grad()
                    F.cross_entropy(model(inputs[indices]), labels[indices]).backward()
                    optimizer.step()

    Each step keeps the parameters before it, the examples of its batch, and what the optimizer
    really did: preconditioner, momentum, learning rate, clipping, both kinds of weight decay, read
    from its state. So a trace answers questions that were not thought of while training.

    Parameters
    ----------
    model
        Any module of float32 or float64 parameters on one device.
    optimizer
        ``SGD``, ``Adam``, ``AdamW``, ``NAdam``, ``RMSprop`` or ``Adagrad`` of ``torch.optim``; for
        another, add to ``lkarray.training.RULES``. Frozen parameters that it holds
        (``requires_grad`` false) are left out of the trace.
    train_set
        Map-style dataset of ``(input, target)``: the items that are trained on, as they are
        trained on.
    loss
        A name or a callable, as for `lkarray.LocalPosterior`: its mean over the batch must be
        what the loop's backward pass differentiates.
    store
        Path, URL or Zarr store.
    scheduler
        A learning-rate scheduler, so that `Recorder.remaining` can set it back too. The rates
        themselves are read from the optimizer.
    every
        Keep the parameters of each ``every``-th step only; those between are computed again when
        they are asked for, to the same bits on the same device. The optimizer's state is kept with
        them.
    check_every
        Steps from one check to the next, of what is recorded against the model: the gradient
        applied must be the mean of per-example gradients, and the update what the optimizer's
        rule says. A check costs about one forward and backward pass; the first two steps have one.
    num_workers
        Processes that read the training set's items for these checks; as in `lkarray.sample`.
    progress
        Whether to show a bar over that reading when it takes longer than two seconds.

    Returns
    -------
    Recorder
        A context manager; enter it before the first step.

    Raises
    ------
    TypeError
        The optimizer is not known, or an argument is of the wrong type.
    ValueError
        The optimizer has parameters that the model lacks, parameters are on several devices, or
        examples of a batch influence each other. In `Recorder.step`: the step breaks one of the
        rules there.
    FingerprintError
        The store has a trace of other code, weights, data or settings.
    DamagedError
        Something of the trace in the store is missing, or not what was committed; it is left as it
        is.
    LockedError
        Another process writes to the store.

    Notes
    -----
    Memory: two blocks of steps (16 MiB of parameters each, or one step of a larger model), and as
    much again for an optimizer with a preconditioner. Disk: the parameters of a step (twice
    that with a preconditioner), divided by ``every``. A killed run leaves a trace up to the last
    commit (each block, at least every 30 s); run the loop again, over `Recorder.remaining` or
    from its beginning, to go on.

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
    >>> trace.steps
    2
    """
    with bars.showing(progress):
        return Recorder(
            model,
            optimizer,
            train_set,
            loss,
            store,
            scheduler,
            every,
            check_every,
            check_workers(num_workers),
        )
