"""The README's code runs as printed, and its commands are those of the Makefile."""

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import xarray as xr
import zarr

import lkarray as lk
from tests.helpers.networks import classification, small_network

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)


def block(word):
    """The only block of code with a word in it."""
    (code,) = [text for text in BLOCKS if word in text]
    return compile(code, "README.md", "exec")


def test_readme__the_ten_lines_run_on_the_demo_store(digits):
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", BLOCKS[0]],
        cwd=digits,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    first, *_, between, gains = done.stdout.strip().splitlines()
    tree = lk.open(digits / "runs/digits/store.zarr")
    R = lk.correlation(tree["losses"]).compute()
    assert float(first) == pytest.approx(float(R[3, 17]), abs=1e-6)
    block = R.values[R["label"].values == 3][:, R["label"].values == 8]
    assert float(between) == pytest.approx(block.mean(), abs=1e-6)
    assert "neighbor" in done.stdout
    assert len(gains.strip("[]").split()) == 2


def test_readme__the_lines_for_ones_own_model_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    data = classification()
    names = {
        "lk": lk,
        "model": small_network(),
        "train_set": data,
        "observed": torch.utils.data.Subset(data, range(10)),
        "labels": data.tensors[1][:10],
    }
    code = BLOCKS[1].replace("draws=500", "draws=6, progress=False")
    exec(compile(code, "README.md", "exec"), names)
    assert names["tree"]["losses"].sizes == {"chain": 4, "draw": 6, "sample": 10}
    exec(block("lk.diagnostics"), names | {"other_inputs": torch.utils.data.Subset(data, [11, 12])})


def test_readme__the_lines_about_memory_run_on_the_demo_store(digits, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tree = lk.open(digits / "runs/digits/store.zarr")
    names = {"lk": lk, "tree": tree}
    exec(block("lk.save"), names)
    saved = zarr.open_group(tmp_path / "kernel.zarr", mode="r")[f"derived/{names['R'].name}"]
    np.testing.assert_allclose(saved[names["R"].name][3, :9], names["R"][3, :9], atol=1e-6)


def test_readme__the_lines_about_training_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    data, model = classification(), small_network()
    names = {
        "lk": lk,
        "F": torch.nn.functional,
        "model": model,
        "optimizer": torch.optim.AdamW(model.parameters(), 1e-2),
        "train_set": data,
        "inputs": data.tensors[0],
        "labels": data.tensors[1],
        "test_set": torch.utils.data.Subset(data, range(6)),
        "batches": [part for _ in range(3) for part in torch.arange(40).split(16)],
    }
    exec(block("lk.record"), names)
    assert names["similarity"].shape == (40, 40)
    assert names["K"].shape == (3, 3)
    assert names["modes"]["drive"].values.shape == (5,)
    exec(block("lk.audit"), names)
    assert names["audit"].attrs["lc"] > 0.99
    assert set(names["by_class"]["influence"].dims) == {"group", "audit", "layer", "epoch"}


def test_readme__the_lines_about_hierarchies_run():
    rng = np.random.default_rng(0)
    wnids = list(lk.Taxonomy.imagenet().labels[:200:4])
    losses = xr.DataArray(
        rng.normal(size=(3, 30, 50)).astype("float32"),
        dims=("chain", "draw", "sample"),
        coords={"sample": np.arange(50), "wnid": ("sample", wnids)},
        name="loss",
    )
    names = {
        "lk": lk,
        "tree": xr.DataTree.from_dict({"/losses": losses.to_dataset()}),
        "near": lk.neighbors(losses, k=5),
        "images": rng.integers(0, 255, (50, 4, 4, 3)),
    }
    exec(block("taxonomic_lift"), names)
    assert names["lift"]["lift"].sel(depth=0).dropna("query_depth").values.tolist()


def test_readme__gives_both_commands_first_and_they_exist():
    makefile = (ROOT / "Makefile").read_text()
    first = re.search(r"```\n(.*?)```", README, flags=re.DOTALL)
    commands = re.findall(r"^make (\S+)", first.group(1), flags=re.MULTILINE)
    assert commands == ["demo", "test"]
    assert all(f"\n{name}:" in makefile for name in commands)


PAGES = [
    "README.md",
    "CONTRIBUTING.md",
    "docs/architecture.md",
    "docs/hierarchies.md",
    "docs/training.md",
    "docs/audit.md",
]


@pytest.mark.parametrize("name", PAGES)
def test_docs__local_links_and_files_exist(name):
    text = (ROOT / name).read_text()
    folder = (ROOT / name).parent
    links = re.findall(r"\]\(([^)#:]+)\)", text)
    assert all((folder / link).exists() for link in links)
    code = re.findall(r"`((?:benchmarks|tests|workflows|docs)/[\w/]+\.\w+)`", text)
    assert all((ROOT / path).exists() for path in code)
