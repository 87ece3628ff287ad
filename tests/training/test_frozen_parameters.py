"""Frozen parameters, and those that some batches do not reach."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

import lkarray as lk
from tests.helpers.hard_models import N, adapted, by_autograd, close, similarities
from tests.helpers.recorded_runs import cross_entropy


def train(model, data, optimizer, store, batches, stop=None):
    x, y = data.tensors
    with lk.record(model, optimizer, data, loss=cross_entropy, store=store) as trace:
        for i, batch in enumerate(trace.remaining(batches)):
            if i == stop:
                break
            with trace.step(batch):
                optimizer.zero_grad()
                cross_entropy(model(x[batch]), y[batch]).mean().backward()
                optimizer.step()
    return trace


@pytest.mark.parametrize("kind", [torch.optim.Adam, torch.optim.SGD])
def test_record__leaves_frozen_parameters_out_and_resumes(kind, tmp_path):
    batches = [np.arange(i, i + 5) for i in (0, 5, 2, 3, 1)]

    def groups(model):
        return [
            {"params": model.base.parameters(), "lr": 5.0},
            {"params": [p for p in model.parameters() if p.requires_grad]},
        ]

    model, data = adapted()
    train(model, data, kind(groups(model), 1e-2), tmp_path / "a", batches)
    again, _ = adapted()
    train(again, data, kind(groups(again), 1e-2), tmp_path / "b", batches, stop=2)
    again, _ = adapted()
    train(again, data, kind(groups(again), 1e-2), tmp_path / "b", batches)
    for p, q in zip(model.parameters(), again.parameters(), strict=True):
        assert torch.equal(p, q)
    trace = lk.open_trace(tmp_path / "b", model, data, loss=cross_entropy)
    assert trace.names == ["out.weight", "out.bias", "down.weight", "up.weight"]
    np.testing.assert_array_equal(trace.learning_rates, 1e-2)
    audit = lk.audit(trace, range(N))
    assert audit.attrs["closure"] < 1e-9
    assert audit.attrs["lc"] > 0.99
    G = lk.gradient_features(trace, range(N), [5], store=tmp_path / "b", dtype="float64")
    close(G["gradient"].values[0], by_autograd(model, data))


def test_snapshot__leaves_frozen_parameters_out(tmp_path):
    model, data = adapted()
    trace = lk.snapshot(model, data, loss=cross_entropy, store=tmp_path / "t")
    close(lk.gradient_similarity(trace, range(N)), similarities(by_autograd(model, data)))
    with pytest.raises(ValueError, match="no trainable parameters"):
        lk.snapshot(model.requires_grad_(False), data, loss=cross_entropy, store=tmp_path / "u")


def test_record__parameters_frozen_or_freed_on_the_way(tmp_path):
    model, data = adapted()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    x, y = data.tensors
    with lk.record(model, optimizer, data, loss=cross_entropy, store=tmp_path / "t") as trace:
        with trace.step([0, 1]):
            optimizer.zero_grad()
            cross_entropy(model(x[:2]), y[:2]).mean().backward()
            optimizer.step()
        model.base.requires_grad_(True)
        message = r"step 1: requires_grad of \['base.bias', 'base.weight'\] was changed"
        with pytest.raises(ValueError, match=message), trace.step([0, 1]):
            pass
        model.base.requires_grad_(False)
        model.base.weight.grad = torch.ones_like(model.base.weight)
        with pytest.raises(ValueError, match="frozen but have a gradient"), trace.step([0, 1]):
            optimizer.step()


def test_record__parameters_that_some_batches_do_not_reach(tmp_path):
    class Either(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 3), nn.Linear(4, 3)

        def forward(self, x):
            large = x[:, :1] > 0
            out = self.a(x)
            return out + large * self.b(x) if large.any() else out

    torch.manual_seed(0)
    x = torch.randn(N, 4).double()
    x[:, 0] = torch.tensor([-1.0] * 5 + [1.0] * 5)
    data = TensorDataset(x, torch.arange(N) % 3)
    batches = [np.arange(5), np.arange(5, 10), np.arange(5)]
    model = Either().double()
    train(model, data, torch.optim.SGD(model.parameters(), 0.1), tmp_path / "a", batches)
    audit = lk.audit(lk.open_trace(tmp_path / "a", model, data, loss=cross_entropy), range(N))
    assert audit.attrs["closure"] < 1e-9
    model = Either().double()
    with pytest.raises(ValueError, match=r"'b.weight', 'b.bias'.*set .grad to zeros"):
        train(model, data, torch.optim.Adam(model.parameters()), tmp_path / "b", batches)
