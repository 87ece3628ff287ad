"""`lk.save` and `store.put` lose nothing of others, and what they wrote is complete or says not."""

import json
import shutil

import dask.array as da
import numpy as np
import pytest
import xarray as xr
import zarr
from zarr.storage import LocalStore, MemoryStore

import lkarray as lk
from lkarray import errors
from lkarray import store as stores
from lkarray.store import derived, names, results
from lkarray.store.seals import SEAL
from tests.helpers.losses import LABELS, VALUES, kernel


def content(path):
    """Return every file of a store but for locks, with its bytes."""
    files = (p for p in path.rglob("*") if p.is_file() and not p.name.startswith(".lkarray"))
    return {str(p.relative_to(path)): p.read_bytes() for p in files}


@pytest.fixture
def full(tmp_path):
    """A store with losses, a kernel, a result, and something else by the user."""
    path = tmp_path / "full.zarr"
    root = stores.create_run(
        path,
        chains=1,
        draws=40,
        sets=[stores.LossSet("losses", {"sample": np.arange(3)}, np.zeros(3, "f4"))],
        observables={},
        state={"parameters": 2},
        state_dtype="float32",
        fingerprint={"state": ["parameters"]},
    )
    lk.save(kernel(), path, "derived/k")
    lk.save(kernel(), path, "mine")
    stores.put(path, "means", xr.DataArray([1.0, 2.0], dims="x", name="means"))
    root.create_array("alone", shape=(2,), dtype="f4", chunks=(2,), dimension_names=["pair"])[:] = 1
    xr.Dataset({"v": ("x", [1, 2])}).to_zarr(
        path, group="theirs/inner", consolidated=False, zarr_format=3, mode="a"
    )
    (path / "notes").mkdir()
    (path / "notes/thesis.tex").write_text("years of work")
    return path


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
    assert lk.verify(full) == []


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


# --- interrupted ---------------------------------------------------------------------------------


class Killed(BaseException):
    """The process ends here."""


def kill_at(monkeypatch, number):
    """Let the n-th write to a local store, and all after it, never happen."""
    count = [0]
    real = LocalStore.set

    async def write(self, key, value, *args, **options):
        count[0] += 1
        if count[0] >= number:
            raise Killed
        await real(self, key, value, *args, **options)

    monkeypatch.setattr(LocalStore, "set", write)
    return count


def test_save__killed_at_any_write_is_unfinished_and_goes_on(tmp_path, monkeypatch):
    monkeypatch.setattr("lkarray.store.files.fsync", lambda path: None)
    undisturbed = lk.save(kernel(), tmp_path / "whole.zarr").values
    number, ended = 0, False
    while not ended:
        number += 1
        path = tmp_path / f"{number}.zarr"
        with monkeypatch.context() as killing:
            kill_at(killing, number)
            try:
                lk.save(kernel(), path)
                ended = True
            except Killed:
                pass
        if ended:
            break
        stored = {tuple(map(int, p.parts[-2:])) for p in path.glob("derived/k/k/c/*/*")}
        if (path / "derived/k/zarr.json").exists():
            assert [p.kind for p in lk.verify(path)] == ["unfinished"]
            (said,) = lk.open(path).attrs["hidden"]
            assert "derived/k is left out" in said
        computed: list = []
        np.testing.assert_array_equal(lk.save(kernel(computed=computed), path), undisturbed)
        # Of what was stored, only the first and the last are computed, to be compared.
        again = {min(stored), max(stored)} if stored else set()
        everything = {(i, j) for i in range(2) for j in range(2)}
        assert set(computed) == (everything - stored) | again
        assert lk.verify(path) == []
        assert "hidden" not in lk.open(path).attrs
    assert number > 10


def test_open__hides_an_unfinished_kernel_beside_what_is_finished(full, monkeypatch, caplog):
    with monkeypatch.context() as killing:
        kill_at(killing, 8)
        with pytest.raises(Killed):
            lk.save(kernel(), full, "derived/other")
    (problem,) = lk.verify(full)
    assert (problem.kind, problem.path) == ("unfinished", "derived/other")
    root = stores.open_root(full, mode="r+")
    record = stores.stored(root, "commit", lk.schema.RECORD)
    assert record.shape == (1, 3)
    assert [p for p, problem in results.results(root) if problem is None] == [
        "derived/k",
        "derived/means",
    ]


@pytest.mark.parametrize("damage", ["cut", "flipped", "empty", "gone"])
@pytest.mark.parametrize("finished", [True, False])
def test_save__computes_a_damaged_tile_again_and_nothing_else(tmp_path, damage, finished):
    path, values = tmp_path / "k.zarr", np.random.default_rng(0).normal(size=(24, 24))
    lk.save(kernel(values), path)
    if not finished:
        unfinish(path / "derived/k/zarr.json")
    tile = path / "derived/k/k/c/1/1"
    raw = bytearray(tile.read_bytes())
    raw[9] ^= 4
    tile.unlink()
    if damage != "gone":
        tile.write_bytes({"cut": raw[:40], "flipped": raw, "empty": b""}[damage])
    kinds = {"cut": "truncated", "flipped": "corrupt", "empty": "truncated", "gone": "missing"}
    problems = [p.kind for p in lk.verify(path)]
    assert problems == ([kinds[damage]] if finished else ["unfinished"])
    computed: list = []
    np.testing.assert_array_equal(lk.save(kernel(values, computed=computed), path), values)
    assert sorted(computed) == [(0, 0), (1, 1), (2, 2)]  # the first and last are compared
    assert lk.verify(path) == []


def unfinish(file, *, old=False):
    """Take the marks from a saved kernel: as a kill leaves it, or as lkarray 0.1.0 wrote it."""
    metadata = json.loads(file.read_text())
    del metadata["attributes"][SEAL]
    metadata["attributes"][names.SAVED][results.COMPLETE] = False
    if old:
        del metadata["attributes"][names.SAVED][results.COMPLETE]
    file.write_text(json.dumps(metadata))


def test_open__judges_a_kernel_of_0_1_0_by_its_chunks(tmp_path):
    path = tmp_path / "k.zarr"
    lk.save(kernel(), path)
    unfinish(path / "derived/k/zarr.json", old=True)
    np.testing.assert_array_equal(lk.open(path)["derived/k/k"], VALUES)
    assert lk.verify(path) == []
    (path / "derived/k/k/c/1/0").unlink()
    assert [p.kind for p in lk.verify(path)] == ["unfinished"]
    (said,) = lk.open(path).attrs["hidden"]
    assert "chunks are not stored" in said
    computed: list = []
    np.testing.assert_array_equal(lk.save(kernel(computed=computed), path), VALUES)
    assert sorted(computed) == [(0, 0), (1, 0), (1, 1)]
    assert lk.verify(path) == []


def test_open__never_reads_a_lost_tile_as_nothing(full):
    (full / "derived/k/k/c/1/0").unlink()
    shown = {path for path, problem in results.results(stores.open_root(full)) if problem is None}
    assert shown == {"derived/means"}
    assert [(p.kind, p.path) for p in lk.verify(full)] == [("missing", "derived/k/k/c/1/0")]


def test_save__tells_when_tiles_are_not_where_workers_wrote_them(tmp_path, monkeypatch):
    monkeypatch.setattr("lkarray.saving._save_block", lambda *_: 1)
    with pytest.raises(errors.StoreError, match="all workers share"):
        lk.save(kernel(), tmp_path / "k.zarr")
    assert [p.kind for p in lk.verify(tmp_path / "k.zarr")] == ["unfinished"]


def test_put__killed_at_any_write_keeps_the_old_result(tmp_path, monkeypatch):
    monkeypatch.setattr("lkarray.store.files.fsync", lambda path: None)
    path = tmp_path / "s.zarr"
    lk.save(kernel(), path)
    old, new = (xr.DataArray(LABELS, dims="x", name="v") + word for word in (" old", " new"))
    stores.put(path, "v", old)
    seen = set()
    for number in range(1, 30):
        with monkeypatch.context() as killing:
            kill_at(killing, number)
            try:
                stores.put(path, "v", new)
                break
            except Killed:
                pass
        opened = lk.open(path)["derived/v/v"]
        assert opened.equals(old) or opened.equals(new)
        seen.add(bool(opened.equals(new)))
        assert lk.verify(path) == []
        stores.put(path, "v", old)
    assert lk.open(path)["derived/v/v"].equals(new)
    assert seen == {False, True}  # killed before the move, and after it


@pytest.mark.parametrize("exchanging", [True, False])
def test_put__moves_a_whole_group(tmp_path, monkeypatch, exchanging):
    path = tmp_path / "s.zarr"
    lk.save(kernel(), path)
    if not exchanging:
        monkeypatch.setattr(derived, "_exchange", lambda a, b: False)
    for value in (1.0, 2.0):
        stores.put(path, "v", xr.DataArray([value], dims="x", name="v"))
        assert float(lk.open(path)["derived/v/v"][0]) == value
    assert sorted(p.name for p in (path / "derived").iterdir()) == ["k", "v", "zarr.json"]


def test_put__into_memory_keeps_the_old_result_when_it_fails():
    store = MemoryStore()
    lk.save(kernel(), store)
    stores.put(store, "v", xr.DataArray([1.0], dims="x", name="v"))
    ones = da.ones(1, chunks=1)
    data = ones.map_blocks(lambda x: 1 // 0, dtype="f8", meta=np.ones(0))
    failing = xr.DataArray(data, dims="x", name="v")
    with pytest.raises(ZeroDivisionError):
        stores.put(store, "v", failing)
    stores.put(store, "v", lk.open(store)["derived/v/v"] + 1)
    np.testing.assert_array_equal(lk.open(store)["derived/v/v"], [2.0])


# --- seals ---------------------------------------------------------------------------------------


def swap(a, b):
    one, other = a.read_bytes(), b.read_bytes()
    a.write_bytes(other)
    b.write_bytes(one)


def edit(file, change):
    metadata = json.loads(file.read_text())
    change(metadata)
    file.write_text(json.dumps(metadata))


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


# --- read back as they were ----------------------------------------------------------------------

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
