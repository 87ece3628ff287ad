"""What is stopped keeps all its draws; what was deleted is told truly."""

import logging
import shutil
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import lkarray as lk
from lkarray import errors
from lkarray.store import commit
from tests.helpers.networks import classification, small_network

ROOT = Path(__file__).parents[2]
OPTIONS = {
    "sampler": lk.SGLD(1e-3),
    "chains": 2,
    "draws": 60,
    "burn_in": 0,
    "batch_size": 16,
    "chains_per_device": 1,
    "progress": False,
}

CHILD = """
import signal
import sys
import lkarray as lk

signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
from lkarray.store import commit
from tests.helpers.networks import classification, small_network
from torch import nn

class Telling(nn.Module):
    seen = 0
    def __init__(self):
        super().__init__()
        self.inner = small_network()
    def forward(self, x):
        Telling.seen += 1
        if Telling.seen == 200:
            print("running", flush=True)
        return self.inner(x)

commit.COMMIT_SECONDS = 1e9  # nothing but the end of a block commits
data = classification()
posterior = lk.LocalPosterior(Telling(), data, nbeta=10.0, gamma=50.0)
lk.sample(posterior, data, sampler=lk.SGLD(1e-3), chains=1, draws=1_000_000, burn_in=0,
          batch_size=16, chains_per_device=1, store=sys.argv[1], progress=False)
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_sample__a_signal_commits_first_and_then_ends_the_process(tmp_path, number):
    path = tmp_path / "s"
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}){CHILD}"
    with subprocess.Popen(
        [sys.executable, "-c", code, str(path)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as child:
        try:
            assert child.stdout.readline() == "running\n"
            child.send_signal(number)
            _, told = child.communicate(timeout=120)
        finally:
            child.kill()
    # As Python ends a process that leaves KeyboardInterrupt alone.
    assert child.returncode == -number
    stored = lk.open(path)["losses/loss"]
    assert stored.sizes["draw"] > 40  # it ran 200 passes: steps, draws and tests of them
    assert f"{stored.sizes['draw']} of chain 0" in told
    assert "The same call continues" in told
    assert lk.verify(path) == []


class Interrupted(nn.Module):
    """Raises at one of its passes, once."""

    at = 0

    def __init__(self):
        super().__init__()
        self.inner = small_network()

    def forward(self, x):
        Interrupted.at -= 1
        if Interrupted.at == 0:
            raise KeyboardInterrupt
        return self.inner(x)


@pytest.mark.parametrize("width", [1, 2])
@pytest.mark.parametrize(
    "at", [62, *(pytest.param(at, marks=pytest.mark.minutes) for at in (61, 63, 64))]
)
def test_sample__an_interrupt_anywhere_in_a_step_loses_nothing(
    tmp_path, monkeypatch, caplog, at, width
):
    data = classification()
    posterior = lk.LocalPosterior(Interrupted(), data, nbeta=10.0, gamma=50.0)
    options = OPTIONS | {"chains_per_device": width}
    whole = lk.sample(posterior, data, store=tmp_path / "whole", **options)
    monkeypatch.setattr(commit, "COMMIT_SECONDS", 1e9)
    Interrupted.at = at
    with caplog.at_level(logging.WARNING), pytest.raises(KeyboardInterrupt) as stopped:
        lk.sample(posterior, data, store=tmp_path / "s", **options)
    kept = lk.open(tmp_path / "s")["losses/loss"].sizes["draw"]
    assert kept > 10
    assert f"{kept} of chain 0" in caplog.text
    assert "The same call continues" in stopped.value.__notes__[0]
    again = lk.sample(posterior, data, store=tmp_path / "s", **options)
    np.testing.assert_array_equal(again["losses/loss"], whole["losses/loss"])
    xr_stats = again["sample_stats"].to_dataset()
    assert xr_stats.equals(whole["sample_stats"].to_dataset())


def test_sample__an_error_of_the_model_keeps_what_was_drawn(tmp_path, monkeypatch):
    class Failing(Interrupted):
        def forward(self, x):
            Interrupted.at -= 1
            if Interrupted.at == 0:
                raise RuntimeError("a bad item")
            return self.inner(x)

    monkeypatch.setattr(commit, "COMMIT_SECONDS", 1e9)
    data = classification()
    posterior = lk.LocalPosterior(Failing(), data, nbeta=10.0, gamma=50.0)
    Interrupted.at = 61
    with pytest.raises(RuntimeError, match="a bad item"):
        lk.sample(posterior, data, store=tmp_path / "s", **OPTIONS)
    assert lk.open(tmp_path / "s")["losses/loss"].sizes["draw"] > 10


@pytest.mark.parametrize("what", ["", "losses"])
def test_sample__a_store_deleted_meanwhile_is_told_truly(tmp_path, monkeypatch, what):
    monkeypatch.setattr(commit, "COMMIT_SECONDS", 0.0)
    data, path = classification(), tmp_path / "s"

    class Deleting(nn.Module):
        seen = 0

        def __init__(self):
            super().__init__()
            self.inner = small_network()

        def forward(self, x):
            Deleting.seen += 1
            if Deleting.seen == 80:
                # In one move: a folder that is written to at that moment cannot be emptied.
                gone = (path / what).rename(tmp_path / "gone")
                shutil.rmtree(gone)
            return self.inner(x)

    posterior = lk.LocalPosterior(Deleting(), data, nbeta=10.0, gamma=50.0)
    with pytest.raises(errors.StoreError) as told:
        lk.sample(posterior, data, store=path, **OPTIONS)
    if what:
        assert "parts of" in str(told.value)
        assert "['losses/loss']" in str(told.value)
        assert "draws in the files that are left are not touched" in str(told.value)
    else:
        assert "was deleted or moved while it was sampled, and its draws with it" in str(told.value)
        assert not (path / "zarr.json").exists()
    assert "safe" not in str(told.value)


# --- complete results on a read-only disk -------------------------------------

#: Ends root's right to write where permissions forbid it, for this process alone.
POWERLESS = """
import ctypes

def give_up_rights():
    libc = ctypes.CDLL(None, use_errno=True)
    header = (ctypes.c_uint32 * 2)(0x20080522, 0)
    nothing = (ctypes.c_uint32 * 6)()
    assert libc.capset(header, nothing) == 0, ctypes.get_errno()

give_up_rights()
"""

RESULTS = """
import sys
import numpy as np, torch
import lkarray as lk
from tests.helpers.networks import classification, small_network

torch.set_num_threads(1)
data, net, out = classification(), small_network(), sys.argv[1]
posterior = lk.LocalPosterior(net, data, nbeta=10.0, gamma=50.0)

def sampled(name="sampled", **changes):
    options = dict(sampler=lk.SGLD(1e-3), chains=2, draws=6, batch_size=16, progress=False)
    return lk.sample(posterior, data, store=f"{out}/{name}", **(options | changes))

def recorded(steps=3):
    model = small_network()
    sgd = torch.optim.SGD(model.parameters(), 0.1)
    x, y = data.tensors
    with lk.record(model, sgd, data, store=f"{out}/run", progress=False) as run:
        for rows in run.remaining([np.arange(i, i + 8) for i in range(steps)]):
            with run.step(rows):
                sgd.zero_grad()
                torch.nn.functional.cross_entropy(model(x[rows]), y[rows]).backward()
                sgd.step()
    return run.trace()

def everything():
    tree = sampled()
    parts = sampled("parts", components={"first": "0.*", "last": "2.*"})
    trace = recorded()
    features = lk.gradient_features(trace, range(5), times=[0, 2], store=f"{out}/run")
    audit = lk.audit(trace, range(4), store=f"{out}/run")
    snapshot = lk.snapshot(net, data, store=f"{out}/snapshot")
    kernel = lk.save(lk.correlation(tree), f"{out}/sampled")
    return [tree["losses/loss"], parts["losses/loss"], features["gradient"], audit["influence"],
            snapshot.theta(0) if hasattr(snapshot, "theta") else 0, kernel]

tensors = everything()
"""


@pytest.mark.minutes
def test_complete_results__open_on_a_read_only_disk(tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    here = f"import sys; sys.path.insert(0, {str(ROOT)!r})\n"

    def call(code):
        return subprocess.run(
            [sys.executable, "-c", here + code, str(out)], capture_output=True, text=True
        )

    made = call(RESULTS)
    assert made.returncode == 0, made.stderr
    folders = [out, *(p for p in out.rglob("*") if p.is_dir())]
    try:
        for path in out.rglob("*"):
            path.chmod(0o444 if path.is_file() else 0o555)
        out.chmod(0o555)
        checks = textwrap.dedent("""
        def refused(work):
            try:
                work()
            except lk.errors.StoreError as error:
                assert "permission is denied" in str(error), error
                return True
            return False

        assert refused(lambda: sampled(draws=9))
        assert refused(lambda: recorded(4))
        assert refused(lambda: sampled("new"))
        assert all(np.isfinite(np.asarray(one)).all() for one in tensors)
        """)
        opened = call(POWERLESS + RESULTS + checks)
        assert opened.returncode == 0, opened.stderr
    finally:
        for path in folders:
            path.chmod(0o755)


@pytest.mark.minutes
def test_study__complete_in_a_read_only_folder_is_reused(tmp_path):
    code = """
import sys
from pathlib import Path
from lkarray import workflow

class Config(workflow.Config):
    pass

folder = Path(sys.argv[1]) / "study"
with workflow.Run("study", Config(), folder) as run:
    run.stage("one", lambda: (folder / "a").write_text("1"), [folder / "a"])
from lkarray.workflow.running import finish
finish(folder, {})
print(run.reused)
"""
    out = tmp_path / "out"
    out.mkdir()
    run = [sys.executable, "-c"]
    here = f"import sys; sys.path.insert(0, {str(ROOT)!r})\n"
    made = subprocess.run([*run, here + code, str(out)], capture_output=True, text=True)
    assert made.returncode == 0, made.stderr
    for path in (out / "study").iterdir():
        path.chmod(0o444)
    (out / "study").chmod(0o555)
    try:
        opened = subprocess.run(
            [*run, here + POWERLESS + code, str(out)], capture_output=True, text=True
        )
        assert opened.returncode == 0, opened.stderr
        assert opened.stdout.strip() == "['one']"
    finally:
        (out / "study").chmod(0o755)


def test_gradients__an_interrupt_keeps_the_shards_that_were_written(tmp_path, monkeypatch):
    from lkarray.training import features

    monkeypatch.setattr(features, "_COMMIT_SECONDS", 1e9)
    data, net = classification(), small_network()
    trace = lk.snapshot(net, data, store=tmp_path / "s")
    shard, count = features.Maker.shard, []

    def slow(self, rows):
        count.append(rows)
        if len(count) == 3:
            raise KeyboardInterrupt
        return shard(self, rows)

    size = 8 * features._COPIES * sum(p.numel() for p in net.parameters())
    options = {"times": [0], "store": tmp_path / "s", "memory": 8 * size}
    monkeypatch.setattr(features.Maker, "shard", slow)
    with pytest.raises(KeyboardInterrupt):
        lk.gradient_features(trace, range(40), **options)
    before = len(count)
    assert before == 3
    lk.gradient_features(trace, range(40), **options)
    starts = [rows.start for rows in count]
    assert len(set(starts)) == len(starts) - 1  # but for the one that was interrupted
    torch.manual_seed(0)


@pytest.fixture
def interruptible():
    """A process whose Ctrl-C raises: a shell's background jobs ignore it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interruptible")
def test_audit__a_signal_keeps_the_steps_taken(tmp_path, monkeypatch):
    from lkarray.auditing.panel import Panel
    from lkarray.store.audit_panels import PanelWriter

    data, net = classification(), small_network()
    sgd = torch.optim.SGD(net.parameters(), 0.1)
    x, y = data.tensors
    with lk.record(net, sgd, data, store=tmp_path / "s", progress=False) as run:
        for start in range(6):
            rows = np.arange(start, start + 8)
            with run.step(rows):
                sgd.zero_grad()
                nn.functional.cross_entropy(net(x[rows]), y[rows]).backward()
                sgd.step()
    trace, taken, step = run.trace(), [], Panel._step

    def stepping(self, at, means):
        taken.append(at)
        if len(taken) == 3:
            signal.raise_signal(signal.SIGINT)
        step(self, at, means)

    expected = lk.audit(trace, range(4))
    monkeypatch.setattr(Panel, "_step", stepping)
    monkeypatch.setattr(PanelWriter, "due", lambda self: False)
    with pytest.raises(KeyboardInterrupt):
        lk.audit(trace, range(4), store=tmp_path / "s")
    found = lk.audit(trace, range(4), store=tmp_path / "s")
    assert taken == [5, 4, 3, 2, 1, 0]
    np.testing.assert_allclose(found["influence"], expected["influence"], rtol=1e-6, atol=1e-9)
