"""A small run of real training steps, recorded."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset

import lkarray as lk

DTYPE = torch.float64


def cross_entropy(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Per-example losses in the parameters' own precision."""
    return F.cross_entropy(output, target, reduction="none")


def network(seed: int = 3) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3)).to(DTYPE)


def examples(n: int = 50) -> TensorDataset:
    torch.manual_seed(1)
    inputs = torch.randn(n, 6, dtype=DTYPE)
    return TensorDataset(inputs, inputs[:, :3].argmax(1))


def batches_of(steps: int, n: int = 50, size: int = 16) -> list[np.ndarray]:
    """Batches of epochs without replacement, the last of each smaller."""
    out: list[np.ndarray] = []
    epoch = 0
    while len(out) < steps:
        order = np.random.default_rng(epoch).permutation(n)
        out += [order[a : a + size] for a in range(0, n, size)]
        epoch += 1
    return out[:steps]


@pytest.fixture
def train() -> Callable[..., tuple[nn.Module, Any]]:
    """Train the small network, recorded; returns it and the recorder."""

    def call(
        store: Any,
        *,
        make: Any = None,
        steps: int = 22,
        clip: Any = None,
        resume: bool = False,
        scheduler: Any = None,
        model: nn.Module | None = None,
        groups: bool = False,
        **options: Any,
    ) -> tuple[nn.Module, Any]:
        model = network() if model is None else model
        data = examples()
        inputs, labels = data.tensors
        parameters: Any = list(model.parameters())
        if groups:
            parameters = [{"params": parameters[:2]}, {"params": parameters[2:], "lr": 2e-3}]
        optimizer = (make or (lambda p: torch.optim.Adam(p, 1e-2)))(parameters)
        schedule = scheduler and scheduler(optimizer)
        recorder = lk.record(
            model, optimizer, data, loss=cross_entropy, store=store, scheduler=schedule, **options
        )
        with recorder as trace:
            batches = batches_of(steps)
            for batch in trace.remaining(batches) if resume else batches:
                with trace.step(batch):
                    optimizer.zero_grad()
                    cross_entropy(model(inputs[batch]), labels[batch]).mean().backward()
                    if clip:
                        clip(model.parameters())
                    optimizer.step()
                if schedule:
                    schedule.step()
        return model, recorder

    return call
