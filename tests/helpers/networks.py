"""A small classifier, its data, and a sample of it in memory."""

from __future__ import annotations

import torch
import xarray as xr
from torch import nn
from torch.utils.data import TensorDataset
from zarr.storage import MemoryStore

import lkarray as lk


def classification(n: int = 40, features: int = 6, classes: int = 3) -> TensorDataset:
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(n, features, generator=generator)
    return TensorDataset(inputs, inputs[:, :classes].argmax(1))


def small_network(features: int = 6, classes: int = 3) -> nn.Module:
    torch.manual_seed(2)
    return nn.Sequential(nn.Linear(features, 5), nn.Tanh(), nn.Linear(5, classes))


def in_memory(
    posterior: lk.LocalPosterior, observed: object, *, step_size: float = 1e-4, draws: int = 2
) -> xr.DataTree:
    """`lk.sample` of one short chain into memory."""
    return lk.sample(
        posterior,
        observed,
        sampler=lk.SGLD(step_size=step_size),
        chains=1,
        draws=draws,
        store=MemoryStore(),
        progress=False,
    )


def convolutional():
    torch.manual_seed(4)
    body = nn.Conv2d(1, 4, 3), nn.Tanh(), nn.Flatten(), nn.Linear(64, 20), nn.Tanh()
    return nn.Sequential(*body, nn.Linear(20, 3)).double()
