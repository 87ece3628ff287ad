"""A store of something else, a disk that is full or read-only: nothing that is stored is lost."""

import functools

import numpy as np
import pytest
import torch
import zarr
from torch import nn
from torch.utils.data import TensorDataset

import lkarray as lk
from lkarray import errors
from lkarray.nn import per_example_loss
from tests.helpers.disks import own_disk, run_on


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


def test_sample__refuses_an_observed_set_larger_than_the_disk_at_once(tmp_path, posterior):
    class Vast(torch.utils.data.Dataset):
        def __len__(self):
            return 10**12

        def __getitem__(self, index):
            raise AssertionError("an item was read although nothing can be stored")

    with pytest.raises(errors.StoreError, match=r"would grow by 1600000\.00 GB.*fewer samples"):
        lk.sample(posterior, Vast(), sampler=lk.SGLD(1e-3), store=tmp_path / "s")
    assert not (tmp_path / "s").exists()
