"""What a batch's autograd graph says: whose a layer's rows are, and who reads a weight.

A layer's factors are taken row by row, so that each example must have rows of its own, in order.
Operations that move rows by the values of their inputs (indexing, routing, sorting), or that add up
over the batch, could break that for one batch and not for another. A graph without them, of the
same operations as the graph of other batches, keeps the order that was tried.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import BackwardCFunction

Node = Any

#: Operations that may move rows, where their dim does not say otherwise.
_MOVING = re.compile(
    "Index(?!ed)|Gather|Scatter|Take|Put|MaskedSelect|Sort|Topk|Kthvalue|Pack|Segment|Sparse|"
    "CopySlices|Embedding|Cumsum|Cumprod|Mv|Dot"
)
_ACCUMULATE = "AccumulateGrad"
_REENTRANT = "CheckpointFunctionBackward"


@dataclass(frozen=True)
class Graph:
    """The graph behind the numbers of a batch.

    Attributes
    ----------
    signature
        Its operations and how they hang together, in a fixed order: the same for batches that are
        computed alike, whatever their number of examples.
    reads
        How often each parameter is read, by its ``id``.
    clear
        Whether no operation can move rows from one example to another by the values of its inputs.
    hidden
        Whether a part of it is not there: inside a reentrant checkpoint.
    nodes
        All of its nodes.
    """

    signature: tuple[object, ...]
    reads: Counter[int]
    clear: bool
    hidden: bool
    nodes: set[Node]


def graph_of(numbers: Tensor) -> Graph:
    """Return the graph behind numbers of the examples of a batch, ``(batch,)``."""
    n = len(numbers)
    signature: list[object] = []
    reads: Counter[int] = Counter()
    clear, hidden = True, False
    nodes: set[Node] = set()
    left: list[Node] = [numbers.grad_fn]
    while left:
        node = left.pop()
        if node is None or node in nodes:
            continue
        nodes.add(node)
        name = type(node).__name__
        if name == _ACCUMULATE:
            continue
        edges: tuple[tuple[Node, int], ...] = node.next_functions
        places = []
        for child, place in edges:
            if type(child).__name__ == _ACCUMULATE:
                reads[id(child.variable)] += 1
            places.append(place)
            left.append(child)
        size = _SIZES.get(name)
        signature.append((name, *places, None if size is None else size(node)))
        hidden = hidden or name == _REENTRANT
        if clear and (isinstance(node, BackwardCFunction) or _MOVING.search(name)):
            clear = _stays(node, name, n)
    return Graph(tuple(signature), reads, clear, hidden, nodes)


def _stays(node: Node, name: str, n: int) -> bool:
    """Say whether an operation that may move rows moves none from one example to another."""
    if name.startswith("EmbeddingBackward"):  # of a weight; of computed rows it picks among them
        return type(node.next_functions[0][0]).__name__ == _ACCUMULATE
    if name == "IndexBackward0":
        first, sizes = node._saved_indices[0], node._saved_self_sym_sizes
        if sizes[0] != n:
            return False
        if first is None:
            return True
        whole = first.dtype == torch.int64 and first.numel() == n
        return whole and torch.equal(first.flatten(), torch.arange(n, device=first.device))
    dim = getattr(node, "_saved_dim", 0)
    if not isinstance(dim, int) or dim == 0:
        return False
    index = getattr(node, "_saved_index", getattr(node, "_saved_indices", None))
    if isinstance(index, Tensor) and index.ndim > 1:
        return len(index) == n
    sizes = getattr(node, "_saved_self_sym_sizes", ())
    return len(sizes) > 1 and sizes[0] == n


# What is added up: the length of a sum over the batch would tell it.


def _summed(node: Node) -> int:
    sizes = node._saved_self_sym_sizes
    dims = [d if d < len(sizes) else d - 2**64 for d in node._saved_dim]
    return prod(sizes[d] for d in dims) if dims else prod(sizes)


def _bmm(node: Node) -> int:
    left = node._saved_self
    return int(left.shape[2] if left is not None else node._saved_mat2.shape[1])


def _baddbmm(node: Node) -> int:
    left = node._saved_batch1
    return int(left.shape[2] if left is not None else node._saved_batch2.shape[1])


def _selected(node: Node) -> tuple[int, int]:
    return node._saved_dim, node._saved_index


_SIZES: dict[str, Callable[[Node], object]] = {
    "MmBackward0": lambda node: node._saved_self_sym_sizes[1],
    "AddmmBackward0": lambda node: node._saved_mat1_sym_sizes[1],
    "BmmBackward0": _bmm,
    "BaddbmmBackward0": _baddbmm,
    "SumBackward1": _summed,
    "MeanBackward1": _summed,
    "SelectBackward0": _selected,
}
