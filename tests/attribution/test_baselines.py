"""Baselines of attribution: their definitions by plain autograd, in float64."""

import sys

import numpy as np
import pytest
import torch
from torch import nn, optim
from torch.nn import functional as F
from torch.utils.data import TensorDataset
from zarr.storage import MemoryStore

import lkarray as lk
from lkarray import errors
from lkarray.attribution.influence_functions import influence_functions
from lkarray.attribution.tracin import gradient_similarity, tracin, tracin_in_run
from lkarray.attribution.trak import trak
from lkarray.training.projection import Projection
from tests.helpers.audited_runs import (
    audited,
    both_gradients,
    brute_hessian,
    cross_entropy,
    log_odds,
    rates,
    recorded,
)
from tests.helpers.networks import convolutional
from tests.helpers.recorded_runs import DTYPE

LAST = slice(35, 53)  # of the network's parameters, the last layer


def images(n=40, seed=2):
    torch.manual_seed(seed)
    return TensorDataset(torch.randn(n, 1, 6, 6, dtype=DTYPE), torch.arange(n) % 3)


def sgd(parameters):
    return optim.SGD(parameters, 0.1)


@pytest.fixture(scope="module")
def trace():
    """Two groups with rates of their own, a schedule, momentum: what TracIn looks through."""
    return recorded(
        lambda p: optim.Adam(p, 1e-2),
        groups=True,
        schedule=lambda o: optim.lr_scheduler.StepLR(o, 3, 0.7),
    )


@pytest.fixture(scope="module")
def image_trace():
    return recorded(sgd, model=convolutional(), data=images(), batches=np.array_split(range(40), 5))


def close(scores, expected, tolerance=1e-10):
    scale = np.abs(expected).max()
    np.testing.assert_allclose(scores, expected, rtol=tolerance, atol=tolerance * scale)


# --- TracIn -------------------------------------------------------------------------------------


def brute_tracin(trace, steps, columns=slice(None)):
    total = 0
    for step in steps:
        g, a = both_gradients(trace, step)
        total = total - (g * rates(trace, step))[:, columns] @ a[:, columns].T
    return total


@pytest.mark.parametrize(
    ("checkpoints", "steps"),
    [
        ("epoch", [0, 4, 8]),
        ("step", range(12)),
        ([3, 11], [3, 11]),
    ],
)
def test_tracin__is_its_definition(trace, checkpoints, steps):
    scores = tracin(trace, audited(), checkpoints=checkpoints)
    assert scores.dims == ("example", "audit")
    assert scores.shape == (50, 7)
    assert scores.name == "tracin"
    close(scores, brute_tracin(trace, steps))
    assert scores.attrs["kernel"] == "influence operator"
    assert scores.attrs["units"] == "nat"
    assert scores.attrs["checkpoints"] == list(steps)


@pytest.mark.parametrize("params", ["last", "2", ["2.weight", "2.bias"]])
def test_tracin__of_the_last_layer(trace, params):
    scores = tracin(trace, audited(), params=params)
    close(scores, brute_tracin(trace, [0, 4, 8], LAST))
    assert scores.attrs["params"] == ["2.weight", "2.bias"]


def test_tracin__of_convolutions_some_examples_and_panels(image_trace, monkeypatch):
    test = images(9, seed=8)
    g, a = both_gradients(image_trace, 2, data=test)
    scores = tracin(
        image_trace,
        test,
        checkpoints=[2],
        examples=[30, 3, 17],
        coords={"label": list("abcabcabc")},
    )
    close(scores, -0.1 * g[[3, 17, 30]] @ a.T)
    np.testing.assert_array_equal(scores["example"], [3, 17, 30])
    assert scores["label"].dims == ("audit",)
    monkeypatch.setattr(sys.modules["lkarray.attribution.tracin"], "BATCH", 7)
    monkeypatch.setattr(
        sys.modules["lkarray.attribution.tracin"], "panel_size", lambda problem, budget: 4
    )
    close(tracin(image_trace, test, checkpoints=[2]), -0.1 * g @ a.T)


def test_tracin__of_predictions_has_a_dim_more(trace):
    scores = tracin(trace, audited(), target="prediction", checkpoints=[5])
    assert scores.dims == ("example", "audit", "output")
    g, _ = both_gradients(trace, 5)
    for c in range(3):
        _, a = both_gradients(trace, 5, lambda output, target, c=c: output[:, c])
        close(scores.isel(output=c), -(g * rates(trace, 5)) @ a.T)
    assert scores.attrs["units"] == "1"


def brute_in_run(trace, columns=slice(None)):
    total = np.zeros((50, 7))
    for step in range(trace.steps):
        g, a = both_gradients(trace, step)
        products = (g * rates(trace, step))[:, columns] @ a[:, columns].T
        batch = trace.batch(step)
        np.add.at(total, batch, -products[batch] / len(batch))
    return total


@pytest.mark.parametrize(("params", "columns"), [(None, slice(None)), ("last", LAST)])
def test_tracin_in_run__is_its_definition(trace, params, columns):
    scores = tracin_in_run(trace, audited(), params=params, coords={"label": np.arange(7) % 3})
    assert scores.dims == ("example", "audit")
    assert scores.name == "tracin"
    close(scores, brute_in_run(trace, columns))
    assert scores.attrs["kernel"] == "influence operator"
    assert scores.attrs["units"] == "nat"
    assert scores["label"].dims == ("audit",)


def test_tracin_in_run__counts_an_example_as_often_as_it_is_in_a_batch():
    trace = recorded(sgd, batches=[np.asarray([3, 3, 8]), np.asarray([8, 1])])
    scores = tracin_in_run(trace, audited(), examples=[8, 3])
    close(scores, brute_in_run(trace)[[3, 8]])
    np.testing.assert_array_equal(scores["example"], [3, 8])


def test_tracin_in_run__of_plain_descent_is_its_audit_by_eulers_rule():
    trace = recorded(sgd)
    close(tracin_in_run(trace, audited()), lk.audit(trace, audited(), rule="euler")["influence"])


def test_tracin_in_run__adds_up_to_the_change_to_second_order():
    """Halving the rate of plain descent quarters what is missing of each step's change."""
    off = []
    for rate in (0.04, 0.02):
        trace = recorded(lambda p, rate=rate: optim.SGD(p, rate), steps=1)
        total = tracin_in_run(trace, audited()).sum("example").values
        change = np.zeros(7)
        for state, sign in ((trace.steps, 1), (0, -1)):
            trace.set(state)
            with torch.no_grad():
                losses = cross_entropy(
                    trace.flat.module(audited().tensors[0]), audited().tensors[1]
                )
            change += sign * losses.numpy()
        off.append(np.abs(total - change).sum())
    assert 3.7 < off[0] / off[1] < 4.3


def test_tracin__refuses_a_state_without_a_learning_rate_and_other_mistakes(trace):
    with pytest.raises(ValueError, match="no step follows state 12.*from 0 to 11"):
        tracin(trace, audited(), checkpoints=[3, 12])
    with pytest.raises(ValueError, match="checkpoints: .*'epoch', 'step'"):
        tracin(trace, audited(), checkpoints="all")
    with pytest.raises(ValueError, match="distinct indices"):
        tracin(trace, audited(), examples=[2, 2])
    with pytest.raises(ValueError, match="matches none"):
        tracin(trace, audited(), params="conv")
    with pytest.raises(errors.SchemaError, match="'example' is a dim"):
        tracin(trace, audited(), coords={"example": np.arange(7)})
    with pytest.raises(errors.MemoryBudgetError, match="examples=.*memory="):
        tracin(trace, audited(), memory=1000)
    with pytest.raises(ValueError, match="unlike=True"):
        tracin(trace, TensorDataset(audited().tensors[0] * 255, audited().tensors[1]))


# --- similarity ---------------------------------------------------------------------------------


@pytest.mark.parametrize("cosine", [False, True])
@pytest.mark.parametrize(("at", "state"), [(-1, 5), (0, 0), (2, 2)])
def test_gradient_similarity__is_its_definition(image_trace, at, state, cosine):
    test = images(9, seed=8)
    g, a = both_gradients(image_trace, state, data=test)
    expected = g @ a.T
    if cosine:
        expected /= np.outer(np.linalg.norm(g, axis=1), np.linalg.norm(a, axis=1))
    scores = gradient_similarity(image_trace, test, at=at, cosine=cosine)
    close(scores, expected)
    assert scores.attrs["at"] == state
    assert scores.attrs["units"] == ("1" if cosine else "nat^2")


def test_gradient_similarity__of_an_example_with_itself(trace):
    scores = gradient_similarity(trace, [4, 9], cosine=True)
    np.testing.assert_allclose(np.diag(scores.sel(example=[4, 9])), 1)
    np.testing.assert_array_equal(scores["audit"], [4, 9])


def test_gradient_similarity__refuses_a_state_that_there_is_none_of(trace):
    for at in (13, -14):
        with pytest.raises(ValueError, match="0 to 12"):
            gradient_similarity(trace, audited(), at=at)
    for at in (1.0, True):
        with pytest.raises(TypeError, match="at must be an integer"):
            gradient_similarity(trace, audited(), at=at)


# --- TRAK ---------------------------------------------------------------------------------------


def one_minus_p(trace, state, data):
    trace.set(state)
    with torch.no_grad():
        p = torch.softmax(trace.flat.module(data.tensors[0]), 1)
    return 1 - p.gather(1, data.tensors[1][:, None]).squeeze(1).numpy()


def brute_trak(trace, states, projections, regularization=0.0, rows=slice(None)):
    scores, q, own = 0, 0, 0
    for state, matrix in zip(states, projections, strict=True):
        g, a = both_gradients(trace, state, log_odds)
        phi, other = g[rows] @ matrix, a @ matrix
        inverse = np.linalg.inv(phi.T @ phi + regularization * np.eye(phi.shape[1]))
        scores = scores + phi @ inverse @ other.T / len(states)
        q = q + one_minus_p(trace, state, trace.train_set)[rows] / len(states)
        own = own + one_minus_p(trace, state, audited()) / len(states)
    return scores * q[:, None], own


def test_trak__is_its_definition(trace):
    expected, own = brute_trak(trace, [12], [np.eye(53)], 1e-2)
    scores = trak(trace, audited(), size=None, regularization=1e-2)
    close(scores, expected, 1e-8)
    assert scores.dims == ("example", "audit")
    assert scores.attrs["kernel"] == "influence operator"
    assert scores.attrs["checkpoints"] == [12]
    as_loss = trak(trace, audited(), size=None, regularization=1e-2, target="loss")
    close(as_loss, -own * expected, 1e-8)
    assert as_loss.attrs["units"] == "nat"


@pytest.mark.parametrize("memory", [None, 200_000])
def test_trak__projects_each_checkpoint_anew_and_averages(trace, memory, monkeypatch):
    projections = [Projection(8, 5 + i).rows(0, 53).astype(float) for i in range(3)]
    some = [2, *range(10, 49)]
    expected, _ = brute_trak(trace, [3, 7, 12], projections, rows=some)
    monkeypatch.setattr(sys.modules["lkarray.attribution.trak"], "ROWS", 9)
    if memory is not None:
        monkeypatch.setattr(sys.modules["lkarray.attribution.trak"], "KEPT", 0.0)
    scores = trak(
        trace, audited(), checkpoints=[3, 7, 12], size=8, seed=5, examples=some[::-1], memory=memory
    )
    close(scores, expected, 1e-7)
    np.testing.assert_array_equal(scores["example"], some)


def test_trak__helps_where_the_same_class_does(trace):
    """Others of an example's own class support it: positive, and negative of losses."""
    scores = trak(trace, audited(), size=None, regularization=1.0)
    same = trace.train_set.tensors[1].numpy()[:, None] == audited().tensors[1].numpy()
    assert scores.values[same].mean() > 0 > scores.values[~same].mean()
    lowers = trak(trace, audited(), size=None, regularization=1.0, target="loss")
    assert lowers.values[same].mean() < 0


def test_trak__refuses_what_is_singular_and_says_what_to_set(trace):
    with pytest.raises(ValueError, match="50 training examples.*size=25 or less, or regular"):
        trak(trace, audited())
    # Equal shifts of all classes' logits move no margin: the matrix has not the full rank.
    with pytest.raises(ValueError, match="do not span.*smaller size=, or regularization="):
        trak(trace, audited(), size=None, params="last")
    assert np.isfinite(trak(trace, audited(), size=12, params="last")).all()
    with pytest.raises(ValueError, match="'margin' or 'loss'"):
        trak(trace, audited(), target="logit")
    with pytest.raises(ValueError, match="must not be negative"):
        trak(trace, audited(), regularization=-1)
    with pytest.raises(errors.MemoryBudgetError, match=r"memory= to \d+ MiB"):
        trak(trace, audited(), size=20, memory=20_000)


def test_trak__refuses_a_model_that_is_no_classifier():
    torch.manual_seed(0)
    data = TensorDataset(torch.randn(20, 4), torch.randn(20, 2))
    model = nn.Linear(4, 2)
    optimizer = sgd(model.parameters())
    recorder = lk.record(model, optimizer, data, loss="mse", store=MemoryStore())
    with recorder, recorder.step(np.arange(20)):
        F.mse_loss(model(data.tensors[0]), data.tensors[1]).backward()
        optimizer.step()
    with pytest.raises(ValueError, match="classifier"):
        trak(recorder, data)


# --- influence functions ------------------------------------------------------------------------


@pytest.mark.parametrize(("params", "columns"), [(None, slice(None)), ("last", LAST)])
def test_influence_functions__are_their_definition(trace, params, columns):
    g, a = (side[:, columns] for side in both_gradients(trace, 12))
    h = brute_hessian(trace, 12)[columns, columns] + 1.5 * np.eye(len(range(53)[columns]))
    scores = influence_functions(trace, audited(), damping=1.5, params=params)
    close(scores, -g @ np.linalg.solve(h, a.T) / 50)
    assert scores.dims == ("example", "audit")
    assert scores.attrs["units"] == "nat"
    assert scores.attrs["residual"] < 1e-12


def test_influence_functions__say_what_leaving_an_example_out_does():
    """Logistic regression to its minimum, again without each example: the oracle of the method."""
    torch.manual_seed(0)
    inputs = torch.randn(60, 3, dtype=DTYPE)
    labels = (inputs[:, 0] + torch.randn(60, dtype=DTYPE) > 0).long()
    data = TensorDataset(inputs, labels)
    decay = 0.05

    def fit(model, keep):
        newton = optim.LBFGS(
            model.parameters(),
            max_iter=200,
            tolerance_grad=1e-13,
            tolerance_change=0,
            line_search_fn="strong_wolfe",
        )

        def mean():
            newton.zero_grad()
            norm = sum(p.square().sum() for p in model.parameters())
            total = cross_entropy(model(inputs[keep]), labels[keep]).sum() / 60
            (total + decay / 2 * norm).backward()
            return total + decay / 2 * norm.detach()

        newton.step(mean)
        with torch.no_grad():
            return cross_entropy(model(inputs[:9]), labels[:9]).numpy()

    model = nn.Linear(3, 2).double()
    everything = np.arange(60)
    whole = fit(model, everything)
    trace = recorded(lambda p: optim.SGD(p, 1e-12), model=model, data=data, batches=[everything])
    scores = influence_functions(trace, range(9), damping=decay, examples=range(20))
    again = [fit(nn.Linear(3, 2).double(), np.delete(everything, m)) for m in range(20)]
    did = whole - np.stack(again)  # of having the example
    assert np.corrcoef(scores.values.ravel(), did.ravel())[0, 1] > 0.99
    assert 0.9 < (scores.values * did).sum() / (did * did).sum() < 1.1
    assert (scores.values[np.arange(9), np.arange(9)] < 0).all()


def test_influence_functions__of_some_examples_targets_and_attention(image_trace):
    scores = influence_functions(
        image_trace, [4, 7], target="prediction", damping=1.0, examples=[9, 1], params="last"
    )
    assert scores.dims == ("example", "audit", "output")
    np.testing.assert_array_equal(scores["example"], [1, 9])
    alone = influence_functions(image_trace, [4, 7], target=2, damping=1.0, params="last")
    close(scores.isel(output=2), alone.sel(example=[1, 9]))


def test_influence_functions__refuse_what_is_no_minimum_or_too_large(trace):
    h = brute_hessian(trace, 0)
    least = np.linalg.eigvalsh(h)[0]
    assert least < -1e-3
    with pytest.raises(ValueError, match=f"least eigenvalue is {least:.3g}.*set damping="):
        influence_functions(trace, audited(), at=0, damping=0.0)
    with pytest.raises(ValueError, match="53 parameters.*params='last'.*max_params"):
        influence_functions(trace, audited(), max_params=50)
    with pytest.raises(ValueError, match="damping must be"):
        influence_functions(trace, audited(), damping=float("nan"))
    with pytest.raises(errors.MemoryBudgetError, match="choose params="):
        influence_functions(trace, audited(), memory=10_000)
