"""Recorded runs of small networks in float64, and the audit's definition by brute force."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import nn, optim
from torch.nn import functional as F
from torch.nn.utils import clip_grad_norm_, clip_grad_value_
from torch.utils.data import TensorDataset
from zarr.storage import MemoryStore

import lkarray as lk
from lkarray.training.optimizers import RULES, kind_named
from tests.helpers.recorded_runs import DTYPE, batches_of, cross_entropy, examples, network

__all__ = ["DTYPE", "audited", "batches_of", "brute_force", "cross_entropy", "recorded"]

OPTIMIZERS: dict[str, Any] = {
    "sgd": lambda p, **o: optim.SGD(p, 0.1, **o),
    "momentum": lambda p, **o: optim.SGD(p, 0.05, momentum=0.9, dampening=0.3, **o),
    "nesterov": lambda p, **o: optim.SGD(p, 0.05, momentum=0.9, nesterov=True, **o),
    "adam": lambda p, **o: optim.Adam(p, 1e-2, **o),
    "amsgrad": lambda p, **o: optim.Adam(p, 1e-2, amsgrad=True, **o),
    "adamw": lambda p, **o: optim.AdamW(p, 1e-2, **o),
    "nadam": lambda p, **o: optim.NAdam(p, 1e-2, **o),
    "nadam decoupled": lambda p, **o: optim.NAdam(p, 1e-2, decoupled_weight_decay=True, **o),
    "rmsprop": lambda p, **o: optim.RMSprop(p, 1e-3, centered=True, **o),
    "rmsprop momentum": lambda p, **o: optim.RMSprop(p, 1e-3, momentum=0.9, **o),
    "adagrad": lambda p, **o: optim.Adagrad(p, 5e-2, lr_decay=0.1, **o),
}

CLIPS: dict[str, Any] = {
    "none": None,
    "norm": lambda parameters: clip_grad_norm_(parameters, 0.15),
    "value": lambda parameters: clip_grad_value_(parameters, 0.02),
}


def audited(n: int = 7, shape: tuple[int, ...] = (6,)) -> TensorDataset:
    """Examples to audit."""
    torch.manual_seed(5)
    inputs = torch.randn(n, *shape, dtype=DTYPE)
    return TensorDataset(inputs, inputs.flatten(1)[:, :3].argmax(1))


def recorded(
    make: Any,
    *,
    store: Any = None,
    clip: Any = None,
    steps: int = 12,
    groups: bool = False,
    schedule: Any = None,
    warm: int = 0,
    model: nn.Module | None = None,
    data: Any = None,
    batches: Any = None,
    **options: Any,
) -> Any:
    """Train, recorded, and return the trace; ``warm`` steps are taken before the recording."""
    model = network() if model is None else model
    data = examples() if data is None else data
    inputs, labels = data.tensors
    parameters: Any = list(model.parameters())
    if groups:
        parameters = [{"params": parameters[:1]}, {"params": parameters[1:], "lr": 3e-3}]
    optimizer = make(parameters)
    scheduler = schedule and schedule(optimizer)

    def update(batch: Any) -> None:
        optimizer.zero_grad()
        cross_entropy(model(inputs[batch]), labels[batch]).mean().backward()
        if clip:
            clip(model.parameters())
        optimizer.step()
        if scheduler:
            scheduler.step()

    plan = batches_of(steps + warm) if batches is None else batches
    for batch in plan[:warm]:
        update(batch)
    store = MemoryStore() if store is None else store
    recorder = lk.record(model, optimizer, data, loss=cross_entropy, store=store, **options)
    with recorder as trace:
        for batch in plan[warm:]:
            with trace.step(batch):
                update(batch)
    return recorder.trace()


class Brute:
    """The audit by forward accumulation: what each example has in every momentum buffer.

    Attributes
    ----------
    influence
        ``(step the example was seen, step it acted, example, audit, param)`` summed over ``param``
        by tensor: ``(seen, acted, example, audit, tensor)``.
    residual
        ``(acted, audit)``.
    path
        ``(acted, audit)``: mean gradient times the step.
    """

    def __init__(self, trace: Any, data: TensorDataset, rule: str, number: Any) -> None:
        steps, n, size = trace.steps, trace.train.n, int(trace.stops[-1])
        tensors = np.repeat(np.arange(len(trace.names)), trace.stops - trace.starts)
        membership = np.eye(len(trace.names))[tensors]  # (param, tensor)
        group = np.asarray(trace.fingerprint.group_of)[tensors]
        divides = RULES[kind_named(trace.fingerprint.optimizer)].divides
        states = [theta for _, theta in trace.states(range(steps + 1))]
        slopes = [gradients(trace, theta, data, number) for theta in states]
        buffers = np.zeros((steps, n, size))  # by the step that the example was seen in
        other = trace.inherited()
        other = np.zeros(size) if other is None else other.copy()
        shape = (steps, steps, n, len(data), len(trace.names))
        self.influence = np.zeros(shape)
        self.residual = np.zeros((steps, len(data)))
        self.path = np.zeros((steps, len(data)))
        for t in range(steps):
            _, mu, s, q, b_n, coupled, decoupled = trace.coefficients[t][group, :7].T
            d = trace.denominator(t)
            s, q, b_n = (v / d if k in divides else v for k, v in (("S", s), ("Q", q), ("N", b_n)))
            batch = trace.batch(t)
            raw = gradients(
                trace, states[t], torch.utils.data.Subset(trace.train_set, batch), trace.loss
            )
            mean, bound = raw.mean(0), trace.clip_bounds[t]
            safe = np.where(mean == 0, 1, mean)
            clip = np.where(mean == 0, 1, np.clip(mean, -bound, bound) / safe)
            clip = clip * trace.clip[t][tensors]
            gbar = slopes[t] if rule == "euler" else (slopes[t] + slopes[t + 1]) / 2
            direct = np.zeros((n, size))
            np.add.at(direct, batch, clip * raw / len(batch))
            buffers *= mu
            buffers[t] += s * direct
            other = mu * other + s * coupled * states[t]
            moved = -q * buffers
            moved[t] -= b_n * direct
            rest = -q * other - b_n * coupled * states[t] - decoupled * states[t]
            np.testing.assert_allclose(
                moved.sum((0, 1)) + rest, states[t + 1] - states[t], rtol=1e-9, atol=1e-13
            )
            for tensor in range(membership.shape[1]):
                here = membership[:, tensor].astype(bool)
                self.influence[:, t, :, :, tensor] = moved[..., here] @ gbar[:, here].T
            self.residual[t] = gbar @ rest
            self.path[t] = gbar @ (states[t + 1] - states[t])


def gradients(trace: Any, theta: np.ndarray, data: Any, number: Any) -> np.ndarray:
    """Gradients of each example alone, by plain autograd, ``(example, param)``."""
    trace.set_parameters(theta)
    rows = []
    for x, y in data:
        output = trace.flat.module(x[None])
        slopes = torch.autograd.grad(
            number(output, torch.as_tensor(y)[None]).sum(),
            trace.flat.leaves,
            materialize_grads=True,
        )
        rows.append(torch.cat([slope.flatten() for slope in slopes]).numpy())
    return np.stack(rows)


def brute_force(
    trace: Any, data: TensorDataset, rule: str = "trapezoid", number: Any = None
) -> Brute:
    """Return the audit's definition, step by step."""
    return Brute(trace, data, rule, number or trace.loss)


def per_example(output: Any, target: Any) -> torch.Tensor:
    """Cross-entropies in the model's precision."""
    return F.cross_entropy(output, target, reduction="none")


def both_gradients(
    trace: Any, state: int, number: Any = None, data: Any = None
) -> tuple[np.ndarray, np.ndarray]:
    """Gradients of training and of audited examples at a state."""
    theta = trace.parameters(state)
    data = audited() if data is None else data
    return (
        gradients(trace, theta, trace.train_set, number or trace.loss),
        gradients(trace, theta, data, number or trace.loss),
    )


def rates(trace: Any, step: int) -> np.ndarray:
    """Learning rate of each parameter."""
    by_group = trace.coefficients[step, :, 0]
    by_tensor = by_group[trace.fingerprint.group_of]
    return np.repeat(by_tensor, trace.stops - trace.starts)


def log_odds(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Margins of each example's own class."""
    p = torch.softmax(output, 1).gather(1, target[:, None]).squeeze(1)
    return torch.log(p / (1 - p))


def brute_hessian(trace: Any, state: int) -> np.ndarray:
    """Hessian of the mean training loss at a state, by plain autograd."""
    inputs, labels = trace.train_set.tensors
    shapes = [p.shape for p in trace.flat.leaves]
    names = dict(trace.flat.module.named_parameters())

    def mean(theta: torch.Tensor) -> torch.Tensor:
        tensors = [p.view(s) for p, s in zip(theta.split([s.numel() for s in shapes]), shapes)]  # noqa: B905
        output = torch.func.functional_call(
            trace.flat.module, dict(zip(names, tensors, strict=True)), (inputs,)
        )
        return cross_entropy(output, labels).mean()

    theta = torch.from_numpy(trace.parameters(state))
    return torch.autograd.functional.hessian(mean, theta).numpy()
