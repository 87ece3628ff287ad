"""The attacks of docs/reliability.md, in fewer rounds: nothing is silent."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "scripts" / "make_reliability.py"


@pytest.mark.services
@pytest.mark.timeout(1800)
def test_attacks__none_is_silent():
    spec = importlib.util.spec_from_file_location("make_reliability", SCRIPT)
    assert spec is not None and spec.loader is not None
    made = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = made  # processes that are started find it by this name
    spec.loader.exec_module(made)
    tallies, silent = made.table(rounds=15, kills=8, seed=1)
    assert not silent
    assert sum(tally.total() for tally in tallies.values()) == 2 * 5 * 15 + 2 * 8
    # The attacks are real: each kind of damage was noticed at least once.
    assert all(set(tallies[kind]) - {"no effect"} for kind in made.FAULTS)
