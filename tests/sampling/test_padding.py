"""Padding counts nowhere: tokens that are no part of a sequence, positions without a label."""

import re

import numpy as np
import pytest
import torch
import xarray as xr
from torch import nn
from torch.nn import functional as F
from torch.utils.data import Dataset, TensorDataset
from zarr.storage import MemoryStore

import lkarray as lk
from lkarray import errors
from lkarray.nn import batches, losses
from lkarray.store import open_root
from lkarray.store.seals import SEAL

OPTIONS = {
    "sampler": lk.SGLD(1e-3),
    "chains": 2,
    "draws": 12,
    "burn_in": 2,
    "chains_per_device": 1,
    "progress": False,
}


class Sums(nn.Module):
    """A language model in which a position sees those before it."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(1)
        self.embed, self.out = nn.Embedding(9, 6), nn.Linear(6, 9)

    def forward(self, input_ids, attention_mask=None):
        return self.out(self.embed(input_ids).cumsum(1))


def sequences(lengths, *, cut=False):
    ids = torch.randint(0, 9, (len(lengths), 10), generator=torch.Generator().manual_seed(0))
    if cut:
        return [{"input_ids": i[:n]} for i, n in zip(ids, lengths, strict=True)]
    masks = [(torch.arange(10) < n).long() for n in lengths]
    return [{"input_ids": i, "attention_mask": m} for i, m in zip(ids, masks, strict=True)]


def run(data, loss="next_token", store=None, **changes):
    posterior = lk.LocalPosterior(Sums(), data, loss=loss, nbeta=5, gamma=10)
    return lk.sample(posterior, data, store=store or MemoryStore(), **(OPTIONS | changes))


RAGGED = [10, 4, 2, 7, 10, 3]


def test_llc__of_padded_tokens_is_that_of_their_means(tmp_path):
    data = sequences(RAGGED)
    tokens, means = run(data, store=tmp_path / "s"), run(data, "next_token_mean")
    np.testing.assert_allclose(lk.llc(tokens), lk.llc(means), rtol=1e-5)
    np.testing.assert_allclose(
        lk.llc(tokens).standard_error, lk.llc(means).standard_error, rtol=1e-5
    )
    for name in ("loss", "center_loss"):
        per_sequence = tokens["losses"][name].mean("token")
        np.testing.assert_allclose(per_sequence, means["losses"][name], rtol=1e-5)
    gain = lk.loss_gain(tokens).mean("token")
    np.testing.assert_allclose(gain, lk.loss_gain(means), rtol=1e-3, atol=1e-6)
    assert lk.verify(tmp_path / "s") == []
    assert run(data, store=tmp_path / "s").identical(lk.open(tmp_path / "s"))


def test_summaries__of_padded_tokens_are_those_without_the_padding():
    padded, cut = run(sequences([4] * 6)), run(sequences([4] * 6, cut=True))
    for summary in (lk.llc, lk.singular_fluctuation):
        got, expected = summary(padded), summary(cut)
        np.testing.assert_allclose(got, expected, rtol=1e-5)
        np.testing.assert_allclose(got.standard_error, expected.standard_error, rtol=1e-4)
    alone = lk.singular_fluctuation(padded["losses"]["loss"], nbeta=5)
    np.testing.assert_allclose(alone, lk.singular_fluctuation(cut), rtol=1e-5)
    got, expected = lk.diagnostics(padded), lk.diagnostics(cut)
    assert got.attrs["verdicts"] == expected.attrs["verdicts"]
    assert got.attrs["summary"] == expected.attrs["summary"]
    for name in ("rhat", "ess_bulk", "mcse", "within_variance"):
        np.testing.assert_allclose(got[name][:, :3], expected[name], rtol=1e-3)
        assert got[name][:, 3:].isnull().all()
    bare = lk.diagnostics(padded["losses"]["loss"])  # without the losses at w*
    np.testing.assert_array_equal(bare["rhat"], got["rhat"])


def test_llc__a_draw_that_is_nan_is_not_taken_for_padding():
    tree = run(sequences(RAGGED))
    ds = tree["losses"].to_dataset().load()
    ds["loss"][0, 3, 0, 0] = np.nan
    assert np.isnan(lk.llc(ds))
    assert np.isnan(lk.singular_fluctuation(ds))
    bare = lk.singular_fluctuation(ds["loss"], nbeta=5)
    assert np.isnan(bare)


def test_kernels__of_tokens_leave_padding_out_as_their_error_says():
    losses = run(sequences(RAGGED))["losses"]["loss"]
    with pytest.raises(errors.SchemaError) as told:
        lk.correlation(losses)
    remedy = re.search(r"or (\.stack.*dropna\('position'\))", str(told.value))[1]
    flat = eval(f"losses{remedy}")
    assert flat.chunks is not None
    assert flat.sizes["position"] == sum(n - 1 for n in RAGGED)
    plain = losses.values[..., ~np.isnan(losses.values[0, 0])].reshape(-1, flat.shape[-1])
    np.testing.assert_allclose(lk.correlation(flat), np.corrcoef(plain.T), atol=1e-4)
    per_sequence = lk.correlation(losses.mean("token"))
    assert np.isfinite(per_sequence).all()
    whole = losses.stack(position=("sample", "token")).reset_index("position")
    with pytest.raises(errors.NonFiniteError, match=r"padding.*x.dropna\('position'\)"):
        lk.correlation(whole).compute()


def test_next_token__a_diverging_chain_is_flagged_and_padding_is_not(tmp_path):
    with pytest.raises(errors.DivergedError):
        run(sequences(RAGGED), store=tmp_path / "s", sampler=lk.SGLD(1e12))
    assert lk.verify(tmp_path / "s") == []  # its non-finite losses are flagged


def test_verify__a_token_that_is_nan_and_no_padding_is_a_fault(tmp_path):
    run(sequences(RAGGED), store=tmp_path / "s")
    loss = open_root(tmp_path / "s", mode="r+")["losses/loss"]
    loss[1, 5, 1, 0] = np.nan
    (problem,) = lk.verify(tmp_path / "s")
    assert "non-finite losses at chain 1, draw 5" in str(problem)


def unseal(root):
    """Take seals and checksums of commits from a store, as those versions had none."""
    mark = {key: value for key, value in root.attrs["lkarray"].items() if key != "seal"}
    root.update_attributes({"lkarray": mark})
    for name in ("losses", "sample_stats", "state", "commit"):
        group = root[name]
        kept = {key: value for key, value in group.attrs.items() if key != SEAL}
        group.attrs.put(kept)
    for name in ("latest", "blocks"):
        del root[f"commit/{name}"]


def test_sample__a_store_that_counted_padding_opens_and_is_not_mixed(tmp_path):
    """As the versions before wrote: padding is a token of loss 0."""
    data = sequences(RAGGED)
    run(data, store=tmp_path / "s")
    root = open_root(tmp_path / "s", mode="r+")
    for name in ("loss", "center_loss"):
        root[f"losses/{name}"][...] = np.nan_to_num(root[f"losses/{name}"][...])
    unseal(root)
    assert np.isfinite(lk.open(tmp_path / "s")["losses/loss"]).all()
    with pytest.raises(errors.FingerprintError, match="stored padding as tokens of loss 0"):
        run(data, store=tmp_path / "s", draws=20)


def test_suggest__of_padded_tokens_sees_their_means():
    data = sequences(RAGGED)
    got, expected = (
        lk.suggest(
            lk.LocalPosterior(Sums(), data, loss, nbeta=5, gamma=10),
            data,
            step_sizes=[1e-3],
            draws=6,
            progress=False,
        )
        for loss in ("next_token", "next_token_mean")
    )
    np.testing.assert_allclose(got["loss_gain"], expected["loss_gain"], rtol=1e-3)


# --- positions without a label ------------------------------------------------


def labelled(n=10):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(n, 2, 8, generator=generator)
    y = torch.randint(0, 3, (n, 8), generator=generator)
    y[::2, 2:] = -100
    return TensorDataset(x, y)


@pytest.mark.parametrize("width", [1, 2])
def test_cross_entropy__is_torchs_of_each_example(width):
    torch.manual_seed(0)
    data, net = labelled(), nn.Conv1d(2, 3, 1)
    posterior = lk.LocalPosterior(net, data, nbeta=5, gamma=10)
    options = OPTIONS | {"chains_per_device": width, "draws": 4}
    tree = lk.sample(posterior, data, store=MemoryStore(), **options)
    expected = [F.cross_entropy(net(x[None]), y[None]).item() for x, y in data]
    np.testing.assert_allclose(tree["losses/center_loss"], expected, rtol=1e-5)


def test_cross_entropy__gradients_are_torchs_of_each_example():
    torch.manual_seed(0)
    (x, y), net = labelled().tensors, nn.Conv1d(2, 3, 1).double()
    got = torch.autograd.grad(losses.cross_entropy(net(x.double()), y).mean(), net.weight)[0]
    each = sum(F.cross_entropy(net(x[i : i + 1].double()), y[i : i + 1]) for i in range(len(x)))
    expected = torch.autograd.grad(each / len(x), net.weight)[0]
    torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("dtype", [torch.int64, torch.uint8])
def test_cross_entropy__of_labels_that_all_count_is_torchs_to_the_bit(dtype):
    torch.manual_seed(0)
    scores, y = torch.randn(6, 4), torch.tensor([0, 3, 1, 2, 2, 0], dtype=dtype)
    expected = F.cross_entropy(scores, y, reduction="none")
    assert torch.equal(losses.cross_entropy(scores, y), expected)


class Lazily(Dataset):
    def __init__(self, data):
        self.data = data

    def __len__(self):
        return len(self.data)

    def __getitem__(self, index):
        return self.data[index]


@pytest.mark.parametrize("held", [True, False])
def test_sample__examples_of_which_nothing_counts_are_named(held, monkeypatch):
    bad = labelled()
    bad.tensors[1][[3, 8]] = -100
    if not held:
        bad = Lazily(bad)
        monkeypatch.setattr(batches, "CACHE_BYTES", 0)
    net = nn.Conv1d(2, 3, 1)
    for posterior, observed in (
        (lk.LocalPosterior(net, bad, nbeta=5), labelled()),
        (lk.LocalPosterior(net, labelled(), nbeta=5), bad),
    ):
        name = "train_set" if observed is not bad else "observed"
        with pytest.raises(ValueError, match=rf"{name}: examples \[3, 8\] have no loss"):
            lk.sample(posterior, observed, store=MemoryStore(), **OPTIONS | {"batch_size": None})
    with pytest.raises(ValueError, match="have no loss.*padding"):
        run(sequences([5, 1, 4]))  # one token predicts nothing


def test_sample__single_labels_that_do_not_count_are_named():
    y = torch.tensor([0, 1, -100, 2])
    data = TensorDataset(torch.randn(4, 5), y)
    posterior = lk.LocalPosterior(nn.Linear(5, 3), data)
    with pytest.raises(ValueError, match=r"examples \[2\] have no loss"):
        lk.sample(posterior, data, store=MemoryStore(), **OPTIONS)


def test_loss_variance__of_padding_is_nan_and_of_tokens_is_not():
    tree = run(sequences(RAGGED))
    variance = lk.loss_variance(tree)
    xr.testing.assert_equal(
        variance.isnull().drop_attrs(),
        tree["losses"]["center_loss"].isnull().rename("loss_variance").drop_attrs(),
    )
