"""Audits: exact for every optimizer, against forward accumulation by brute force."""

import numpy as np
import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from torch import nn, optim
from zarr.storage import MemoryStore

import lkarray as lk
from tests.helpers.audited_runs import (
    CLIPS,
    OPTIMIZERS,
    audited,
    batches_of,
    brute_force,
    cross_entropy,
    recorded,
)
from tests.helpers.grids import in_turn
from tests.helpers.recorded_runs import DTYPE, examples


def momentum_schedule(optimizer):
    return optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=40, cycle_momentum=True)


SCHEDULES = {
    "none": None,
    "step": lambda o: optim.lr_scheduler.StepLR(o, 3, 0.7),
    "cycle": momentum_schedule,
}


def closes(trace, audit, tolerance=1e-10, **options):
    """Influences and residual add up to the integral, which plain autograd finds too."""
    expected = brute_force(trace, audited(), **options)
    scale = np.abs(expected.path).sum(0)
    whole = audit["total"] + audit["residual"]
    assert (np.abs(whole - expected.path.sum(0)) <= tolerance * scale).all()
    assert (np.abs(audit["path"] - expected.path.sum(0)) <= tolerance * scale).all()
    np.testing.assert_allclose(
        audit["influence"], expected.influence.sum((0, 1, 4)), rtol=1e-9, atol=1e-10 * scale.max()
    )
    np.testing.assert_allclose(
        audit["residual"], expected.residual.sum(0), rtol=1e-9, atol=1e-10 * scale.max()
    )
    assert audit.attrs["closure"] < tolerance


@pytest.mark.parametrize(("name", "clip"), in_turn(OPTIMIZERS, CLIPS))
def test_audit__is_what_forward_accumulation_gives(name, clip):
    decay = 0.1 if "adamw" in name or "decoupled" in name else 0.02
    trace = recorded(
        lambda p: OPTIMIZERS[name](p, weight_decay=decay), clip=CLIPS[clip], groups=True
    )
    audit = lk.audit(trace, audited())
    closes(trace, audit)
    assert audit["influence"].dims == ("example", "audit")
    assert audit.attrs["complete"]
    assert (audit["residual"] != 0).all()


@settings(max_examples=25, phases=[Phase.explicit, Phase.reuse, Phase.generate])
@given(
    name=st.sampled_from(sorted(OPTIMIZERS)),
    clip=st.sampled_from(sorted(CLIPS)),
    schedule=st.sampled_from(sorted(SCHEDULES)),
    decay=st.sampled_from([0.0, 0.03]),
    groups=st.booleans(),
    warm=st.sampled_from([0, 3]),
    size=st.integers(1, 20),
    replacement=st.booleans(),
    every=st.sampled_from([1, 1, 4]),
    seed=st.integers(0, 2**16),
)
def test_audit__closes_on_random_runs(
    name, clip, schedule, decay, groups, warm, size, replacement, every, seed
):
    if schedule == "cycle" and name in ("adagrad", "rmsprop", "sgd"):
        schedule = "step"  # these have no momentum to cycle
    rng = np.random.default_rng(seed)
    torch.manual_seed(seed)
    width = int(rng.integers(2, 6))
    act = nn.Tanh() if seed % 2 else nn.ReLU()
    model = nn.Sequential(nn.Linear(6, width), act, nn.Linear(width, 3)).to(DTYPE)
    draw = (
        (lambda: rng.integers(0, 50, size))
        if replacement
        else (lambda: rng.choice(50, size, replace=False))
    )
    batches = [draw() for _ in range(9)] + [draw()[: max(size // 2, 1)]]
    trace = recorded(
        lambda p: OPTIMIZERS[name](p, weight_decay=decay),
        clip=CLIPS[clip],
        model=model,
        groups=groups,
        schedule=SCHEDULES[schedule],
        warm=warm,
        batches=batches,
        every=every,
    )
    closes(trace, lk.audit(trace, audited()))


def test_audit__euler_is_the_first_order_rule():
    trace = recorded(OPTIMIZERS["nadam"])
    audit = lk.audit(trace, audited(), rule="euler")
    closes(trace, audit, rule="euler")
    assert audit.attrs["mre"] > 3 * lk.audit(trace, audited()).attrs["mre"]


def test_audit__error_is_of_third_order_in_a_step():
    errors = []
    for rate in (0.08, 0.04):
        trace = recorded(lambda p, rate=rate: optim.SGD(p, rate), steps=8)
        errors.append(lk.audit(trace, audited()).attrs["mre"])
    assert 6 < errors[0] / errors[1] < 10  # 2 ** 3: as many steps, each half as long


# --- rules, strides, targets --------------------------------------------------------------------


def path_by_hand(trace, data, nodes, weights, stride=1):
    """Integrate along straight stretches of the path by plain autograd."""
    from tests.helpers.audited_runs import gradients

    total = np.zeros(len(data))
    for a in range(0, trace.steps, stride):
        b = min(a + stride, trace.steps)
        start, stop = trace.parameters(a), trace.parameters(b)
        gbar = sum(
            w * gradients(trace, start + node * (stop - start), data, trace.loss)
            for node, w in zip(nodes, weights, strict=True)
        )
        total += gbar @ (stop - start)
    return total


@pytest.mark.parametrize(
    ("options", "nodes", "weights"),
    [
        ({"supersample": 2}, (0, 0.5, 1), (0.25, 0.5, 0.25)),
        ({"rule": "simpson"}, (0, 0.5, 1), (1 / 6, 4 / 6, 1 / 6)),
        ({"rule": "midpoint"}, (0.5,), (1,)),
        ({"rule": "midpoint", "supersample": 2}, (0.25, 0.75), (0.5, 0.5)),
        ({"stride": 5}, (0, 1), (0.5, 0.5)),
    ],
)
def test_audit__rules_and_strides(options, nodes, weights):
    trace = recorded(OPTIMIZERS["adam"])
    audit = lk.audit(trace, audited(), **options)
    expected = path_by_hand(trace, audited(), nodes, weights, options.get("stride", 1))
    np.testing.assert_allclose(audit["total"] + audit["residual"], expected, rtol=1e-9)
    path_only = lk.reconstruction(trace, audited(), **options)
    np.testing.assert_allclose(path_only["path"], expected, rtol=1e-9)
    np.testing.assert_allclose(path_only["reconstruction"], audit["reconstruction"], rtol=1e-9)
    assert path_only.attrs["lc"] == pytest.approx(audit.attrs["lc"], abs=1e-9)


def test_audit__simpson_and_supersampling_are_more_accurate():
    trace = recorded(OPTIMIZERS["adam"])
    plain, twice, simpson = (
        lk.audit(trace, audited(), **options).attrs["mre"]
        for options in ({}, {"supersample": 2}, {"rule": "simpson"})
    )
    assert twice < plain / 3
    assert simpson < plain / 20


def test_audit__predictions_of_every_output():
    trace = recorded(OPTIMIZERS["adamw"])
    audit = lk.audit(trace, audited(), target="prediction")
    assert audit["influence"].dims == ("example", "audit", "output")
    for k in range(3):
        number = lambda output, target, k=k: output[:, k]  # noqa: E731
        expected = brute_force(trace, audited(), number=number)
        np.testing.assert_allclose(
            audit["influence"][..., k], expected.influence.sum((0, 1, 4)), rtol=1e-8, atol=1e-12
        )
        np.testing.assert_allclose(audit["residual"][:, k], expected.residual.sum(0), rtol=1e-8)
        alone = lk.audit(trace, audited(), target=k)
        np.testing.assert_allclose(alone["influence"], audit["influence"][..., k], rtol=1e-12)
    own = lk.audit(trace, audited(), target="logit")
    label = audited().tensors[1].numpy()
    np.testing.assert_allclose(own["change"], audit["change"].values[np.arange(7), label])
    assert audit.attrs["closure"] < 1e-10


def test_audit__of_an_activation_inside():
    trace = recorded(OPTIMIZERS["adam"])
    audit = lk.audit(
        trace, audited(), target=lambda hidden, target: hidden.square().sum(1), module="1"
    )
    number = lambda output, target: hidden[0].square().sum(1)  # noqa: E731
    hidden = []
    trace.flat.module[1].register_forward_hook(
        lambda m, a, out: hidden.__setitem__(slice(None), [out])
    )
    expected = brute_force(trace, audited(), number=number)
    np.testing.assert_allclose(
        audit["influence"], expected.influence.sum((0, 1, 4)), rtol=1e-8, atol=1e-13
    )
    last = lk.audit(
        trace,
        audited(),
        target=lambda h, t: h.square().sum(1),
        module="1",
        groups={"param": "tensor"},
    )
    assert (last["influence"].sel(layer="2.weight") == 0).all()


# --- groups -----------------------------------------------------------------------------------


def test_audit__groups_of_everything_at_once():
    trace = recorded(OPTIMIZERS["nesterov"], steps=10)
    full = brute_force(trace, audited()).influence
    labels = examples().tensors[1].numpy()
    audit = lk.audit(
        trace,
        audited(),
        groups={"example": labels, "param": {"in": "0.*", "out": "2.*"}, "time": "epoch"},
    )
    assert audit["influence"].dims == ("group", "audit", "layer", "epoch")
    assert audit["layer"].values.tolist() == ["in", "out"]
    seen = full.sum(1)
    for e, (a, b) in enumerate(((0, 4), (4, 8), (8, 10))):
        for c in range(3):
            for layer, tensors in enumerate(([0, 1], [2, 3])):
                expected = seen[a:b][:, labels == c][..., tensors].sum((0, 1, 3))
                got = audit["influence"].sel(group=c)[:, layer, e]
                np.testing.assert_allclose(got, expected, rtol=1e-9, atol=1e-13)
    assert audit.attrs["closure"] < 1e-10


def test_audit__credit_acted_completes_each_window():
    trace = recorded(lambda p: OPTIMIZERS["momentum"](p, weight_decay=0.01), steps=12, warm=2)
    brute = brute_force(trace, audited())
    audit = lk.audit(trace, audited(), groups={"time": [0, 3, 7, 12]}, credit="acted")
    assert audit["residual"].dims == ("audit", "window")
    for w, (a, b) in enumerate(((0, 3), (3, 7), (7, 12))):
        got = audit["influence"][..., w]
        np.testing.assert_allclose(
            got, brute.influence[:, a:b].sum((0, 1, 4)), rtol=1e-8, atol=1e-13
        )
        whole = got.sum("example") + audit["residual"][:, w]
        np.testing.assert_allclose(whole, brute.path[a:b].sum(0), rtol=1e-9)
    assert audit.attrs["closure"] < 1e-10


def test_audit__credit_acted_forgets_what_momentum_has_forgotten():
    trace = recorded(lambda p: optim.SGD(p, 0.05, momentum=0.01), steps=24)
    brute = brute_force(trace, audited())
    audit = lk.audit(trace, audited(), groups={"time": range(0, 24, 8)}, credit="acted")
    got = audit["influence"][..., 2]
    np.testing.assert_allclose(got, brute.influence[:, 16:].sum((0, 1, 4)), rtol=1e-8, atol=1e-15)


def test_audit__overlapping_groups_only_when_asked():
    trace = recorded(OPTIMIZERS["adam"])
    whole = lk.audit(trace, audited())["influence"]
    groups = {
        "example": {"even": range(0, 50, 2), "low": range(10)},
        "param": {"all": "*", "w": "*weight"},
    }
    with pytest.raises(ValueError, match="'even' and 'low' overlap, .*overlap=True"):
        lk.audit(trace, audited(), groups=groups)
    audit = lk.audit(trace, audited(), groups=groups, overlap=True)
    assert not audit.attrs["complete"]
    assert np.isnan(audit.attrs["mre"])
    both = audit["influence"].sel(layer="all")
    np.testing.assert_allclose(both.sel(group="even"), whole[::2].sum("example"), rtol=1e-9)
    np.testing.assert_allclose(both.sel(group="low"), whole[:10].sum("example"), rtol=1e-9)
    windows = {"early": (0, 8), "late": (4, 12)}
    with pytest.raises(ValueError, match="'early' and 'late' overlap"):
        lk.audit(trace, audited(), groups={"time": windows})
    timed = lk.audit(trace, audited(), groups={"time": windows}, overlap=True)["influence"]
    seen = brute_force(trace, audited()).influence.sum((1, 4))
    np.testing.assert_allclose(timed.sel(window="late"), seen[4:].sum(0), rtol=1e-8, atol=1e-13)
    np.testing.assert_allclose(timed.sel(window="early"), seen[:8].sum(0), rtol=1e-8, atol=1e-13)


@pytest.mark.parametrize("name", ["momentum", "nesterov", "adam", "nadam"])
def test_audit__of_some_steps_is_complete_with_the_momentum_before(name):
    trace = recorded(lambda p: OPTIMIZERS[name](p, weight_decay=0.01))
    audit = lk.audit(trace, audited(), steps=(4, 9))
    brute = brute_force(trace, audited())
    np.testing.assert_allclose(
        audit["influence"], brute.influence[4:, 4:9].sum((0, 1, 4)), rtol=1e-7, atol=1e-12
    )
    whole = audit["total"] + audit["residual"]
    np.testing.assert_allclose(whole, brute.path[4:9].sum(0), rtol=1e-8)
    assert audit["epoch"].values.tolist() == [1, 2]


def test_audit__of_some_examples_and_parameters():
    trace = recorded(OPTIMIZERS["amsgrad"], clip=CLIPS["value"], every=4)
    whole = lk.audit(trace, audited(), groups={"param": "module"})["influence"]
    some = lk.audit(trace, audited(), examples=[30, 2, 17])
    assert some["example"].values.tolist() == [2, 17, 30]
    np.testing.assert_allclose(
        some["influence"], whole.sum("layer").sel(example=[2, 17, 30]), rtol=1e-9
    )
    last = lk.audit(trace, audited(), params="2.*")
    np.testing.assert_allclose(last["influence"], whole.sel(layer="2"), rtol=1e-9, atol=1e-14)
    for audit, reason in ((some, "training examples"), (last, "parameters")):
        assert not audit.attrs["complete"]
        assert f"some {reason} are left out" in audit.attrs["incomplete"]
        assert np.isnan(audit.attrs["mre"])
        assert np.isnan(audit.attrs["closure"])
        part = audit["influence"].sum("example") + audit["residual"]
        expected = np.corrcoef(part, audit["change"])[0, 1]
        assert audit.attrs["lc"] == pytest.approx(expected, abs=1e-9)


def test_audit__reconstruction_over_epochs():
    trace = recorded(OPTIMIZERS["adam"], steps=12)
    audit = lk.audit(trace, audited())
    brute = brute_force(trace, audited())
    for e, stop in enumerate((4, 8, 12)):
        np.testing.assert_allclose(audit["reconstruction"][e], brute.path[:stop].sum(0), rtol=1e-9)
        trace.set(stop)
        inputs, labels = audited().tensors
        with torch.no_grad():
            after = cross_entropy(trace.flat(inputs), labels)
            trace.set(0)
            before = cross_entropy(trace.flat(inputs), labels)
        np.testing.assert_allclose(audit["epoch_change"][e], (after - before).numpy(), rtol=1e-9)
    np.testing.assert_allclose(audit["epoch_change"][-1], audit["change"])


# --- other layers -------------------------------------------------------------------------------


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(9, 4)
        self.rnn, self.norm, self.head = (
            nn.GRU(4, 5, batch_first=True),
            nn.LayerNorm(5),
            nn.Linear(5, 3),
        )

    def forward(self, x):
        return self.head(self.norm(self.rnn(self.embed(x))[0][:, -1]))


def test_audit__of_layers_without_factors():
    torch.manual_seed(0)
    tokens = torch.randint(0, 9, (40, 6))
    data = torch.utils.data.TensorDataset(tokens, tokens[:, 0] % 3)
    trace = recorded(
        OPTIMIZERS["adam"],
        model=Recurrent().to(DTYPE),
        data=data,
        steps=5,
        batches=batches_of(5, 40, 8),
    )
    seen = torch.utils.data.TensorDataset(tokens[:5] % 7, tokens[:5, 1] % 3)
    audit = lk.audit(trace, seen)
    expected = brute_force(trace, seen)
    np.testing.assert_allclose(
        audit["influence"], expected.influence.sum((0, 1, 4)), rtol=1e-8, atol=1e-12
    )


def test_audit__of_convolutions_in_float32():
    torch.manual_seed(0)
    images = torch.randn(64, 1, 8, 8)
    data = torch.utils.data.TensorDataset(images, (images[:, 0, 0, 0] > 0).long())
    model = nn.Sequential(
        nn.Conv2d(1, 4, 3),
        nn.ReLU(),
        nn.Conv2d(4, 6, 3, stride=2),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(24, 20),
        nn.ReLU(),
        nn.Linear(20, 3),
    )
    trace = recorded(OPTIMIZERS["adam"], model=model, data=data, batches=batches_of(40, 64, 16))
    seen = torch.utils.data.TensorDataset(images[:9] * 0.9, data.tensors[1][:9])
    audit = lk.audit(trace, seen)
    assert audit.attrs["closure"] < 1e-5
    assert audit.attrs["lc"] > 0.999
    expected = lk.audit(trace, seen, groups={"param": "tensor"})
    np.testing.assert_allclose(
        expected["influence"].sum("layer"), audit["influence"], rtol=2e-3, atol=1e-5
    )


def test_audit__does_not_depend_on_stores_that_keep_few_states():
    options = {"make": OPTIMIZERS["rmsprop momentum"], "clip": CLIPS["value"]}
    every_state, some = (recorded(**options, every=k, store=MemoryStore()) for k in (1, 5))
    a, b = (lk.audit(trace, audited())["influence"] for trace in (every_state, some))
    np.testing.assert_allclose(a, b, rtol=1e-9)
    c = lk.audit(some, audited(), memory="80 MiB")["influence"]
    np.testing.assert_array_equal(b, c)
