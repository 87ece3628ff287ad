"""Recording refuses what a trace cannot tell, and keeps the steps before."""

import numpy as np
import pytest
import torch
from torch import nn, optim
from zarr.storage import MemoryStore

import lkarray as lk
from lkarray import errors
from tests.helpers.recorded_runs import cross_entropy, examples, network
from tests.helpers.recordings import Own, flat, opened, step, usual


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
