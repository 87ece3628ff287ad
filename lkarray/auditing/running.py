"""Run one panel of an audit, in this process: what an audit here and one on workers share."""

from __future__ import annotations

from collections.abc import Callable

from lkarray.auditing.budget import states_bytes
from lkarray.auditing.panel import Panel, Writer
from lkarray.auditing.per_step import Influences, PerStep
from lkarray.auditing.problem import Problem
from lkarray.nn.gradients import NotFactoredError


def run_panel(
    problem: Problem,
    writer: Writer,
    budget: int,
    tick: Callable[[int], None],
    skip: Callable[[int], None],
    *,
    per_step: type[PerStep] = Influences,
) -> None:
    """Run one panel, from where it was cut off; ``skip`` is told the steps taken before."""
    memory = states_bytes(budget)
    panel = Panel(problem, writer, memory, per_step)
    done = len(problem.stretches) - panel.left
    skip(min(done * problem.request.stride, problem.stop - problem.start))
    while True:
        try:
            return panel.run(tick)
        except NotFactoredError as error:  # a batch that uses a layer otherwise than the first
            problem.materialise(error.names)
            panel = Panel(problem, writer, memory, per_step, afresh=True)
