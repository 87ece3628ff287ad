"""Per-example gradients of models that use their layers otherwise for some inputs."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lkarray.nn.flat import FlatModel
from lkarray.nn.gradients import ExampleGradients, NotFactoredError

torch_double = torch.float64


class Tokens(nn.Module):
    """Two experts; a token goes to one of them."""

    def __init__(self):
        super().__init__()
        self.e = nn.ModuleList([nn.Linear(5, 3), nn.Linear(5, 3)])

    def forward(self, x):
        out, first = x.new_zeros(*x.shape[:-1], 3), x[..., 0] <= 0
        for rows, expert in zip((first, ~first), self.e, strict=True):
            if rows.any():
                out[rows] = expert(x[rows])
        return out.mean(1) if out.ndim == 3 else out


class Dispatched(nn.Module):
    """Experts with slots that tokens are sent to and fetched from by products with masks."""

    def __init__(self):
        super().__init__()
        self.e = nn.ModuleList([nn.Linear(5, 3), nn.Linear(5, 3)])

    def forward(self, x):
        tokens = x.flatten(0, 1)
        choice = F.one_hot((tokens[:, 0] > 0).long(), 2).to(x)
        place = (choice.cumsum(0) - 1) * choice
        slots = F.one_hot(place.long(), len(tokens)).to(x) * choice[..., None]  # (t, e, slot)
        sent = torch.einsum("tes,td->esd", slots, tokens)
        came = torch.stack([expert(sent[k]) for k, expert in enumerate(self.e)])
        return torch.einsum("tes,eso->to", slots, came).view(*x.shape[:2], 3).mean(1)


class Summed(Dispatched):
    """The same by a sum in place of a product."""

    def forward(self, x):
        tokens = x.flatten(0, 1)
        order = torch.argsort(tokens[:, 0], stable=True)
        fetch = F.one_hot(order, len(tokens)).to(x)
        came = self.e[0](fetch @ tokens)
        return (fetch.T[..., None] * came[None]).sum(1).view(*x.shape[:2], 3).mean(1)


class Sorted(nn.Module):
    """Rows are put in another order before a layer, and back after it."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(5, 4), nn.Linear(4, 3)

    def forward(self, x):
        x = x.mean(1)
        order = torch.argsort(x[:, 0], stable=True)
        return self.b(torch.tanh(self.a(x[order])))[torch.argsort(order)]


class Listed(Sorted):
    """The same, by a list in Python."""

    def forward(self, x):
        x = x.mean(1)
        order = torch.argsort(x[:, 0], stable=True)
        h = self.b(torch.tanh(self.a(x[order])))
        return torch.stack([h[i] for i in torch.argsort(order).tolist()])


class Kept(Sorted):
    """The same, by writing to places."""

    def forward(self, x):
        x = x.mean(1)
        order = torch.argsort(x[:, 0], stable=True)
        h = self.b(torch.tanh(self.a(x[order])))
        return torch.zeros_like(h).index_copy(0, order, h)


class Mixed(Sorted):
    def forward(self, x):
        x = x.mean(1)
        order = torch.argsort(x[:, 0], stable=True)
        h = self.b(torch.tanh(self.a(x[order])))
        return F.one_hot(torch.argsort(order), len(x)).to(h) @ h


class ReadTwice(nn.Module):
    """A weight that is read a second time for some inputs: by a branch, or by a mask."""

    def __init__(self, how):
        super().__init__()
        self.a, self.b, self.how = nn.Linear(5, 4), nn.Linear(4, 4), how

    def forward(self, x):
        x = x.mean(1)
        h = torch.tanh(self.a(x))
        out = self.b(h)
        large = x[:, :1] > 0
        if self.how == "mask":
            return out + large * (h @ self.b.weight)
        if large.any():
            out = out + large * (self.b(out) if self.how == "call" else h @ self.b.weight)
        return out


class Skipped(nn.Module):
    """A layer that some batches do without, and one that as many rows go through as asked for."""

    def __init__(self, some):
        super().__init__()
        self.a, self.b, self.some = nn.Linear(5, 3), nn.Linear(3, 3), some

    def forward(self, x):
        x = x.mean(1)
        h = torch.tanh(self.a(x))
        large = x[:, 0] > 0
        count = int(large.sum())
        if self.some and bool(large[:count].all()):
            return torch.cat([self.b(h[:count]), h[count:]])
        return torch.where(large[:, None], self.b(h), h) if count else h


class Recurrent(nn.Module):
    """As many calls of a layer as the inputs ask for."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(5, 4), nn.Linear(4, 4)

    def forward(self, x):
        x = x.mean(1)
        h = self.a(x)
        for k in range(1 + int((x[:, 0] > 0).any())):
            h = torch.where((x[:, :1] > 0) | (k == 0), torch.tanh(self.b(h)), h)
        return h


MODELS = {
    "tokens": Tokens,
    "dispatched": Dispatched,
    "summed": Summed,
    "sorted": Sorted,
    "listed": Listed,
    "kept": Kept,
    "mixed": Mixed,
    "read by a branch": lambda: ReadTwice("branch"),
    "read by a mask": lambda: ReadTwice("mask"),
    "called by a branch": lambda: ReadTwice("call"),
    "skipped": lambda: Skipped(False),
    "some rows": lambda: Skipped(True),
    "recurrent": Recurrent,
}


def loss(output, target):
    return F.cross_entropy(output, target, reduction="none")


def alone(model, x, y):
    rows = []
    for i in range(len(x)):
        slopes = torch.autograd.grad(
            loss(model(x[i : i + 1]), y[i : i + 1]).sum(),
            list(model.parameters()),
            allow_unused=True,
            materialize_grads=True,
        )
        rows.append(torch.cat([slope.flatten() for slope in slopes]))
    return torch.stack(rows)


def data(positive, tokens=6, n=8):
    """Examples of which the first three are alike: sorted, and all for the first expert."""
    torch.manual_seed(0)
    x = torch.randn(n, tokens, 5, dtype=torch_double)
    size = torch.rand(n, tokens, dtype=torch_double).sort(0).values + 0.1
    sign = -torch.ones(n, tokens, dtype=torch_double)
    sign.view(-1)[3 * tokens :][torch.randperm((n - 3) * tokens)[:positive]] = 1
    x[..., 0] = sign * (size.flip(0))
    return x, torch.arange(n) % 3


@pytest.mark.parametrize("positive", [5, 18])
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("tokens", [1, 6])
def test_gradients__of_layers_that_see_other_rows_than_in_the_probe(name, positive, tokens):
    x, y = data(positive * tokens // 6, tokens)
    torch.manual_seed(1)
    model = MODELS[name]().double().eval()
    engine = ExampleGradients(FlatModel(model), loss, (x[:2], y[:2]))
    for rows in (torch.arange(8).flip(0), torch.tensor([6, 7])):
        expected = alone(model, x[rows], y[rows])
        gradients = engine.gradients(x[rows], y[rows])
        torch.testing.assert_close(gradients, expected, rtol=1e-9, atol=1e-12)
        assert not gradients.requires_grad
        try:
            features = engine.features(x[rows], y[rows])
        except NotFactoredError as error:
            engine.materialise(error.names)
            features = engine.features(x[rows], y[rows])
        products = features.products(features)
        torch.testing.assert_close(products, expected @ expected.T, rtol=1e-9, atol=1e-12)


def test_gradients__a_probe_alone_would_be_wrong_about_them():
    """The same models without a look at each batch: what is compared does depend on it."""
    x, y = data(24)
    model = Sorted().double().eval()
    engine = ExampleGradients(FlatModel(model), loss, (x[:2], y[:2]))
    expected = alone(model, x, y)
    by_layers = engine._layers
    assert by_layers.run(x, y).untrusted == {"a.weight", "a.bias", "b.weight", "b.bias"}
    assert not by_layers.left_out
    torch.testing.assert_close(engine.gradients(x, y), expected)


def test_gradients__plain_models_take_one_backward_pass_a_batch(monkeypatch):
    """No second pass, and nothing one by one, for models that move no rows."""
    passes = []
    original = torch.autograd.grad
    model = (
        nn.Sequential(
            nn.Conv2d(2, 4, 3),
            nn.BatchNorm2d(4),
            nn.ReLU(inplace=True),
            nn.MaxPool2d(2),
            nn.Flatten(),
            nn.Linear(16, 8),
            nn.GELU(),
            nn.LayerNorm(8),
            nn.Linear(8, 3),
        )
        .double()
        .eval()
    )
    x, y = torch.randn(9, 2, 6, 6, dtype=torch_double), torch.arange(9) % 3
    engine = ExampleGradients(FlatModel(model), loss, (x[:2], y[:2]))
    monkeypatch.setattr(
        torch.autograd, "grad", lambda *a, **k: passes.append(1) or original(*a, **k)
    )
    engine.gradients(x, y)
    engine.features(x[:4], y[:4])
    assert len(passes) == 2
