"""`snapshot`: a trace of a network that was trained elsewhere."""

from __future__ import annotations

import numpy as np
import torch
from torch import nn

from lkarray.arguments import checked
from lkarray.nn.batches import Batches, MapDataset
from lkarray.nn.copying import copy_module
from lkarray.nn.losses import LossFunction, per_example_loss
from lkarray.nn.modes import with_gradients
from lkarray.nn.trainable import moving_indices
from lkarray.store.location import StoreLike
from lkarray.training.recording import record
from lkarray.training.trace import Trace, open_trace


@checked()
@with_gradients
def snapshot(
    model: nn.Module,
    train_set: MapDataset,
    *,
    loss: str | LossFunction = "cross_entropy",
    store: StoreLike,
) -> Trace:
    """Return a trace of a model as it is: for networks whose training was not recorded.

    Whatever asks one state of a trace works on it: gradients, their modes, activations, mode
    coefficients. It is a recorded run of one step of plain gradient descent at a learning rate
    of 0, so that its two states, 0 and 1, are the same: an audit of it is of a run in which
    nothing happened.

    Parameters
    ----------
    model
        Any module of float32 or float64 parameters; its copy is used. Frozen parameters
        (``requires_grad`` false) are left out: the trace is of the others.
    train_set
        Examples to ask about: what it was trained on, or others.
    loss
        As for `record`.
    store
        Where the trace goes; the same call opens it again.

    Returns
    -------
    Trace
        With one step, and so two states, which are the same.

    Raises
    ------
    ValueError
        Examples of a batch influence each other (BatchNorm or dropout in train mode); all
        parameters are frozen; or the module holds something that cannot be copied.
    TypeError
        ``model`` is no module.
    FingerprintError
        The store holds a trace of another model, other data or another loss.
    """
    moving = moving_indices(model, None)
    given, model = model, copy_module(model)
    parameters = dict(model.named_parameters())
    moved = [parameters[name] for name in moving]
    optimizer = torch.optim.SGD(moved, lr=0.0)
    device = moved[0].device
    data = Batches(train_set, name="train_set", device=device)
    per_example = per_example_loss(loss).per_example
    with record(model, optimizer, train_set, loss=loss, store=store) as trace:
        for batch in trace.remaining([np.arange(min(2, data.n))]):
            with trace.step(batch):
                for p in moved:  # also of what these examples do not reach
                    p.grad = torch.zeros_like(p)
                inputs, target = data.take(np.asarray(batch))
                output = model(**inputs) if isinstance(inputs, dict) else model(inputs)
                per_example(output, target).mean().backward()
                optimizer.step()
    return open_trace(store, given, train_set, loss=None if isinstance(loss, str) else loss)
