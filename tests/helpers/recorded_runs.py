"""A small network and what it is trained on."""

from __future__ import annotations

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset

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
