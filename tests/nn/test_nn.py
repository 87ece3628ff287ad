import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset

from lkarray.nn import Batches, FlatModel, per_example_loss
from lkarray.nn.flat import hash_weights


class Tied(nn.Module):
    """Conv, norm and two linear layers that share a weight; channels-last on top."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(2, 3, 3).to(memory_format=torch.channels_last)
        self.norm = nn.BatchNorm2d(3)
        self.first, self.second = nn.Linear(12, 12), nn.Linear(12, 12)
        self.second.weight = self.first.weight

    def forward(self, inputs):
        return self.second(self.first(self.norm(self.conv(inputs)).flatten(1)))


def test_flat_model__parameters_and_gradients_are_views_of_one_vector():
    model, inputs = Tied(), torch.randn(5, 2, 4, 4)
    flat = FlatModel(model)
    assert flat.names == tuple(name for name, _ in model.named_parameters())
    assert flat.theta.shape[1] == sum(p.numel() for p in model.parameters())
    torch.testing.assert_close(flat(inputs), model.eval()(inputs))
    flat(inputs).square().sum().backward()
    model(inputs).square().sum().backward()
    expected = torch.cat([p.grad.flatten() for p in model.parameters()])
    torch.testing.assert_close(flat.grad[0], expected)
    flat.theta.zero_()
    assert not flat(inputs).any()
    assert model(inputs).any()
    flat.grad.zero_()
    flat(inputs).sum().backward()  # still the same vector after another pass
    assert flat.grad.any()


def test_flat_model__runs_in_eval_mode_and_leaves_the_rest_frozen():
    flat = FlatModel(Tied().train(), trainable=["conv.*", "norm.bias"])
    assert not flat.module.training
    assert flat.names == ("conv.weight", "conv.bias", "norm.bias")
    frozen = [n for n, p in flat.module.named_parameters() if not p.requires_grad]
    assert frozen == ["norm.weight", "first.weight", "first.bias", "second.bias"]


def test_hash_weights__sees_weights_buffers_and_structure():
    hashes = {hash_weights(Tied())}
    changed = Tied()
    with torch.no_grad():
        changed.first.bias[3] += 1e-6
    other = Tied()
    other.norm.running_mean[0] = 1
    hashes |= {hash_weights(m) for m in (changed, other, nn.Sequential(Tied()), Tied().double())}
    assert len(hashes) == 5
    assert hash_weights(Tied()) in hashes


@pytest.mark.parametrize("shape", [(6,), (6, 4), (6, 2, 3)])
def test_mse__averages_to_torchs(shape):
    a, b = torch.randn(2, *shape)
    losses = per_example_loss("mse")(a, b)
    assert losses.shape == (6,)
    torch.testing.assert_close(losses.mean(), F.mse_loss(a, b))


def test_cross_entropy__is_float32_and_one_number_an_example():
    loss = per_example_loss("cross_entropy")
    logits, target = torch.randn(6, 4), torch.arange(6) % 4
    assert loss(logits.bfloat16(), target).dtype == torch.float32
    torch.testing.assert_close(loss(logits, target).mean(), F.cross_entropy(logits, target))
    maps, labels = torch.randn(6, 4, 5, 5), torch.randint(0, 4, (6, 5, 5))
    assert loss(maps, labels).shape == (6,)
    torch.testing.assert_close(loss(maps, labels).mean(), F.cross_entropy(maps, labels))


def test_batches__give_rows_in_order_and_at_indices():
    data = TensorDataset(torch.arange(20.0).reshape(10, 2), torch.arange(10))
    batches = Batches(data, name="data", device=torch.device("cpu"))
    seen = torch.cat([target for _, target in batches.slices(4)])
    assert seen.tolist() == list(range(10))
    inputs, target = batches.take(np.array([7, 2]))
    assert target.tolist() == [7, 2]
    assert inputs.tolist() == [[14, 15], [4, 5]]
    other = TensorDataset(data.tensors[0], data.tensors[1].flip(0))
    assert Batches(other, name="other", device=torch.device("cpu")).identity != batches.identity
