"""Data sets are read once, by workers where asked, and every wait has its word."""

import logging

import numpy as np
import pytest
import torch
from torch.utils.data import Dataset
from zarr.storage import MemoryStore

import lkarray as lk
from lkarray import progress
from lkarray.nn import Batches, batches
from tests.helpers.networks import classification, small_network

OPTIONS = {"sampler": lk.SGLD(1e-3), "chains": 2, "draws": 4, "batch_size": 8}
CPU = torch.device("cpu")


class Counted(Dataset):
    """As a data set that decodes files: every reading counts."""

    def __init__(self, n=40, *, as_dict=False):
        self.data, self.as_dict = classification(n), as_dict
        self.reads = np.zeros(n, int)

    def __len__(self):
        return len(self.data)

    def __getitem__(self, index):
        self.reads[index] += 1
        x, y = self.data[index]
        return {"input": x, "labels": y} if self.as_dict else (x, y)


class Named(torch.nn.Module):
    """Takes the input of a dict."""

    def __init__(self):
        super().__init__()
        self.inner = small_network()

    def forward(self, input):  # noqa: A002
        return self.inner(input)


@pytest.mark.parametrize("as_dict", [False, True])
def test_suggest__reads_every_item_once_whatever_the_grid(as_dict):
    data = Counted(as_dict=as_dict)
    posterior = lk.LocalPosterior(Named() if as_dict else small_network(), data, nbeta=5)
    grid = {"step_sizes": [1e-6, 1e-5, 1e-4], "gammas": [10.0, 100.0], "draws": 4}
    pilots = lk.suggest(posterior, data, samples=10, progress=False, **grid)
    assert pilots["loss_gain"].shape == (1, 2, 3)
    assert data.reads[1:].max() == 1
    assert data.reads[0] <= 3  # the first is read again, to see that it is the same
    plain = lk.LocalPosterior(small_network(), classification(), nbeta=5)
    expected = lk.suggest(plain, classification(), samples=10, progress=False, **grid)
    np.testing.assert_array_equal(pilots["loss_gain"], expected["loss_gain"])


def test_suggest__of_another_observed_set_reads_both_once():
    data, observed = Counted(), Counted()
    posterior = lk.LocalPosterior(small_network(), data, nbeta=5)
    lk.suggest(posterior, observed, samples=10, draws=4, progress=False)
    assert data.reads[1:].max() == 1
    assert observed.reads.sum() <= 12
    assert posterior.train_set is data  # not changed


def test_suggest__leaves_the_posteriors_that_observe_remembers_alone(posterior, data):
    from lkarray.sampling import remembering

    lk.sample(posterior, data, store=MemoryStore(), progress=False, **OPTIONS)
    before = dict(remembering._remembered)
    lk.suggest(posterior, data, draws=4, step_sizes=[1e-6, 1e-5], progress=False)
    assert remembering._remembered == before


class Forked(Counted):
    """Tells which process read an item."""

    def __getitem__(self, index):
        worker = torch.utils.data.get_worker_info()
        assert worker is not None or index == 0, "read in the sampling process"
        return super().__getitem__(index)


@pytest.mark.parametrize("held", [True, False])
def test_workers__read_the_same_numbers(held, monkeypatch):
    if not held:
        monkeypatch.setattr(batches, "CACHE_BYTES", 0)
        monkeypatch.setattr(batches, "_HASHED_ITEMS", 4)
    forked = Batches(Forked(12), name="data", device=CPU, num_workers=2)
    plain = Batches(Counted(12), name="data", device=CPU)
    assert forked.held is held
    assert forked.identity == plain.identity
    rows = np.array([7, 2, 2, 11])
    for a, b in zip(forked.take(rows), plain.take(rows), strict=True):
        assert torch.equal(a, b)


def test_workers__are_an_option_of_sample_record_and_observe(tmp_path):
    data = Forked(12)
    posterior = lk.LocalPosterior(small_network(), data, nbeta=5)
    options = OPTIONS | {"progress": False}
    tree = lk.sample(posterior, data, store=MemoryStore(), num_workers=2, **options)
    plain = lk.LocalPosterior(small_network(), classification(12), nbeta=5)
    expected = lk.sample(plain, plain.train_set, store=MemoryStore(), **options)
    np.testing.assert_array_equal(tree["losses/loss"], expected["losses/loss"])
    replay = lk.observe(tree, data, num_workers=2, progress=False)
    np.testing.assert_array_equal(replay["losses/loss"], expected["losses/loss"])
    net = small_network()
    sgd = torch.optim.SGD(net.parameters(), 0.1)
    lk.record(net, sgd, data, store=tmp_path / "r", num_workers=2)
    for bad, error in ((-1, ValueError), ("two", TypeError)):
        for call in (
            lambda n: lk.sample(posterior, data, store=MemoryStore(), num_workers=n, **options),
            lambda n: lk.suggest(posterior, data, num_workers=n, progress=False),
            lambda n: lk.record(net, sgd, data, store=tmp_path / "r", num_workers=n),
        ):
            with pytest.raises(error, match="num_workers must be"):
                call(bad)


@pytest.fixture
def said(monkeypatch):
    """What bars were made, by their words."""
    titles, make = [], progress._make

    def making(**options):
        if not options["disable"]:
            titles.append(options["desc"])
        return make(**options)

    monkeypatch.setattr(progress, "_make", making)
    return titles


def test_progress__every_stage_of_a_run_has_its_word(said, monkeypatch):
    from lkarray.sampling import stacking

    monkeypatch.setattr(stacking, "WORTH_SECONDS", 0.0)
    monkeypatch.setattr(stacking, "_PART_SECONDS", 1e-3)
    data, observed = Counted(), Counted()
    posterior = lk.LocalPosterior(small_network(), data, nbeta=5)
    lk.sample(posterior, observed, store=MemoryStore(), progress=True, **OPTIONS)
    stages = ["reading train_set", "reading observed", "trying the model", "measuring layouts"]
    assert said == [*stages, "losses at w*", "sampling"]
    said.clear()
    lk.sample(posterior, observed, store=MemoryStore(), progress=False, **OPTIONS)
    assert said == []
    lk.suggest(posterior, observed, draws=4, step_sizes=[1e-5], progress=True)
    assert said == ["reading train_set", "reading observed", "first pilot", "pilots"] or (
        said[:2] == ["reading train_set", "reading observed"] and said[-1] == "pilots"
    )


def test_progress__of_training_says_what_it_reads(said, tmp_path):
    data, net = Counted(), small_network()
    sgd = torch.optim.SGD(net.parameters(), 0.1)
    lk.record(net, sgd, data, store=tmp_path / "r", progress=True)
    assert said == ["reading train_set"]
    trace = lk.snapshot(net, data, store=tmp_path / "s")
    said.clear()
    lk.gradient_features(trace, Counted(), times=[0], store=tmp_path / "s", progress=True)
    assert "reading examples" in said
    assert said[-1] == "gradients"
    said.clear()
    lk.audit(trace, Counted(8), progress=True, unlike=True)
    assert said[0] == "preparing the audit"
    assert said[-1] == "audit"


def test_bar__is_drawn_by_the_clock_before_its_first_step(capsys, monkeypatch):
    import threading

    monkeypatch.setattr(progress, "_DELAY", 0.0)
    monkeypatch.setattr(progress, "_TICK", 0.0)
    drawn = threading.Event()
    made = progress._tqdm()
    display = made.display

    def displaying(self, *args, **options):
        drawn.set()
        return display(self, *args, **options)

    monkeypatch.setattr(made, "display", displaying)
    bar = progress.bar("sampling", total=10, show=True)
    drawn.clear()
    assert drawn.wait(60)  # with no step taken
    bar.close()
    assert "sampling:   0%" in capsys.readouterr().err
    logging.getLogger("lkarray")


def test_showing__tells_bars_that_are_not_told():
    assert progress.bar("a", total=1).disable
    with progress.showing(True):
        shown = progress.bar("a", total=1)
        assert not shown.disable
        shown.close()
        assert progress.bar("a", total=1, show=False).disable
    assert progress.bar("a", total=1).disable
