"""Before a record or a mark counts, all that it implies is on the disk, folders and all."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
import xarray as xr
from torch.nn import functional as F

import lkarray as lk
from lkarray import store as stores
from lkarray.store import derived
from lkarray.store.names import SAVED
from tests.helpers.losses import kernel


class Disk:
    """What a power cut would leave: files and folders' entries as of their last flush."""

    def __init__(self, monkeypatch, root: Path, is_mark):
        self.root, self.is_mark, self.marks = root, is_mark, []
        self.files: dict[str, tuple] = {}
        self.folders: dict[str, dict[str, int]] = {}
        fsync, replace = os.fsync, os.replace

        def flush(handle):
            fsync(handle)
            path = os.readlink(f"/proc/self/fd/{handle}")
            if os.path.isdir(path):
                self.folders[path] = {e.name: e.inode() for e in os.scandir(path)}
            else:
                self.files[path] = self.state(path)

        def move(source, target, **options):
            if self.is_mark(Path(source), Path(target)):
                self.check(Path(source), Path(target))
            # What was flushed goes along with its folder.
            for path, state in list(self.files.items()):
                if path.startswith(f"{source}/"):
                    self.files[f"{target}{path.removeprefix(str(source))}"] = state
            for path, entries in list(self.folders.items()):
                if path == str(source) or path.startswith(f"{source}/"):
                    self.folders[f"{target}{path.removeprefix(str(source))}"] = entries
            replace(source, target, **options)

        monkeypatch.setattr(os, "fsync", flush)
        monkeypatch.setattr(os, "replace", move)
        monkeypatch.setattr(derived, "_exchange", lambda a, b: False)

    @staticmethod
    def state(path):
        status = os.stat(path)
        return status.st_ino, status.st_size, status.st_mtime_ns

    def lost(self, but=()):
        """Return the files of the store that a power cut would lose, or spoil."""
        lost = []
        for at, folders, names in os.walk(self.root):
            for name in [*folders, *names]:
                path = os.path.join(at, name)
                if name.startswith(".lkarray") or name.endswith(".partial") or path in but:
                    continue
                entry = self.folders.get(at, {}).get(name)
                if entry != os.stat(path).st_ino:
                    lost.append(f"entry {path}")
                elif name in names and self.files.get(path) != self.state(path):
                    lost.append(f"content {path}")
        if self.root.name not in self.folders.get(str(self.root.parent), {}):
            lost.append(f"entry {self.root}")
        return lost

    def check(self, source, target):
        self.marks.append(target)
        # A folder that the mark is the first in comes with it; the old result may stay behind.
        leading = {str(path) for path in (source, target, *target.parents)}
        lost = self.lost(leading | {str(target.with_name(f"..{target.name}"))})
        assert not lost, f"{target} would outlive {lost[:4]} ({len(lost)})"


def root_mark(*keys):
    """Return a test for the root's metadata when they first tell of something."""

    def is_mark(source, target):
        if target.name != "zarr.json" or target.parent.name[-5:] != ".zarr":
            return False
        attributes = json.loads(source.read_text())["attributes"]["lkarray"]
        return any(attributes.get(key) for key in keys)

    return is_mark


def record(*ends):
    """Return a test for records, but for those of zeros, which count nothing."""
    return lambda source, target: str(target).endswith(ends) and any(source.read_bytes()[:-4])


def test_sampling__a_store_is_on_the_disk_before_its_records(tmp_path, monkeypatch, sample):
    path = tmp_path / "new" / "folder" / "run.zarr"
    made, counted = root_mark("losses"), record("commit/record/c/0/0")
    disk = Disk(monkeypatch, path, lambda a, b: made(a, b) or counted(a, b))
    sample(path, chains=1, draws=3)
    assert {p.name for p in disk.marks} == {"zarr.json", "0"}
    before = len(disk.marks)
    sample(path, chains=1, draws=40)  # grows
    assert len(disk.marks) > before
    assert disk.lost() == []
    for folder in (tmp_path, tmp_path / "new"):
        assert set(os.listdir(folder)) == set(disk.folders[str(folder)])


def test_save__a_kernel_is_on_the_disk_before_it_is_complete(tmp_path, monkeypatch):
    def is_mark(source, target):
        if target.name != "zarr.json" or target.parent.name != "k":
            return False
        attributes = json.loads(source.read_text())["attributes"]
        return attributes.get(SAVED, {}).get("complete", False)

    disk = Disk(monkeypatch, tmp_path / "k.zarr", is_mark)
    lk.save(kernel(), tmp_path / "k.zarr")
    assert len(disk.marks) == 2  # complete, and sealed
    assert disk.lost() == []


def test_put__a_result_is_on_the_disk_before_it_is_in_place(tmp_path, monkeypatch):
    path = tmp_path / "s.zarr"

    def is_mark(source, target):
        return target == path / "derived/t" and source.name == ".t"

    disk = Disk(monkeypatch, path, is_mark)
    lk.save(kernel(), path)
    for value in (1.0, 2.0):
        stores.put(path, "t", xr.DataArray([value], dims="x", name="v"))
        assert disk.lost() == []
    assert len(disk.marks) == 2


def test_training__steps_gradients_and_audits_are_on_the_disk_before_they_count(
    tmp_path, monkeypatch, model, data
):
    path = tmp_path / "train.zarr"
    made = root_mark("trajectory", "gradients", "audits")
    counted = record("trajectory/record/c/0", "gradients/done/c/0/0", "audit/record/c/0/0")
    disk = Disk(monkeypatch, path, lambda a, b: made(a, b) or counted(a, b))
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    x, y = data.tensors
    with lk.record(model, optimizer, data, store=path) as run:
        for start in (0, 8, 16):
            batch = np.arange(start, start + 8)
            with run.step(batch):
                optimizer.zero_grad()
                F.cross_entropy(model(x[batch]), y[batch]).backward()
                optimizer.step()
    trace = lk.open_trace(path, model, data)
    lk.gradient_features(trace, range(4), times=[0, 1], store=path)
    lk.audit(trace, torch.utils.data.Subset(data, range(4)), store=path, progress=False)
    ends = ["trajectory/record/c/0", "gradients/done/c/0/0", "audit/record/c/0/0", "zarr.json"]
    for end in ends:
        assert any(str(mark).endswith(end) for mark in disk.marks), end
    assert disk.lost({str(path / "audit/state")}) == []


@pytest.mark.parametrize("name", ["run.json", "index.html"])
def test_replacing__flushes_a_file_before_it_takes_its_place(tmp_path, monkeypatch, name):
    from lkarray.store.files import write_text

    disk = Disk(monkeypatch, tmp_path, lambda a, b: False)
    write_text(tmp_path / name, "text")
    assert disk.files[str(tmp_path / f".{name.split('.')[0]}.part.{name.split('.')[1]}")]
    assert os.listdir(tmp_path) == [name] == list(disk.folders[str(tmp_path)])
