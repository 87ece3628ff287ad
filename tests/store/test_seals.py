"""Seals: what was saved is known to have been changed."""

import numpy as np
import pytest
import xarray as xr

import lkarray as lk
from lkarray import errors
from lkarray import store as stores
from lkarray.store import names
from tests.helpers.attacks import contents as content
from tests.helpers.attacks import edit
from tests.helpers.losses import LABELS, kernel


def swap(a, b):
    one, other = a.read_bytes(), b.read_bytes()
    a.write_bytes(other)
    b.write_bytes(one)


DAMAGE = {
    "tiles": lambda k: swap(k / "k/c/0/1", k / "k/c/1/0"),
    "labels": lambda k: swap(k / "label/c/0", k / "other/c/0"),
    "center": lambda k: edit(k / "k/zarr.json", lambda m: m["attributes"].update(center="chain")),
    "scale": lambda k: edit(k / "k/zarr.json", lambda m: m["attributes"].update(scale_factor=2.0)),
    "fill": lambda k: edit(k / "k/zarr.json", lambda m: m.update(fill_value=0.0)),
    "mark": lambda k: edit(k / "zarr.json", lambda m: m["attributes"][names.SAVED].update(dims=[])),
}


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("group", ["derived/k", "mine"])
def test_verify__finds_swapped_tiles_and_labels_and_edited_metadata(tmp_path, damage, group):
    path = tmp_path / "k.zarr"
    made = kernel(other=("sample", LABELS[::-1])).assign_attrs(center="pooled")
    lk.save(made, path, group)
    assert lk.verify(path) == []
    DAMAGE[damage](path / group)
    assert {p.kind for p in lk.verify(path)} == {"mismatch"}
    before = content(path)
    with pytest.raises(errors.StoreError, match="nothing was touched"):
        lk.save(made, path, group)
    assert content(path) == before


@pytest.mark.parametrize("damage", ["labels", "flipped", "units"])
def test_verify__finds_damage_to_a_result(tmp_path, damage):
    path = tmp_path / "s.zarr"
    lk.save(kernel(), path)
    table = xr.Dataset(
        {"v": ("x", np.arange(16.0), {"units": "nat"})},
        coords={"label": ("x", LABELS), "other": ("x", LABELS[::-1])},
    )
    stores.put(path, "t", table)
    assert lk.verify(path) == []
    at = path / "derived/t"
    if damage == "labels":
        swap(at / "label/c/0", at / "other/c/0")
    elif damage == "units":
        edit(at / "v/zarr.json", lambda m: m["attributes"].update(units="1"))
    else:
        raw = bytearray((at / "label/c/0").read_bytes())
        raw[-20] ^= 1  # within text: without a checksum, another text
        (at / "label/c/0").write_bytes(raw)
    kind = "corrupt" if damage == "flipped" else "mismatch"
    assert {p.kind for p in lk.verify(path)} == {kind}
