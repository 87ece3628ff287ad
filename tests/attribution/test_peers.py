"""Baselines of attribution, beside the packages that others compute them with.

captum has TracIn and influence functions, traker is TRAK by its authors, and curvlinops has
Hessians. Where an example helped, TracIn and influence functions are positive there and negative
here: the loss became lower. Products of gradients and TRAK, of margins, have the same sign in both.
"""

import logging

import numpy as np
import pytest
import torch
from captum.influence import NaiveInfluenceFunction, TracInCP, TracInCPFast
from curvlinops import HessianLinearOperator
from torch import nn, optim
from torch.nn.utils import vector_to_parameters
from torch.utils.data import Subset, TensorDataset
from trak import TRAKer
from trak.projectors import NoOpProjector
from trak.score_computers import BasicScoreComputer, BasicSingleBlockScoreComputer

import lkarray as lk
from lkarray.training.projection import Projection
from tests.helpers.audited_runs import audited, gradients, log_odds, recorded
from tests.helpers.recorded_runs import DTYPE, network

DOUBLE = 1e-10  # of the largest score: captum and curvlinops follow the model's float64
SINGLE = 5e-5  # traker keeps gradients, inverses and scores in float32 (or less), of any model

LAST = slice(35, 53)  # of the network's parameters, the last layer
LOSS = nn.CrossEntropyLoss(reduction="none")


def convolutional():
    torch.manual_seed(4)
    body = nn.Conv2d(1, 3, 3), nn.Tanh(), nn.Flatten(), nn.Linear(48, 4), nn.Tanh()
    return nn.Sequential(*body, nn.Linear(4, 3)).double()


def images(n=20, seed=2):
    torch.manual_seed(seed)
    return TensorDataset(torch.randn(n, 1, 6, 6, dtype=DTYPE), torch.arange(n) % 3)


@pytest.fixture(scope="module")
def trace():
    return recorded(
        lambda p: optim.SGD(p, 0.3, momentum=0.5),
        schedule=lambda o: optim.lr_scheduler.StepLR(o, 3, 0.7),
    )


def rate(step):
    """The learning rate of that run: each checkpoint has its own."""
    return 0.3 * 0.7 ** (step // 3)


@pytest.fixture(scope="module")
def image_trace():
    def constant(parameters):
        return optim.SGD(parameters, 0.1)

    batches = np.array_split(np.arange(20), 5)
    return recorded(constant, model=convolutional(), data=images(), batches=batches)


def close(scores, expected, tolerance=DOUBLE):
    expected = np.asarray(expected)
    assert scores.shape == expected.shape
    scale = np.abs(expected).max()
    np.testing.assert_allclose(scores, expected, rtol=0, atol=tolerance * scale)


def at(trace, step, model):
    """Return a model with the weights of a state of a run."""
    vector_to_parameters(torch.from_numpy(trace.parameters(step)), model.parameters())
    return model


def loader(trace, rate_of):
    """Return what gives captum's model the weights of a checkpoint, and its learning rate."""

    def load(model, step):
        at(trace, step, model)
        return rate_of(step)

    return load


# --- TracIn: captum -----------------------------------------------------------------------------


@pytest.mark.parametrize(("params", "layers"), [(None, None), ("0", ["0"]), ("last", ["2"])])
@pytest.mark.parametrize("steps", [[7], [0, 4, 8], list(range(12))])
def test_tracin__is_minus_captums(trace, steps, params, layers):
    peer = TracInCP(
        network(), trace.train_set, steps, loader(trace, rate), layers, LOSS, batch_size=16
    )
    scores = lk.tracin(trace, audited(), checkpoints=steps, params=params)
    close(scores, -peer.influence(audited().tensors).T)


def test_tracin__of_the_last_layer_is_minus_captums_by_factors(trace):
    """Its other algorithm: products of the layer's inputs times those of slopes, without a bias."""
    model = network()
    peer = TracInCPFast(
        model,
        model[2],
        trace.train_set,
        [0, 4, 8],
        loader(trace, rate),
        nn.CrossEntropyLoss(reduction="sum"),
        batch_size=16,
    )
    scores = lk.tracin(trace, audited(), checkpoints="epoch", params=["2.weight"])
    close(scores, -peer.influence(audited().tensors).T)


def test_tracin__of_convolutions_and_some_examples_is_minus_captums(image_trace):
    some, test = [3, 8, 17], images(6, seed=8)
    peer = TracInCP(
        convolutional(),
        Subset(image_trace.train_set, some),
        [1, 4],
        loader(image_trace, lambda step: 0.1),
        loss_fn=LOSS,
        batch_size=2,
    )
    scores = lk.tracin(image_trace, test, checkpoints=[1, 4], examples=some)
    close(scores, -peer.influence(test.tensors).T)


class OfClass(nn.Module):
    """What captum takes for the loss of a test example: one output."""

    reduction = "none"

    def forward(self, output, target):
        return output[:, 1]


def test_tracin__of_an_output_is_minus_captums(trace):
    peer = TracInCP(
        network(),
        trace.train_set,
        [2, 9],
        loader(trace, rate),
        loss_fn=LOSS,
        batch_size=16,
        test_loss_fn=OfClass(),
    )
    scores = lk.tracin(trace, audited(), checkpoints=[2, 9], target=1)
    close(scores, -peer.influence(audited().tensors).T)


@pytest.mark.parametrize(("params", "layers"), [(None, None), ("last", ["2"])])
def test_gradient_similarity__is_captums_of_one_checkpoint(trace, params, layers):
    """With a learning rate of one; and its cosine by captum's influences on themselves."""
    peer = TracInCP(
        network(),
        trace.train_set,
        [12],
        loader(trace, lambda step: 1.0),
        layers,
        LOSS,
        batch_size=16,
    )
    products = peer.influence(audited().tensors).T
    close(lk.gradient_similarity(trace, audited(), params=params), products)
    norms = peer.self_influence().sqrt()[:, None] * peer.self_influence(audited().tensors).sqrt()
    close(lk.gradient_similarity(trace, audited(), params=params, cosine=True), products / norms)


# --- TRAK: traker -------------------------------------------------------------------------------


def trakers(trace, steps, folder, *, projector=None, **options):
    """Return traker's scores ``(example, audit)`` of some checkpoints."""
    data = audited()
    peer = TRAKer(
        model=network(),
        task="image_classification",
        train_set_size=50,
        save_dir=str(folder),
        device="cpu",
        use_half_precision=False,
        logging_level=logging.ERROR,
        projector=projector or NoOpProjector(device="cpu"),
        **options,
    )
    states = [at(trace, step, network()).state_dict() for step in steps]
    for i, state in enumerate(states):
        peer.load_checkpoint(state, model_id=i)
        for rows in torch.arange(50).split(16):
            peer.featurize(trace.train_set[rows], inds=rows.numpy())
    peer.finalize_features()
    for i, state in enumerate(states):
        peer.start_scoring_checkpoint("audit", state, i, num_targets=len(data))
        peer.score(data.tensors, num_samples=len(data))
    return np.asarray(peer.finalize_scores("audit"))


class Rescaled(BasicScoreComputer):
    """traker's own, times what it divides the inverse by, of which each checkpoint has its own."""

    def get_x_xtx_inv(self, grads, xtx):
        inverse = torch.linalg.inv(xtx + self.lambda_reg * torch.eye(len(xtx)))
        return super().get_x_xtx_inv(grads, xtx) * inverse.abs().mean()


class OneBlock(BasicSingleBlockScoreComputer):
    """traker's own for tests, which neither scales nor regularizes."""

    def __init__(self, dtype, device, **options):
        super().__init__(dtype, device)


class OurProjector(NoOpProjector):
    """Our projections for traker's gradients, one for each checkpoint."""

    def project(self, grads, model_id):
        flat = torch.cat([g.flatten(1) for g in grads.values()], 1)
        matrix = Projection(self.proj_dim, self.seed + model_id).rows(0, self.grad_dim)
        return flat @ torch.from_numpy(matrix).to(flat)


@pytest.mark.parametrize(
    ("params", "names", "columns"),
    [
        (None, None, slice(None)),
        ("last", ["2.weight", "2.bias"], LAST),
    ],
)
def test_trak__is_trakers_but_for_its_scale(trace, tmp_path, params, names, columns):
    """Theirs is ours over the number of parameters, P, and over the inverse's mean size.

    It divides gradients by sqrt(P), which makes its regularization a P-th, and the inverse by the
    mean of its entries' absolute values.
    """
    theirs = trakers(trace, [12], tmp_path, grad_wrt=names, lambda_reg=0.01)
    g = gradients(trace, trace.parameters(12), trace.train_set, log_odds)[:, columns]
    count = g.shape[1]
    scores = lk.trak(trace, audited(), size=None, regularization=0.01 * count, params=params)
    inverse = np.linalg.inv(g.T @ g + 0.01 * count * np.eye(count))
    close(scores / (count * np.abs(inverse).mean()), theirs, SINGLE)


def test_trak__of_several_checkpoints_is_trakers(trace, tmp_path):
    theirs = trakers(trace, [3, 7, 12], tmp_path, lambda_reg=0.01, score_computer=Rescaled)
    scores = lk.trak(trace, audited(), checkpoints=[3, 7, 12], size=None, regularization=0.01 * 53)
    close(scores, theirs, SINGLE)


def test_trak__projected_and_not_regularized_is_trakers(trace, tmp_path):
    theirs = trakers(
        trace,
        [3, 7, 12],
        tmp_path,
        score_computer=OneBlock,
        projector=OurProjector(53, 8, 5, "rademacher", "cpu"),
    )
    scores = lk.trak(trace, audited(), checkpoints=[3, 7, 12], size=8, seed=5)
    close(scores, theirs, SINGLE)


# --- influence functions: curvlinops and captum -------------------------------------------------


@pytest.mark.parametrize(
    ("params", "columns", "damping"),
    [
        (None, slice(None), 0.5),
        ("last", LAST, 0.01),
    ],
)
def test_influence_functions__are_by_curvlinops_hessian(trace, params, columns, damping):
    model = at(trace, 12, network())
    chosen = list((model[2] if params else model).parameters())
    batches = [trace.train_set[rows] for rows in torch.arange(50).split(16)]
    peer = HessianLinearOperator(model, nn.CrossEntropyLoss(), chosen, batches)
    hessian = peer @ torch.eye(peer.shape[1], dtype=DTYPE)
    damped = hessian.numpy() + damping * np.eye(len(hessian))
    theta = trace.parameters(12)
    g = gradients(trace, theta, trace.train_set, trace.loss)[:, columns]
    a = gradients(trace, theta, audited(), trace.loss)[:, columns]
    scores = lk.influence_functions(trace, audited(), damping=damping, params=params)
    close(scores, -g @ np.linalg.solve(damped, a.T) / 50)


@pytest.mark.parametrize(
    ("params", "layers", "damping"),
    [
        (None, None, 0.5),
        ("last", ["2"], 0.01),
    ],
)
def test_influence_functions__are_minus_captums(trace, params, layers, damping):
    """captum's Hessian is of the sum of losses, so that its regularization is 50 dampings."""
    peer = NaiveInfluenceFunction(
        network(),
        trace.train_set,
        5,
        loader(trace, rate),
        layers,
        LOSS,
        batch_size=16,
        projection_dim=53,
        hessian_reg=50 * damping,
    )
    scores = lk.influence_functions(trace, audited(), at=5, damping=damping, params=params)
    close(scores, -peer.influence(audited().tensors).T)


def test_influence_functions__of_convolutions_and_some_examples_are_minus_captums(image_trace):
    some, test = [3, 8, 17], images(6, seed=8)
    peer = NaiveInfluenceFunction(
        convolutional(),
        Subset(image_trace.train_set, some),
        5,
        loader(image_trace, lambda step: 0.1),
        loss_fn=LOSS,
        batch_size=8,
        hessian_dataset=image_trace.train_set,
        projection_dim=1000,
        hessian_reg=20 * 1.0,
    )
    scores = lk.influence_functions(image_trace, test, damping=1.0, examples=some)
    close(scores, -peer.influence(test.tensors).T)
