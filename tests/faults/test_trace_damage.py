"""Damage to recorded runs, and to what is computed from them: it is named, and goes no further."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from torch import optim
from zarr.storage import MemoryStore

import lkarray as lk
from lkarray import errors
from lkarray.store import audits, gradients, trace_layout, trajectory
from lkarray.store.location import create_root
from lkarray.training import repair_trace
from tests.faults import test_commit_kills as made
from tests.helpers.audited_runs import audited, recorded
from tests.helpers.damage import Attack, Files, attacks, contents, noticed
from tests.helpers.recorded_runs import cross_entropy, examples, network

OPTIMIZERS = {
    "adam": lambda p: optim.Adam(p, 1e-2),
    "sgd": lambda p: optim.SGD(p, 0.05, momentum=0.9),
}


def computed(monkeypatch, store, optimizer: str, every: int) -> None:
    """Record a run of two blocks, and make gradients, factors and an audit of two panels."""
    monkeypatch.setattr(trace_layout, "_BLOCK_STEPS", 5)
    monkeypatch.setattr("lkarray.auditing.describing.panel_size", lambda problem, budget: 2)
    trace = recorded(OPTIMIZERS[optimizer], store=store, every=every, steps=8)
    lk.gradient_features(trace, range(9), times=[0, 7], store=store)
    lk.gradient_factors(trace, range(9), times=[0, 7], store=store)
    names = {"who": [f"n{i}" for i in range(50)], "by": [f"m{i}" for i in range(50)]}
    lk.audit(trace, audited(3), store=store, example_coords=names)
    assert lk.verify(store) == []


def survey(store, todo: list[Attack], whole) -> Counter:
    """Return how each attack was noticed; one that was not fails."""
    outcomes: Counter = Counter()
    for attack in todo:
        with attack.done_to(Files(store)):
            by = noticed(store, whole)
        assert by is not None, attack
        outcomes[attack.kind, by] += 1
    return outcomes


@pytest.mark.parametrize(
    ("optimizer", "every"), [pytest.param("adam", 1, marks=pytest.mark.minutes), ("sgd", 3)]
)
def test_damage__of_any_file_is_noticed_or_harmless(optimizer, every, monkeypatch):
    store = MemoryStore()
    computed(monkeypatch, store, optimizer, every)
    outcomes = survey(store, attacks(Files(store), seed=every)[:25], contents(store))
    assert outcomes["flip", "harmless"] + outcomes["delete", "harmless"] <= 3


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
@pytest.mark.parametrize("every", [1, 3])
def test_damage__of_every_file_and_pair_is_noticed_or_harmless(
    optimizer, every, tmp_path, monkeypatch
):
    computed(monkeypatch, tmp_path / "t", optimizer, every)
    survey(tmp_path / "t", attacks(Files(tmp_path / "t")), contents(tmp_path / "t"))


# --- what goes on -----------------------------------------------------------------------------


def outcome(store: made.Log, attack: Attack, work, whole) -> str:
    """Damage, go on, and say what came of it; what is told must leave the store as it was."""
    hurt = made.Log(dict(store._store_dict))
    files = Files(hurt)
    context = attack.done_to(files)
    context.__enter__()
    before = dict(files)
    try:
        work(hurt)
    except errors.StoreError:
        assert dict(files) == before, f"{attack} was noticed, and the store changed"
        return "refused"
    by = noticed(hurt, whole)
    assert by is not None, f"{attack} was made permanent"
    return by


@pytest.mark.parametrize("every", [1, 2])
def test_resume__of_a_damaged_run_is_refused_or_leaves_the_damage_to_be_seen(every, monkeypatch):
    monkeypatch.setattr(trace_layout, "_BLOCK_STEPS", made.BLOCK)
    store = made.Log()
    made.train(store, every, steps=3)
    whole = made.Log()
    made.train(whole, every)
    expected = contents(whole)
    todo = [a for a in attacks(Files(store), bits=1, seed=every) if a.kind != "swap"]
    outcomes = Counter(
        (a.kind, outcome(store, a, lambda s: made.train(s, every), expected)) for a in todo[:60]
    )
    assert outcomes["delete", "verify"] == 0  # what is missing is always refused
    assert sum(outcomes[kind, "refused"] for kind in ("delete", "flip", "empty")) > 20


@pytest.mark.parametrize(("work", "group"), [("differentiate", "gradients"), ("judge", "audit")])
def test_resume__of_damaged_tensors_and_audits(work, group):
    go = {
        "differentiate": lambda s: made.differentiate(s, None),
        "judge": lambda s: made.judge(s, True),
    }[work]
    whole = made.Log()
    go(whole)
    store = whole.after(2 * len(whole.log) // 3)
    todo = [a for a in attacks(Files(store), bits=1) if a.kind != "swap"][:50]
    outcomes = Counter((a.kind, outcome(store, a, go, contents(whole))) for a in todo)
    assert sum(n for (_, by), n in outcomes.items() if by == "refused") > 10


@pytest.mark.parametrize(
    "lost",
    [
        "trajectory/parameters/c/0/0",
        "trajectory/denominator/c/1/0",
        "trajectory/batch/c/1/0",
        "trajectory/coefficients/c/0/0/0",
        "trajectory/gradient_norm/c/0",
        "trajectory/record/c/0",
        "trajectory/start/c/0",
        "trajectory/tensor/c/0",
    ],
)
def test_audit__of_a_run_that_misses_a_chunk_is_refused(lost, tmp_path, monkeypatch):
    monkeypatch.setattr(trace_layout, "_BLOCK_STEPS", 5)
    recorded(OPTIMIZERS["adam"], store=tmp_path / "t", steps=8)
    (tmp_path / "t" / lost).unlink()

    def audit():
        trace = lk.open_trace(tmp_path / "t", network(), examples(), loss=cross_entropy)
        lk.audit(trace, audited(3), store=tmp_path / "a")

    with pytest.raises(errors.DamagedError, match=f"{lost} .*missing"):
        audit()
    if (tmp_path / "a").exists():  # begun, since all that comes first could be read
        assert audits.panels_left(create_root(tmp_path / "a"), "audit") == [0]


@pytest.mark.parametrize(
    "lost", ["trajectory/parameters/c/1/0", "trajectory/optimizer/exp_avg/c/1/0"]
)
def test_replay__from_a_state_that_is_missing_is_refused(lost, tmp_path):
    recorded(OPTIMIZERS["adam"], store=tmp_path / "t", steps=8, every=3)
    (tmp_path / "t" / lost).unlink()
    trace = lk.open_trace(tmp_path / "t", network(), examples(), loss=cross_entropy)
    with pytest.raises(errors.DamagedError, match=f"{lost} was committed"):
        trace.parameters(5)


def test_open__of_missing_labels_is_refused_and_lazy_chunks_when_they_are_read(tmp_path):
    made_of = {"gradients": made.differentiate, "audit": made.judge}
    for group, work in made_of.items():
        work(tmp_path / group, None)
    cases = {
        "gradients": ("learning_rate/c/0", "time/c/0", "label/c/0", "done/c/0/0"),
        "audit": ("who/c/0", "residual/c/1", "record/c/0/0", "epoch/c/0"),
    }
    for group, keys in cases.items():
        for key in keys:
            with (
                Attack("delete", f"{group}/{key}").done_to(Files(tmp_path / group)),
                pytest.raises(errors.DamagedError, match=f"{group}/{key}"),
            ):
                lk.open(tmp_path / group)
    for group, key in {"gradients": "gradient/c/1/0/0", "audit": "influence/c/0/1"}.items():
        (tmp_path / group / group / key).unlink()
        opened = lk.open(tmp_path / group)[group].to_dataset()
        with pytest.raises(errors.DamagedError, match=f"{group}/{key} was committed"):
            opened.compute()


@pytest.mark.parametrize(
    ("key", "attack", "kind"),
    [
        ("trajectory/record/c/0", "delete", "missing"),
        ("trajectory/record/c/0", "flip", "corrupt"),
        ("trajectory/module/zarr.json", "delete", "missing"),
        ("trajectory/digest/c/0/0/0", "empty", "mismatch"),
        ("gradients/done/c/0/0", "delete", "missing"),
        ("gradients/digest/c/1/0/0", "truncate", "truncated"),
        ("gradients/zarr.json", "empty", "corrupt"),
        ("audit/record/c/1/0", "delete", "missing"),
        ("audit/record/c/1/0", "truncate", "truncated"),
        ("audit/who/zarr.json", "truncate", "corrupt"),
    ],
)
def test_verify__names_the_file(key, attack, kind, monkeypatch):
    monkeypatch.setattr(trace_layout, "_BLOCK_STEPS", made.BLOCK)
    store = made.Log()
    made.train(store, 1)
    made.differentiate(store, None)
    made.judge(store, False)
    with Attack(attack, key).done_to(Files(store)):
        problems = lk.verify(store)
        assert kind in {p.kind for p in problems}, problems
        assert any(p.path == key or key in p.detail for p in problems) or "digest" in key, problems


def test_text_labels__have_a_checksum(tmp_path):
    made.judge(tmp_path / "t", False)
    path = tmp_path / "t/audit/who/c/0"
    content = path.read_bytes()
    path.write_bytes(content.replace(b"c", b"k", 1))
    assert path.read_bytes() != content
    with pytest.raises(errors.DamagedError, match="audit/who"):
        lk.open(tmp_path / "t")
    assert ("corrupt", "audit/who/c/0") in {(p.kind, p.path) for p in lk.verify(tmp_path / "t")}


@pytest.mark.parametrize(
    ("a", "b"),
    [
        ("trajectory/denominator/c/0/0", "trajectory/denominator/c/1/0"),
        ("trajectory/start/c/0", "trajectory/stop/c/0"),
        ("trajectory/optimizer/exp_avg/c/0/0", "trajectory/optimizer/exp_avg/c/1/0"),
        ("trajectory/last/exp_avg/c/1/0", "trajectory/last/parameters/c/1/0"),
        ("gradients/gradient/c/0/0/0", "gradients/gradient/c/1/0/0"),
        ("audit/influence/c/0/0", "audit/influence/c/0/1"),
        ("audit/change/c/0", "audit/total/c/1"),
        ("audit/record/c/0/0", "audit/record/c/1/0"),
    ],
)
def test_verify__sees_chunks_in_each_others_places(a, b, monkeypatch):
    monkeypatch.setattr(trace_layout, "_BLOCK_STEPS", made.BLOCK)
    store = made.Log()
    made.train(store, 2 if "optimizer" in a else 1)
    made.differentiate(store, None)
    made.judge(store, False)
    files = Files(store)
    if a.startswith("trajectory/last"):
        slot = trajectory.read_steps(create_root(store))[1]
        a, b = (key.replace("/c/1/", f"/c/{slot}/") for key in (a, b))
    with Attack("swap", a, b).done_to(files):
        problems = lk.verify(store)
        assert problems
        assert any(p.path.startswith(a.split("/")[0]) for p in problems), problems
    assert lk.verify(store) == []


# --- stores of lkarray 0.1.0 ------------------------------------------------------------------


def as_before(store: made.Log) -> None:
    """Take away what lkarray 0.1.0 did not store."""
    import json

    files = Files(store)
    for key in list(files):
        if "/digest/" in key:
            del files[key]
        elif key.endswith("zarr.json"):
            node = json.loads(files[key])
            node.get("attributes", {}).pop("lkarray_seal", None)
            node.get("attributes", {}).get("lkarray", {}).pop("seal", None)
            files[key] = json.dumps(node).encode()


def test_old_stores__open_go_on_and_verify(monkeypatch):
    monkeypatch.setattr(trace_layout, "_BLOCK_STEPS", made.BLOCK)
    store, whole = made.Log(), made.Log()
    made.train(store, 1, steps=3)
    as_before(store)
    made.train(whole, 1)
    assert lk.verify(store) == []
    made.train(store, 1)
    assert lk.verify(store) == []
    assert (
        lk.open(store)["trajectory"]
        .to_dataset()
        .compute()
        .identical(lk.open(whole)["trajectory"].to_dataset().compute())
    )
    made.differentiate(store, None)
    made.judge(store, False)
    as_before(store)
    assert lk.verify(store) == []
    assert {"gradients", "audit"} <= set(lk.open(store).children)
    del Files(store)["trajectory/loss/c/0"]
    assert [(p.kind, p.path) for p in lk.verify(store)] == [("missing", "trajectory/loss/c/0")]
    with pytest.raises(errors.DamagedError, match="trajectory/loss/c/0 was committed"):
        made.train(store, 1, steps=7)


def test_clipping__that_ends_leaves_a_run_that_opens(monkeypatch):
    """The factors of clipping end with the block in which the last gradient was clipped."""
    monkeypatch.setattr(trace_layout, "_BLOCK_STEPS", made.BLOCK)
    store = made.Log()
    made.train(store, 1, steps=9)
    diagonal = lk.open(store)["trajectory"]["clip_diagonal"]
    assert diagonal.sizes["step"] == 9
    assert (diagonal[4:] == 1).all()
    root = create_root(store)
    np.testing.assert_array_equal(trajectory.step_rows(root, "clip_diagonal", 2, 9), diagonal[2:])


def test_batches__that_widen_are_no_damage(monkeypatch):
    """Blocks before a larger batch have no chunk of the examples beyond theirs."""
    monkeypatch.setattr(trace_layout, "_BLOCK_STEPS", made.BLOCK)
    store = made.Log()
    made.train(store, 1, steps=4)
    monkeypatch.setattr(made, "row", lambda step, every, plain=made.row: plain(1, every))
    made.train(store, 1, steps=7)
    assert lk.verify(store) == []
    assert gradients.gradient_fingerprints(create_root(store)) == {}
    assert audits.audit_fingerprints(create_root(store)) == {}


# --- states taken again -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("every", "attack"),
    [
        (1, Attack("delete", "trajectory/parameters/c/1/0")),
        (1, Attack("flip", "trajectory/denominator/c/1/0", bit=99)),
        (3, Attack("delete", "trajectory/parameters/c/1/0")),
        (3, Attack("truncate", "trajectory/optimizer/exp_avg/c/2/0")),
        (3, Attack("swap", "trajectory/parameters/c/1/0", "trajectory/parameters/c/2/0")),
    ],
)
def test_repair_trace__takes_lost_states_again_to_the_bit(every, attack, tmp_path, monkeypatch):
    path = tmp_path / "t"
    monkeypatch.setattr(trace_layout, "_BLOCK_STEPS", 5 if every == 1 else 100)
    recorded(OPTIMIZERS["adam"], store=path, steps=8, every=every)
    files = Files(path)
    before = dict(files)
    with attack.done_to(files):
        hurt = dict(files)
        trace = lk.open_trace(path, network(), examples(), loss=cross_entropy)
        with monkeypatch.context() as other:  # a device that gives other bits
            other.setattr(trace, "clip", 1.5 * trace.clip)
            assert repair_trace(trace) == []
        assert dict(files) == hurt
        trace = lk.open_trace(path, network(), examples(), loss=cross_entropy)
        assert repair_trace(trace)
        assert lk.verify(path) == []
        differ = [key for key in before if key != "zarr.json" and files[key] != before[key]]
        assert differ == []
