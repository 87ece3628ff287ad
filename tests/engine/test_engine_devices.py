"""Kernels made on a device: torch on the processor, and the same on a GPU where there is one."""

import subprocess
import sys

import dask
import dask.array as da
import numpy as np
import pytest
import torch
import xarray as xr
from hypothesis import given, settings
from hypothesis import strategies as st

import lkarray as lk
from lkarray import errors
from lkarray.engine import contraction_of, device_tiles, devices
from lkarray.engine.cache import DEVICE_PANELS
from lkarray.engine.devices import Device, as_device
from tests.helpers.losses import (
    Forbidding,
    counting,
    numpy_correlation,
    numpy_covariance,
    random_losses,
)

NO_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
DEVICES = ["cpu", pytest.param("cuda", marks=[pytest.mark.gpu, NO_GPU])]
each_device = pytest.mark.parametrize("device", DEVICES)


@pytest.fixture(autouse=True)
def _asked_for_by_arguments_only(monkeypatch):
    monkeypatch.delenv("LKARRAY_DEVICE", raising=False)


@each_device
@settings(max_examples=25, deadline=None)
@given(
    sizes=st.tuples(st.integers(1, 4), st.integers(3, 40), st.integers(2, 60)),
    chunks=st.tuples(st.integers(1, 4), st.integers(1, 40), st.integers(1, 60)),
    dtype=st.sampled_from(["float32", "float64", "int32"]),
    center=st.sampled_from(["pooled", "chain"]),
    device_memory=st.sampled_from([None, 60_000, 150_000]),
    memory=st.sampled_from(["64 MiB", "1 MB"]),
    seed=st.integers(0, 5),
)
def test_kernels__are_those_of_numpy(
    device, sizes, chunks, dtype, center, device_memory, memory, seed
):
    x = random_losses(np.random.default_rng(seed), *sizes, dtype=dtype)
    lazy = x.chunk(dict(zip(x.dims, map(min, chunks, sizes), strict=True)))
    options = {"device": device, "device_memory": device_memory, "memory": memory}
    tolerance = 1e-11 if dtype == "float64" else 2e-5
    try:
        k, r = (call(lazy, center=center, **options) for call in (lk.covariance, lk.correlation))
    except errors.MemoryBudgetError:
        return  # few tasks at once on one machine, many on another
    expected = numpy_covariance(x, center)
    np.testing.assert_allclose(k, expected, atol=tolerance * max(expected.max(), 1))
    np.testing.assert_allclose(r, numpy_correlation(x, center), atol=tolerance)
    assert k.dtype == r.dtype == np.result_type(dtype, np.float32)
    assert k.attrs["device"] == device
    assert k.attrs["precision"] == k.dtype.name


@each_device
def test_panels__are_standardised_alike(rng, device):
    """One large mean that float32 hardly holds: what is subtracted must be the float64 mean."""
    x = (random_losses(rng, 3, 50, 30) + 1e4).astype("float32").chunk(chain=1)
    on, off = (lk.correlation(x, device=where) for where in (device, None))
    np.testing.assert_allclose(on, off, atol=1e-6)
    np.testing.assert_allclose(on, numpy_correlation(x), atol=2e-6)


@each_device
def test_two_operands_and_dims_in_step(rng, device):
    values = rng.normal(size=(3, 11, 40)), rng.normal(size=(3, 7, 40)).astype("float32")
    x, y = (xr.DataArray(v, dims=("time", "a", "p")) for v in values)
    y = y.rename(a="b")
    out = lk.gram(x, y, over="p", each="time", scale=-2.0, device=device)
    np.testing.assert_allclose(out, -2 * np.einsum("tap,tbp->tab", *values), rtol=1e-6, atol=1e-6)
    query = random_losses(rng, 2, 20, 9)
    losses = random_losses(rng, 2, 20, 6)
    np.testing.assert_allclose(
        lk.influence(losses, query, device=device), lk.influence(losses, query), rtol=1e-4
    )


@each_device
def test_a_small_device__holds_parts_of_panels_and_evicts(rng, monkeypatch, device):
    x = random_losses(rng, 4, 400, 300)
    held, loads, get = [], [], DEVICE_PANELS.get

    def noted(key, load, *, size, limit):
        out = get(key, lambda: loads.append(key) or load(), size=size, limit=limit)
        held.append(DEVICE_PANELS.nbytes)
        assert held[-1] <= limit
        return out

    monkeypatch.setattr(DEVICE_PANELS, "get", noted)
    with dask.config.set(scheduler="synchronous"):
        small = lk.correlation(x, device=device, device_memory="500 KB")
        placed = contraction_of(small.data).plan.placed
        assert placed.length < 1600  # contracted in parts
        assert placed.peak + placed.cache == 500_000
        np.testing.assert_allclose(small, numpy_correlation(x), atol=2e-6)
    assert len(loads) > len(set(loads))  # evicted, and loaded again
    assert 0 < max(held) <= placed.cache


@each_device
def test_too_little_memory__is_refused_with_the_number_that_would_do(rng, device):
    x = random_losses(rng, 3, 100, 80)
    for make in (
        lambda amount: lk.correlation(x, device=device, device_memory=amount),
        lambda amount: lk.neighbors(x, 3, device=device, device_memory=amount),
    ):
        with pytest.raises(errors.MemoryBudgetError, match="set device_memory=") as error:
            make("2 KB")
        enough = int(str(error.value).split(" KiB can")[0].split()[-1]) * 1024
        make(enough).compute()
        with pytest.raises(errors.MemoryBudgetError):
            make(enough // 2)


@each_device
def test_panels__go_with_the_operand(rng, device):
    before = DEVICE_PANELS.nbytes
    kernel = lk.correlation(random_losses(rng), device=device)
    kernel.compute()
    assert DEVICE_PANELS.nbytes > before
    del kernel
    assert DEVICE_PANELS.nbytes <= before


@each_device
def test_each_chunk__is_read_once(rng, device):
    x, reads = counting(random_losses(rng, 4, 20, 30), (1, 20, 10))
    lk.correlation(x, device=device, memory="32 MiB").compute()
    assert set(reads.values()) == {1}


@each_device
def test_nothing__is_computed_before_it_is_asked_for(rng, device):
    x = random_losses(rng).chunk(sample=5)
    held = DEVICE_PANELS.nbytes
    with dask.config.set(scheduler=Forbidding()):
        kernel = lk.correlation(x, device=device)
        lk.neighbors(x, 3, device=device)
        lk.histogram(x, bins=4, device=device)
        lk.covariance(x, device=device).isel(sample=[1, 2])
    assert DEVICE_PANELS.nbytes == held
    assert isinstance(kernel.data, da.Array)
    assert isinstance(kernel.values, np.ndarray)


@each_device
@pytest.mark.parametrize("exclude", [None, "label", "rule"])
@pytest.mark.parametrize("largest", [True, False])
def test_neighbors__are_those_of_the_cores(rng, device, exclude, largest):
    x = random_losses(rng, 3, 40, 150)
    rule = (lambda a, b: abs(a["sample"] - b["sample"]) < 9) if exclude == "rule" else exclude
    options = {"exclude": rule, "largest": largest, "precision": "float32"}
    cores = lk.neighbors(x, 6, **options).compute()
    for memory in (None, "700 KB"):
        near = lk.neighbors(x, 6, device=device, device_memory=memory, **options).compute()
        np.testing.assert_allclose(near["similarity"], cores["similarity"], atol=2e-6)
        same = near["neighbor"] == cores["neighbor"]
        gap = abs(cores["similarity"].diff("rank")).min("rank")
        assert same.where(gap > 1e-5, True).all()
        assert near.attrs == cores.attrs | {"device": device}


@each_device
def test_neighbors__of_ties_are_the_first(rng, device):
    """Samples that repeat tie with many others; those that do not vary are nobody's."""
    kinds = rng.integers(0, 4, size=(2, 12, 3)).astype("float32")
    x = xr.DataArray(kinds[:, :, rng.integers(0, 3, 90)], dims=("chain", "draw", "sample"))
    x[:, :, ::7] = 2.0
    got = lk.neighbors(x, 7, device=device, device_memory="200 KB").compute()
    r = np.round(numpy_correlation(x), 5)
    np.fill_diagonal(r, -np.inf)
    r[:, ::7] = -np.inf
    varying = np.arange(90) % 7 != 0
    near = got["neighbor"].values[varying]
    first = np.argsort(-r, axis=1, kind="stable")[varying, :7]
    values = r[varying]
    np.testing.assert_array_equal(
        np.take_along_axis(values, near, 1), np.take_along_axis(values, first, 1)
    )
    assert (got["neighbor"].values[::7] == -1).all()
    assert not np.isin(got["neighbor"], np.arange(0, 90, 7)).any()


@each_device
def test_neighbors__that_are_too_few_end_in_none(rng, device):
    x = random_losses(rng, 2, 10, 8).assign_coords(label=("sample", [0] * 6 + [1] * 2))
    near, cores = (lk.neighbors(x, 5, exclude="label", device=d).compute() for d in (device, None))
    np.testing.assert_array_equal(near["neighbor"], cores["neighbor"])


@each_device
def test_histogram__is_that_of_the_cores(rng, device):
    x = random_losses(rng, 3, 30, 120)
    options = {"bins": 8, "kernel": "covariance", "bounds": (-3.0, 3.0)}
    on = lk.histogram(x, "label", device=device, device_memory="700 KB", **options).compute()
    off = lk.histogram(x, "label", **options).compute()
    total = sum(int(on[name].sum()) for name in ("count", "below", "above"))
    assert total == 120 * 119
    for name in ("count", "below", "above"):
        assert abs(on[name] - off[name]).sum() <= 8  # entries within rounding of an edge
    assert on.attrs == off.attrs | {"device": device, "precision": "float32"}


@each_device
def test_save__goes_on_under_another_budget(rng, tmp_path, device):
    x = random_losses(rng, 3, 30, 90)
    kernel = lk.correlation(x, device=device, device_memory="400 KB")
    stored = lk.save(kernel, tmp_path / "k.zarr")
    np.testing.assert_allclose(stored, numpy_correlation(x), atol=2e-6)
    assert stored.attrs["device"] == device
    again = lk.save(lk.correlation(x, device=device), tmp_path / "k.zarr")
    xr.testing.assert_identical(again, stored)


@each_device
@pytest.mark.parametrize("shape", [(2, 10, 90), (3, 40, 25)])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_passes__are_those_of_the_cores(rng, device, shape, dtype):
    x = random_losses(rng, *shape, dtype=dtype).chunk(sample=20, draw=10)
    y = random_losses(rng, *shape, dtype=dtype)
    tight = {"rtol": 1e-9 if dtype == "float64" else 2e-4, "atol": 1e-5}
    calls = (
        lambda **on: lk.group_mean(x, "label", self_pairs=False, **on),
        lambda **on: lk.frobenius(x, y, **on),
        lambda **on: lk.cka(x, y, **on),
        lambda **on: lk.cka(x, y, debiased="samples", **on),
        lambda **on: lk.cka(x, y, debiased="draws", **on),
        lambda **on: lk.svd(x, 3, over=("chain", "draw"), center="pooled", **on)["singular_value"],
    )
    for call in calls:
        off = call()
        for device_memory in (None, "1 MB"):
            on = call(device=device, device_memory=device_memory)
            np.testing.assert_allclose(on, off, **tight)


@each_device
def test_passes__iterate_on_a_device(rng, device, monkeypatch):
    monkeypatch.setattr("lkarray.kernels.spectra._EXACT_OPERATIONS", 0)
    x = random_losses(rng, 3, 40, 300)
    on, off = (
        lk.svd(x, 2, over=("chain", "draw"), max_passes=3, device=d).compute()
        for d in (device, None)
    )
    np.testing.assert_allclose(on["singular_value"], off["singular_value"], rtol=1e-4)
    np.testing.assert_allclose(on["u"], off["u"], atol=1e-3)
    assert on.attrs == off.attrs | {"device": device, "precision": "float32"}


@each_device
def test_passes__say_where_they_were_made(rng, device):
    x = random_losses(rng)
    for call in (
        lk.frobenius,
        lambda a, **o: lk.cka(a, a, **o),
        lambda a, **o: lk.group_mean(a, "label", **o),
    ):
        assert call(x, device=device).attrs["device"] == device
        assert "device" not in call(x).attrs
    with pytest.raises(errors.MemoryBudgetError, match=r"hold strips.*set device_memory=") as error:
        lk.frobenius(x, device=device, device_memory="1 KB")
    enough = int(str(error.value).split(" KiB can")[0].split()[-1]) * 1024
    lk.frobenius(x, device=device, device_memory=enough).compute()


@each_device
def test_gradient_kernels__are_those_of_the_cores(rng, device):
    values = rng.normal(size=(3, 7, 40)).astype("float32")
    G = xr.DataArray(values, dims=("time", "example", "param"), name="gradient")
    G = G.assign_coords(learning_rate=("time", [1.0, 0.5, 0.1])).chunk(time=1)
    outputs = G.expand_dims("output", axis=2)
    for call in (
        lk.lgk,
        lambda G, **on: lk.plgk(G, weight="lr", **on),
        lk.ips,
        lk.temporal_kernel,
        lambda G, **on: lk.lntk(G, outputs, **on),
        lambda G, **on: lk.pntk(G, outputs, **on),
    ):
        on, off = call(G, device=device), call(G)
        np.testing.assert_allclose(on, off, rtol=1e-4, atol=1e-5)
        assert on.attrs == off.attrs | {"device": device}


@each_device
def test_plan__knows_the_device(rng, device):
    x = random_losses(rng, 3, 40, 200)
    cost = lk.plan(lk.correlation(x, device=device, device_memory="1 MB"))
    assert cost.device == device
    assert cost.device_peak <= cost.device_budget == 1_000_000
    assert cost.bytes_up >= x.nbytes
    assert cost.bound in ("products", "reading", "copying")
    assert f"on {device}: peak" in str(cost)
    assert f"bound by {cost.bound}" in str(cost)
    # One triangle of tiles comes back; of neighbours, a few numbers of each row and panel.
    assert 4 * 200 * 201 // 2 <= cost.bytes_back <= 4 * 200**2
    near = lk.plan(lk.neighbors(x, 3, device=device))
    assert near.bytes_back == 200 * 3 * 12
    cores = lk.plan(lk.correlation(x))
    assert cores.device is None
    assert "bound by" not in str(cores)


# --- without a GPU ----------------------------------------------------------------------------


def test_no_device__leaves_everything_as_it_was(rng):
    kernel = lk.correlation(random_losses(rng))
    assert "device" not in kernel.attrs
    assert contraction_of(kernel.data).plan.placed is None


def test_device__comes_from_the_environment(rng, monkeypatch):
    monkeypatch.setenv("LKARRAY_DEVICE", "cpu")
    assert lk.correlation(random_losses(rng)).attrs["device"] == "cpu"
    monkeypatch.setenv("LKARRAY_DEVICE", "tpu")
    with pytest.raises(ValueError, match=r"LKARRAY_DEVICE.*not 'tpu'"):
        lk.correlation(random_losses(rng))
    monkeypatch.setenv("LKARRAY_DEVICE", "")
    assert as_device(None) is None


def test_device_memory__is_a_share_of_what_is_free():
    given = as_device("cpu", "1 GiB")
    assert given == Device("cpu", 1 << 30)
    assert as_device("cpu").budget == int(0.8 * devices.free_bytes("cpu"))


def test_what_is_not_there__is_named(rng, monkeypatch):
    x = random_losses(rng)
    for wrong in ("gpu", "mps", "cuda:", "cuda:x", "CPU"):
        with pytest.raises(ValueError, match="device must be"):
            lk.correlation(x, device=wrong)
    with pytest.raises(ValueError, match="device_memory is for"):
        lk.correlation(x, device_memory="1 GiB")
    with pytest.raises(errors.MemoryBudgetError, match="device_memory 'much'"):
        lk.correlation(x, device="cpu", device_memory="much")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(errors.DeviceError, match=r"'cuda' needs CUDA.*nvidia-smi"):
        lk.correlation(x, device="cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(errors.DeviceError, match="cuda:7' does not exist; there are cuda:0"):
        lk.correlation(x, device="cuda:7")
    with pytest.raises(TypeError, match="multiplies float32 and float64"):
        lk.correlation(x.astype(np.longdouble), device="cpu")


def test_no_torch__is_named():
    code = (
        "import sys; sys.modules['torch'] = None\n"
        "import numpy as np, xarray as xr, lkarray as lk\n"
        "x = xr.DataArray(np.eye(3), dims=('sample', 'feature'))\n"
        "try: lk.gram(x, over='feature', device='cpu')\n"
        "except lk.errors.DeviceError as error: print(error)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "pip install torch" in done.stdout


def test_nan__is_named_by_its_place(rng):
    x = random_losses(rng)
    x[1, 2, 3] = np.nan
    with pytest.raises(errors.NonFiniteError, match="first in {'sample': 3}"):
        lk.correlation(x, device="cpu").compute()


def test_settings_of_float32__are_restored():
    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    try:
        matmul.fp32_precision = "tf32"
        with devices.exact(Device("cpu", 1)):
            assert matmul.fp32_precision == "ieee"
        assert matmul.fp32_precision == "tf32"
    finally:
        matmul.fp32_precision = before


def test_auto__means_float32_on_a_device(rng, monkeypatch):
    monkeypatch.setattr("lkarray.engine.lowprecision._WORTH", 0)
    monkeypatch.setattr("lkarray.engine.lowprecision._WORTH_LOADED", 0)
    monkeypatch.setattr("lkarray.engine.lowprecision._is_faster", lambda: True)
    x = random_losses(rng)
    assert lk.correlation(x, precision="auto").attrs["precision"] == "bfloat16"
    assert lk.correlation(x, precision="auto", device="cpu").attrs["precision"] == "float32"
    assert lk.neighbors(x, 3, precision="auto", device="cpu").attrs["precision"] == "float32"


# --- when the device's memory ends in the middle ------------------------------------------------


def full_for(times, monkeypatch):
    """Have the next products end for want of memory."""
    calls, multiply = [], device_tiles.multiply

    def maybe(a, b):
        calls.append(tuple(a.shape))
        if len(calls) <= times:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
        return multiply(a, b)

    monkeypatch.setattr(device_tiles, "multiply", maybe)
    return calls


def test_full__is_tried_again_in_halves(rng, monkeypatch):
    x = random_losses(rng, 3, 20, 31)
    calls = full_for(1, monkeypatch)
    kernel = lk.correlation(x, device="cpu").compute(scheduler="synchronous")
    np.testing.assert_allclose(kernel, numpy_correlation(x), atol=2e-6)
    assert calls[0] == (60, 31)
    assert calls[1:] == [(30, 16), (30, 16), (30, 15), (30, 15)]


def test_full__again_is_an_error_with_a_name(rng, monkeypatch):
    full_for(99, monkeypatch)
    with pytest.raises(errors.MemoryBudgetError, match=r"'cpu' ran out of memory.*device_memory="):
        lk.correlation(random_losses(rng), device="cpu").compute(scheduler="synchronous")
    assert DEVICE_PANELS.nbytes == 0


@pytest.mark.parametrize("largest", [True, False])
def test_full__within_sinks_brings_the_tile_back(rng, monkeypatch, largest):
    x = random_losses(rng, 3, 20, 31)
    near = lk.neighbors(x, 4, largest=largest, precision="float32").compute()
    counts = lk.histogram(x, "label", bins=3).compute()
    full_for(2, monkeypatch)  # once for the tile, once for the whole of it
    got = lk.neighbors(x, 4, largest=largest, device="cpu").compute(scheduler="synchronous")
    np.testing.assert_array_equal(got["neighbor"], near["neighbor"])
    full_for(1, monkeypatch)
    got = lk.histogram(x, "label", bins=3, device="cpu").compute(scheduler="synchronous")
    np.testing.assert_array_equal(got["count"], counts["count"])


def test_full__within_a_pass_is_tried_again(rng, monkeypatch):
    from lkarray.kernels import alignment_sums

    x, step, fails = random_losses(rng, 2, 5, 30), alignment_sums.gram_step, [1]

    def maybe(*args):
        fails[0] -= 1
        if fails[0] >= 0:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return step(*args)

    expected = float(lk.frobenius(x))
    monkeypatch.setattr(alignment_sums, "gram_step", maybe)
    options = {"scheduler": "synchronous"}
    got = lk.frobenius(x, device="cpu").compute(**options)
    np.testing.assert_allclose(got, expected, rtol=1e-5)
    fails[0] = 9
    with pytest.raises(errors.MemoryBudgetError, match="ran out of memory within a strip"):
        lk.frobenius(x, device="cpu").compute(**options)


def test_other_errors__are_passed_on(rng, monkeypatch):
    def broken(a, b):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(device_tiles, "multiply", broken)
    with pytest.raises(RuntimeError, match="illegal memory access"):
        lk.correlation(random_losses(rng), device="cpu").compute(scheduler="synchronous")
