"""Recording: what a trace holds is what the optimizer did, and it can be taken again."""

import subprocess
import sys
import textwrap
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import optim
from zarr.storage import MemoryStore

import lkarray as lk
from lkarray import errors
from tests.helpers.grids import in_turn
from tests.helpers.recorded_runs import batches_of, cross_entropy, examples, network
from tests.helpers.recordings import CLIPS, OPTIMIZERS, Own, flat, opened, usual
from tests.helpers.recordings import step as recorded_step


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


@pytest.mark.parametrize(("name", "clip"), in_turn(OPTIMIZERS, CLIPS))
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


@pytest.mark.parametrize(("name", "clip"), in_turn(OPTIMIZERS, CLIPS))
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
        recorded_step(model, optimizer, data, usual, store=tmp_path / "t")
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


@pytest.mark.minutes
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
