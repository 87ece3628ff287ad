"""Models and losses that change what they are given leave the data as it is."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import Dataset, TensorDataset

import lkarray as lk
from tests.helpers.hard_models import N, by_autograd, close, similarities
from tests.helpers.recorded_runs import cross_entropy


class Changing(nn.Module):
    def __init__(self, how="sub"):
        super().__init__()
        self.out, self.how, self.calls = nn.Linear(4, 3), how, 0

    def forward(self, x):
        self.calls += 1
        if self.how == "sub":
            x.sub_(0.5)
        elif self.how == "data":
            x.data.mul_(2)
        elif self.how == "relu":
            x = F.relu_(x)
        elif self.how == "seldom" and x.max() > 2:  # not the first examples
            x.clamp_(max=2)
        elif self.how == "late" and self.calls > 30:
            x.clamp_(max=0.5)
        return self.out(x)


class Keyed(nn.Module):
    def __init__(self):
        super().__init__()
        self.out = nn.Linear(4, 3)

    def forward(self, x):
        return self.out(x.mul_(2))


class Own(Dataset):
    """Rows of tensors that it keeps."""

    def __init__(self, x, y, keyed=False):
        self.x, self.y, self.keyed = x, y, keyed

    def __len__(self):
        return len(self.x)

    def __getitem__(self, i):
        return {"x": self.x[i], "labels": self.y[i]} if self.keyed else (self.x[i], self.y[i])


def changing_loss(output, target):
    target.sub_(1)
    return F.cross_entropy(output, target, reduction="none")


@pytest.mark.parametrize("batch_size", [None, 4])
@pytest.mark.parametrize("how", ["sub", "data", "relu", "seldom", "late", "own", "keyed", "loss"])
def test_sample__of_models_that_change_their_input(how, batch_size, tmp_path):
    torch.manual_seed(0)
    x, y = torch.randn(N, 4), torch.arange(N) % 3
    x[6, 0] = 4.0
    model = Keyed() if how == "keyed" else Changing("sub" if how in ("own", "loss") else how)
    loss = cross_entropy
    if how == "loss":
        y, loss = y + 1, changing_loss
    data = Own(x, y, how == "keyed") if how in ("own", "keyed") else TensorDataset(x, y)
    kept, labels = x.clone(), y.clone()
    right = loss(model(x.clone()), y.clone()).detach()
    posterior = lk.LocalPosterior(model, data, loss=loss, nbeta=1e-3, gamma=1e3)
    tree = lk.sample(
        posterior,
        data,
        sampler=lk.SGLD(1e-12),
        draws=25,
        chains=2,
        batch_size=batch_size,
        store=tmp_path / "s",
        progress=False,
        chains_per_device=1,
    )
    assert torch.equal(x, kept)
    assert torch.equal(y, labels)
    if how != "late":
        np.testing.assert_allclose(tree["losses"]["center_loss"], right, atol=1e-6)
        whole = np.broadcast_to(right, tree["losses"]["loss"].shape)
        np.testing.assert_allclose(tree["losses"]["loss"], whole, atol=1e-4)


@pytest.mark.parametrize("how", ["sub", "relu", "seldom"])
def test_gradients__of_models_that_change_their_input(how, tmp_path):
    torch.manual_seed(0)
    model = Changing(how).double()
    x = torch.randn(N, 4).double()
    x[6, 0] = 4.0
    data = TensorDataset(x, torch.arange(N) % 3)
    kept, expected = x.clone(), by_autograd(model, data)
    trace = lk.snapshot(model, data, loss=cross_entropy, store=tmp_path / "t")
    close(lk.gradient_similarity(trace, data), similarities(expected))
    G = lk.gradient_features(trace, data, [0], store=tmp_path / "t", dtype="float64")
    close(G["gradient"].values[0], expected)
    modes = lk.modes(G.isel(time=0), 2).compute()
    lk.audit(trace, data)
    lk.trak(trace, data, size=3)
    lk.influence_functions(trace, data, damping=3.0)
    lk.mode_sensitivity(trace, modes, data, 0)
    lk.activations(trace, data, [0], module="out")
    lk.shift_modes(trace, modes, data, 0, shift=0.1, radius=0.1, steps=2, loss=0.1)
    assert torch.equal(x, kept)


def test_sequences__that_are_their_own_target_and_are_changed(tmp_path):
    class Language(nn.Module):
        def __init__(self):
            super().__init__()
            self.e, self.o = nn.Embedding(9, 6), nn.Linear(6, 9)

        def forward(self, ids):
            return self.o(self.e(ids.clamp_(max=4)))

    torch.manual_seed(0)
    ids, model = torch.randint(0, 9, (N, 6)), Language()
    logits = model(ids.clone())
    right = F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
    posterior = lk.LocalPosterior(model, list(ids), loss="next_token_mean", nbeta=1e-3, gamma=1e3)
    tree = lk.sample(
        posterior,
        list(ids),
        sampler=lk.SGLD(1e-12),
        draws=3,
        chains=1,
        store=tmp_path / "s",
        progress=False,
    )
    expected = right.view(N, 5).mean(1).detach()
    np.testing.assert_allclose(tree["losses"]["center_loss"], expected, atol=1e-6)
