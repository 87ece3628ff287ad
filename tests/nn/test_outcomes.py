"""Outcomes of single outputs, against float64 and pencil."""

import warnings
from functools import partial

import numpy as np
import pytest
import torch
from torch import nn
from torch.func import vmap
from torch.nn import functional as F

import lkarray as lk
from lkarray.nn import Batches, per_example_loss
from lkarray.nn.losses import binary_log_odds, logits
from lkarray.nn.outcomes import (
    BUILT_IN,
    chosen_outcomes,
    log_odds,
    next_token_log_odds,
    residual,
    with_outcomes,
)


def scores_and_classes(n=200, classes=5, scale=3.0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    scores = scale * torch.randn(n, classes, generator=generator, dtype=torch.float64)
    return scores.to(dtype), torch.randint(classes, (n,), generator=generator)


def brute_force(scores, target):
    """Of float64 logits, one example at a time: the others' logsumexp minus the target's own."""
    out = []
    for row, y in zip(scores.double().numpy(), target.tolist(), strict=True):
        others = np.delete(row, y)
        top = others.max()
        out.append(top - row[y] + np.log(np.exp(others - top).sum()))
    return np.array(out)


def softplus(odds):
    with np.errstate(invalid="ignore"):  # of padding
        return np.logaddexp(0, np.asarray(odds, np.float64))


@pytest.mark.parametrize("scale", [1e-3, 1.0, 30.0, 300.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_log_odds__are_those_of_float64(scale, dtype):
    scores, target = scores_and_classes(scale=scale, dtype=dtype)
    odds, eps = log_odds(scores, target), torch.finfo(dtype).eps
    assert odds.dtype == dtype
    np.testing.assert_allclose(odds, brute_force(scores, target), rtol=4 * eps, atol=8 * eps)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("size", [0.1, 80.0, 90.0, 700.0])
def test_log_odds__of_saturated_networks_make_the_loss(size, dtype):
    """Where a float32 loss is 0, log-odds still tell how sure the network is."""
    scores = torch.tensor([[size, 0.0, -1.0], [-size, 0.0, -1.0]], dtype=dtype)
    target = torch.tensor([0, 0])
    odds = log_odds(scores, target)
    np.testing.assert_allclose(odds, brute_force(scores, target), rtol=1e-6)
    exact = -torch.log_softmax(scores.double(), 1)[:, 0]
    np.testing.assert_allclose(softplus(odds)[1], exact[1], rtol=1e-6)
    loss = F.cross_entropy(scores, target, reduction="none")
    np.testing.assert_allclose(softplus(odds), loss, rtol=1e-5, atol=2e-7)
    if size >= 80:
        assert loss[0] == 0
        assert odds[0] < -79


def test_log_odds__lose_nothing_to_what_all_logits_share():
    scores, target = scores_and_classes(dtype=torch.float32)
    # Powers of two, so that the sums are exact: 2**20 and float32 have three bits behind the point.
    rounded = (scores * 8).round() / 8
    np.testing.assert_array_equal(log_odds(rounded + 2.0**20, target), log_odds(rounded, target))


def test_log_odds__leave_masked_classes_out():
    scores, target = scores_and_classes(classes=6)
    target = target.clamp(max=3)
    masked = scores.clone()
    masked[:, 4:] = -torch.inf
    np.testing.assert_array_equal(log_odds(masked, target), log_odds(scores[:, :4], target))
    # A masked target is never right, and one class alone never wrong.
    assert (log_odds(masked, torch.full_like(target, 4)) == torch.inf).all()
    alone = torch.tensor([[-torch.inf, 1.0, -torch.inf]])
    assert log_odds(alone, torch.tensor([1])) == -torch.inf


def test_log_odds__of_targets_that_do_not_count_are_missing():
    scores, target = scores_and_classes()
    ignored = target.clone()
    ignored[::3] = -100
    odds = log_odds(scores, ignored)
    np.testing.assert_array_equal(odds.isnan(), ignored == -100)
    np.testing.assert_array_equal(odds[ignored != -100], log_odds(scores, target)[ignored != -100])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_log_odds__of_narrow_logits_are_float32(dtype):
    scores, target = scores_and_classes(dtype=dtype)
    odds = log_odds(scores, target)
    assert odds.dtype == torch.float32
    np.testing.assert_allclose(odds, brute_force(scores, target), rtol=1e-6, atol=1e-6)


def test_log_odds__have_the_gradient_of_their_definition():
    scores, target = scores_and_classes(n=6, classes=4)
    scores[0, 3] = -torch.inf
    target[0] = 1
    scores.requires_grad_()
    (slope,) = torch.autograd.grad(log_odds(scores, target).sum(), scores)
    rest = scores.detach().scatter(1, target.unsqueeze(1), -torch.inf)
    expected = rest.softmax(1).scatter(1, target.unsqueeze(1), -1.0)
    torch.testing.assert_close(slope, expected)
    torch.autograd.gradgradcheck(lambda s: log_odds(s, target[1:]), scores[1:])


def test_log_odds__do_not_change_the_logits_and_run_side_by_side():
    scores, target = scores_and_classes()
    before = scores.clone()
    stacked = torch.stack([scores, 2 * scores])
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # of operations that vmap would loop over
        both = vmap(log_odds, in_dims=(0, None))(stacked, target)
    torch.testing.assert_close(both[0], log_odds(scores, target))
    torch.testing.assert_close(both[1], log_odds(2 * scores, target))
    assert torch.equal(scores, before)


@pytest.mark.parametrize(
    ("output", "target", "words"),
    [
        (torch.zeros(3, 1), torch.tensor([0, 0, 0]), "two classes or more.*binary_cross_entropy"),
        (torch.zeros(3, 4), torch.full((3, 4), 0.25), "probabilities"),
        (torch.zeros(3, 4, 2), torch.zeros(3, 2).long(), "mean over positions"),
        (torch.zeros(3, 4), None, "a class of each example"),
    ],
)
def test_log_odds__say_what_they_need(output, target, words):
    with pytest.raises(ValueError, match=words):
        log_odds(output, target)


def tokens(dtype=torch.float32):
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(7, (4, 9), generator=generator)
    scores = 4 * torch.randn(4, 9, 7, generator=generator, dtype=torch.float64)
    return scores.to(dtype), ids


def test_next_token__log_odds_are_of_the_tokens_that_losses_are_of():
    scores, ids = tokens()
    mask = torch.ones_like(ids)
    mask[1, 5:] = 0
    target = {"input_ids": ids, "attention_mask": mask}
    odds, loss = next_token_log_odds(scores, target), per_example_loss("next_token")(scores, target)
    assert odds.shape == loss.shape == (4, 8)
    np.testing.assert_array_equal(odds.isnan(), loss.isnan())
    np.testing.assert_array_equal(odds.isnan(), mask[:, 1:] == 0)
    np.testing.assert_allclose(softplus(odds), loss, rtol=1e-5, atol=1e-6)
    flat = brute_force(scores[:, :-1].reshape(-1, 7), ids[:, 1:].reshape(-1)).reshape(4, 8)
    np.testing.assert_allclose(odds[0], flat[0], rtol=1e-5, atol=1e-6)


def test_next_token__log_odds_that_are_not_finite_are_no_padding():
    scores, ids = tokens()
    scores[2, 3] = torch.nan
    odds = next_token_log_odds(scores, ids)
    assert odds[2, 3] == torch.inf
    assert not odds.isnan().any()


def test_next_token__log_odds_copy_the_logits_once():
    """Vocabularies are large: of n numbers, n are copied and a mask of n bytes is made."""
    scores = torch.randn(1, 16, 50_000)
    ids = torch.randint(50_000, (1, 16))
    with torch.profiler.profile(profile_memory=True, record_shapes=False) as seen:
        next_token_log_odds(scores, ids)
    now, peak = 0, 0
    for event in seen.profiler.kineto_results.events():
        if event.name() == "[memory]":
            now += event.nbytes()
            peak = max(peak, now)
    assert scores.nbytes < peak < 1.4 * scores.nbytes


@pytest.mark.parametrize("shape", [(-1,), (-1, 1)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_binary__loss_and_log_odds(shape, dtype):
    scores = torch.tensor([-90.0, -3.0, 0.0, 0.5, 25.0, 90.0], dtype=dtype).repeat(2)
    target = torch.tensor([0] * 6 + [1] * 6)
    loss = per_example_loss("binary_cross_entropy")
    args = scores.reshape(shape), target.reshape(shape)
    odds = binary_log_odds(*args)
    sign = np.where(target.numpy() == 1, -1, 1)
    np.testing.assert_array_equal(odds, sign * scores.numpy())
    tight = {"rtol": 4 * torch.finfo(dtype).eps, "atol": 1e-40}
    np.testing.assert_allclose(loss(*args), softplus(odds), **tight)
    both = torch.stack([torch.zeros_like(scores), scores], 1)  # the same as two classes
    np.testing.assert_allclose(log_odds(both, target), odds, rtol=1e-6)
    reference = F.binary_cross_entropy_with_logits(scores, target.to(dtype), reduction="none")
    np.testing.assert_allclose(loss(*args), reference, rtol=1e-6, atol=1e-30)


def test_binary__targets_that_are_neither_are_no_examples():
    loss = per_example_loss("binary_cross_entropy")
    target = torch.tensor([0.0, 1.0, 0.5, -100.0])
    assert loss(torch.zeros(4), target).isnan().tolist() == [False, False, True, True]
    items = torch.utils.data.TensorDataset(torch.zeros(4, 2), target)
    data = Batches(items, name="observed", device=torch.device("cpu"))
    with pytest.raises(ValueError, match=r"observed: examples \[2, 3\] have no loss"):
        data.refuse_uncounted(loss.counts)
    with pytest.raises(ValueError, match="one logit and one target"):
        loss(torch.zeros(4, 2), torch.zeros(4))


def test_binary__gradients_hold_where_it_is_saturated():
    scores = torch.tensor([-300.0, 300.0, 0.0], requires_grad=True)
    loss = per_example_loss("binary_cross_entropy")(scores, torch.tensor([1, 1, 1]))
    (slope,) = torch.autograd.grad(loss.sum(), scores, create_graph=True)
    np.testing.assert_allclose(slope.detach(), [-1, 0, -0.5], atol=1e-7)
    (bend,) = torch.autograd.grad(slope.sum(), scores)
    np.testing.assert_allclose(bend, [0, 0, 0.25], atol=1e-7)


@pytest.mark.parametrize("shape", [(5,), (5, 1)])
def test_residual__squared_is_the_loss(shape):
    output, target = torch.randn(2, *shape, generator=torch.Generator().manual_seed(0))
    values = residual(output, target)
    assert values.shape == (5,)
    assert torch.equal(values, (output - target).reshape(5))
    torch.testing.assert_close(values.square(), per_example_loss("mse")(output, target))


@pytest.mark.parametrize("shape", [(5, 2), (5, 1, 1)])
def test_residual__of_several_outputs_is_refused(shape):
    with pytest.raises(ValueError, match=rf"one output.*{shape[1]}"):
        residual(torch.zeros(shape), torch.zeros(shape))


# --- what is asked for ---------------------------------------------------------------------------


def margin(output, target):
    return output[:, 0] * (1 - 2 * target)


def test_chosen__are_of_the_loss():
    for name, of_losses in BUILT_IN.items():
        for loss, expected in of_losses.items():
            assert chosen_outcomes(per_example_loss(loss), ("loss", name)) == (expected,)
    assert chosen_outcomes(per_example_loss("mse"), ["loss"]) == ()
    own = lk.Outcome("margin", margin, "softplus")
    assert chosen_outcomes(per_example_loss(margin), ("loss", own)) == (own,)


@pytest.mark.parametrize(
    ("loss", "asked", "kind", "words"),
    [
        ("cross_entropy", ("log_odds",), ValueError, "must begin with 'loss'"),
        ("cross_entropy", (), ValueError, "must begin with 'loss'"),
        ("cross_entropy", ("loss", "loss"), ValueError, "'loss' is named twice"),
        ("cross_entropy", ("loss", "log_odds", "log_odds"), ValueError, "'log_odds' is named twi"),
        ("cross_entropy", ("loss", "odds"), ValueError, r"'odds' is not one of.*lk\.Outcome"),
        ("cross_entropy", ("loss", "residual"), ValueError, r"has no 'residual'.*\['mse'\]"),
        ("mse", ("loss", "log_odds"), ValueError, "'mse' has no 'log_odds'"),
        ("next_token_mean", ("loss", "log_odds"), ValueError, "mean.*take loss='next_token'"),
        (margin, ("loss", "log_odds"), ValueError, r"margin@.*lk\.Outcome\('log_odds'"),
        ("cross_entropy", "loss", TypeError, "a tuple of names"),
        ("cross_entropy", ("loss", 3), TypeError, "3 must be a name or"),
        (
            "mse",
            ("loss", lk.Outcome("residual", margin, "softplus")),
            ValueError,
            "'residual' is the name of outcomes with link 'square'",
        ),
    ],
)
def test_chosen__refuses_by_name(loss, asked, kind, words):
    with pytest.raises(kind, match=words):
        chosen_outcomes(per_example_loss(loss), asked)


@pytest.mark.parametrize(
    ("changed", "kind", "words"),
    [
        ({"name": 3}, TypeError, "name must be a string"),
        ({"name": "two words"}, ValueError, "'two words'"),
        ({"of_logits": "f"}, TypeError, "of_logits must be a function"),
        ({"link": "logit"}, ValueError, "'logit' is not one of"),
        ({"link": ("a", "b")}, TypeError, "link must be one of"),
        ({"link": ("square", np.square)}, ValueError, "lkarray's own"),
        ({"units": 1}, TypeError, "units must be a string"),
    ],
)
def test_outcome__refuses_by_name(changed, kind, words):
    made = {"name": "margin", "of_logits": margin, "link": "softplus"}
    with pytest.raises(kind, match=words):
        lk.Outcome(**(made | changed))


def test_outcome__is_recorded_by_what_it_does():
    one, other = (lk.Outcome("a", partial(torch.mul, other=k), "square") for k in (1, 2))
    again = lk.Outcome("a", partial(torch.mul, other=1), "square")
    assert one.recorded == again.recorded != other.recorded
    assert BUILT_IN["log_odds"]["next_token"].recorded["function"] == "log_odds"
    own = lk.Outcome("p", margin, ("negative_log", lambda p: -np.log(p)), units="1")
    assert own.recorded["link"] == own.link_name == "negative_log"
    assert own.link_function(np.array([1.0])) == 0


def test_outcome__that_does_not_make_the_loss_is_refused():
    scores, target = scores_and_classes(n=4)
    losses = per_example_loss("cross_entropy")(scores, target)
    right = BUILT_IN["log_odds"]["cross_entropy"]
    right.check(losses, scores, target)
    with pytest.raises(ValueError, match="link 'softplus' makes"):
        lk.Outcome("o", lambda s, y: -log_odds(s, y), "softplus").check(losses, scores, target)
    with pytest.raises(ValueError, match=r"shape \(4, 5\) where losses have \(4,\)"):
        lk.Outcome("o", lambda s, y: s, "softplus").check(losses, scores, target)
    with pytest.raises(TypeError, match="returned float"):
        lk.Outcome("o", lambda s, y: 1.0, "softplus").check(losses, scores, target)
    with pytest.raises(ValueError, match="outcome 'o': of three"):
        lk.Outcome("o", lambda s, y: _raise("of three"), "softplus").check(losses, scores, target)


def _raise(words):
    raise RuntimeError(words)


def test_with_outcomes__gives_the_losses_bit_for_bit():
    torch.manual_seed(0)
    model, inputs, target = nn.Linear(3, 4), torch.randn(5, 3), torch.tensor([0, 1, 2, 3, 0])
    loss = per_example_loss("cross_entropy")
    both = with_outcomes(loss, chosen_outcomes(loss, ("loss", "log_odds")))
    output = model(inputs)
    losses, odds = both(output, target)
    assert torch.equal(losses, loss(output, target))
    assert torch.equal(odds, log_odds(logits(output), target))
