"""Per-example gradients against ``vmap(grad)``: all of them, and their inner products alone.

LeNet-5 (61,706 parameters) on batches of 256: every gradient as one row of a matrix. A
three-layer MLP of width 512 (784-512-512-10): the 256 x 256 inner products, without any gradient
being made. Both sides of a pair run interleaved in one process; medians; ratios above 1 mean that
lkarray is faster.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from functools import partial

import torch
from torch import nn
from torch.func import functional_call, grad, vmap
from torch.nn import functional as F

from lkarray.nn import FlatModel, per_example_loss
from lkarray.nn.gradients import ExampleGradients

Gradients = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def lenet() -> nn.Module:
    """LeNet-5 for 28 x 28 images, with ReLU and max pooling."""
    torch.manual_seed(0)
    return nn.Sequential(
        *(nn.Conv2d(1, 6, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(6, 16, 5), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten()),
        *(nn.Linear(400, 120), nn.ReLU(), nn.Linear(120, 84), nn.ReLU(), nn.Linear(84, 10)),
    )


def mlp() -> nn.Module:
    """784-512-512-10."""
    torch.manual_seed(0)
    layers = nn.Linear(784, 512), nn.ReLU(), nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 10)
    return nn.Sequential(nn.Flatten(), *layers)


def functional(model: nn.Module) -> Gradients:
    """Return the peer: ``vmap(grad)``, its gradients joined to rows."""
    values = {name: p.detach() for name, p in model.named_parameters()}

    def loss(values: dict[str, torch.Tensor], x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(functional_call(model, values, (x[None],)), y[None])

    each = vmap(grad(loss), (None, 0, 0))
    return lambda x, y: torch.cat([g.flatten(1) for g in each(values, x, y).values()], 1)


def pair(ours: Callable[[], object], theirs: Callable[[], object], repeats: int) -> list[float]:
    """Return median seconds of both, interleaved, after one run each to warm up."""
    times: list[list[float]] = [[], []]
    for repeat in range(repeats + 1):
        for work, kept in zip((ours, theirs), times, strict=True):
            began = time.perf_counter()
            work()
            if repeat:
                kept.append(time.perf_counter() - began)
    return [statistics.median(kept) for kept in times]


def measure(batch: int, repeats: int) -> list[tuple[str, float, float, float, float]]:
    """Return rows: what, seconds of lkarray, seconds of the peer, bar, largest relative error."""
    torch.manual_seed(1)
    x, y = torch.randn(batch, 1, 28, 28), torch.arange(batch) % 10
    out = torch.empty(batch, sum(p.numel() for p in lenet().parameters()))
    rows = []
    for name, model, bar in (("LeNet-5, gradients", lenet(), 1.0), ("MLP 512, products", mlp(), 2)):
        ours = ExampleGradients(FlatModel(model), per_example_loss("cross_entropy"), (x[:2], y[:2]))
        theirs = functional(model)
        works = (
            (partial(ours.gradients, x, y, out), partial(theirs, x, y))
            if bar == 1
            else (partial(products, ours, x, y), partial(dense_products, theirs, x, y))
        )
        ours, expected = (work() for work in works)
        error = float((ours - expected).abs().max() / expected.abs().max())
        rows.append((name, *pair(*works, repeats), bar, error))
        print(ours.plan)
    return rows


def products(ours: ExampleGradients, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Return the inner products of a batch's gradients without the gradients."""
    features = ours.features(x, y)
    return features.products(features)


def dense_products(theirs: Gradients, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Return the same from the gradients."""
    gradients = theirs(x, y)
    return gradients @ gradients.T


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--small", action="store_true")
    small = parser.parse_args().small
    rows = measure(16 if small else 256, 1 if small else 15)
    print(f"\n{'':20}  lkarray  vmap(grad)  ratio    bar  error")
    for name, ours, theirs, bar, error in rows:
        print(
            f"{name:20}  {1e3 * ours:4.1f} ms  {1e3 * theirs:7.1f} ms  {theirs / ours:5.2f}  "
            f"{bar:5.1f}  {error:.0e}"
        )
        assert error < 1e-4


if __name__ == "__main__":
    main()
