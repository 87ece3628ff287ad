"""Audits as they are run: stored, cut off, on workers, within a budget; and what is refused."""

import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import xarray as xr
from torch import optim
from torch.utils.data import TensorDataset

import lkarray as lk
from lkarray import errors
from lkarray.auditing import budget
from lkarray.auditing.problem import problem_of
from lkarray.auditing.request import Request
from lkarray.store import audit_panels
from tests.helpers.audited_runs import audited, cross_entropy, recorded
from tests.helpers.recorded_runs import DTYPE, examples, network

adam = lambda p: optim.Adam(p, 1e-2)  # noqa: E731


@pytest.fixture
def three_panels(monkeypatch):
    monkeypatch.setattr("lkarray.auditing.describing.panel_size", lambda problem, budget: 3)


@pytest.fixture
def commits(monkeypatch):
    """Commit after every stretch."""
    monkeypatch.setattr(audit_panels, "_COMMIT_SECONDS", 0.0)
    monkeypatch.setattr(audit_panels, "_COMMIT_SHARE", 0.0)


def test_audit__is_stored_lazy_and_sound(tmp_path, three_panels):
    trace = recorded(adam, store=tmp_path / "t")
    labels = {
        "coords": {"label": audited().tensors[1].numpy()},
        "example_coords": {"train_label": examples().tensors[1].numpy()},
    }
    whole = lk.audit(trace, audited(), **labels)
    audit = lk.audit(trace, audited(), **labels, store=tmp_path / "t")
    assert audit["influence"].chunks == ((50,), (3, 3, 1))
    xr.testing.assert_identical(audit.compute().drop_attrs(), whole.drop_attrs())
    assert lk.verify(tmp_path / "t") == []
    opened = lk.open(tmp_path / "t")["audit"].to_dataset()
    xr.testing.assert_identical(opened.compute(), audit.compute())
    assert opened.attrs["kernel"] == "influence operator"
    assert opened["influence"].attrs["units"] == "nat"
    assert not (tmp_path / "t/audit/state").exists()
    (tmp_path / "t/audit/influence/c/0/1").unlink()
    assert [(p.kind, p.path) for p in lk.verify(tmp_path / "t")] == [
        ("missing", "audit/influence/c/0/1")
    ]


def test_discard_trace__leaves_what_was_computed(tmp_path, monkeypatch):
    path = tmp_path / "t"
    audit = lk.audit(recorded(adam, store=path), audited(), store=path).compute()
    with pytest.raises(errors.StoreError, match="no store"):
        lk.discard_trace(tmp_path / "other")
    with monkeypatch.context() as broken:  # killed before anything is deleted
        broken.setattr("zarr.storage.LocalStore.delete_dir", lambda *args: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            lk.discard_trace(path)
    for _ in range(2):
        xr.testing.assert_identical(lk.open(path)["audit"].to_dataset().compute(), audit)
        assert lk.verify(path) == []
        lk.discard_trace(path)
        assert not (path / "trajectory").exists()
    assert "trajectory" not in lk.open(path)
    with pytest.raises(errors.StoreError, match="no training run"):
        lk.open_trace(path, network(), examples())
    recorded(adam, store=path)  # the run may be recorded anew
    assert "trajectory" in lk.open(path)


def test_audit__called_again_computes_nothing(tmp_path, monkeypatch):
    trace = recorded(adam, store=tmp_path / "t")
    once = lk.audit(trace, audited(), store=tmp_path / "t").compute()
    monkeypatch.setattr(sys.modules["lkarray.auditing.audit"], "run_panel", None)
    again = lk.audit(trace, audited(), store=tmp_path / "t")
    xr.testing.assert_identical(again.compute(), once)
    with pytest.raises(
        errors.FingerprintError, match="rule: stored .'trapezoid', 1, 1., now .*name="
    ):
        lk.audit(trace, audited(), rule="euler", store=tmp_path / "t")
    monkeypatch.undo()
    lk.audit(trace, audited(), rule="euler", store=tmp_path / "t", name="euler")
    assert {"audit", "audit_euler"} <= set(lk.open(tmp_path / "t").children)
    assert "/audit_euler  influence(example 50, audit 7)" in describe(tmp_path / "t")


def describe(path):
    from lkarray.inspect import describe_store

    return describe_store(path)


@pytest.mark.parametrize(
    "options",
    [
        {"groups": {"time": "epoch", "param": "module"}},
        {"groups": {"time": [0, 3, 7]}, "credit": "acted", "stride": 2},
        *(pytest.param(o, marks=pytest.mark.minutes) for o in ({}, {"target": "prediction"})),
    ],
)
def test_audit__cut_off_anywhere_goes_on_with_the_same_bits(
    options, tmp_path, commits, three_panels, monkeypatch
):
    trace = recorded(lambda p: optim.SGD(p, 0.05, momentum=0.9, weight_decay=0.01))
    whole = lk.audit(trace, audited(), **options)
    rng = np.random.default_rng(0)
    for attempts in range(60):  # noqa: B007
        steps = iter(range(int(rng.integers(1, 7))))

        def stop(self, *args, steps=steps, plain=audit_panels.PanelWriter.due):
            if next(steps, None) is None:
                raise KeyboardInterrupt
            return plain(self)

        with monkeypatch.context() as patch:
            patch.setattr(audit_panels.PanelWriter, "due", stop)
            try:
                audit = lk.audit(trace, audited(), **options, store=tmp_path / "t")
                break
            except KeyboardInterrupt:
                assert lk.verify(tmp_path / "t") == []
    assert attempts >= 3
    xr.testing.assert_identical(audit.compute().drop_attrs(), whole.drop_attrs())


KILLED = """
    import sys, time
    from tests.helpers.audited_runs import audited, recorded, cross_entropy
    from tests.helpers.recorded_runs import examples, network
    from lkarray.store import audit_panels
    from lkarray.auditing import panel
    import lkarray as lk
    audit_panels._COMMIT_SECONDS = audit_panels._COMMIT_SHARE = 0.0
    plain = panel.Panel._step
    def slow(self, *args):
        time.sleep(0.01)
        plain(self, *args)
    panel.Panel._step = slow
    trace = lk.open_trace(sys.argv[1], network(), examples(), loss=cross_entropy)
    lk.audit(trace, audited(), store=sys.argv[2])
"""


@pytest.mark.minutes
def test_audit__killed_processes_leave_what_goes_on(tmp_path):
    import textwrap

    trace = recorded(adam, store=tmp_path / "t", steps=60)
    whole = lk.audit(trace, audited())
    script = tmp_path / "audit.py"
    script.write_text(textwrap.dedent(KILLED))
    command = [sys.executable, str(script), str(tmp_path / "t"), str(tmp_path / "a")]
    env = {"PYTHONPATH": str(Path(__file__).parents[2]), "PATH": "/usr/bin:/bin"}
    left = 60
    for _ in range(2):
        process = subprocess.Popen(command, env=env)
        deadline = time.monotonic() + 60
        while process.poll() is None and time.monotonic() < deadline and left_of(tmp_path) >= left:
            time.sleep(0.01)
        process.kill()
        process.wait()
        assert 0 < left_of(tmp_path) < left
        left = left_of(tmp_path)
    subprocess.run(command, env=env, check=True)
    audit = lk.open(tmp_path / "a")["audit"].to_dataset().compute()
    np.testing.assert_array_equal(audit["influence"], whole["influence"])
    np.testing.assert_array_equal(audit["path"], whole["path"])


def left_of(folder):
    """Stretches that the panel still has to go, by its record."""
    import zarr

    try:
        left = int(zarr.open_array(folder / "a/audit/record", mode="r")[0, 0])
    except Exception:  # still being made, or read while it is replaced
        return 10**6
    return left if left >= 0 else 10**6


def test_audit__on_workers(tmp_path, three_panels, local_cluster):
    from distributed import Client

    trace = recorded(adam, store=tmp_path / "t")
    whole = lk.audit(trace, audited())
    with Client(local_cluster) as client:
        audit = lk.audit(trace, audited(), store=tmp_path / "t", client=client)
        np.testing.assert_allclose(audit["influence"], whole["influence"], rtol=1e-9, atol=1e-14)
        assert audit.attrs["closure"] < 1e-10
        with pytest.raises(errors.StoreError, match="in memory cannot be reached by Dask workers"):
            lk.audit(trace, audited(), client=client)


def test_audit__panels_follow_the_budget():
    trace = recorded(adam)

    problem = problem_of(trace, Request(audit_set=audited(40)))
    each = budget.audit_bytes(problem)
    assert each >= 8 * (53 + 2 * 50)  # momentum, and influence twice
    fixed = (64 << 20) + budget.passing_bytes(problem)
    whole = int((fixed + 20.5 * each) / (1 - 1 / 8))
    assert budget.panel_size(problem, whole) == 20
    with pytest.raises(errors.MemoryBudgetError, match="set memory= to .* MiB or more"):
        lk.audit(trace, audited(), memory="10 MiB")


# --- what is refused ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target": "losses"}, "target must be 'loss', 'prediction'"),
        ({"target": 3}, "the model has outputs 0 to 2"),
        ({"target": lambda o, t: o.mean()}, "must give one number per example"),
        ({"target": lambda o, t: o}, "must give one number per example"),
        ({"target": lambda o, t: o.detach()[:, 0]}, "does not depend on the parameters"),
        ({"target": lambda o, t: (o - o.mean(0)).square().sum(1)}, "influence each other"),
        ({"module": "1"}, "needs a target that is a function"),
        ({"target": lambda h, t: h[:, 0], "module": "7"}, "is none of the model's"),
        (
            {"target": lambda h, t: h[:, 0], "module": "0", "params": "2.*"},
            "params= that come after",
        ),
        ({"rule": "rk4"}, "rule must be one of"),
        ({"supersample": 0}, "supersample must be a positive integer"),
        ({"stride": 1.5}, "stride must be an integer"),
        ({"steps": (3, 3)}, r"must be \(first, one beyond the last\) within 0 to 12"),
        ({"examples": [1, 1]}, "distinct indices from 0 to 49"),
        ({"params": "conv*"}, "matches none of"),
        ({"credit": "late"}, "credit must be 'seen' or 'acted'"),
        ({"groups": {"class": [1]}}, "'class' is not one of"),
        ({"groups": {"example": [0, 1]}}, "one label for each of the 50"),
        ({"groups": {"example": {"a": [99]}}}, "outside 0 to 49"),
        ({"groups": {"param": "layers"}}, "must be 'module', 'tensor' or a dict"),
        ({"groups": {"time": {"a": (5, 90)}}}, "within 0 to 12"),
        ({"coords": {"label": [0] * 7}, "example_coords": {"label": [0] * 50}}, "different names"),
        ({"coords": {"epoch": [0] * 7}}, "or a dim"),
    ],
)
def test_audit__refuses_before_any_work(options, message, tmp_path):
    trace = recorded(adam)
    with pytest.raises((ValueError, TypeError), match=message):
        lk.audit(trace, audited(), store=tmp_path / "a", **options)
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x, y: (255 * x, y), "spread .* were not prepared alike"),
        (lambda x, y: (x + 9, y), "mean .* were not prepared alike"),
        (lambda x, y: (x / 255, y), "were not prepared alike"),
        (lambda x, y: (x.float(), y), "float32 of shape"),
        (lambda x, y: (x[:, :5], y), r"of shape \(5,\)"),
        (lambda x, y: (x, y + 1), "has the label 3, and the training set labels from 0 to 2"),
        (lambda x, y: (x, torch.nn.functional.one_hot(y)), "targets have the shape"),
    ],
)
def test_audit__refuses_a_set_prepared_otherwise(change, message):
    trace = recorded(adam)
    inputs, labels = audited().tensors
    labels[:3] = torch.arange(3)
    with pytest.raises((ValueError, RuntimeError), match=message):
        lk.audit(trace, TensorDataset(*change(inputs, labels)))


def test_audit__of_what_lies_outside_the_training_set_when_asked():
    trace = recorded(adam)
    inputs, labels = audited().tensors
    audit = lk.audit(trace, TensorDataset(9 * inputs, labels), unlike=True)
    assert audit.attrs["closure"] < 1e-10


def test_audit__names_the_first_step_that_does_not_reproduce(tmp_path):
    import zarr

    trace = recorded(adam, store=tmp_path / "t")
    batch = zarr.open_array(tmp_path / "t/trajectory/batch", mode="r+")
    rows = batch[:]
    rows[5:10] = (rows[5:10] + 1) % 50
    batch[:] = rows
    trace = lk.open_trace(tmp_path / "t", network(), examples(), loss=cross_entropy)
    with pytest.raises(errors.FingerprintError, match="the gradient of step 5 has the norm"):
        lk.audit(trace, audited())  # looked at before any work: steps 0, 6 and 11
    rows[6] = (rows[6] - 1) % 50
    batch[:] = rows
    trace = lk.open_trace(tmp_path / "t", network(), examples(), loss=cross_entropy)
    with pytest.raises(errors.FingerprintError, match="the gradient of step 5 has the norm"):
        lk.audit(trace, audited())


def test_audit__refuses_a_disk_that_is_too_small(tmp_path, monkeypatch):
    import shutil

    trace = recorded(adam)
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(errors.StoreError, match=r"would grow by 0.00 GB, but the disk has"):
        lk.audit(trace, audited(), store=tmp_path / "a")


def test_audit__takes_indices_of_the_training_set_and_a_recorder():
    trace = recorded(adam)
    audit = lk.audit(trace, [4, 40])
    assert audit["audit"].values.tolist() == [4, 40]
    inputs, labels = examples().tensors
    same = lk.audit(trace, TensorDataset(inputs[[4, 40]], labels[[4, 40]]))
    np.testing.assert_array_equal(audit["influence"], same["influence"])


def test_audit__needs_no_state_without_momentum():
    trace = recorded(lambda p: optim.SGD(p, 0.1))
    momentum = recorded(lambda p: optim.SGD(p, 0.1, momentum=0.5))
    request = Request(audit_set=audited())
    without, carried = (budget.audit_bytes(problem_of(t, request)) for t in (trace, momentum))
    assert carried - without == 53 * torch.empty(0, dtype=DTYPE).element_size()
