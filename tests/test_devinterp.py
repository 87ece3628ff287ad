"""Reading devinterp's stores. The layout written here is that of devinterp 2.0.1.

It was taken from `devinterp.slt.sampling._build_sampling_schema`, and checked once against a
store that devinterp 2.0.1 itself wrote: flat arrays, zstd, NaN where nothing was written, settings
in the root's attribute ``metadata``, and ``completed`` written last.
"""

import json
import shutil

import dask
import numpy as np
import pytest
import zarr
from zarr.codecs import ZstdCodec

import lkarray as lk
from lkarray import errors
from tests.helpers.losses import Forbidding

CHAINS, DRAWS, TOKENS, BATCH, BURN_IN, THIN = 3, 6, 7, 4, 5, 2
STEPS = BURN_IN + DRAWS * THIN
SAMPLER = {
    "lr": 1e-4,
    "n_beta": 30.0,
    "batch_size": BATCH,
    "num_chains": CHAINS,
    "num_draws": DRAWS,
    "num_burnin_steps": BURN_IN,
    "num_steps_bw_draws": THIN,
    "init_seed": 100,
    "gradient_accumulation_steps": 1,
    "localization": 200.0,
    "noise_level": 1.0,
    "llc_weight_decay": 0.0,
    "bounding_box_size": None,
    "sampling_method": "sgmcmc_sgld",
    "sampling_method_kwargs": {},
    "init_noise": None,
    "save_metrics": False,
    "shuffle": True,
    "epoch_mode": "cycle",
    "num_init_loss_batches": 32,
    "match_sampling_input_ids_across_chains": True,
    "scheduler_type": "constant",
    "scheduler_kwargs": None,
    "cores": 1,
    "online": False,
}


def layout(names, samples):
    """The dims and the shape of each array."""
    micro = (CHAINS, STEPS, BATCH)
    arrays = {
        "init_loss": (("chain", "token_pos"), (CHAINS, TOKENS)),
        "sampling_loss": (
            ("chain", "draw", "batch", "token_pos"),
            (CHAINS, DRAWS, BATCH, TOKENS),
        ),
        "sampling_loss_micro": (
            ("chain", "step", "batch_sampling", "token_pos"),
            (*micro, TOKENS),
        ),
        "sampling_input_ids_micro": (
            ("chain", "step", "batch_sampling", "token"),
            (*micro, TOKENS + 1),
        ),
    }
    for name in names:
        dims = ("chain", "draw", f"batch_{name}", "token_pos")
        arrays[f"loss_{name}"] = (dims, (CHAINS, DRAWS, samples, TOKENS))
        arrays[f"input_ids_{name}"] = ((f"batch_{name}", "token"), (samples, TOKENS + 1))
    return arrays


def write(path, names=("pile", "code"), *, samples=5, completed=True, failed=()):
    rng = np.random.default_rng(0)
    root = zarr.create_group(path, zarr_format=3)
    values = {}
    for name, (dims, shape) in layout(names, samples).items():
        ids = "input_ids" in name
        array = root.create_array(
            name,
            shape=shape,
            chunks=tuple(1 if dim == "chain" else n for dim, n in zip(dims, shape, strict=True)),
            dtype="int64" if ids else "float32",
            fill_value=0 if ids else np.nan,
            compressors=ZstdCodec(level=0),
            dimension_names=dims,
            attributes={} if ids else {"_FillValue": "AAAAAAAA+H8="},
        )
        drawn = rng.integers(0, 50, shape) if ids else rng.normal(3, 1, shape).astype("f4")
        if dims[:2] == ("chain", "draw"):
            # devinterp leaves the rest of a failed chain unwritten.
            drawn[list(failed), 2:] = np.nan
        array[:] = drawn
        values[name] = drawn
    observables = [{"type": "ObserveDifferentDataset", "obs_id": n} for n in names]
    config = {
        "sampler": SAMPLER,
        "observables": observables,
        "tokenizer_context_length": TOKENS + 1,
    }
    root.update_attributes({"metadata": {"config": config}})
    if completed:
        root.update_attributes({"completed": 1})
    return values


def test_from_devinterp__opens_losses_lazily_with_their_settings(tmp_path):
    values = write(tmp_path / "s")
    with dask.config.set(scheduler="synchronous"):
        tree = lk.from_devinterp(tmp_path / "s")
    loss = tree["losses/loss"]
    assert loss.dims == ("chain", "draw", "sample", "token")
    assert loss.chunks is not None
    np.testing.assert_array_equal(loss, values["loss_pile"])
    np.testing.assert_array_equal(tree["losses_code/loss"], values["loss_code"])
    np.testing.assert_array_equal(tree["losses"]["input_ids"], values["input_ids_pile"])
    attrs = tree["losses"].attrs
    expected = {"nbeta": 30.0, "gamma": 200.0, "burn_in": BURN_IN, "thin": THIN}
    assert {key: attrs[key] for key in expected} == expected
    assert attrs["sampler"]["name"] == "SGLD"
    assert attrs["sampler"]["step_size"] == 1e-4
    with dask.config.set(scheduler=Forbidding()):
        lk.correlation(loss.mean("token"))
    assert lk.correlation(loss.mean("token")).shape == (5, 5)
    assert lk.diagnostics(tree).sizes["sample"] == 5


def test_from_devinterp__leaves_failed_chains_out(tmp_path):
    values = write(tmp_path / "s", failed=[1])
    tree = lk.from_devinterp(tmp_path / "s")
    np.testing.assert_array_equal(tree["losses/loss"], values["loss_pile"][[0, 2]])
    assert "1" in tree.attrs["hidden"][0]
    write(tmp_path / "all", failed=[0, 1, 2])
    with pytest.raises(errors.DivergedError):
        lk.from_devinterp(tmp_path / "all")


def test_from_devinterp__says_what_is_wrong(tmp_path, store):
    write(tmp_path / "part", completed=False)
    with pytest.raises(errors.StoreError, match="interrupted"):
        lk.from_devinterp(tmp_path / "part")
    with pytest.raises(errors.StoreError, match="no Zarr group"):
        lk.from_devinterp(tmp_path / "nothing")
    with pytest.raises(errors.StoreError, match=r"open it with lk\.open"):
        lk.from_devinterp(store)
    zarr.create_group(tmp_path / "other", zarr_format=3)
    with pytest.raises(errors.StoreError, match="not a store of devinterp 2"):
        lk.from_devinterp(tmp_path / "other")
    write(tmp_path / "s")
    shutil.rmtree(tmp_path / "s" / "loss_pile")
    with pytest.raises(errors.SchemaError, match="loss_pile"):
        lk.from_devinterp(tmp_path / "s")
    assert json.loads((tmp_path / "s" / "zarr.json").read_text())["attributes"]["completed"] == 1
