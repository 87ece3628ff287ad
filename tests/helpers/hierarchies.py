"""Made hierarchies, neighbour tables and losses that follow them."""

import numpy as np
import xarray as xr
from hypothesis import strategies as st

import lkarray as lk


def table(neighbor, labels, **attrs):
    return xr.Dataset(
        {"neighbor": (("sample", "rank"), np.asarray(neighbor))},
        coords={"sample": np.arange(len(labels)), "label": ("sample", np.asarray(labels))},
        attrs=attrs,
    )


def binary(depth):
    """A complete binary tree; its leaves are its labels."""
    edges = [
        (word, word + bit)
        for level in range(depth)
        for word in (format(i, f"0{level}b") if level else "" for i in range(2**level))
        for bit in "01"
    ]
    return lk.Taxonomy.from_edges(edges)


def random_table(taxonomy, n, k, rng):
    labels = rng.choice(taxonomy.labels, n)
    neighbor = np.full((n, k), -1)
    for i in range(n):
        neighbor[i] = rng.choice(np.flatnonzero(labels != labels[i]), k, replace=False)
    return table(neighbor, labels, exclude="label", k=k)


def taxonomic_losses(taxonomy, each=4, chains=5, draws=60, seed=0):
    """Losses whose correlations follow the hierarchy: each node moves all that is below."""
    rng = np.random.default_rng(seed)
    labels = np.repeat(taxonomy.labels, each)
    series = {node: rng.normal(size=(chains, draws)) for node in taxonomy.nodes}
    loss = np.stack([sum(series[a] for a in taxonomy.ancestors(y)) for y in labels], -1)
    loss = loss + 0.7 * rng.normal(size=loss.shape)
    return xr.DataArray(
        loss.astype(np.float32),
        dims=("chain", "draw", "sample"),
        coords={"sample": np.arange(len(labels)), "label": ("sample", labels)},
        name="loss",
    )


@st.composite
def dags(draw, most: int = 12):
    """Parents of nodes 0 .. n - 1, each below earlier ones only; several roots are common."""
    n = draw(st.integers(2, most))
    return {
        node: draw(st.lists(st.integers(0, node - 1), max_size=3, unique=True)) if node else []
        for node in range(n)
    }


def whole(parents):
    return lk.Taxonomy(parents, labels=list(parents), roots=[n for n in parents if not parents[n]])
