"""`Taxonomy`: labels and what they are kinds of."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping, Sequence
from functools import cached_property
from typing import Any, Self

import numpy as np
from scipy import sparse

from lkarray.analysis.hierarchy import graph, sources
from lkarray.analysis.hierarchy.graph import DEPTHS
from lkarray.analysis.hierarchy.names import checked_parents, named_list, named_nodes, plain_all
from lkarray.analysis.hierarchy.sources import plain
from lkarray.values import integer, mapping, one_of, several, text

Node = Hashable


class Taxonomy:
    """Labels, and what they are kinds of: a directed acyclic graph, immutable.

    A node may have several parents, and there may be several roots. A node is its own
    ancestor, and a root has depth 0 (docs/methods/base_rates.md). Made by the constructors below,
    or from a mapping of each node to its parents.

    Parameters
    ----------
    parents
        ``{node: its parents}``, in order of importance; nodes that are only parents, and those
        whose parent is missing (``None``, NaN, an empty text), are roots. Blanks around names do
        not count.
    labels
        The nodes that inputs are labelled with, in order: nodes, or ``{label: node}`` where the
        labels of the data are called otherwise. By default the leaves.
    aliases
        Other names by which a node is known, ``{name: node}``.
    roots
        The nodes that may be without parents. By default any that has children.

    Raises
    ------
    ValueError
        There is a cycle (it is named), a label that no node bears, or a label without a path
        to a root.

    Examples
    --------
    >>> animals = Taxonomy({"dog": ["mammal"], "cat": ["mammal"], "trout": ["fish"],
    ...                     "mammal": ["animal"], "fish": ["animal"]})
    >>> animals.labels
    ('dog', 'cat', 'trout')
    >>> animals.ancestors("dog")
    ('animal', 'mammal', 'dog')
    >>> animals.distance("dog", "trout")
    4.0
    """

    __slots__ = ("__dict__", "_index", "_parents", "labels", "nodes")

    #: What inputs are labelled with, in order.
    labels: tuple[Hashable, ...]
    #: Every node.
    nodes: tuple[Node, ...]

    def __init__(
        self,
        parents: Mapping[Node, Iterable[Node]],
        labels: Iterable[Node] | Mapping[Hashable, Node] | None = None,
        *,
        aliases: Mapping[Hashable, Node] | None = None,
        roots: Iterable[Node] | None = None,
    ) -> None:
        above = checked_parents(parents)
        above |= {p: () for listed in list(above.values()) for p in listed if p not in above}
        if not above:
            raise ValueError("parents or edges are empty: a taxonomy needs at least one node")
        self.nodes = tuple(above)
        position = {node: number for number, node in enumerate(self.nodes)}
        self._parents = tuple(tuple(position[p] for p in listed) for listed in above.values())
        cycle = graph.find_cycle(self._parents)
        if cycle is not None:
            path = " -> ".join(str(self.nodes[node]) for node in reversed(cycle))
            raise ValueError(f"a taxonomy must not have cycles, but there is {path}")
        inner = {p for listed in self._parents for p in listed}
        if labels is None:
            labels = [node for number, node in enumerate(self.nodes) if number not in inner]
        named = named_nodes("labels", labels)
        others = {} if aliases is None else named_nodes("aliases", mapping("aliases", aliases))
        absent = [node for node in others.values() if node not in position]
        if absent:
            raise ValueError(f"{named_list(absent)} named by aliases, but not among parents")
        known = position | {alias: position[node] for alias, node in others.items()}
        absent = [node for node in named.values() if node not in known]
        if absent:
            raise ValueError(f"{named_list(absent)} named as labels, but not in the taxonomy")
        self.labels = tuple(named)
        self._index = known | {label: known[node] for label, node in named.items()}
        self._check_roots(inner, None if roots is None else set(plain_all("roots", roots)))

    def _check_roots(self, inner: set[int], roots: set[Node] | None) -> None:
        for label in self.labels:
            above = graph.upward(self._parents, self._index[label])
            tops = [a for a in above if not self._parents[a]]
            good = [a for a in tops if (a in inner if roots is None else self.nodes[a] in roots)]
            if not good:
                raise ValueError(
                    f"label {label!r} has no path to a root: above it is only "
                    f"{named_list([self.nodes[a] for a in tops])} "
                    "without parents; give it a parent, or name it in roots="
                )

    # --- made from -------------------------------------------------------------------------

    @classmethod
    def imagenet(cls) -> Self:
        """Return the 1,000 classes of ImageNet (ILSVRC 2012) and their WordNet 3.0 ancestors.

        Labels are wnids in torchvision's order; class numbers 0 to 999 and synset names are
        known too. Read from a file of this package, so that no corpus is needed.

        >>> Taxonomy.imagenet().ancestors(151)[-2:]
        ('toy_dog.n.01', 'chihuahua.n.03')
        """
        parents, labels, aliases = sources.read_imagenet()
        return cls(parents, labels, aliases=aliases)

    @classmethod
    def wordnet(cls, synsets: Iterable[str] | Mapping[Hashable, str]) -> Self:
        """Return WordNet 3.0 above some synsets, through nltk.

        Parameters
        ----------
        synsets
            wnids (``"n02085620"``) or names (``"dog.n.01"``), or ``{label: synset}``.

        Raises
        ------
        ValueError
            A synset is unknown (all that are get listed).
        MissingCorpusError
            nltk's WordNet corpus is missing; the message says the command that gets it.
        """
        named = {
            label: text("synsets", name) for label, name in named_nodes("synsets", synsets).items()
        }
        parents, names, aliases = sources.read_wordnet(named.values())
        labels = {label: names[synset] for label, synset in named.items()}
        return cls(parents, labels, aliases=aliases)

    @classmethod
    def from_edges(
        cls,
        edges: Iterable[tuple[Node, Node]],
        labels: Iterable[Node] | Mapping[Hashable, Node] | None = None,
        *,
        roots: Iterable[Node] | None = None,
    ) -> Self:
        """Return the taxonomy of ``(parent, child)`` edges; one without a parent names a root.

        A parent is missing if it is ``None``, NaN, or empty text (but for the empty text above
        several nodes, which is the root of words by their beginnings).

        >>> Taxonomy.from_edges([("animal", "dog"), ("animal", "cat")]).labels
        ('dog', 'cat')
        """
        rows: list[tuple[str, tuple[Any, Any]]] = []
        for number, edge in enumerate(several("edges", edges)):
            if not sources.is_pair(edge):
                raise ValueError(f"edges: edge {number} is {edge!r}; expected (parent, child)")
            above, below = plain_all("edges", edge)
            rows.append((f"edge {number}", (above, below)))
        return cls(sources.parents_of(rows, prefixes=True), labels, roots=roots)

    @classmethod
    def from_parents(
        cls,
        parents: Mapping[Node, Any],
        labels: Iterable[Node] | Mapping[Hashable, Node] | None = None,
        *,
        roots: Iterable[Node] | None = None,
    ) -> Self:
        """Return the taxonomy of ``{node: parent}``, ``{node: [parents]}``, or None for roots.

        >>> Taxonomy.from_parents({"dog": "mammal", "bat": ["mammal", "flier"]}).roots
        ('mammal', 'flier')
        """
        return cls(mapping("parents", parents), labels, roots=roots)

    @classmethod
    def from_networkx(
        cls,
        digraph: Any,
        labels: Iterable[Node] | Mapping[Hashable, Node] | None = None,
        *,
        roots: Iterable[Node] | None = None,
    ) -> Self:
        """Return the taxonomy of a networkx ``DiGraph`` whose edges lead from parent to child."""
        if not hasattr(digraph, "is_directed"):
            raise TypeError(f"digraph must be a networkx DiGraph, not {type(digraph).__name__}")
        if not digraph.is_directed():
            raise ValueError("a taxonomy needs directed edges, from parent to child: nx.DiGraph")
        parents = {node: list(digraph.predecessors(node)) for node in digraph}
        return cls(parents, labels, roots=roots)

    @classmethod
    def from_csv(cls, path: Any, labels: Iterable[Node] | None = None) -> Self:
        """Return the taxonomy of a CSV file with the columns ``parent`` and ``child``.

        A row without a parent says that its child is a root. Blanks around names do not count.
        """
        return cls(sources.read_csv(path), labels)

    @classmethod
    def from_json(cls, path: Any) -> Self:
        """Return the taxonomy that `to_json` wrote, or that of ``{node: [parents]}`` in JSON."""
        parents, labels = sources.read_json(path)
        return cls(parents, labels)

    def to_json(self, path: Any) -> None:
        """Write the taxonomy to a file: nodes and labels that are text or numbers."""
        labels = {label: self.nodes[self._index[label]] for label in self.labels}
        sources.write_json(path, {node: self.parents(node) for node in self.nodes}, labels)

    def subset(self, labels: Iterable[Hashable]) -> Self:
        """Return the same graph, seen from some of its labels or nodes only."""
        chosen = {label: self.nodes[at] for label, at in self._found(labels)}
        aliases = {name: self.nodes[at] for name, at in self._index.items()}
        return type(self)(
            {node: self.parents(node) for node in self.nodes}, chosen, aliases=aliases
        )

    # --- asked ------------------------------------------------------------------------------

    @property
    def roots(self) -> tuple[Node, ...]:
        """Nodes without parents."""
        return tuple(n for n, above in zip(self.nodes, self._parents, strict=True) if not above)

    def node(self, label: Hashable) -> Node:
        """Return the node that a label, an alias or a node names."""
        return self.nodes[self._at(label)]

    def require(self, label: Hashable, name: str) -> None:
        """Raise ``ValueError`` that names an argument, unless its label is in the taxonomy."""
        self._at(label, name)

    def parents(self, label: Hashable) -> tuple[Node, ...]:
        """Return the nodes directly above."""
        return tuple(self.nodes[p] for p in self._parents[self._at(label)])

    def children(self, label: Hashable) -> tuple[Node, ...]:
        """Return the nodes directly below."""
        at = self._at(label)
        pairs = zip(self.nodes, self._parents, strict=True)
        return tuple(node for node, above in pairs if at in above)

    def depth(self, label: Hashable, depth: str = "shortest") -> int:
        """Return a node's depth: 0 at a root.

        Parameters
        ----------
        label
            A label, an alias or a node.
        depth
            ``"shortest"``: edges to the nearest root, as everywhere by default;
            ``"longest"``; or ``"first_path"``, along first parents.
        """
        return int(self.depths(depth)[self._at(label)])

    def ancestors(self, label: Hashable, at_depth: int | None = None) -> tuple[Node, ...]:
        """Return a node's ancestors and itself, from the root down; or those at one depth."""
        if at_depth is not None:
            at_depth = integer("at_depth", at_depth)
        shortest, longest = self.depths("shortest"), self.depths("longest")
        above = graph.upward(self._parents, self._at(label))
        order = sorted(above, key=lambda a: (longest[a], a))
        return tuple(self.nodes[a] for a in order if at_depth in (None, shortest[a]))

    def descendants(self, label: Hashable) -> tuple[Hashable, ...]:
        """Return the labels below a node, itself included if it is one."""
        at = self._at(label)
        below = self.lines[:, [at]].toarray()[:, 0] > 0
        return tuple(label for label, under in zip(self.labels, below, strict=True) if under)

    def lowest_common_ancestors(self, a: Hashable, b: Hashable) -> tuple[Node, ...]:
        """Return the nodes above both that have none such below: several at times, or none."""
        up, other = self._upward(a, b)
        common = [node for node in other if node in up]
        higher = {p for node in common for p in self._parents[node]}
        return tuple(self.nodes[node] for node in common if node not in higher)

    def distance(self, a: Hashable, b: Hashable) -> float:
        """Return the fewest edges between two nodes by a common ancestor; infinite without."""
        up, other = self._upward(a, b)
        return float(min((up[n] + other[n] for n in up if n in other), default=np.inf))

    def order(self) -> tuple[Hashable, ...]:
        """Return the labels so that related ones stand side by side: depth first."""
        roots = [self._index[root] for root in self.roots]
        place = {node: at for at, node in enumerate(graph.side_by_side(self._parents, roots))}
        return tuple(sorted(self.labels, key=lambda label: place[self._index[label]]))

    def hues(self) -> dict[Hashable, float]:
        """Return a hue for each label, 0 to 0.9, by its place in `order`.

        See Adam et al. 2025a, figure 1.
        """
        order = self.order()
        return {label: 0.9 * at / max(1, len(order) - 1) for at, label in enumerate(order)}

    def title(self, label: Hashable) -> str:
        """Return a node's name for people: ``"toy dog"`` for ``"toy_dog.n.01"``."""
        node = str(self.node(label))
        word, dot, rest = node.partition(".")
        return word.replace("_", " ") if dot and rest[:2] == "n." else node

    # --- for many at a time -------------------------------------------------------------------

    def depths(self, depth: str = "shortest") -> np.ndarray:
        """Return every node's depth, in the order of ``nodes``."""
        one_of("depth", depth, DEPTHS)
        if depth not in self._depths:
            self._depths[depth] = graph.depths(self._parents, depth)
            self._depths[depth].flags.writeable = False
        return self._depths[depth]

    def positions(self, labels: Iterable[Hashable]) -> np.ndarray:
        """Return where in ``nodes`` some labels are.

        Raises
        ------
        ValueError
            Some are not in the taxonomy; they are listed.
        """
        return np.array([at for _, at in self._found(labels)], np.int64)

    def ancestry(self, positions: Sequence[int] | np.ndarray) -> sparse.csr_array:
        """Return steps up plus 1 from some nodes to each node above, ``(some, node)``, sparse."""
        return graph.ancestry(self._parents, [int(at) for at in positions])

    @cached_property
    def lines(self) -> sparse.csr_array:
        """The ancestry of all labels, ``(label, node)``."""
        return self.ancestry(self.positions(self.labels))

    @cached_property
    def _depths(self) -> dict[str, np.ndarray]:
        return {}

    def _found(
        self, labels: Iterable[Hashable], name: str = "labels"
    ) -> list[tuple[Hashable, int]]:
        names = plain_all(name, labels)
        absent = [name for name in dict.fromkeys(names) if name not in self._index]
        if absent:
            raise ValueError(
                f"{name}: {named_list(absent)} not in the taxonomy, whose labels are such as "
                f"{named_list(self.labels[:3])}; rename labels with Taxonomy(..., labels={{label: "
                "node}), or leave these inputs out"
            )
        return [(name, self._index[name]) for name in names]

    def _upward(self, a: Hashable, b: Hashable) -> list[dict[int, int]]:
        return [graph.upward(self._parents, self._at(x, name)) for x, name in ((a, "a"), (b, "b"))]

    def _at(self, label: Hashable, name: str = "label") -> int:
        return self._found([label], name)[0][1]

    def __setattr__(self, name: str, value: Any) -> None:
        if name in self.__slots__ and hasattr(self, name):
            raise AttributeError("a Taxonomy cannot be changed; make another")
        object.__setattr__(self, name, value)

    def __len__(self) -> int:
        return len(self.labels)

    def __contains__(self, label: Hashable) -> bool:
        return plain(label) in self._index

    def __repr__(self) -> str:
        deepest = int(self.depths().max())
        return (
            f"<Taxonomy: {len(self.labels)} labels, {len(self.nodes)} nodes, "
            f"{len(self.roots)} root{'s' * (len(self.roots) > 1)}, depth {deepest}>"
        )

    def __dask_tokenize__(self) -> tuple[Any, ...]:
        return (type(self).__name__, self.nodes, self._parents, self.labels)


def require_taxonomy(taxonomy: object) -> None:
    """Raise unless the argument ``taxonomy`` is one."""
    if not isinstance(taxonomy, Taxonomy):
        raise TypeError(
            f"taxonomy must be a Taxonomy, as lk.Taxonomy makes, not {type(taxonomy).__name__}"
        )
