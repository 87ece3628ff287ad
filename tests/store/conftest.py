"""Sound stores, each made once in a process, for tests to damage copies of."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.helpers import attacks
from tests.helpers.saved import full_store


@pytest.fixture(scope="session")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, object]]:
    """A run with results, and what users read of it."""
    return attacks.whole_store(tmp_path_factory.mktemp("whole") / "s.zarr")


@pytest.fixture(scope="session")
def made_full(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return full_store(tmp_path_factory.mktemp("full") / "full.zarr")


@pytest.fixture
def full(made_full: Path, tmp_path: Path) -> Path:
    """A copy of a store that holds something in every group."""
    return attacks.copied(made_full, tmp_path / "full.zarr")
