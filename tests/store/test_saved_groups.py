"""`lk.save` and `store.put` write over nothing that is not theirs."""

import shutil

import numpy as np
import pytest
import xarray as xr

import lkarray as lk
from lkarray import errors
from lkarray import store as stores
from lkarray.store import names
from tests.helpers.attacks import contents as content
from tests.helpers.losses import kernel

GROUPS = [
    "",
    "/",
    "//",
    ".",
    "..",
    "../other",
    "derived",
    "derived/",
    "derived/a/b",
    "derived/k/more",
    "derived/../losses",
    "derived/.k",
    "derived//k",
    "derived\\k",
    "a\\..\\losses",
    "Derived/k",
    "losses",
    "losses/loss",
    "losses_test",
    "Losses",
    "sample_stats",
    "observables",
    "state",
    "commit",
    "commit/record",
    "trajectory",
    "gradients",
    "gradients_x",
    "audit",
    "audit_x",
    "component",
    "component/a/derived/k",
    "checkpoint",
    "mine/below",
    "alone",
    "alone/below",
    "theirs",
    "theirs/inner",
    "notes",
    "derived/means",
    "derived/zarr.json",
    "zarr.json",
    "derived/" + "x" * 300,
    "derived/a\0b",
]


@pytest.mark.parametrize("group", GROUPS)
def test_save__refuses_a_group_of_something_else_and_touches_nothing(full, group):
    before = content(full)
    with pytest.raises(errors.GroupError, match="nothing was touched"):
        lk.save(kernel(), full, group)
    assert content(full) == before


def test_save__refuses_names_that_are_no_names(tmp_path):
    for name in ("a/b", "..", ".hidden", "a\\b", "zarr.json"):
        with pytest.raises(errors.GroupError, match="name"):
            lk.save(kernel(name=name), tmp_path / "k.zarr", "derived/k")
    with pytest.raises(errors.GroupError, match="name"):
        lk.save(kernel(**{"a/b": ("sample", np.arange(16))}), tmp_path / "k.zarr")
    with pytest.raises(errors.SchemaError, match="name of its labels"):
        lk.save(kernel(k=("sample", np.arange(16))), tmp_path / "k.zarr")
    with pytest.raises(TypeError, match="group must be a string"):
        lk.save(kernel(), tmp_path / "k.zarr", 3)
    assert not (tmp_path / "k.zarr").exists()


@pytest.mark.parametrize(
    "name", ["k", "a/b", "", ".x", "..", "../losses", "a\\b", "../../k", "inner", "zarr.json", "n"]
)
def test_put__refuses_what_it_did_not_write(full, name):
    xr.Dataset({"v": ("x", [1, 2])}).to_zarr(
        full, group="derived/inner", consolidated=False, zarr_format=3, mode="a"
    )
    (full / "derived/n").mkdir()
    (full / "derived/n/thesis.tex").write_text("years of work")
    before = content(full)
    with pytest.raises(errors.GroupError, match="nothing was touched"):
        stores.put(full, name, xr.DataArray([1.0], dims="x", name="v"))
    assert content(full) == before


def test_own_groups__are_not_made_over_a_saved_kernel(full):
    """As lkarray 0.1.0 allowed it to be saved under their names."""
    root = stores.open_root(full, mode="r+")
    for name in ("trajectory", "losses_more"):
        shutil.copytree(full / "mine", full / name)
    before = content(full)
    with pytest.raises(errors.GroupError, match="nothing was touched"):
        names.make_group(root, "trajectory", ours={"record"})
    with pytest.raises(errors.GroupError, match="nothing was touched"):
        names.make_group(root, "notes", ours={"record"})
    assert content(full) == before
    bare = full.parent / "bare.zarr"
    lk.save(kernel(), bare, "mine")
    shutil.copytree(bare / "mine", bare / "losses_more")
    with pytest.raises(errors.GroupError, match="nothing was removed"):
        stores.drop_unfinished(stores.open_root(bare, mode="r+"))
    assert (bare / "losses_more/k/c/0/0").exists()


@pytest.mark.parametrize("name", ["a/b", "../losses", "", ".."])
def test_tensors_and_audits__refuse_names_that_are_no_names(name):
    from lkarray.store.audits import audit_group
    from lkarray.store.gradients import gradient_group

    for group in (audit_group, gradient_group):
        with pytest.raises(errors.GroupError):
            group(name)
    assert gradient_group("factors") == "gradients_factors"
