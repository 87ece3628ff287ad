"""Models that other tools fail on: against plain autograd of one example at a time, in float64."""

import copy
import threading

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import prune, weight_norm
from torch.utils.checkpoint import checkpoint
from torch.utils.data import Dataset, TensorDataset

import lkarray as lk

N = 10


def cross_entropy(output, target):
    return F.cross_entropy(output, target, reduction="none")


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


# --- models and losses that change what they are given ---------------


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


# --- frozen parameters ---------------


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


# --- messages ---------------


def test_record__a_loop_that_never_steps(tmp_path):
    model, data = adapted()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    recorder = lk.record(model, optimizer, data, loss=cross_entropy, store=tmp_path / "t")
    with pytest.raises(ValueError, match="never reached trace.step"), recorder:
        pass
    with pytest.raises(KeyError), recorder:  # what the body raised is not hidden
        raise KeyError


@pytest.mark.parametrize("kind", ["tuple", "list", "dict"])
def test_step__given_the_batch_itself(kind, tmp_path):
    model, data = adapted()
    x, y = (part[:2] for part in data.tensors)
    given = {"tuple": (x, y), "list": [x, y], "dict": {"x": x}}[kind]
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    recorder = lk.record(model, optimizer, data, loss=cross_entropy, store=tmp_path / "t")
    with (
        pytest.raises(ValueError, match="pass indices of the batch"),
        recorder as trace,
        trace.step(given),
    ):
        pass


def test_weights__from_files_that_are_no_state_dicts(tmp_path):
    model, data = (
        nn.Sequential(nn.Linear(4, 3)),
        TensorDataset(torch.randn(N, 4), torch.arange(N) % 3),
    )
    (tmp_path / "junk.pt").write_bytes(b"no weights at all")
    torch.save(model, tmp_path / "whole.pt")
    torch.save({"model": model.state_dict(), "epoch": 3}, tmp_path / "nested.pt")
    torch.save(nn.Linear(2, 2).state_dict(), tmp_path / "other.pt")
    torch.save(torch.zeros(3), tmp_path / "tensor.pt")
    posterior = lk.LocalPosterior(model, data)
    for name in ("junk", "whole", "nested", "other", "tensor"):
        path = tmp_path / f"{name}.pt"
        with pytest.raises(ValueError, match=rf"{name}\.pt .*state_dict\(\)"):
            posterior.at(path)
        with pytest.raises(ValueError, match=rf"checkpoints\['a'\]: .*{name}\.pt"):
            lk.sample(
                posterior,
                data,
                sampler=lk.SGLD(1e-6),
                draws=2,
                chains=1,
                store=tmp_path / "s",
                checkpoints={"a": path},
                progress=False,
            )
    assert not (tmp_path / "s").exists()


@pytest.mark.parametrize("given", [{"0.weight": torch.zeros(2)}, "model.pt", None])
def test_traces__of_what_is_no_module(given, tmp_path):
    data = TensorDataset(torch.randn(N, 4), torch.arange(N) % 3)
    for call in (
        lambda: lk.snapshot(given, data, store=tmp_path / "t"),
        lambda: lk.open_trace(tmp_path / "t", given, data),
        lambda: lk.LocalPosterior(given, data),
    ):
        message = "load_state_dict" if given else "must be a torch.nn.Module"
        with pytest.raises(TypeError, match=message):
            call()
