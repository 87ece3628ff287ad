"""Opening a damaged store, in another process, and of lkarray 0.1.0."""

import logging
import tarfile
import warnings
from pathlib import Path

import dask
import numpy as np
import pytest
import torch
import xarray as xr
import zarr
from click.testing import CliRunner
from torch.utils.data import DataLoader

import lkarray as lk
from lkarray import errors
from lkarray import store as stores
from lkarray.cli import main
from tests.helpers import attacks
from tests.helpers.attacks import ATTACKS, copied, edit

OLD = Path(__file__).parent / "data" / "store_0_1_0.tar.gz"


@pytest.fixture
def store(whole, tmp_path, monkeypatch):
    """A copy to be damaged."""
    attacks.small_blocks(monkeypatch)
    return copied(whole[0], tmp_path / "s.zarr")


# --- opening -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "how"),
    [
        ("derived/near/zarr.json", "cut"),
        ("derived/near/zarr.json", "delete"),
        ("derived/near/name/zarr.json", "empty"),
        ("derived/near/name/c/0", "delete"),
    ],
)
def test_open__leaves_out_a_broken_result_and_says_so(store, whole, name, how, caplog):
    ATTACKS[how](store / name, np.random.default_rng(0))
    tree = lk.open(store)
    assert set(tree["derived"].children) == {"kernel"}
    assert any("derived/near is damaged" in line for line in tree.attrs["hidden"])
    assert "derived/near" in caplog.text
    assert tree["losses/loss"].shape == (2, 10, 24)


@pytest.mark.parametrize("dim", ["components", "checkpoints"])
def test_parts__name_the_inner_file(tmp_path, sample, model, dim):
    parts = {"components": {"first": "0.*"}, "checkpoints": {"first": model}}[dim]
    path = tmp_path / "s.zarr"
    sample(path, **{dim: parts})
    inner = f"{dim.removesuffix('s')}/first"
    (path / inner / "losses/label/c/0").unlink()
    assert [p.path for p in lk.verify(path)] == [f"{inner}/losses/label/c/0"]
    with pytest.raises(errors.DamagedError, match=f"{inner} is damaged: losses/label/c/0"):
        lk.open(path)
    with pytest.raises(errors.DamagedError, match=f"{inner} is damaged"):
        sample(path, **{dim: parts, "draws": 12})


class Reads(torch.utils.data.Dataset):
    """Items read from a store in each worker."""

    def __init__(self, path):
        self.path = path

    def __len__(self):
        return 2

    def __getitem__(self, index):
        losses = lk.open(self.path)["losses"]
        return torch.tensor([index, len(losses["label"]), len(losses["name"])])


def test_open__in_a_forked_process(store):
    """Dask's threads were used before, and do not live on in the child."""
    with dask.config.set(scheduler="threads"):
        lk.open(store)["losses/loss"].mean().compute()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of forking with threads
        loader = DataLoader(
            Reads(store), batch_size=None, num_workers=1, multiprocessing_context="fork", timeout=60
        )
        batches = [item.tolist() for item in loader]
    assert batches == [[0, 24, 24], [1, 24, 24]]


# --- stores of lkarray 0.1.0 ---------------------------------------------------------------------


@pytest.fixture
def old(tmp_path):
    with tarfile.open(OLD) as archive:
        archive.extractall(tmp_path, filter="data")
    return tmp_path / "store.zarr"


def test_old_store__opens_and_verifies_and_says_what_is_not_checked(old, caplog):
    losses = lk.open(old)["losses"]
    assert losses["loss"].shape == (2, 9, 8)
    assert losses["name"].values.tolist() == list("abcdefgh")
    with caplog.at_level(logging.WARNING, "lkarray"):
        assert lk.verify(old) == []
    assert "written by lkarray 0.1.0" in caplog.text
    done = CliRunner().invoke(main, ["verify", str(old)])
    assert done.exit_code == 0
    assert "written by lkarray 0.1.0" in done.output
    assert "is sound" in done.output


def test_old_store__damage_of_what_has_checksums_is_named(old):
    attacks.flip(old / "losses/loss/c/1/0/0", np.random.default_rng(0))
    raw = (old / "losses/name/c/0").read_bytes()
    (old / "losses/name/c/0").write_bytes(raw.replace(b"a", b"z"))  # seen by the hash of labels
    edit(old / "losses/zarr.json", lambda m: m["attributes"].update(gamma=1.0))
    named = {p.path for p in lk.verify(old)}
    assert {"losses/loss/c/1/0/0", "losses", "losses/zarr.json"} == named or named >= {
        "losses/loss/c/1/0/0",
        "losses/zarr.json",
    }


def test_old_store__goes_on_without_checksums(old):
    from concurrent.futures import ThreadPoolExecutor

    root = stores.open_root(old, mode="r+")
    stores.require_sound(root)
    with ThreadPoolExecutor(1) as pool:
        region = stores.ChainRegion(root, 0, pool)
        assert region.draws == 9
        assert region.state() is not None
    (old / "sample_stats/distance/c/0/0").unlink()
    with pytest.raises(errors.DamagedError, match="sample_stats/distance/c/0/0"):
        stores.require_sound(root)


def test_labels__as_text_have_checksums(store):
    for name in ("losses/name", "losses_other/turned"):
        array = zarr.open_group(store)[name]
        assert [type(codec).__name__ for codec in array.compressors] == ["Crc32cCodec"]
    assert isinstance(lk.open(store)["losses"].to_dataset(), xr.Dataset)
