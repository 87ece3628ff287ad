"""The attacks of docs/reliability.md, in fewer rounds: nothing is silent."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).parents[2] / "scripts"


@pytest.mark.services
@pytest.mark.timeout(1800)
def test_attacks__none_is_silent(monkeypatch):
    monkeypatch.syspath_prepend(SCRIPTS)  # so that processes that are started find it too
    made = importlib.import_module("make_reliability")
    tallies, silent = made.table(rounds=15, kills=8, seed=1)
    assert not silent
    assert sum(tally.total() for tally in tallies.values()) == len(made.STORES) * 5 * 15 + 2 * 8
    # The attacks are real: each kind of damage was noticed at least once.
    assert all(set(tallies[kind]) - {"no effect"} for kind in made.FAULTS)
