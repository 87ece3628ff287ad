"""What was saved is read back as it was, or refused by name."""

import numpy as np
import pytest
import xarray as xr
import zarr

import lkarray as lk
from lkarray import errors
from lkarray import store as stores
from tests.helpers.attacks import contents as content
from tests.helpers.losses import LABELS, VALUES, kernel

COORDS = {
    "fixed text": LABELS,
    "object": LABELS.astype(object),
    "any length": LABELS.astype(np.dtypes.StringDType()),
    "bool": np.arange(16) % 2 == 0,
    "float32": np.r_[np.nan, np.arange(15)].astype("f4"),
    "float16": np.arange(16).astype("f2"),
    "uint64": np.arange(16).astype("u8") + 2**63,
    "big-endian": np.arange(16).astype(">i4"),
    "ns": np.array(["2020-01-01"] * 15 + ["NaT"], "M8[ns]"),
    "s": np.array(["2020-01-01T00:00:03"] * 16, "M8[s]"),
    "timedelta": np.arange(16).astype("m8[s]"),
    "complex": np.arange(16) * 1j,
}


@pytest.mark.parametrize("kind", COORDS)
@pytest.mark.parametrize("name", ["tag", "sample"])
def test_labels__come_back_equal_in_dtype_and_value(tmp_path, kind, name):
    if name == "sample" and kind in ("float16", "complex"):
        return
    made = kernel(**{name: ("sample", COORDS[kind])}).assign_attrs(
        over=["chain", "draw"], center=None, factor=0.1, deep={"a": [1, None]}
    )
    path = tmp_path / "k.zarr"
    saved = lk.save(made, path)
    stores.put(path, "t", made.rename("t"))
    tree = lk.open(path)
    for stored in (saved, tree["derived/k/k"], tree["derived/t/t"]):
        xr.testing.assert_identical(stored.compute().rename("k"), made.compute())
        for coord in made.coords:
            assert stored[coord].dtype == made[coord].dtype
    assert tree["derived/k"].attrs == {}
    assert lk.verify(path) == []
    array = zarr.open_array(path / "derived/k" / name)
    assert any("Crc32c" in type(codec).__name__ for codec in array.compressors)


@pytest.mark.parametrize(
    "labels", [[None], [1.5], [b"x"], [np.nan], [["list"]]], ids=["None", "1.5", "b", "nan", "list"]
)
def test_labels__that_are_no_text_are_refused_by_name(tmp_path, labels):
    values = np.empty(16, object)
    values[:] = "a"
    values[5] = labels[0]
    made = kernel(tag=("sample", values))
    with pytest.raises(errors.SchemaError, match=r"'tag' holds .* at position 5"):
        lk.save(made, tmp_path / "k.zarr")
    assert not (tmp_path / "k.zarr").exists()
    lk.save(kernel(), tmp_path / "k.zarr")
    before = content(tmp_path / "k.zarr")
    with pytest.raises(errors.SchemaError, match=r"'tag' holds .* at position 5"):
        stores.put(tmp_path / "k.zarr", "t", made)
    assert content(tmp_path / "k.zarr") == before


@pytest.mark.parametrize(
    "attrs",
    [
        {"scale_factor": 2.0},
        {"_FillValue": 1.0},
        {"missing_value": 3.0},
        {"dtype": "bool"},
        {"units": "days since 2000-01-01"},
        {"add_offset": 1.0},
        {"f": object()},
        {3: "x"},
        {"f": b"bytes"},
    ],
    ids=lambda attrs: str(next(iter(attrs))),
)
def test_attributes__that_would_change_values_are_refused_by_name(tmp_path, attrs):
    made = kernel().assign_attrs(attrs)
    with pytest.raises(errors.SchemaError, match=str(next(iter(attrs)))):
        lk.save(made, tmp_path / "k.zarr")
    assert not (tmp_path / "k.zarr").exists()
    lk.save(kernel(), tmp_path / "k.zarr")
    with pytest.raises(errors.SchemaError, match=str(next(iter(attrs)))):
        stores.put(tmp_path / "k.zarr", "t", made)


def test_save__goes_on_whatever_form_attributes_had(tmp_path):
    made = kernel().assign_attrs(over=("chain", "draw"), center=np.float32(2), least=float("nan"))
    first = lk.save(made, tmp_path / "k.zarr")
    computed: list = []
    again = kernel(computed=computed).assign_attrs(made.attrs)
    assert lk.save(again, tmp_path / "k.zarr").identical(first)
    assert sorted(computed) == [(0, 0), (1, 1)]


def test_save__refreshes_what_plain_readers_rely_on(full):
    stores.finish(stores.open_root(full, mode="r+"))
    lk.save(kernel(), full, "derived/later")
    plain = xr.open_datatree(full, engine="zarr", chunks={})
    np.testing.assert_array_equal(plain["derived/later/k"], VALUES)
