"""How many audited examples a panel may have."""

from __future__ import annotations

from math import prod

import numpy as np
import torch
from torch import nn

from lkarray.auditing.blocks import Dense
from lkarray.auditing.panel import BATCH
from lkarray.auditing.problem import Problem
from lkarray.errors import MemoryBudgetError

#: Share of the budget for states of the run, and bytes for threads, Zarr and the allocator.
_STATES, _SPARE = 1 / 8, 64 << 20


def states_bytes(budget: int) -> int:
    """Return the bytes of a budget that states of the run may take."""
    return int(budget * _STATES)


def panel_size(problem: Problem, budget: int) -> int:
    """Return the audited examples of a panel that fit a budget, and divide the set evenly.

    Raises
    ------
    MemoryBudgetError
        Not one fits.
    """
    passing = passing_bytes(problem)
    fixed = states_bytes(budget) + _SPARE + passing
    each = audit_bytes(problem)
    fit = (budget - fixed) // each
    if fit < 1:
        needed = (fixed - states_bytes(budget) + each) / (1 - _STATES)
        raise MemoryBudgetError(
            f"an audited example takes {each / 2**20:.1f} MiB (what is carried through the run, "
            f"and its influences), and a batch {passing / 2**20:.0f} MiB; set memory= to "
            f"{needed / 2**20:.0f} MiB or more, or audit groups of examples, or some params="
        )
    n = problem.data.n
    panels = -(-n // fit)
    return int(-(-n // panels))


def audit_bytes(problem: Problem) -> int:
    """Return the bytes that one audited example takes."""
    item = problem.flat.theta.element_size()
    gradients = 2 * _gradient_numbers(problem)
    return item * problem.outputs * (_carried(problem) + gradients + 2 * _credited(problem))


def state_bytes(problem: Problem, audits: int) -> int:
    """Return the bytes that a pass of some audited examples leaves to go on from."""
    item = problem.flat.theta.element_size()
    return item * problem.outputs * audits * (_carried(problem) + _credited(problem))


def _carried(problem: Problem) -> int:
    """Numbers carried from step to step."""
    if problem.updates.stateless:
        return 0
    live = 2 if problem.by_acted else 1  # by what acted, a window goes on when the next begins
    return live * sum(block.size for block in problem.blocks())


def _credited(problem: Problem) -> int:
    """Numbers of the influence of the windows that are open at once."""
    live = 2 if problem.by_acted else 1  # by what acted, a window goes on when the next begins
    edges = [edge for window in problem.windows for edge in window]
    open_at = [sum(a <= edge < b for a, b in problem.windows) for edge in edges]
    return problem.layers * problem.places.length * max(live, *open_at)


def _gradient_numbers(problem: Problem) -> int:
    """Numbers of one example's gradient as it is kept: factors where there are some."""
    dense = sum(block.size for block in problem.blocks() if isinstance(block, Dense))
    return dense + sum(site.cost for site in problem.training.plan.sites if site.form == "factored")


def passing_bytes(problem: Problem) -> int:
    """Bytes of a batch on its way through the model, and of its gradients."""
    batch = int((problem.trace.batches >= 0).sum(1).max())
    most = max(batch, min(BATCH, problem.data.n))
    item = problem.flat.theta.element_size()
    # Activations, what comes back to them, and copies on the way.
    return most * item * (4 * _activations(problem) + 2 * _gradient_numbers(problem))


def _activations(problem: Problem) -> int:
    """Numbers that the layers give for one example."""
    counts: list[int] = []

    def count(module: nn.Module, args: object, output: object) -> None:
        if isinstance(output, torch.Tensor):
            counts.append(prod(output.shape[1:]))

    leaves = [m for m in problem.flat.module.modules() if not list(m.children())]
    handles = [module.register_forward_hook(count) for module in leaves]
    try:
        with torch.no_grad():
            problem.flat(problem.trace.train.take(np.zeros(1, np.int64))[0])
    finally:
        for handle in handles:
            handle.remove()
    return sum(counts)
