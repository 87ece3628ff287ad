"""Gradients by plain autograd of one example at a time, and models with frozen parameters."""

import copy

import numpy as np
import torch
from torch import nn
from torch.utils.data import TensorDataset

from tests.helpers.recorded_runs import cross_entropy

N = 10


def by_autograd(model, data, loss=cross_entropy):
    """The definition, by whole backward passes of one example."""
    model = copy.deepcopy(model)
    moving, rows = [p for p in model.parameters() if p.requires_grad], []
    for i in range(N):
        x, y = (part[i : i + 1].clone() for part in data.tensors)
        for p in moving:
            p.grad = None
        loss(model(x), y).sum().backward()
        parts = [torch.zeros_like(p) if p.grad is None else p.grad.to_dense() for p in moving]
        rows.append(torch.cat([part.flatten() for part in parts]))
    return torch.stack(rows).numpy()


def close(values, expected, tolerance=1e-9):
    np.testing.assert_allclose(values, expected, rtol=0, atol=tolerance * np.abs(expected).max())


def similarities(G):
    return np.asarray(G) @ np.asarray(G).T


class Adapted(nn.Module):
    """A frozen layer with a low-rank change, as LoRA has it."""

    def __init__(self):
        super().__init__()
        self.base, self.out = nn.Linear(4, 6), nn.Linear(6, 3)
        self.base.requires_grad_(False)
        self.down, self.up = nn.Linear(4, 2, bias=False), nn.Linear(2, 6, bias=False)

    def forward(self, x):
        return self.out(torch.tanh(self.base(x) + self.up(self.down(x))))


def adapted():
    torch.manual_seed(0)
    data = TensorDataset(torch.randn(N, 4).double(), torch.arange(N) % 3)
    return Adapted().double(), data
