import dask
import numpy as np
import pytest
import xarray as xr

import lkarray as lk
from tests.helpers.influences import by_epochs, cut, influence
from tests.helpers.losses import Forbidding


@pytest.fixture(params=["memory", "dask"])
def audit(request, rng):
    x = influence(rng)
    return (cut(x) if request.param == "dask" else x).to_dataset()


@pytest.fixture
def epochs(rng):
    return by_epochs(rng)


def test_audits__large_tables_compute_nothing_until_asked(rng, monkeypatch):
    monkeypatch.setattr("lkarray.analysis.audits.influence._SMALL", 5)
    x = cut(influence(rng))
    x = x.assign_coords(train_label=x["train_label"].compute())  # labels are read at once
    with dask.config.set(scheduler=Forbidding()):
        results = [
            lk.most_influential(x, 3),
            lk.most_influential(x, 3, by="train_label"),
            lk.concentration(x),
            *(f(x, cumulative=c) for f in (lk.net_influence, lk.gross_influence) for c in (0, 1)),
        ]
    assert all(dask.is_dask_collection(table) for table in results)


class Largest:
    """A scheduler's view of the largest array that any task returns."""

    def __init__(self):
        self.bytes = 0

    def _posttask(self, key, result, dsk, state, worker):
        self.bytes = max(self.bytes, getattr(result, "nbytes", 0))


@pytest.mark.parametrize(
    ("what", "share"),
    [
        (lambda x: lk.most_influential(x, 4), 1 / 40),
        (lambda x: lk.gross_influence(x, cumulative=True), 1 / 40),
        (lk.concentration, 1 / 4),  # all training examples of some audited ones
    ],
)
def test_audits__hold_blocks_and_never_the_influence(rng, what, share):
    values = rng.normal(size=(4000, 12, 3)).astype("f4")
    x = xr.DataArray(values, dims=("example", "audit", "epoch"))
    x = cut(x, {"example": 100, "audit": 4, "epoch": 1})
    largest = Largest()
    with (
        dask.config.set(scheduler="synchronous"),
        dask.callbacks.Callback(pretask=None, posttask=largest._posttask),
    ):
        what(x.copy(data=x.data.map_blocks(np.positive))).compute()
    assert 0 < largest.bytes <= share * values.nbytes


def test_audits__are_methods_of_an_audit(audit, epochs):
    xr.testing.assert_identical(
        audit.lk.most_influential(4, by="train_label").compute(),
        lk.most_influential(audit, 4, by="train_label").compute(),
    )
    xr.testing.assert_identical(epochs.lk.completeness(), lk.completeness(epochs))
    assert audit.lk.concentration().name == "share"
    assert audit["influence"].lk.net_influence().name == "net_influence"
    assert audit.lk.gross_influence(cumulative=True).name == "gross_influence"


def test_kernels__refuse_influence(rng):
    x = influence(rng, ("example", "audit"))
    for given in (x, x.drop_attrs(), x.to_dataset()):
        for what in (lk.chord_distance, lk.angle_distance, lk.embed):
            with pytest.raises(ValueError, match=f"{what.__name__} needs a kernel"):
                what(given)
    with pytest.raises(ValueError, match="audit_modes needs a kernel"):
        lk.audit_modes(x, 2, scale=1)
