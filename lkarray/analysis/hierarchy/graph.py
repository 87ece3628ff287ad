"""Numbers on directed acyclic graphs: depths, ancestors, distances, order. No labels."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from graphlib import CycleError, TopologicalSorter

import numpy as np
from scipy import sparse

#: Conventions for a node's depth; a root has depth 0.
DEPTHS = ("shortest", "longest", "first_path")

Parents = Sequence[Sequence[int]]


def topological_order(parents: Parents) -> list[int]:
    """Return the nodes, parents first.

    Raises
    ------
    graphlib.CycleError
        There is a cycle; its second argument lists it.
    """
    return list(TopologicalSorter(dict(enumerate(parents))).static_order())


def find_cycle(parents: Parents) -> list[int] | None:
    """Return one cycle, first node repeated at its end, or None."""
    try:
        topological_order(parents)
    except CycleError as error:
        return list(error.args[1])
    return None


def depths(parents: Parents, convention: str) -> np.ndarray:
    """Return every node's depth: edges from a root, shape ``(node,)``.

    By the shortest path, by the longest, or along each node's first parent.
    """
    out = np.zeros(len(parents), np.int64)
    for node in topological_order(parents):
        if parents[node]:
            above = [int(out[p]) for p in parents[node]]
            pick = {"shortest": min(above), "longest": max(above), "first_path": above[0]}
            out[node] = 1 + pick[convention]
    return out


def upward(parents: Parents, node: int) -> dict[int, int]:
    """Return the node and all of its ancestors, with the fewest edges up to each."""
    steps, queue = {node: 0}, deque([node])
    while queue:
        lower = queue.popleft()
        for parent in parents[lower]:
            if parent not in steps:
                steps[parent] = steps[lower] + 1
                queue.append(parent)
    return steps


def ancestry(parents: Parents, nodes: Iterable[int]) -> sparse.csr_array:
    """Return steps up, plus 1, from some nodes to their ancestors: ``(some, node)``, sparse.

    A node is its own ancestor, with 0 steps; what is not stored is no ancestor.
    """
    rows = [upward(parents, node) for node in nodes]
    indptr = np.cumsum([0, *map(len, rows)])
    indices = np.fromiter((a for row in rows for a in row), np.int64, indptr[-1])
    steps = np.fromiter((s + 1 for row in rows for s in row.values()), np.float32, indptr[-1])
    return sparse.csr_array((steps, indices, indptr), shape=(len(rows), len(parents)))


def distances(lines: sparse.csr_array) -> np.ndarray:
    """Return the fewest edges between nodes by way of a common ancestor, ``(some, some)``.

    Parameters
    ----------
    lines
        What `ancestry` returns.

    Returns
    -------
    numpy.ndarray
        float32; infinite where two nodes share no ancestor. Costs the sum over ancestors of the
        square of how many of the nodes they have below.
    """
    out = np.full((lines.shape[0], lines.shape[0]), np.inf, np.float32)
    columns = lines.tocsc()
    for ancestor in np.flatnonzero(np.diff(columns.indptr)):
        span = slice(columns.indptr[ancestor], columns.indptr[ancestor + 1])
        below, steps = columns.indices[span], columns.data[span] - 1
        pairs = np.ix_(below, below)
        out[pairs] = np.minimum(out[pairs], steps[:, None] + steps)
    return out


def shared_at(lines: sparse.csr_array, depth: np.ndarray) -> list[sparse.csr_array]:
    """Return, for each depth, which nodes descend from which nodes at that depth.

    Two rows share an ancestor there when their product is not 0; element d is
    ``(some, nodes at depth d)``.
    """
    member = lines.tocsc()
    member.data = np.ones_like(member.data)
    present = np.flatnonzero(np.diff(member.indptr))
    deepest = int(depth[present].max(initial=-1))
    return [member[:, present[depth[present] == d]].tocsr() for d in range(deepest + 1)]


def side_by_side(parents: Parents, roots: Sequence[int]) -> list[int]:
    """Return all nodes depth first, so that related ones are neighbours.

    Of several parents a node stands below the one with the longest path to a root: the most
    specific, so that WordNet's dogs are by the other canines and not by the domestic animals.
    """
    longest = depths(parents, "longest")
    children: list[list[int]] = [[] for _ in parents]
    for node, above in enumerate(parents):
        if above:
            children[max(above, key=lambda p: longest[p])].append(node)
    out: list[int] = []
    stack = list(reversed(roots))
    while stack:
        node = stack.pop()
        out.append(node)
        stack.extend(reversed(children[node]))
    return out
