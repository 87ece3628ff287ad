"""Leading curvature against dense matrices, and the Gaussian law that is made of it."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

from lkarray.nn import Batches, FlatModel
from lkarray.nn.losses import per_example_loss
from lkarray.sampling.curvature import GaussNewton, leading_curvature
from lkarray.sampling.laplace_law import LaplaceLaw

N, CLASSES = 30, 3
CPU = torch.device("cpu")


def parts(loss, dtype=torch.float64, trainable=None):
    """A small network in float64, and its Gauss-Newton matrix by batches of 7."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, CLASSES)).to(dtype)
    inputs = torch.randn(N, 4, dtype=dtype)
    target = torch.randn(N, CLASSES, dtype=dtype)
    if loss == "cross_entropy":
        target = target.argmax(1)
    flat = FlatModel(model, trainable=trainable)
    data = Batches(TensorDataset(inputs, target), name="train_set", device=CPU)
    return GaussNewton(flat, per_example_loss(loss), data, np.arange(N), 7), inputs


def dense(product, inputs, loss):
    """The matrix from Jacobians of the outputs, and Hessians of the loss written by hand."""
    flat = product.flat
    params = {name: p.detach() for name, p in flat.module.named_parameters()}

    def outputs(values):
        return torch.func.functional_call(flat.module, values, (inputs,))

    pieces = torch.func.jacrev(outputs)(params)
    jacobian = torch.cat([pieces[name].flatten(2) for name in flat.names], dim=2)
    share = torch.softmax(outputs(params), 1)
    bend = torch.eye(CLASSES, dtype=share.dtype).expand(N, -1, -1) * 2 / CLASSES
    if loss == "cross_entropy":
        bend = torch.diag_embed(share) - share[:, :, None] * share[:, None, :]
    return torch.einsum("ncp,ncd,ndq->pq", jacobian, bend, jacobian) / N


@pytest.mark.parametrize("loss", ["cross_entropy", "mse"])
def test_curvature__is_that_of_the_dense_matrix(loss):
    product, inputs = parts(loss)
    whole = dense(product, inputs, loss)
    expected, directions = (x.flip(-1) for x in torch.linalg.eigh(whole))
    got = leading_curvature(product, 10, seed=0)
    torch.testing.assert_close(got.values, expected[:10], rtol=1e-6, atol=1e-12)
    assert got.residuals.max() < 1e-9
    assert got.trace == pytest.approx(float(whole.trace()), rel=1e-9)
    assert got.captured == pytest.approx(float(expected[:10].sum() / whole.trace()), rel=1e-9)
    overlap = (got.vectors @ directions[:, :10]).abs()
    torch.testing.assert_close(overlap, torch.eye(10).double(), rtol=0, atol=1e-5)


def test_curvature__residuals_and_trace_are_told_where_the_basis_is_small(monkeypatch):
    """A basis of four vectors for a matrix of 43: the residuals are those of the pairs returned."""
    from lkarray.sampling import curvature

    monkeypatch.setattr(curvature, "BLOCK", 2)
    product, inputs = parts("mse")
    whole = dense(product, inputs, "mse")
    got = leading_curvature(product, 1, seed=0)
    off = got.vectors @ whole - got.values[:, None] * got.vectors
    torch.testing.assert_close(got.residuals, off.norm(dim=1), rtol=1e-6, atol=1e-12)
    assert got.residuals.max() > 1e-3
    estimates = [leading_curvature(product, 1, seed=seed).trace for seed in range(40)]
    error = np.std(estimates) / np.sqrt(len(estimates))
    assert abs(np.mean(estimates) - float(whole.trace())) < 4 * error


def test_curvature__rank_beyond_the_data_is_that_of_the_data():
    product, _ = parts("mse", trainable="2.*")
    got = leading_curvature(product, 500, seed=0)
    # Of the last layer alone: 6 inputs with the bias, for each of 3 outputs.
    assert len(got.values) == 18 == product.flat.theta.shape[1]
    few = GaussNewton(product.flat, product._loss, product.data, np.arange(2), 7)
    assert len(leading_curvature(few, 500, seed=0).values) == 2 * CLASSES


def test_curvature__keeps_to_the_parts_of_tensors_that_move():
    product, _ = parts("mse", trainable="0.weight[0:2, :]")
    got = leading_curvature(product, 4, seed=0)
    mask = product.flat.mask
    assert int(mask.sum()) == 8
    assert not got.vectors[:, ~mask].any()


def test_curvature__says_what_to_do_where_there_is_none():
    product, _ = parts("mse")

    class Hard(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        @torch.autograd.function.once_differentiable
        def backward(ctx, slope):
            return slope

    flat = product.flat
    flat.module.append(type("Layer", (nn.Module,), {"forward": lambda self, x: Hard.apply(x)})())
    with pytest.raises(ValueError, match="rank=0"):
        product(torch.ones_like(flat.theta))


@pytest.mark.parametrize("step_size", [0.0, 0.01])
def test_law__is_that_of_the_dense_precision(step_size):
    product, inputs = parts("cross_entropy")
    whole, nbeta, gamma = dense(product, inputs, "cross_entropy"), 20.0, 3.0
    curvature = leading_curvature(product, 100, seed=0)
    law = LaplaceLaw.of(curvature, nbeta=nbeta, gamma=gamma, step_size=step_size)
    unit = torch.eye(len(whole)).double()
    precision = nbeta * whole + gamma * unit
    sigma = torch.linalg.inv(precision @ (unit - step_size / 4 * precision))
    torch.testing.assert_close(law.root(law.root(unit)), sigma, rtol=1e-6, atol=1e-9)


def test_law__refuses_what_has_no_stationary_law():
    curvature = leading_curvature(parts("mse")[0], 3, seed=0)
    with pytest.raises(ValueError, match="gamma above 0"):
        LaplaceLaw.of(curvature, nbeta=1.0, gamma=0.0)
    with pytest.raises(ValueError, match="step_size must be below"):
        LaplaceLaw.of(curvature, nbeta=1.0, gamma=10.0, step_size=0.5)
