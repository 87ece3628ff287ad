"""Models that other tools fail on: against plain autograd of one example at a time, in float64."""

import threading

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import prune, weight_norm
from torch.utils.checkpoint import checkpoint
from torch.utils.data import TensorDataset

import lkarray as lk
from tests.helpers.hard_models import N, adapted, by_autograd, close, similarities
from tests.helpers.recorded_runs import cross_entropy


class OldStyle(torch.autograd.Function):
    """Without ``setup_context``: torch.func refuses it."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.tanh()

    @staticmethod
    def backward(ctx, slope):
        return slope * (1 - ctx.saved_tensors[0].tanh() ** 2)


class Body(nn.Module):
    """A layer that `how` makes something of, and a linear one after it."""

    def __init__(self, how, width=6):
        super().__init__()
        self.how, self.out = how, nn.Linear(width, 3)
        self.first = LAYERS[how]() if how in LAYERS else nn.Linear(4, width)
        self.scale = nn.Parameter(torch.rand(width))

    def forward(self, x):
        if self.how in ("gru", "lstm"):
            h = self.first(x)[0][:, -1]
        elif self.how == "attention":
            h = F.pad(self.first(x, x, x, need_weights=False)[0].mean(1), (0, 2))
        elif self.how == "encoder":
            h = F.pad(self.first(x).mean(1), (0, 2))
        elif self.how == "transposed":
            h = self.first(x.transpose(1, 2)).mean(2)
        elif self.how in ("bag", "sparse"):
            h = self.first(x) if self.how == "bag" else self.first(x).mean(1)
        elif self.how == "old function":
            h = OldStyle.apply(self.first(x)).mean(1)
        elif self.how == "reentrant":
            h = self.first(x).requires_grad_()
            h = checkpoint(lambda h: torch.tanh(self.scale * h), h, use_reentrant=True).mean(1)
        else:
            h = self.first(x).mean(1)
        return self.out(torch.tanh(h) * self.scale)


LAYERS = {
    "gru": lambda: nn.GRU(4, 6, batch_first=True),
    "lstm": lambda: nn.LSTM(4, 6, batch_first=True),
    "attention": lambda: nn.MultiheadAttention(4, 2, batch_first=True),
    "encoder": lambda: nn.TransformerEncoderLayer(4, 2, 8, dropout=0.0, batch_first=True),
    "transposed": lambda: nn.ConvTranspose1d(4, 6, 3),
    "bag": lambda: nn.EmbeddingBag(9, 6, mode="sum"),
    "sparse": lambda: nn.Embedding(9, 6, sparse=True),
}
HOW = [*LAYERS, "bare", "old function", "reentrant"]


def build(how):
    torch.manual_seed(0)
    model = Body(how).double().eval()
    x = torch.randn(N, 5, 4).double()
    if how in ("bag", "sparse"):
        x = torch.randint(0, 9, (N, 5))
    return model, TensorDataset(x, torch.arange(N) % 3)


@pytest.mark.parametrize("how", HOW)
def test_features__of_models_that_mix_layers(how, tmp_path):
    model, data = build(how)
    expected = by_autograd(model, data)
    store = tmp_path / "t"
    trace = lk.snapshot(model, data, loss=cross_entropy, store=store)
    G = lk.gradient_features(trace, range(N), [0], store=store, dtype="float64")
    close(G["gradient"].values[0], expected)
    lk.gradient_factors(trace, range(N), [0], store=store, dtype="float64")
    P = lk.gradient_features(trace, range(N), [0], store=store, project=8, name="p")
    assert P["gradient"].shape == (1, N, 8)
    close(lk.gradient_similarity(trace, range(N)), similarities(expected))
    close(lk.mean_gradient(trace, [0])[0], expected.mean(0))
    one = lk.gradient_features(trace, range(N), [0], store=store, params="out.*", name="o")
    assert one["gradient"].shape[2] == 21


@pytest.mark.parametrize("how", ["gru", "old function", "bare"])
def test_influence_functions__of_models_that_torch_func_refuses(how, tmp_path):
    model, data = build(how)
    trace = lk.snapshot(model, data, loss=cross_entropy, store=tmp_path / "t")
    options = {"damping": 5.0} if how != "old function" else {"damping": 5.0, "params": "out.*"}
    influences = lk.influence_functions(trace, range(N), **options)
    names = [n for n, _ in model.named_parameters() if how != "old function" or n.startswith("out")]
    values = dict(model.named_parameters())
    x, y = data.tensors
    mean = cross_entropy(model(x), y).mean()
    slopes = torch.autograd.grad(mean, [values[n] for n in names], create_graph=True)
    flat = torch.cat([slope.flatten() for slope in slopes])
    rows = [
        torch.autograd.grad(
            one, [values[n] for n in names], retain_graph=True, materialize_grads=True
        )
        for one in flat
    ]
    H = torch.stack([torch.cat([part.flatten() for part in row]) for row in rows])
    g = by_autograd(model, data)
    if how == "old function":
        asked = [torch.full((p.numel(),), n in names) for n, p in model.named_parameters()]
        g = g[:, torch.cat(asked).numpy()]
    expected = -g @ np.linalg.solve(H.numpy() + 5.0 * np.eye(len(H)), g.T) / N
    close(influences.values, expected, 1e-8)


def test_reentrant_checkpoints__that_lose_gradients_are_named(tmp_path):
    class Lost(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 3)

        def forward(self, x):
            return self.b(checkpoint(self.a, x, use_reentrant=True))

    data = TensorDataset(torch.randn(N, 4), torch.arange(N) % 3)
    with pytest.raises(ValueError, match="use_reentrant=False"):
        lk.snapshot(Lost(), data, store=tmp_path / "t")


# --- modules that deepcopy refuses ---------------


class Keeps(nn.Module):
    def __init__(self, kept):
        super().__init__()
        self.out, self.seen = nn.Linear(4, 3), kept

    def forward(self, x):
        h = self.out(x)
        if isinstance(self.seen, list):
            self.seen[:] = [h]
        elif isinstance(self.seen, dict):
            self.seen["h"] = {"deep": (h,)}
        elif self.seen is None or isinstance(self.seen, torch.Tensor):
            self.seen = h
        return h


class Hook:
    """A hook that keeps what it saw."""

    def __call__(self, module, args, output):
        self.last = output


def uncopyable(name):
    torch.manual_seed(0)
    if name == "weight_norm":
        return nn.Sequential(weight_norm(nn.Linear(4, 3)))
    if name == "spectral_norm":
        return nn.Sequential(nn.utils.spectral_norm(nn.Linear(4, 3)))
    if name == "pruned":
        model = nn.Sequential(nn.Linear(4, 3))
        prune.random_unstructured(model[0], "weight", 0.5)
        return model
    if name == "hook":
        model = nn.Sequential(nn.Linear(4, 3))
        model[0].register_forward_hook(Hook())
        return model
    return Keeps({"tensor": None, "list": [], "dict": {}}[name])


@pytest.mark.filterwarnings("ignore:.*weight_norm.*is deprecated:FutureWarning")
@pytest.mark.parametrize(
    "name", ["weight_norm", "spectral_norm", "pruned", "hook", "tensor", "list", "dict"]
)
def test_copies__of_modules_that_keep_what_they_computed(name, tmp_path):
    model = uncopyable(name).double()
    data = TensorDataset(torch.randn(N, 4).double(), torch.arange(N) % 3)
    model(data.tensors[0])
    model.eval()
    right = cross_entropy(model(data.tensors[0]), data.tensors[1]).detach()
    tree = lk.sample(
        lk.LocalPosterior(model, data, loss=cross_entropy, nbeta=5, gamma=10),
        data,
        sampler=lk.SGLD(1e-5),
        draws=2,
        chains=1,
        store=tmp_path / "s",
        progress=False,
    )
    np.testing.assert_allclose(tree["losses"]["center_loss"], right, rtol=1e-6)
    trace = lk.snapshot(model, data, loss=cross_entropy, store=tmp_path / "t")
    similarity = lk.gradient_similarity(trace, range(N))
    moving, rows = list(model.parameters()), []
    for i in range(N):
        x, y = (part[i : i + 1] for part in data.tensors)
        slopes = torch.autograd.grad(cross_entropy(model(x), y).sum(), moving)
        rows.append(torch.cat([slope.flatten() for slope in slopes]))
    close(similarity, similarities(torch.stack(rows)))


def test_copies__name_what_cannot_be_copied(tmp_path):
    model = nn.Sequential(Keeps([threading.Lock()]))
    data = TensorDataset(torch.randn(N, 4), torch.arange(N) % 3)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    for call in (
        lambda: lk.LocalPosterior(model, data),
        lambda: lk.snapshot(model, data, store=tmp_path / "t"),
        lambda: lk.record(model, optimizer, data, store=tmp_path / "t"),
    ):
        with pytest.raises(ValueError, match=r"its '0\.seen\[0\]' is of a kind .*state_dict\(\)"):
            call()


# --- callers' modes ---------------


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_callers__under_no_grad_and_inference_mode(mode, tmp_path):
    model, data = adapted()
    expected = by_autograd(model, data)
    store = tmp_path / "t"
    with mode():
        held = TensorDataset(*(part.clone() for part in data.tensors))  # inference tensors, perhaps
        trace = lk.snapshot(model, held, loss=cross_entropy, store=store)
        G = lk.gradient_features(trace, range(N), [0], store=store, dtype="float64")
        lk.gradient_factors(trace, held, [0], store=store)
        similar = lk.gradient_similarity(trace, held)
        mean = lk.mean_gradient(trace, [0])
        modes = lk.modes(G.isel(time=0), 2).compute()
        lk.audit(trace, held)
        lk.tracin(trace, held)
        lk.tracin_in_run(trace, held)
        lk.reconstruction(trace, held)
        lk.trak(trace, held, size=3)
        lk.influence_functions(trace, held, damping=3.0)
        lk.shift_modes(trace, modes, held, 0, shift=0.1, radius=0.1, steps=2)
        lk.mode_sensitivity(trace, modes, held, 0)
        lk.gradient_plan(trace)
        posterior = lk.LocalPosterior(model, held, loss=cross_entropy)
        lk.sample(
            posterior.at(model.state_dict()),
            held,
            sampler=lk.SGLD(1e-6),
            draws=2,
            chains=1,
            store=tmp_path / "s",
            progress=False,
        )
    close(G["gradient"].values[0], expected)
    close(similar, similarities(expected))
    close(mean[0], expected.mean(0))


def test_weights__that_are_inference_tensors_are_named(tmp_path):
    data = TensorDataset(torch.randn(N, 4), torch.arange(N) % 3)
    with torch.inference_mode():
        model = nn.Linear(4, 3)
    for call in (
        lambda: lk.LocalPosterior(model, data),
        lambda: lk.snapshot(model, data, store=tmp_path / "t"),
    ):
        with pytest.raises(ValueError, match=r"torch.inference_mode\(\)"):
            call()
