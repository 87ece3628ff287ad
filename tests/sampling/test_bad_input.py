"""Bad input gets a clear error before any work, and nothing already stored is lost."""

import functools

import numpy as np
import pytest
import torch
import xarray as xr
import zarr
from torch import nn
from torch.utils.data import IterableDataset, TensorDataset

import lkarray as lk
from lkarray import errors
from lkarray.nn import per_example_loss
from tests.helpers.disks import own_disk, run_on
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


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"seed": 1}, "seed: stored 0, now 1"),
        ({"batch_size": 8}, "batch_size: stored 16, now 8"),
        ({"sampler": lk.SGLD(2e-3)}, "sampler"),
        ({"thin": 2}, "thin"),
        ({"coords": None}, "coords"),
    ],
)
def test_sample__refuses_a_store_of_other_settings_and_names_them(store, sample, change, field):
    before = lk.open(store).compute()
    with pytest.raises(errors.FingerprintError, match=f"{field}.*Nothing was touched"):
        sample(store, **change)
    assert lk.open(store).compute().identical(before)


def test_sample__refuses_a_store_of_other_weights_or_data(store, model, data, posterior):
    options = {"sampler": lk.SGLD(1e-3), "burn_in": 3, "batch_size": 16, "store": store}
    options["coords"] = {"label": data.tensors[1]}
    other = TensorDataset(data.tensors[0] + 1, data.tensors[1])
    with pytest.raises(errors.FingerprintError, match="observed_data"):
        lk.sample(posterior, other, **options)
    with pytest.raises(errors.FingerprintError, match="nbeta"):
        lk.sample(lk.LocalPosterior(model, data, nbeta=3.0, gamma=50.0), data, **options)
    with torch.no_grad():
        model[0].bias += 1
    with pytest.raises(errors.FingerprintError, match=r"\(weights"):
        lk.sample(posterior, data, **options)


class Scaled(nn.Module):
    """A model whose behaviour hangs on what no state dict holds."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layer, self.factor = nn.Linear(6, 3), 1.0
        self.register_buffer("shift", torch.zeros(1), persistent=False)

    def forward(self, inputs):
        return self.layer(inputs) * self.factor + self.shift


def weighted(factor):
    return lambda output, target: nn.functional.cross_entropy(
        output * factor, target, reduction="none"
    )


def changed_factor(model):
    model.factor = 9.0


def changed_buffer(model):
    model.shift += 1


@pytest.mark.parametrize(
    ("change", "loss", "message"),
    [
        (changed_factor, weighted(1.0), "losses at w\\* are not those stored"),
        (changed_buffer, weighted(1.0), "weights"),
        (lambda model: None, weighted(5.0), "loss: stored"),
        (lambda model: None, functools.partial(weighted(1.0)), "loss: stored"),
        (lambda model: None, nn.CrossEntropyLoss(reduction="none"), "loss: stored"),
    ],
)
def test_sample__notices_what_changed_outside_the_weights(tmp_path, data, change, loss, message):
    model = Scaled()
    options = {"sampler": lk.SGLD(1e-3), "store": tmp_path / "s", "progress": False, "chains": 1}
    lk.sample(lk.LocalPosterior(model, data, weighted(1.0)), data, draws=2, **options)
    change(model)
    with pytest.raises(errors.FingerprintError, match=message):
        lk.sample(lk.LocalPosterior(model, data, loss), data, draws=4, **options)
    assert lk.open(tmp_path / "s")["losses"].sizes["draw"] == 2


def test_loss_identity__tells_callables_apart():
    makers = [
        lambda: weighted(1.0),
        lambda: weighted(2.0),
        lambda: functools.partial(weighted, 1.0),
        lambda: functools.partial(weighted, factor=2.0),
        lambda: weighted(np.arange(3.0)),
        lambda: weighted(np.ones(3)),
        lambda: nn.CrossEntropyLoss(reduction="none"),
        lambda: nn.CrossEntropyLoss(reduction="none", label_smoothing=0.3),
        lambda: nn.CrossEntropyLoss(reduction="none", weight=torch.ones(3)),
    ]
    names = [per_example_loss(make()).name for make in makers]
    assert len(set(names)) == len(names)
    assert names == [per_example_loss(make()).name for make in makers]


def test_sample__leaves_a_store_alone_that_another_process_finished_meanwhile(
    tmp_path, sample, monkeypatch
):
    """What a run read before it took the lock may be out of date by then."""
    from lkarray.sampling import running

    target, late, path = running.prepare, [], tmp_path / "s"

    def overtaken(*args, **options):
        if not late:
            late.append(1)
            sample(path, seed=7)
        return target(*args, **options)

    monkeypatch.setattr(running, "prepare", overtaken)
    with pytest.raises(errors.FingerprintError, match="seed: stored 7, now 0"):
        sample(path)
    late, path = [], tmp_path / "other"
    with pytest.raises(errors.StoreError, match="resume=False"):
        sample(path, resume=False)
    for name in ("s", "other"):
        assert lk.open(tmp_path / name)["losses"].attrs["seed"] == 7


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


def test_sample__refuses_an_existing_store_without_resume(store, sample):
    with pytest.raises(errors.StoreError, match="resume=False; nothing was touched"):
        sample(store, resume=False)
    assert lk.verify(store) == []


def test_sample__refuses_a_newer_store(store, sample):
    root = zarr.open_group(store)
    root.update_attributes({"lkarray": {**root.attrs["lkarray"], "schema": 99}})
    with pytest.raises(errors.StoreVersionError, match="Upgrade lkarray"):
        sample(store)


def test_sample__refuses_a_path_that_is_a_file_or_another_folder(tmp_path, sample):
    path = tmp_path / "file"
    path.write_text("precious")
    with pytest.raises(errors.StoreError, match="is a file, not a store"):
        sample(path)
    with pytest.raises(errors.StoreError, match="not a Zarr v3 store; nothing was touched"):
        sample(tmp_path)
    assert path.read_text() == "precious"


def test_sample__refuses_a_run_larger_than_the_disk(tmp_path, sample):
    with pytest.raises(errors.StoreError, match="would grow by .* GB free"):
        sample(tmp_path / "s", chains=256, draws=2**23)


CODE = """
import sys, torch, lkarray as lk
from torch.utils.data import TensorDataset
from lkarray.store import commit
commit.COMMIT_SECONDS = commit._COMMIT_SHARE = 0
torch.manual_seed(0)
data = TensorDataset(torch.randn({n}, 4), torch.zeros({n}).long())
posterior = lk.LocalPosterior(torch.nn.Linear(4, 2), data)
path = sys.argv[1] + "/s.zarr"
try:
    lk.sample(posterior, data, sampler=lk.SGLD(1e-3), chains=4, draws={draws}, burn_in=0,
              store=path, progress=False)
except lk.errors.StoreError as error:
    print("StoreError:", error)
{after}
"""


@own_disk
def test_sample__says_that_a_disk_is_read_only(tmp_path):
    said = run_on(tmp_path, CODE.format(n=50, draws=5, after=""), "-t tmpfs -o ro tmpfs")
    assert "StoreError: cannot write to" in said
    assert "read-only; choose another path" in said


@own_disk
def test_sample__a_disk_that_fills_loses_nothing_committed(tmp_path):
    """The disk is large enough when sampling begins; something else then fills it."""
    fill = """
real = commit.ChainRegion.commit
def commit_then_fill(self, step, state):
    real(self, step, state)
    if self._chain == 1:
        self.wait()
        try:
            open(sys.argv[1] + "/other", "ab", buffering=0).write(bytes(64 << 20))
        except OSError:
            pass
commit.ChainRegion.commit = commit_then_fill
"""
    after = """
import os
print("problems:", lk.verify(path))
print("draws:", lk.open(path)["losses"].sizes["draw"])
os.remove(sys.argv[1] + "/other")
commit.ChainRegion.commit = real
tree = lk.sample(posterior, data, sampler=lk.SGLD(1e-3), chains=4, draws=40, burn_in=0,
                 store=path, progress=False)
print("resumed:", dict(tree["losses"].sizes), lk.verify(path))
"""
    code = CODE.format(n=5000, draws=40, after=after).replace("try:", fill + "try:", 1)
    said = run_on(tmp_path, code, "-t tmpfs -o size=8m tmpfs").replace(chr(39), "")
    assert "StoreError: cannot write to" in said
    assert "the disk is full; free some space. The draws committed before are safe" in said
    assert "problems: []" in said
    assert "resumed: {chain: 4, draw: 40, sample: 5000} []" in said


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


def test_sample__refuses_an_observed_set_larger_than_the_disk_at_once(tmp_path, posterior):
    class Vast(torch.utils.data.Dataset):
        def __len__(self):
            return 10**12

        def __getitem__(self, index):
            raise AssertionError("an item was read although nothing can be stored")

    with pytest.raises(errors.StoreError, match=r"would grow by 1600000\.00 GB.*fewer samples"):
        lk.sample(posterior, Vast(), sampler=lk.SGLD(1e-3), store=tmp_path / "s")
    assert not (tmp_path / "s").exists()


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
