"""Bad input gets a clear error before any work."""

import numpy as np
import pytest
import torch
import xarray as xr
import zarr
from torch import nn
from torch.utils.data import IterableDataset, TensorDataset

import lkarray as lk
from lkarray import errors
from tests.helpers.networks import in_memory


@pytest.mark.parametrize("name", ["nbeta", "gamma"])
@pytest.mark.parametrize("value", [-1.0, float("nan"), float("inf")])
def test_posterior__refuses_negative_or_infinite_strengths(model, data, name, value):
    with pytest.raises(ValueError, match=f"{name} must be a finite number of at least 0"):
        lk.LocalPosterior(model, data, **{name: value})


def test_posterior__refuses_a_flat_posterior(model, data):
    with pytest.raises(ValueError, match="both 0"):
        lk.LocalPosterior(model, data, nbeta=0, gamma=0)


@pytest.mark.parametrize("value", [-1e-3, 0.0, float("nan")])
def test_sgld__refuses_a_step_size_that_is_not_positive(value):
    with pytest.raises(ValueError, match="step_size must be a positive number"):
        lk.SGLD(step_size=value)


def test_posterior__refuses_a_model_without_trainable_parameters(model, data):
    with pytest.raises(ValueError, match="no trainable parameters"):
        lk.LocalPosterior(nn.Flatten(), data)
    with pytest.raises(ValueError, match="no trainable parameters"):
        lk.LocalPosterior(model.requires_grad_(False), data)
    with pytest.raises(ValueError, match=r"'fc\*' matches none of \['0.bias'"):
        lk.LocalPosterior(model, data, trainable="fc*")
    with pytest.raises(TypeError, match="torch.nn.Module, not str"):
        lk.LocalPosterior("resnet", data)


def test_posterior__refuses_weights_it_cannot_sample(model, data):
    odd = nn.Linear(6, 3)
    odd.weight = nn.Parameter(torch.zeros(3, 6, dtype=torch.complex64))
    with pytest.raises(ValueError, match=r"several dtypes|parameters are torch.complex64"):
        lk.LocalPosterior(odd, data)
    mixed = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 3).double())
    with pytest.raises(ValueError, match=r"several dtypes or devices.*convert the model"):
        lk.LocalPosterior(mixed, data)
    with torch.no_grad():
        model[0].weight[0, 0] = np.nan
    with pytest.raises(errors.NonFiniteError, match="'0.weight' holds NaN"):
        lk.LocalPosterior(model, data)


def test_posterior__refuses_an_unknown_loss(model, data):
    with pytest.raises(ValueError, match="'hinge' is not one of"):
        lk.LocalPosterior(model, data, "hinge")
    with pytest.raises(TypeError, match="or a callable"):
        lk.LocalPosterior(model, data, 3)


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        (nn.CrossEntropyLoss(), r"returned shape \(\) for a batch of 2.*reduction='none'"),
        (lambda out, y: out, r"returned shape \(2, 3\)"),
        (lambda out, y: 1.0, "returned float, not a tensor"),
        (lambda out, y: out @ y, "failed on output of shape"),
        ("mse", "one shape; reshape"),
    ],
)
def test_sample__refuses_a_loss_that_is_not_per_example(tmp_path, model, data, loss, message):
    posterior = lk.LocalPosterior(model, data, loss)
    with pytest.raises((ValueError, TypeError), match=message):
        lk.sample(posterior, data, sampler=lk.SGLD(1e-3), store=tmp_path / "s")
    assert not (tmp_path / "s").exists()


def test_sample__refuses_labels_of_the_wrong_length(tmp_path, sample):
    with pytest.raises(
        errors.SchemaError, match=r"coords\['label'\] has shape \(3,\).* 40 samples"
    ):
        sample(tmp_path / "s", coords={"label": [1, 2, 3]})
    with pytest.raises(errors.SchemaError, match="distinct integers"):
        sample(tmp_path / "s", coords={"sample": np.zeros(40, int)})
    with pytest.raises(errors.SchemaError, match="name of lkarray itself"):
        sample(tmp_path / "s", coords={"loss": np.zeros(40)})
    assert not (tmp_path / "s").exists()


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"chains": 0}, "chains must be at least 1"),
        ({"draws": -1}, "draws must be at least 1"),
        ({"burn_in": -1}, "burn_in must be at least 0"),
        ({"thin": 0}, "thin must be at least 1"),
        ({"batch_size": 0}, "batch_size must be at least 1"),
        ({"draws": 2.5}, "draws must be an integer, not float"),
        ({"draws": 2**24}, "noise that never repeats"),
        ({"sampler": "sgld"}, "sampler must be one such as lk.SGLD"),
    ],
)
def test_sample__refuses_bad_counts(tmp_path, sample, option, message):
    with pytest.raises((ValueError, TypeError), match=message):
        sample(tmp_path / "s", **option)
    assert not (tmp_path / "s").exists()


class Stream(IterableDataset):
    def __iter__(self):
        yield torch.zeros(6), 0


class Augmented(torch.utils.data.Dataset):
    def __len__(self):
        return 3

    def __getitem__(self, index):
        return torch.rand(6), 0


@pytest.mark.parametrize(
    ("observed", "message"),
    [
        (TensorDataset(torch.zeros(0, 6), torch.zeros(0)), "observed is empty"),
        (Stream(), "map-style"),
        (TensorDataset(*torch.zeros(3, 3, 6)), "expected a pair"),
        (Augmented(), "differs between two readings"),
        (TensorDataset(torch.zeros(3, 5), torch.zeros(3).long()), "the model failed on the first"),
    ],
)
def test_sample__refuses_data_it_cannot_observe(tmp_path, posterior, observed, message):
    with pytest.raises((ValueError, TypeError), match=message):
        lk.sample(posterior, observed, sampler=lk.SGLD(1e-3), store=tmp_path / "s")
    assert not (tmp_path / "s").exists()


def test_sample__refuses_non_finite_losses_at_the_center(tmp_path, posterior):
    inputs = torch.zeros(5, 6)
    inputs[3] = np.nan
    observed = TensorDataset(inputs, torch.zeros(5).long())
    with pytest.raises(errors.NonFiniteError, match=r"1 of 5 observed samples, first \[3\]"):
        lk.sample(posterior, observed, sampler=lk.SGLD(1e-3), store=tmp_path / "s")
    assert not (tmp_path / "s").exists()


def test_sample__takes_models_with_masks_ties_and_extra_state(data):
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.head = nn.Linear(6, 6), nn.Linear(6, 6)
            self.head.weight = self.first.weight
            self.register_buffer(
                "mask", torch.full((6,), -torch.inf).masked_fill(torch.arange(6) < 3, 0.0)
            )

        def forward(self, inputs):
            return self.head(self.first(inputs)) + self.mask

        def get_extra_state(self):
            return {"version": 2}

        def set_extra_state(self, state):
            pass

    posterior = lk.LocalPosterior(Odd(), data, trainable="head.*")
    assert posterior.trainable == ["first.weight", "head.bias"]
    tree = in_memory(posterior, data, step_size=1e-4, draws=2)
    assert np.isfinite(tree["losses"]["loss"]).all()


def test_sample__reads_a_dataset_through_its_own_items(posterior):
    class Doubled(TensorDataset):
        def __getitem__(self, index):
            inputs, target = super().__getitem__(index)
            return 2 * inputs, target

    data = posterior.train_set
    tree = in_memory(posterior, Doubled(*data.tensors), step_size=1e-4, draws=1)
    expected = nn.functional.cross_entropy(
        posterior.model(2 * data.tensors[0]), data.tensors[1], reduction="none"
    )
    np.testing.assert_allclose(tree["losses"]["center_loss"], expected.detach(), rtol=1e-5)


def test_sample__takes_numpy_numbers(tmp_path, sample):
    tree = sample(
        tmp_path / "s",
        seed=np.int64(3),
        thin=np.int32(1),
        batch_size=np.int64(16),
        sampler=lk.SGLD(np.float32(1e-3)),
    )
    assert tree["losses"].sizes["draw"] == 9


def test_sample__refuses_a_loss_without_gradient(tmp_path, model, data):
    wrong = lk.LocalPosterior(model, data, lambda out, y: (out.argmax(1) != y).float())
    with pytest.raises(ValueError, match="no gradient with respect to what is trainable"):
        lk.sample(wrong, data, sampler=lk.SGLD(1e-3), store=tmp_path / "s")
    assert not (tmp_path / "s").exists()
    with torch.no_grad():  # of the caller's: sampling turns gradients on for itself
        lk.sample(
            lk.LocalPosterior(model, data),
            data,
            sampler=lk.SGLD(1e-3),
            chains=1,
            draws=1,
            store=tmp_path / "s",
            progress=False,
        )


@pytest.mark.parametrize("name", ["true label", "a/b", "..", 7, "neighbor", "sample_2"])
def test_sample__refuses_names_of_labels_that_a_store_cannot_keep(tmp_path, sample, name):
    with pytest.raises(errors.SchemaError, match="coords: "):
        sample(tmp_path / "s", coords={name: np.zeros(40)})
    with pytest.raises(errors.SchemaError, match="missing values"):
        sample(tmp_path / "s", coords={"label": ["a", None] * 20})
    assert not (tmp_path / "s").exists()


class Noisy(nn.Module):
    """Dropout that does not listen to ``eval``."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(6, 3)

    def forward(self, inputs):
        return self.inner(torch.nn.functional.dropout(inputs, 0.5, training=True))


def coupled(output, target):
    losses = torch.nn.functional.cross_entropy(output, target, reduction="none")
    return losses - losses.mean()


@pytest.mark.parametrize(
    ("model", "loss", "message"),
    [
        (Noisy(), "cross_entropy", "other losses for the same items.*dropout"),
        (nn.Linear(6, 3), coupled, "change with the company.*mixes examples"),
        (
            nn.Sequential(nn.Linear(6, 3), nn.BatchNorm1d(3, track_running_stats=False)),
            "cross_entropy",
            "BatchNorm without running statistics",
        ),
    ],
)
def test_sample__refuses_losses_that_are_no_single_examples_own(
    tmp_path, data, model, loss, message
):
    posterior = lk.LocalPosterior(model, data, loss)
    with pytest.raises(ValueError, match=message):
        lk.sample(posterior, data, sampler=lk.SGLD(1e-3), store=tmp_path / "s")
    assert not (tmp_path / "s").exists()


class Growing(torch.utils.data.Dataset):
    """A dataset to which somebody adds while it is read."""

    def __init__(self):
        self.n = 10

    def __len__(self):
        return self.n

    def __getitem__(self, index):
        self.n += index == 5
        return torch.full((6,), float(index)), index % 3


@pytest.mark.parametrize("cache", [0, 2 << 30])
def test_sample__refuses_a_dataset_whose_length_changes(tmp_path, posterior, monkeypatch, cache):
    monkeypatch.setattr("lkarray.nn.batches.CACHE_BYTES", cache)
    with pytest.raises(ValueError, match=r"observed had 10 items and now has 1\d"):
        lk.sample(posterior, Growing(), sampler=lk.SGLD(1e-3), store=tmp_path / "s")


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"autocast": "int8"}, "autocast must be None or one of"),
        ({"compile": True, "chains_per_device": 2}, "use chains_per_device=1 with it"),
        ({"chains_per_device": 0}, "chains_per_device must be at least 1"),
        ({"chains_per_device": "many"}, "chains_per_device must be an integer"),
        ({"observables": {"loss": lambda m: 0.0}}, "must be a name"),
        ({"observables": {"a b": lambda m: 0.0}}, "must be a name"),
        ({"observables": {"x": 3}}, "must be a function of the model"),
        ({"sampler": lk.SGLD(1e-3, schedule=lambda step: -1.0)}, "keep it positive"),
    ],
)
def test_sample__refuses_bad_options(tmp_path, sample, option, message):
    with pytest.raises((ValueError, TypeError), match=message):
        sample(tmp_path / "s", **option)


def test_sample__refuses_bad_sets(tmp_path, posterior, data):
    for observed, coords, message in (
        ({}, None, "observed is empty"),
        ({"a": data, "b/c": data}, None, "letters, digits"),
        ({"a": data}, {"label": np.arange(40)}, "name no observed set"),
    ):
        with pytest.raises(ValueError, match=message):
            lk.sample(
                posterior, observed, sampler=lk.SGLD(1e-3), coords=coords, store=tmp_path / "s"
            )
    assert not (tmp_path / "s").exists()


def test_sample__one_chain_that_diverges_leaves_the_others_unharmed(tmp_path, model, data):
    """In a stack, and alone: the chain is flagged, stopped, named and left out."""
    from lkarray.sampling.randomness import ChainRandomness

    noise = ChainRandomness.noise

    def explosive(self, step, out=None):
        vector = noise(self, step, out)
        if self._chain == 1 and step == 20:
            vector.fill_(float("inf"))
        return vector

    posterior = lk.LocalPosterior(model, data, nbeta=10.0, gamma=50.0)
    options = {"sampler": lk.SGLD(1e-3), "chains": 3, "draws": 40, "burn_in": 0, "batch_size": 16}
    for width in (1, 3):
        options["chains_per_device"] = width
        fine = lk.sample(
            posterior, data, store=tmp_path / f"fine{width}", progress=False, **options
        )
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(ChainRandomness, "noise", explosive)
            tree = lk.sample(
                posterior, data, store=tmp_path / f"bad{width}", progress=False, **options
            )
        assert tree["losses"]["chain"].values.tolist() == [0, 2]
        assert "chains [1] diverged" in tree.attrs["hidden"][0]
        np.testing.assert_array_equal(tree["losses/loss"], fine["losses/loss"].sel(chain=[0, 2]))
        flags = zarr.open_group(tmp_path / f"bad{width}", mode="r")["sample_stats/diverged"][:]
        assert np.argwhere(flags).tolist() == [[1, 20]]
        assert any("chain" in line and "1" in line for line in lk.diagnostics(tree).verdicts)
        raw = xr.open_zarr(
            tmp_path / f"bad{width}", group="losses", consolidated=False, zarr_format=3
        )
        with pytest.raises(errors.NonFiniteError, match="chain"):
            lk.correlation(raw).compute()
