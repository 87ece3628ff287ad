"""A kill between any two writes of a commit: what was committed stays, and the rest is redone."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Executor, Future
from typing import Any

import numpy as np
import pytest
import zarr
from zarr.storage import MemoryStore

import lkarray as lk
from lkarray.store import audits, gradients, trace_layout, trajectory
from lkarray.store.audit_layout import AuditLayout
from lkarray.store.audit_panels import PanelWriter, panels_left
from lkarray.store.location import create_root, exists
from lkarray.store.writing_trace import StepValues, TraceWriter

STEPS, SIZE, BLOCK = 5, 5, 2


class Log(MemoryStore):
    """Keeps what was written and deleted, in order."""

    def __init__(self, store_dict: Any = None, *, read_only: bool = False) -> None:
        super().__init__(store_dict, read_only=read_only)
        self.log: list[tuple[str, Any]] = []

    async def set(self, key: str, value: Any, byte_range: Any = None) -> None:
        self.log.append((key, value))
        await super().set(key, value, byte_range)

    async def delete(self, key: str) -> None:
        self.log.append((key, None))
        await super().delete(key)

    def after(self, count: int) -> Log:
        """Return a store as it is after that many writes: what a kill there leaves."""
        content: dict[str, Any] = {}
        for key, value in self.log[:count]:
            content[key] = value
            if value is None:
                del content[key]
        return Log(content)


def kill_everywhere(
    work: Callable[[Log], None], check: Callable[[Log], None], last: int | None = None
) -> int:
    """Kill the work after each of its (``last``) writes, and let it go on; return how many."""
    whole = Log()
    work(whole)
    assert lk.verify(whole) == []
    counts = range(len(whole.log))[-last if last else None :]
    for count in counts:
        store = whole.after(count)
        if is_made(store):
            assert lk.verify(store) == [], count
        work(store)
        assert lk.verify(store) == [], count
        check(store)
    return len(counts)


#: The last commits, and all, the making of the store among them.
LAST_OR_ALL = pytest.mark.parametrize(
    "last", [24, pytest.param(None, marks=pytest.mark.slow)], ids=["last", "all"]
)


def is_made(store: Log) -> bool:
    """Whether there is anything that counts: else `verify` says that nothing was begun."""
    if not exists(store):
        return False
    root = create_root(store)
    marks = (gradients.gradient_fingerprints(root), audits.audit_fingerprints(root))
    return trajectory.trace_fingerprint(root) is not None or any(marks)


def arrays(store: Log, group: str) -> dict[str, np.ndarray]:
    """Everything stored in a group, but records and checksums, which depend on the kills."""
    node = zarr.open_group(store, path=group, mode="r", use_consolidated=False)
    skip = ("record", "digest", "done")
    return {name: np.asarray(a[...]) for name, a in node.arrays() if name not in skip}


def assert_equal(stored: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    assert set(stored) == set(expected)
    for name in stored:
        np.testing.assert_array_equal(stored[name], expected[name], err_msg=name)


class Inline(Executor):
    """Runs what is submitted at once."""

    def submit(self, fn: Any, /, *args: Any, **options: Any) -> Future[Any]:
        done: Future[Any] = Future()
        try:
            done.set_result(fn(*args, **options))
        except Exception as error:
            done.set_exception(error)
        return done


# --- training runs --------------------------------------------------------------------------------


def layout(every: int) -> trace_layout.TraceLayout:
    return trace_layout.TraceLayout(
        [("a", "", 0, 3), ("b", "", 3, SIZE)], "float64", 1, every, True, ["exp_avg"], ["step"]
    )


def state(step: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(1000 + step)
    return {"exp_avg": rng.normal(size=SIZE), "scalars": np.full((2, 1), float(step))}


def row(step: int, every: int) -> StepValues:
    """What a step leaves; batches widen beyond one chunk, and some steps are clipped."""
    rng = np.random.default_rng(step)
    values = {
        "coefficients": rng.normal(size=(1, len(trace_layout.FIELDS))),
        "clip": rng.normal(size=2),
        "clip_value": rng.normal(),
        "batch": rng.integers(0, 99, 1500 if step in (1, 3) else 8 + step),
        "loss": np.nan if step % 2 else rng.normal(),
        "gradient_norm": rng.normal(),
        "parameters": rng.normal(size=SIZE),
        "denominator": rng.normal(size=SIZE),
    }
    kept = step % every == 0 and (every > 1 or step == 0)
    clipped = rng.normal(size=SIZE) if every == 1 and step == 3 else None
    return StepValues(values, state(step) if kept else None, clipped)


def train(store: Any, every: int, steps: int = STEPS) -> None:
    root = create_root(store)
    if trajectory.trace_fingerprint(root) is None:
        trace_layout.create_trace(store, layout(every), {"every": every})
    writer = TraceWriter(create_root(store), layout(every), Inline())
    for step in range(writer.committed, steps):
        writer.append(row(step, every))
        text = np.asarray([f"state {step}"], np.dtypes.StringDType())
        last = {"parameters": np.full(SIZE, float(step)), "extra": text}
        if step != 2:  # so that a commit has more than one step
            writer.commit(state(step + 1) | last)
            writer.wait()


@LAST_OR_ALL
@pytest.mark.parametrize("every", [1, 2])
def test_trace__killed_after_any_write_goes_on_with_the_same_bits(every, last, monkeypatch):
    monkeypatch.setattr(trace_layout, "_BLOCK_STEPS", BLOCK)
    whole_run = Log()
    train(whole_run, every)
    assert lk.verify(whole_run) == []
    whole = lk.open(whole_run)["trajectory"].to_dataset().compute()
    kept = arrays(whole_run, trace_layout.OPTIMIZER)

    def check(store: Log) -> None:
        xr_found = lk.open(store)["trajectory"].to_dataset().compute()
        assert xr_found.identical(whole)
        assert_equal(arrays(store, trace_layout.OPTIMIZER), kept)
        left, expected = (trajectory.last_state(create_root(p)) for p in (store, whole_run))
        assert_equal(left, expected)

    writes = kill_everywhere(lambda store: train(store, every), check, last)
    assert writes >= (last or 80)  # of some 15 arrays, at each of four commits


# --- gradient tensors -----------------------------------------------------------------------------


def tensor_layout(outputs: int | None) -> gradients.TensorLayout:
    labels = np.asarray(["a", "b"] * 5).astype(np.dtypes.StringDType())
    return gradients.TensorLayout(
        "gradients",
        np.arange(2),
        np.ones(2),
        10,
        outputs,
        SIZE,
        4,
        "float32",
        {"label": ("example", labels)},
        {"of": "loss"},
    )


def differentiate(store: Any, outputs: int | None) -> None:
    writer = gradients.TensorWriter(store, tensor_layout(outputs), {"of": "loss"})
    for time in range(2):
        for shard, rows in enumerate(writer.layout.shards):
            if writer.done[time, shard]:
                continue
            middle = () if outputs is None else (outputs,)
            rng = np.random.default_rng([time, rows.start])
            shape = (rows.stop - rows.start, *middle, SIZE)
            writer.write(time, shard, rng.normal(size=shape).astype(np.float32))
            if shard != 1:
                writer.commit()
    writer.commit()


@LAST_OR_ALL
@pytest.mark.parametrize("outputs", [None, 3])
def test_gradients__killed_after_any_write_go_on_with_the_same_bits(outputs, last):
    whole_run = Log()
    differentiate(whole_run, outputs)
    whole = lk.open(whole_run)["gradients"].to_dataset().compute()
    assert not np.isnan(whole["gradient"]).any()

    def check(store: Log) -> None:
        assert lk.open(store)["gradients"].to_dataset().compute().identical(whole)

    work = lambda store: differentiate(store, outputs)  # noqa: E731
    assert kill_everywhere(work, check, last) >= (last or 30)


# --- audits ---------------------------------------------------------------------------------------


def audit_layout(windows: bool) -> AuditLayout:
    sizes = {"example": 6, "audit": 5} | ({"window": 2} if windows else {})
    coords = {"who": ("example", np.asarray(list("abcdef")).astype(np.dtypes.StringDType()))}
    return AuditLayout(
        group="audit",
        per_panel=2,
        sizes=sizes,
        windows="window" if windows else None,
        split=False,
        epochs=np.arange(3),
        dtype="float64",
        coords=coords,
        attrs={"kernel": "influence"},
        units="nat",
        state=100,
    )


def judge(store: Any, windows: bool | None) -> None:
    """Audit three panels, of two windows if there are any: the later one is written first."""
    of = audit_layout(windows)
    root = audits.begin_audit(store, of, {"of": "loss"})
    for panel in panels_left(root, "audit"):
        writer = PanelWriter(root, of, panel)
        fresh = 3, {"sum": np.zeros(()), "q": np.ones(4)}
        left, carried = writer.resume() or fresh
        n = writer.audits.stop - writer.audits.start
        while left:
            rng = np.random.default_rng([panel, left])
            carried = {"sum": carried["sum"] + rng.normal(), "q": carried["q"] * rng.normal(size=4)}
            if windows and left == 3:
                writer.write(carried["q"][0] * np.ones((6, n)), 1)
            left -= 1
            if left:
                writer.commit(left, carried)
        writer.write(carried["q"][1] * np.ones((6, n)), 0 if windows else None)
        sums = {
            name: np.full(
                [
                    n if d == "audit" else s
                    for d, s in zip(spec.dims, of.shape(spec.dims), strict=True)
                ],
                float(carried["sum"]),
            )
            for name, spec in of.specs().items()
        }
        writer.finish(sums)
    audits.drop_states(root, "audit")
    audits.describe_audit(root, "audit", {"mre": 0.5, "lc": 0.25})


@LAST_OR_ALL
@pytest.mark.parametrize("windows", [False, True])
def test_audit__killed_after_any_write_goes_on_with_the_same_bits(windows, last):
    whole_run = Log()
    judge(whole_run, windows)
    whole = lk.open(whole_run)["audit"].to_dataset().compute()
    assert not np.isnan(whole["influence"]).any()

    def check(store: Log) -> None:
        assert lk.open(store)["audit"].to_dataset().compute().identical(whole)

    work = lambda store: judge(store, windows)  # noqa: E731
    assert kill_everywhere(work, check, last) >= (last or 60)
