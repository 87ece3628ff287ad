"""Per-example gradients, against autograd of one example at a time, in float64."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lkarray.nn import per_example_loss
from lkarray.nn.batches import batch_size
from lkarray.nn.flat import FlatModel
from lkarray.nn.gradients import ExampleGradients


class Block(nn.Module):
    """A transformer block with attention of torch's own, tied embedding, and a bare parameter."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(11, 8, padding_idx=0)
        self.place = nn.Parameter(torch.randn(5, 8))
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.norm = nn.LayerNorm(8)
        self.first, self.second = nn.Linear(8, 16), nn.Linear(16, 8)
        self.head = nn.Linear(8, 11, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids):
        x = self.embed(ids) + self.place
        x = x + self.attention(x, x, x, need_weights=False)[0]
        return self.head(x + self.second(F.gelu(self.first(self.norm(x))))).mean(1)


class Turned(nn.Module):
    """A layer that sees positions first, one whose weight is read elsewhere, one unused."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(3, 4), nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x):  # (n, 2, 3)
        x = self.a(x.transpose(0, 1)).transpose(0, 1)
        return self.b(torch.tanh(x)).sum(1) @ self.b.weight


def conv(**options):
    return nn.Sequential(
        nn.Conv2d(4, 6, 3, **options), nn.ReLU(inplace=True), nn.Flatten(), nn.LazyLinear(3)
    )


IMAGE = (4, 9, 8)


def chain(*layers):
    return lambda: nn.Sequential(*(layer() for layer in layers), nn.Flatten(), nn.LazyLinear(3))


def norms():
    middle = nn.BatchNorm2d(6), nn.GroupNorm(3, 6), nn.Flatten(2), nn.LayerNorm([6, 42])
    return nn.Sequential(
        nn.Conv2d(4, 6, 3), *middle, nn.RMSNorm(42), nn.Flatten(), nn.LazyLinear(3)
    )


MODELS = {
    "mlp": (chain(lambda: nn.Linear(5, 7), nn.Tanh, lambda: nn.Linear(7, 3, bias=False)), (5,)),
    "positions": (chain(lambda: nn.Linear(5, 6), nn.Tanh), (4, 5)),
    "reused": (lambda: nn.Sequential(*[nn.Linear(5, 5)] * 3, nn.Linear(5, 3)), (5,)),
    "conv": (lambda: conv(), IMAGE),
    "conv stride": (lambda: conv(stride=(2, 1), padding=(1, 2)), IMAGE),
    "conv wide": (
        lambda: nn.Sequential(nn.Conv2d(48, 4, 3), nn.Flatten(), nn.LazyLinear(3)),
        (48, 5, 4),
    ),
    "conv dilation groups": (lambda: conv(dilation=2, groups=2, bias=False), IMAGE),
    "conv same": (lambda: conv(padding="same", dilation=(2, 1)), IMAGE),
    "conv reflect": (lambda: conv(padding=2, padding_mode="reflect"), IMAGE),
    "conv1d": (chain(lambda: nn.Conv1d(4, 6, 3, stride=2, padding=1, groups=2)), (4, 9)),
    "conv3d": (chain(lambda: nn.Conv3d(2, 3, 2)), (2, 3, 4, 3)),
    "norms": (norms, IMAGE),
    "rnn": (lambda: Last(), (4, 5)),
    "turned": (lambda: Turned(), (2, 3)),
}


class Last(nn.Module):
    def __init__(self):
        super().__init__()
        self.rnn, self.head = nn.GRU(5, 6, batch_first=True), nn.Linear(6, 3)

    def forward(self, x):
        return self.head(self.rnn(x)[0][:, -1])


def build(name, n=6, dtype=torch.float64):
    torch.manual_seed(0)
    make, shape = MODELS[name]
    inputs = torch.randn(n, *shape, dtype=dtype)
    model = make().to(dtype)
    model(inputs)  # sizes of the lazy layers, statistics of the norms
    for p in model.parameters():
        nn.init.normal_(p, std=0.5)
    return model.eval(), inputs, torch.arange(n) % 3


def one_by_one(model, loss, inputs, target):
    """Gradients of each example alone: the definition."""
    rows = []
    for i in range(batch_size((inputs, target))):
        model.zero_grad()
        loss(model(inputs[i : i + 1]), target[i : i + 1]).sum().backward()
        grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in model.parameters()]
        rows.append(torch.cat([g.flatten() for g in grads]))
    return torch.stack(rows)


@pytest.fixture
def loss():
    # In the inputs' own precision: the named one is of float32 logits.
    return per_example_loss(
        lambda output, target: F.cross_entropy(output, target, reduction="none")
    )


def engine(model, loss, inputs, target):
    return ExampleGradients(FlatModel(model), loss, (inputs[:2], target[:2]))


@pytest.mark.parametrize("name", MODELS)
def test_gradients__are_those_of_each_example_alone(name, loss):
    model, inputs, target = build(name)
    expected = one_by_one(model, loss, inputs, target)
    per_example = engine(model, loss, inputs, target)
    torch.testing.assert_close(
        per_example.gradients(inputs, target), expected, rtol=1e-10, atol=1e-12
    )
    assert per_example.gradients(inputs, target).any(0).sum() > 0.5 * expected.shape[1]
    functional = {site.name for site in per_example.plan.sites if site.way == "torch.func"}
    assert bool(functional) == (name in {"conv3d", "rnn", "turned"}), functional


@pytest.mark.parametrize("name", MODELS)
def test_products__equal_those_of_the_gradients(name, loss):
    model, inputs, target = build(name)
    per_example = engine(model, loss, inputs, target)
    whole = per_example.gradients(inputs, target)
    some = per_example.features(inputs[:4], target[:4])
    products = some.products(per_example.features(inputs, target))
    torch.testing.assert_close(products, whole[:4] @ whole.T, rtol=1e-10, atol=1e-10)


def test_gradients__a_transformer_with_tied_weights(loss):
    torch.manual_seed(0)
    model = Block().double().eval()
    ids, target = torch.randint(0, 11, (6, 5)), torch.arange(6)
    ids[0, -1] = 0
    expected = one_by_one(model, loss, ids, target)
    per_example = engine(model, loss, ids, target)
    torch.testing.assert_close(per_example.gradients(ids, target), expected, rtol=1e-10, atol=1e-12)
    ways = {site.name: site.way for site in per_example.plan.sites}
    assert ways["embed.weight"] == ways["norm.weight"] == ways["first.weight"] == "hooks"
    assert ways["place"] == ways["attention.in_proj_weight"] == "torch.func"


def test_gradients__a_subset_of_parameters(loss):
    model, inputs, target = build("norms")
    whole = engine(model, loss, inputs, target)
    flat = FlatModel(model, trainable=["1.*", "7.bias"])
    part = ExampleGradients(flat, loss, (inputs, target)).gradients(inputs, target)
    columns = [whole._column(name) for name in ("1.weight", "1.bias", "7.bias")]
    expected = torch.cat([whole.gradients(inputs, target)[:, c] for c in columns], 1)
    torch.testing.assert_close(part, expected)


def test_gradients__follow_the_weights(loss):
    model, inputs, target = build("mlp")
    per_example = engine(model, loss, inputs, target)
    before = per_example.gradients(inputs, target)
    per_example.flat.theta.mul_(0.5)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(0.5)
    expected = one_by_one(model, loss, inputs, target)
    assert not torch.allclose(before, expected)
    torch.testing.assert_close(per_example.gradients(inputs, target), expected)


def test_plan__chooses_by_cost_and_prints(loss):
    model = nn.Sequential(nn.Conv2d(1, 6, 5), nn.Flatten(), nn.Linear(96, 40), nn.Linear(40, 3))
    inputs, target = torch.randn(2, 1, 8, 8), torch.arange(2)
    plan = engine(model.eval(), loss, inputs, target).plan
    forms = {site.name: (site.form, site.cost) for site in plan.sites}
    assert forms["2.weight"] == ("factored", 136)
    assert forms["0.weight"] == ("materialised", 150)
    assert f"{plan.cost:,} instead of {sum(p.numel() for p in model.parameters()):,}" in str(plan)


def test_features__of_tensors_that_are_to_be_materialised(loss):
    model, inputs, target = build("mlp")
    per_example = engine(model, loss, inputs, target)
    expected = per_example.gradients(inputs, target)
    factored = {site.name for site in per_example.plan.sites if site.form == "factored"}
    assert factored
    before = per_example.features(inputs, target).products(per_example.features(inputs, target))
    per_example.materialise(factored)
    after = per_example.features(inputs, target)
    assert not after.factors
    torch.testing.assert_close(after.dense, expected)
    torch.testing.assert_close(before, expected @ expected.T)
    torch.testing.assert_close(after.numbers, loss(model(inputs), target))


def test_plan__layers_off_the_way_have_zeros_and_need_no_functional_pass(loss):
    """An early activation does not depend on the layers after it."""

    class Early(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.later = nn.Linear(5, 4), nn.Linear(4, 3)

        def forward(self, x):
            x = torch.tanh(self.first(x))
            self.later(x)
            return x

    model = Early().double()
    inputs, target = torch.randn(6, 5, dtype=torch.float64), torch.arange(6) % 4
    per_example = engine(model, loss, inputs, target)
    assert {site.way for site in per_example.plan.sites} == {"hooks"}
    gradients = per_example.gradients(inputs, target)
    torch.testing.assert_close(gradients, one_by_one(model, loss, inputs, target))
    assert not gradients[:, -15:].any()


def test_gradients__refuse_examples_that_influence_each_other():
    def coupled(output, target):
        return F.cross_entropy(output, target, reduction="none") + output.mean().square()

    model, inputs, target = build("mlp")
    with pytest.raises(ValueError, match="examples influence each other"):
        engine(model, per_example_loss(coupled), inputs, target)
