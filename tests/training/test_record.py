"""Recording: what a trace holds is what the optimizer did, and it can be taken again."""

import subprocess
import sys
import textwrap
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn, optim
from torch.nn.utils import clip_grad_norm_, clip_grad_value_
from zarr.storage import MemoryStore

import lkarray as lk
from lkarray import errors
from tests.helpers.recorded_runs import batches_of, cross_entropy, examples, network

OPTIMIZERS = {
    "sgd": lambda p: optim.SGD(p, 0.1, weight_decay=0.01),
    "momentum": lambda p: optim.SGD(p, 0.05, momentum=0.9, dampening=0.3),
    "nesterov": lambda p: optim.SGD(p, 0.05, momentum=0.9, nesterov=True),
    "adam": lambda p: optim.Adam(p, 1e-2, weight_decay=0.02),
    "amsgrad": lambda p: optim.Adam(p, 1e-2, amsgrad=True),
    "adamw": lambda p: optim.AdamW(p, 1e-2, weight_decay=0.1),
    "nadam": lambda p: optim.NAdam(p, 1e-2, weight_decay=0.1, decoupled_weight_decay=True),
    "rmsprop": lambda p: optim.RMSprop(p, 1e-2, centered=True),
    "rmsprop momentum": lambda p: optim.RMSprop(p, 1e-3, momentum=0.9, weight_decay=0.01),
    "adagrad": lambda p: optim.Adagrad(p, 5e-2, lr_decay=0.1),
}
CLIPS = {
    "none": None,
    "norm": lambda parameters: clip_grad_norm_(parameters, 0.15),
    "value": lambda parameters: clip_grad_value_(parameters, 0.02),
}


def flat(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()]).numpy()


def opened(store):
    return lk.open_trace(store, network(), examples(), loss=cross_entropy)


def retrace(trace):
    """Take every step again from what is stored alone, by the update of docs/methods/adjoint.md."""
    divides = {"Adam": "Q", "AdamW": "Q", "NAdam": "QN", "RMSprop": "S", "Adagrad": "S"}
    divides = divides.get(trace.fingerprint.optimizer, "")
    b = np.zeros(trace.stops[-1])
    per_tensor = np.repeat(np.arange(len(trace.names)), trace.stops - trace.starts)
    group = np.asarray(trace.fingerprint.group_of)[per_tensor]
    for step, theta in trace.states(range(trace.steps)):
        trace.set_parameters(theta)
        inputs, target = trace.train.take(trace.batch(step))
        trace.flat.grad.zero_()
        trace.loss(trace.flat(inputs), target).mean().backward()
        g = trace.flat.grad[0].numpy()
        bound = trace.clip_bounds[step]
        clipped = np.clip(g, -bound, bound) * trace.clip[step][per_tensor]
        _, mu, s, q, n, coupled, decoupled = trace.coefficients[step][group, :7].T
        d = trace.denominator(step)
        s, q, n = (v / d if k in divides else v for k, v in (("S", s), ("Q", q), ("N", n)))
        u = clipped + coupled * theta
        b = mu * b + s * u
        yield step, theta - q * b - n * u - decoupled * theta


@pytest.mark.parametrize("clip", CLIPS)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_record__what_is_stored_gives_every_update(name, clip, train):
    store = MemoryStore()
    model, _ = train(store, make=OPTIMIZERS[name], clip=CLIPS[clip], groups=name == "adam")
    trace = opened(store)
    states = dict(trace.states(range(trace.steps + 1)))
    for step, after in retrace(trace):
        np.testing.assert_allclose(after, states[step + 1], rtol=1e-10, atol=1e-12)
    np.testing.assert_array_equal(states[trace.steps], flat(model))
    clipped = np.isfinite(trace.clip_bounds).any() or (trace.clip != 1).any()
    assert clipped == (clip != "none")


@pytest.mark.parametrize("clip", CLIPS)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_record__every_k_replays_the_same_bits(name, clip, train):
    whole, thin = MemoryStore(), MemoryStore()
    schedule = lambda o: optim.lr_scheduler.StepLR(o, 3, 0.8)  # noqa: E731
    for store, every in ((whole, 1), (thin, 5)):
        options = {"make": OPTIMIZERS[name], "clip": CLIPS[clip], "scheduler": schedule}
        train(store, every=every, **options)
    whole, thin = opened(whole), opened(thin)
    states = dict(thin.states(range(thin.steps + 1)))
    for step, theta in whole.states(range(whole.steps + 1)):
        np.testing.assert_array_equal(states[step], theta)
    if whole.denominator(0) is not None:
        np.testing.assert_array_equal(thin.denominator(13), whole.denominator(13))


def test_record__batches_rates_and_epochs(train):
    store = MemoryStore()
    train(store, scheduler=lambda o: optim.lr_scheduler.ExponentialLR(o, 0.5))
    trace = opened(store)
    for step, batch in enumerate(batches_of(22)):
        np.testing.assert_array_equal(trace.batch(step), batch)
    np.testing.assert_allclose(trace.learning_rates, 1e-2 * 0.5 ** np.arange(22))
    np.testing.assert_array_equal(trace.epochs, [0, 4, 8, 12, 16, 20])
    assert np.isfinite(trace.losses[[0, 1]]).all()
    assert np.isnan(trace.losses[2:]).all()
    assert trace.names == ["0.weight", "0.bias", "2.weight", "2.bias"]


def test_record__epochs_with_replacement_count_examples():
    from lkarray.training.trace import epoch_starts

    rng = np.random.default_rng(0)
    batches = rng.integers(0, 100, (60, 32))
    starts = epoch_starts(batches, 100)
    assert len(starts) == 60 * 32 // 100 + 1
    assert starts[0] == 0
    assert set(np.diff(starts)) <= {3, 4}


def test_record__a_trace_within_a_trace_of_a_momentum_run_begins_with_its_buffer(train):
    model, data = network(), examples()
    optimizer = optim.SGD(model.parameters(), 0.05, momentum=0.9)
    inputs, labels = data.tensors
    for batch in batches_of(3):
        optimizer.zero_grad()
        cross_entropy(model(inputs[batch]), labels[batch]).mean().backward()
        optimizer.step()
    before = torch.cat(
        [optimizer.state[p]["momentum_buffer"].flatten() for p in model.parameters()]
    )
    store = MemoryStore()
    train(store, model=model, make=lambda p: optimizer)
    trace = opened(store)
    np.testing.assert_array_equal(trace.inherited(), before.numpy())
    assert opened_buffer_free(train) is None


def opened_buffer_free(train):
    store = MemoryStore()
    train(store, make=OPTIMIZERS["momentum"])
    return opened(store).inherited()


def test_record__an_optimizer_with_a_rule_of_ones_own(train, tmp_path, monkeypatch):
    import lkarray.training as training

    monkeypatch.setitem(training.RULES, Own, training.RULES[optim.SGD])
    train(tmp_path / "t", make=lambda p: Own(p, 0.1, momentum=0.5), every=4)
    train(tmp_path / "plain", make=lambda p: optim.SGD(p, 0.1, momentum=0.5))
    trace = opened(tmp_path / "t")
    np.testing.assert_array_equal(trace.parameters(10), opened(tmp_path / "plain").parameters(10))
    assert trace.denominator(3) is None
    monkeypatch.undo()
    with pytest.raises(errors.StoreError, match="recorded with Own, for which there is no rule"):
        opened(tmp_path / "t").denominator(3)


# --- resume ------------------------------------------------------------------------------------


@pytest.mark.parametrize("every", [1, 4])
def test_record__goes_on_where_it_stopped_with_the_same_numbers(every, train, tmp_path):
    schedule = lambda o: optim.lr_scheduler.CosineAnnealingLR(o, 30)  # noqa: E731
    options = {"every": every, "scheduler": schedule, "clip": CLIPS["norm"]}
    whole, _ = train(tmp_path / "whole", steps=22, **options)
    train(tmp_path / "parts", steps=9, **options)
    again, _ = train(tmp_path / "parts", steps=22, resume=True, **options)
    np.testing.assert_array_equal(flat(again), flat(whole))
    once, twice = opened(tmp_path / "whole"), opened(tmp_path / "parts")
    for (_, a), (_, b) in zip(once.states(range(23)), twice.states(range(23)), strict=True):
        np.testing.assert_array_equal(a, b)
    np.testing.assert_array_equal(once.coefficients, twice.coefficients)
    np.testing.assert_array_equal(once.batches, twice.batches)


def test_record__a_loop_run_again_is_compared_and_goes_on(train, tmp_path):
    train(tmp_path / "t", steps=9)
    whole, _ = train(tmp_path / "t", steps=22)
    assert opened(tmp_path / "t").steps == 22
    np.testing.assert_array_equal(opened(tmp_path / "t").parameters(22), flat(whole))
    model, data = network(), examples()
    optimizer = optim.Adam(model.parameters(), 1e-2)
    with pytest.raises(errors.FingerprintError, match="step 0 with other .'batch'."):
        step(model, optimizer, data, usual, store=tmp_path / "t")
    assert opened(tmp_path / "t").steps == 22


def test_record__refuses_a_store_of_other_weights_code_or_settings(train, tmp_path):
    train(tmp_path / "t", steps=4)
    with pytest.raises(errors.FingerprintError, match="weights: stored"):
        train(tmp_path / "t", model=network(7))
    with pytest.raises(errors.FingerprintError, match="optimizer: stored 'Adam', now 'SGD'"):
        train(tmp_path / "t", make=OPTIMIZERS["sgd"])
    with pytest.raises(errors.FingerprintError, match="every: stored 1, now 3"):
        train(tmp_path / "t", every=3)
    assert opened(tmp_path / "t").steps == 4


KILLED = """
    import sys, time
    from tests.helpers.recorded_runs import network, examples, batches_of, cross_entropy
    from lkarray.store import trace_layout
    trace_layout._BLOCK_STEPS = 8
    import torch, lkarray as lk
    model, data = network(), examples()
    inputs, labels = data.tensors
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    with lk.record(model, optimizer, data, loss=cross_entropy, store=sys.argv[1]) as trace:
        for batch in trace.remaining(batches_of(80)):
            with trace.step(batch):
                optimizer.zero_grad()
                cross_entropy(model(inputs[batch]), labels[batch]).mean().backward()
                optimizer.step()
            time.sleep(0.005)
"""


@pytest.mark.services
def test_record__killed_runs_leave_a_readable_trace_and_go_on(tmp_path, monkeypatch):
    from lkarray.store import trace_layout

    monkeypatch.setattr(trace_layout, "_BLOCK_STEPS", 8)
    script = tmp_path / "train.py"
    script.write_text(textwrap.dedent(KILLED))
    command = [sys.executable, str(script)]
    root = Path(__file__).parents[2]
    env = {"PYTHONPATH": str(root), "PATH": "/usr/bin:/bin"}
    subprocess.run([*command, tmp_path / "whole"], env=env, check=True)
    steps = 0
    for _ in range(2):
        process = subprocess.Popen([*command, tmp_path / "killed"], env=env)
        deadline = time.monotonic() + 60
        while process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.01)
            if committed(tmp_path / "killed") > steps:
                break
        process.kill()
        process.wait()
        trace = opened(tmp_path / "killed")
        assert trace.steps > steps
        steps = trace.steps
        assert np.isfinite(trace.parameters(steps)).all()
    subprocess.run([*command, tmp_path / "killed"], env=env, check=True)
    once, twice = opened(tmp_path / "whole"), opened(tmp_path / "killed")
    assert once.steps == twice.steps == 80
    for (_, a), (_, b) in zip(once.states(range(81)), twice.states(range(81)), strict=True):
        np.testing.assert_array_equal(a, b)


def committed(path):
    try:
        return opened(path).steps
    except Exception:  # still being made
        return 0


# --- what is refused ----------------------------------------------------------------------------


class Own(optim.SGD):
    pass


def step(model, optimizer, data, body, *, indices=(0, 1, 2, 3), **options):
    recorder = lk.record(
        model, optimizer, data, **({"loss": cross_entropy, "store": MemoryStore()} | options)
    )
    with recorder as trace, trace.step(indices):
        body(model, optimizer, *(t[:4] for t in data.tensors))
    return recorder


def usual(model, optimizer, inputs, labels):
    optimizer.zero_grad()
    cross_entropy(model(inputs), labels).mean().backward()
    optimizer.step()


def summed(model, optimizer, inputs, labels):
    optimizer.zero_grad()
    for part in (slice(2), slice(2, 4)):
        cross_entropy(model(inputs[part]), labels[part]).mean().backward()
    optimizer.step()


def regularised(model, optimizer, inputs, labels):
    loss = cross_entropy(model(inputs), labels).mean()
    (loss + 0.1 * sum(p.square().sum() for p in model.parameters())).backward()
    optimizer.step()


def coupled(model, optimizer, inputs, labels):
    output = model(inputs)
    (cross_entropy(output, labels).mean() + output.mean(0).square().sum()).backward()
    optimizer.step()


def twice(model, optimizer, inputs, labels):
    usual(model, optimizer, inputs, labels)
    optimizer.step()


def clamped(model, optimizer, inputs, labels):
    usual(model, optimizer, inputs, labels)
    with torch.no_grad():
        model[0].weight.clamp_(-0.1, 0.1)


def forgotten(model, optimizer, inputs, labels):
    cross_entropy(model(inputs), labels).mean().backward()


def infinite(model, optimizer, inputs, labels):
    (cross_entropy(model(inputs), labels).mean() * torch.inf).backward()
    optimizer.step()


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (summed, r"2 times the mean .*divide each part's loss"),
        (regularised, "differs from the mean of its examples' loss gradients"),
        (coupled, "a term of the batch"),
        (twice, "called twice in step 0"),
        (clamped, "the update differs from SGD's rule"),
        (forgotten, r"optimizer.step\(\) was not called in step 0"),
        (infinite, "turned non-finite in step 0"),
    ],
)
def test_step__refuses_what_a_trace_cannot_tell(body, message):
    model = network()
    with pytest.raises(ValueError, match=message):
        step(model, optim.SGD(model.parameters(), 0.1), examples(), body)


def weighed(model, optimizer, inputs, labels):
    optimizer.zero_grad()
    cross_entropy(model(inputs), labels).sum().div(4 + 1e-9).backward()
    optimizer.step()


def test_record__every_k_refuses_a_backward_pass_that_it_cannot_repeat():
    model = network()
    optimizer = optim.SGD(model.parameters(), 0.1)
    step(model, optimizer, examples(), weighed)
    with pytest.raises(ValueError, match="in the last bits .* record with every=1"):
        step(model, optimizer, examples(), weighed, every=2)


def test_step__refuses_indices_that_are_not_the_batch():
    model, data = network(), examples()
    optimizer = optim.SGD(model.parameters(), 0.1)
    with pytest.raises(ValueError, match="the indices are not those of the batch"):
        step(model, optimizer, data, usual, indices=[4, 5, 6, 7])
    with pytest.raises(ValueError, match="from 0 to 50, but the training set has 50"):
        step(model, optimizer, data, usual, indices=[0, 50])
    with pytest.raises(ValueError, match="a list of integers"):
        step(model, optimizer, data, usual, indices=[0.5])


def test_step__refuses_parameters_changed_outside():
    model, data = network(), examples()
    optimizer = optim.SGD(model.parameters(), 0.1)
    inputs, labels = data.tensors
    with lk.record(model, optimizer, data, loss=cross_entropy, store=MemoryStore()) as trace:
        with trace.step(range(4)):
            usual(model, optimizer, inputs[:4], labels[:4])
        with torch.no_grad():
            model[0].bias += 1
        with (
            pytest.raises(ValueError, match="changed between step 0 and step 1, outside"),
            trace.step(range(4)),
        ):
            usual(model, optimizer, inputs[:4], labels[:4])


def test_record__refuses_before_any_work():
    model, data = network(), examples()
    with pytest.raises(TypeError, match=r"does not know Own; it knows .*RULES\[Own\]"):
        step(model, Own(model.parameters(), 0.1), data, usual)
    with pytest.raises(ValueError, match="parameters of shapes .* that the model lacks"):
        step(model, optim.SGD(network().parameters(), 0.1), data, usual)
    with pytest.raises(ValueError, match="maximize=True cannot be recorded"):
        step(model, optim.SGD(model.parameters(), 0.1, maximize=True), data, usual)
    with pytest.raises(ValueError, match="every must be a positive integer"):
        step(model, optim.SGD(model.parameters(), 0.1), data, usual, every=0)
    model[2].to("meta")
    with pytest.raises(ValueError, match=r"several devices, \['cpu', 'meta'\]"):
        step(model, optim.SGD(model.parameters(), 0.1), data, usual)


@pytest.mark.parametrize(
    ("layer", "what"), [(nn.BatchNorm1d(5), "BatchNorm"), (nn.Dropout(0.5), "dropout")]
)
def test_step__refuses_layers_in_train_mode(layer, what):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5), layer, nn.Linear(5, 3)).double()
    optimizer = optim.SGD(model.parameters(), 0.1)
    with pytest.raises(ValueError, match=rf"step 0: {what} \['1'\] is in train mode"):
        step(model, optimizer, examples(), usual)
    model.eval()
    step(model, optimizer, examples(), usual)


def test_record__an_error_in_the_loop_keeps_the_steps_before(train, tmp_path):
    def fails(parameters, count=[0]):  # noqa: B006
        count[0] += 1
        if count[0] == 6:
            raise RuntimeError("the loop's own")

    with pytest.raises(RuntimeError, match="the loop's own"):
        train(tmp_path / "t", clip=fails)
    assert opened(tmp_path / "t").steps == 5


def test_record__a_step_that_fails_after_its_update_leaves_the_one_before(train, tmp_path):
    def tamper(parameters, count=[0]):  # noqa: B006
        count[0] += 1
        if count[0] == 7:
            next(iter(parameters)).grad.fill_(torch.nan)

    with pytest.raises(errors.NonFiniteError, match="in step 6"):
        train(tmp_path / "t", clip=tamper)
    whole, _ = train(tmp_path / "whole")
    trace = opened(tmp_path / "t")
    assert trace.steps == 6
    np.testing.assert_array_equal(trace.parameters(6), opened(tmp_path / "whole").parameters(6))
    with pytest.raises(errors.StoreError, match="run the whole loop again"):
        train(tmp_path / "t", resume=True)
    again, _ = train(tmp_path / "t")
    np.testing.assert_array_equal(flat(again), flat(whole))
    assert opened(tmp_path / "t").steps == 22


def test_open_trace__refuses_other_code_data_and_loss(train, tmp_path):
    train(tmp_path / "t")
    data = examples()
    with pytest.raises(errors.FingerprintError, match="the model is not the one that was trained"):
        lk.open_trace(tmp_path / "t", nn.Linear(6, 3).double(), data, loss=cross_entropy)
    with pytest.raises(errors.FingerprintError, match="train_set is not what was trained on"):
        lk.open_trace(tmp_path / "t", network(), examples(40), loss=cross_entropy)
    with pytest.raises(errors.FingerprintError, match="pass the callable as loss="):
        lk.open_trace(tmp_path / "t", network(), data)
    with pytest.raises(errors.StoreError, match="there is no store"):
        lk.open_trace(tmp_path / "none", network(), data)


@pytest.mark.parametrize("every", [1, 4])
def test_open__shows_the_committed_steps(every, train, tmp_path):
    train(tmp_path / "t", every=every, clip=CLIPS["value"])
    tree = lk.open(tmp_path / "t")
    ds = tree["trajectory"]
    trace = opened(tmp_path / "t")
    assert ds.sizes["step"] == 22
    rows = {"step": 8} if every == 1 else {"kept": 8}
    np.testing.assert_array_equal(ds["parameters"].sel(rows), trace.parameters(8))
    np.testing.assert_array_equal(ds["coefficients"].sel(field="learning_rate")[:, 0], [0.01] * 22)
    assert ds["parameters"].chunks is not None
    assert list(ds["tensor"].values) == trace.names
    assert lk.verify(tmp_path / "t") == []
    (tmp_path / "t/trajectory/parameters/c/0/0").unlink()
    assert [(p.kind, p.path) for p in lk.verify(tmp_path / "t")] == [
        ("missing", "trajectory/parameters/c/0/0")
    ]
