"""No argument, however odd, ends in an unnamed error, a warning, or a changed store."""

from __future__ import annotations

import inspect
import json
import random
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
import xarray as xr
from click.testing import CliRunner

import lkarray as lk
from lkarray import errors, workflow
from lkarray.arguments import checked
from lkarray.cli import main
from tests.helpers import fuzzing
from tests.helpers.fuzzing import Case, World
from tests.helpers.losses import random_losses

#: Public names that are not called with arguments of a user.
NOT_CALLED = {
    "PRESETS": "a dict",
    "__version__": "a string",
    "errors": "a module of classes",
    "cluster": "a module, fuzzed as cluster.*",
    "plots": "a module, fuzzed as plots.*",
    "schedules": "a module, fuzzed as schedules.*",
    "cluster.Finding": "what check returns",
}
SEED = 7


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    folder = tmp_path_factory.mktemp("fuzz")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)  # where odd relative paths lie
        yield World(folder)


def faults(world: World, cases: list[Case], arguments: slice = slice(None)) -> list[str]:
    found = []
    for case in cases:
        for argument in list(case.arguments)[arguments]:
            if argument in case.kept:
                continue
            for label, value in fuzzing.values_for(case, argument, world.folder):
                fault = fuzzing.fault(case, argument, value)
                if fault:
                    found.append(f"{case.name}({argument}={label}) {fault}")
    return found


def everything() -> set[str]:
    modules = {
        "plots": lk.plots.__all__,
        "cluster": lk.cluster.__all__,
        "schedules": lk.schedules.SCHEDULES,
    }
    return set(lk.__all__) | {f"{m}.{name}" for m, names in modules.items() for name in names}


@pytest.mark.slow
def test_fuzz__has_every_public_function(world):
    there = {case.name for case in fuzzing.cases(world)} | set(NOT_CALLED)
    assert everything() - there == set()


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize(
    "part", ["losses", "gradients", "audits", "hierarchies", "figures", "runs"]
)
def test_fuzz__every_odd_argument_is_taken_as_documented_or_refused_by_name(world, part):
    cases = list(getattr(fuzzing, f"_of_{part}")(world))
    before = fuzzing.contents(world.path), fuzzing.contents(world.trace_path)
    assert faults(world, cases) == []
    assert (fuzzing.contents(world.path), fuzzing.contents(world.trace_path)) == before


@pytest.mark.slow
def test_fuzz__other_spellings_of_a_number_give_the_same(world):
    for case in fuzzing.cases(world):
        if not case.fast:
            continue
        whole = fuzzing.outcome(case, case.arguments)
        for argument, base in case.arguments.items():
            for label, value in fuzzing.same_as(base):
                if label == "tensor":
                    continue  # taken or refused, as `fault` checks
                got = fuzzing.outcome(case, dict(case.arguments) | {argument: value})
                if isinstance(whole, xr.DataArray | xr.Dataset):
                    xr.testing.assert_identical(got, whole)


# --- in the fast suite: a part of the same, on made-up losses --------------------------------

BOUNDED = {
    "correlation": {"center": "pooled", "precision": "float32", "memory": "64 MiB"},
    "covariance": {"y": None, "shrinkage": 0.5},
    "neighbors": {"k": 3, "exclude": "label", "largest": True},
    "group_mean": {"groups": "label", "self_pairs": True},
    "histogram": {"bins": 4, "bounds": (-1.0, 1.0)},
    "cka_curve": {"draws": 3},
    "llc": {"nbeta": 10.0},
    "loss_gain": {},
    "mcse": {"blocks": 2},
    "residualize": {"groups": "label"},
}


def test_fuzz__a_seeded_part_of_it(tmp_path, rng):
    loss = random_losses(rng, 2, 6, 9)
    losses = loss.to_dataset(name="loss").assign(center_loss=("sample", np.zeros(9, np.float32)))
    choose = random.Random(SEED)
    found = []
    for name, options in BOUNDED.items():
        call = getattr(lk, name)
        first = next(iter(inspect.signature(call).parameters))
        case = Case(name, call, {first: losses, **options})
        for argument in case.arguments:
            values = list(fuzzing.values_for(case, argument, tmp_path))
            for label, value in choose.sample(values, min(6, len(values))):
                fault = fuzzing.fault(case, argument, value)
                if fault:
                    found.append(f"{name}({argument}={label}) {fault}")
    assert found == []


@pytest.mark.parametrize("memory", [np.int64(2**26), np.float32(2**26), 2.0**26, np.array(2**26)])
def test_memory__takes_any_number_of_bytes(rng, memory):
    losses = random_losses(rng, 2, 6, 9)
    xr.testing.assert_identical(lk.correlation(losses, memory=memory), lk.correlation(losses))


@pytest.mark.parametrize(
    ("memory", "kind"),
    [
        (np.inf, errors.MemoryBudgetError),
        (np.nan, errors.MemoryBudgetError),
        ("inf", errors.MemoryBudgetError),
        (-1, errors.MemoryBudgetError),
        (True, TypeError),
        (1j, TypeError),
        ([1], TypeError),
        (b"1 GiB", TypeError),
    ],
)
def test_memory__that_is_no_number_of_bytes_is_refused(rng, memory, kind):
    with pytest.raises(kind, match="memory"):
        lk.correlation(random_losses(rng, 2, 6, 9), memory=memory)


def test_numbers_of_numpy__are_pythons_own_in_what_is_stored(rng, tmp_path):
    losses = random_losses(rng, 2, 6, 9)
    near = lk.neighbors(losses, np.int64(3), largest=np.bool_(True)).compute()
    assert type(near.attrs["k"]) is int
    near.to_zarr(tmp_path / "near.zarr", zarr_format=3, consolidated=False)  # JSON holds them
    for wrong in (True, 2.5, "3", np.array([3])):
        with pytest.raises(TypeError, match="k must be an integer"):
            lk.neighbors(losses, wrong)


@pytest.mark.parametrize(
    "wrong", [None, "losses", np.zeros((2, 3, 4)), [1.0], xr.Dataset(), xr.DataTree(), 3]
)
@pytest.mark.parametrize(
    "name",
    [
        "llc",
        "loss_gain",
        "loss_variance",
        "singular_fluctuation",
        "diagnostics",
        "correlation",
        "cka_curve",
        "lgk",
        "feature_overlap",
        "completeness",
        "concentration",
        "net_influence",
        "to_arviz",
    ],
)
def test_what_holds_no_losses__is_refused_by_name(name, wrong):
    call = getattr(lk, name)
    first = next(iter(inspect.signature(call).parameters))
    with pytest.raises((TypeError, errors.SchemaError), match=rf"\b{first}\b|'loss'|audit"):
        call(wrong)


@pytest.mark.parametrize("level", [0, 1, -0.5, 1.5, np.nan, True, "0.95"])
def test_levels__lie_between_0_and_1(rng, level):
    losses = random_losses(rng, 2, 6, 9)
    tree = lk.Taxonomy({each: ["root"] for each in range(4)} | {"root": []})
    near = lk.neighbors(losses, 3).compute()
    for call in (
        lambda: lk.taxonomic_lift(near, tree, replicates=2, level=level),
        lambda: lk.correlation_by_distance(losses, tree, replicates=2, level=level),
        lambda: lk.attribute_lift(near, "label", level=level),
    ):
        with pytest.raises((ValueError, TypeError), match="level"):
            call()


def test_cka_curve__refuses_less_than_one_point(rng):
    for draws in (-1, 0, True, 1.5):
        with pytest.raises((ValueError, TypeError), match="draws"):
            lk.cka_curve(random_losses(rng, 2, 6, 9), draws)
    assert lk.cka_curve(random_losses(rng, 2, 6, 9), 10**30).sizes["draws"] == 6


def test_constants__give_nan_without_a_warning(rng):
    losses = random_losses(rng, 2, 6, 9)
    flat = xr.zeros_like(losses)
    assert np.isnan(lk.cka(flat, losses).compute())
    assert np.isnan(lk.cka_curve(flat, 3).compute()).all()
    assert np.isnan(lk.participation_ratio(np.zeros(3)))
    one = losses.isel(draw=slice(1))
    assert np.isnan(lk.mcse(one)["loss_gain"].compute()).all()


def test_embed__refuses_as_many_dimensions_as_samples(rng):
    near = lk.neighbors(random_losses(rng, 2, 6, 9), 3).compute()
    for many in (8, 9, 10**9):
        with pytest.raises(ValueError, match="n_components must be at most 7, two less"):
            lk.embed(near, n_components=many)


@pytest.mark.parametrize(
    "place",
    [
        "",
        "file://",
        "/dev/null",
        "foo://x",
        "s3://",
        "a\0b",
        "x" * 5000,
        b"run",
        3,
        None,
        "~nobody-of-this-name/x",
    ],
)
def test_places__that_hold_no_store_are_refused(place, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for call in (lk.open, lk.verify, lk.discard_trace, lk.from_devinterp):
        with pytest.raises((errors.StoreError, TypeError)) as caught:
            call(place)
        said = str(caught.value)
        assert "path or store" in said or str(place).removeprefix("~")[:9] in said
    assert list(tmp_path.iterdir()) == []


def test_places__other_folders_and_pipes_are_refused(tmp_path):
    for label, place in fuzzing.strange_paths(tmp_path):
        if not isinstance(place, Path):
            continue
        with pytest.raises((errors.StoreError, ValueError), match=f"{tmp_path}"):
            lk.open(place)
        assert place.exists() or label == "below"


# --- the accessor, the command line, studies --------------------------------------------------


def test_accessor__refuses_as_the_functions_do(rng):
    losses = random_losses(rng, 2, 6, 9)
    for call, name in (
        (lambda: losses.lk.neighbors(True), "k"),
        (lambda: losses.lk.correlation(memory=np.inf), "memory"),
        (lambda: losses.lk.group_mean("nothing"), "groups"),
        (lambda: losses.lk.cka(None), "b"),
        (lambda: losses.lk.most_influential(), "dims"),
        (lambda: losses.lk.params("*"), "params"),
    ):
        with pytest.raises((ValueError, TypeError), match=rf"\b{name}\b"):
            call()
    taken = {name for name in dir(losses.lk) if not name.startswith("_")}
    assert {"correlation", "modes", "completeness"} <= taken <= set(lk.__all__)


COMMANDS = [
    ["run", "nothing"],
    ["run", "digits", "--preset", "huge"],
    ["run", "digits", "--set", "x"],
    ["run", "digits", "--chains", "nan"],
    ["run", "digits", "--chains", "1e9"],
    ["run", "digits", "--chains", ""],
    ["run", "digits", "loose"],
    ["info", ""],
    ["info", "foo://x"],
    ["info", "/dev/null"],
    ["verify", "nowhere"],
    ["verify", "/dev/null"],
    ["cluster", "check", "junk"],
    ["cluster", "check", "--workers", "x"],
    ["cluster", "check", "tcp://127.0.0.1:1", "--timeout", "-1"],
]


@pytest.mark.parametrize("words", COMMANDS, ids=" ".join)
def test_command_line__ends_in_one_line_and_a_code(words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    done = CliRunner().invoke(main, words)
    assert done.exit_code in (1, 2)
    assert done.exception is None or isinstance(done.exception, SystemExit)
    assert "Traceback" not in done.output


class Settings(workflow.Config):
    size: int = 3


GOOD = {"workflow": "study", "lkarray": lk.__version__, "config": {"size": 3}, "stages": {}}
RECORDS = {
    "empty": "",
    "cut": json.dumps(GOOD)[:40],
    "a list": "[]",
    "null": "null",
    "bytes": "\x00\xff",
    "nested": "[" * 10000,
    "stages a list": json.dumps(GOOD | {"stages": []}),
    "stages of strings": json.dumps(GOOD | {"stages": {"a": "b"}}),
    "stages missing": json.dumps({k: v for k, v in GOOD.items() if k != "stages"}),
    "outputs a number": json.dumps(GOOD | {"finished": "x", "stages": {"a": {"outputs": 3}}}),
    "seconds missing": json.dumps(GOOD | {"stages": {"a": {"outputs": []}}}),
    "config a string": json.dumps(GOOD | {"config": "size=3"}),
    "config null": json.dumps(GOOD | {"config": None}),
    "workflow a list": json.dumps(GOOD | {"workflow": [1]}),
}


@pytest.mark.parametrize("text", RECORDS.values(), ids=RECORDS)
def test_run__a_record_that_is_none_is_refused_and_kept(text, tmp_path):
    record = tmp_path / "run.json"
    record.write_bytes(text.encode("latin1"))
    with (
        pytest.raises(errors.StoreError, match=r"run\.json|size|workflow"),
        workflow.Run("study", Settings(), tmp_path) as run,
    ):
        run.stage("b", lambda: None, [])
    assert record.read_bytes() == text.encode("latin1")
    assert not workflow.running.is_complete(tmp_path)


def test_checked__says_what_an_annotation_allows():
    @checked()
    def call(k: int, name: str | None = None, share: float = 0.5, *, whole: bool = False) -> tuple:
        return k, name, share, whole

    assert call(np.int8(3), np.str_("a"), np.float64(0.25), whole=np.bool_(True)) == (
        3,
        "a",
        0.25,
        True,
    )
    assert [type(v) for v in call(np.int8(3), "a", 1, whole=1)] == [int, str, float, bool]
    for wrong in (
        {"k": 1.0},
        {"k": True},
        {"k": "1"},
        {"k": 1, "name": 3},
        {"k": 1, "share": "a"},
        {"k": 1, "whole": 2},
        {"k": torch.zeros(2)},
    ):
        with pytest.raises(TypeError, match=rf"^{list(wrong)[-1]} must be"):
            call(**wrong)
    with pytest.raises(TypeError, match="missing 1 required positional argument: 'k'"):
        call()
