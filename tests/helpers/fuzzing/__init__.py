"""Real small arguments for every public function, and what is put in their places."""

from __future__ import annotations

from collections.abc import Iterator

from tests.helpers.fuzzing.audits import _of_audits
from tests.helpers.fuzzing.figures import _of_figures
from tests.helpers.fuzzing.gradients import _of_gradients
from tests.helpers.fuzzing.hierarchies import _of_hierarchies
from tests.helpers.fuzzing.losses import _of_losses
from tests.helpers.fuzzing.runs import _of_runs
from tests.helpers.fuzzing.values import same_as, strange_paths, values_for
from tests.helpers.fuzzing.verdicts import contents, fault, outcome
from tests.helpers.fuzzing.world import Case, World

__all__ = [
    "Case",
    "World",
    "_of_audits",
    "_of_figures",
    "_of_gradients",
    "_of_hierarchies",
    "_of_losses",
    "_of_runs",
    "cases",
    "contents",
    "fault",
    "outcome",
    "same_as",
    "strange_paths",
    "values_for",
]


def cases(w: World) -> Iterator[Case]:
    """Yield every public callable with arguments."""
    yield from _of_losses(w)
    yield from _of_gradients(w)
    yield from _of_audits(w)
    yield from _of_hierarchies(w)
    yield from _of_figures(w)
    yield from _of_runs(w)
