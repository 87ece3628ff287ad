"""Calls of taxonomies, and of functions of them."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

import lkarray as lk
from tests.helpers.fuzzing.world import LABEL, Case, World


def _of_hierarchies(w: World) -> Iterator[Case]:
    parents = {1: ["a"], 2: ["a"], 0: ["root"], "a": ["root"], "root": []}
    yield Case(
        "Taxonomy",
        lk.Taxonomy,
        {"parents": parents, "labels": [0, 1, 2], "aliases": {"zero": 0}, "roots": ["root"]},
    )
    yield Case(
        "Taxonomy.from_edges",
        lk.Taxonomy.from_edges,
        {"edges": [("root", "a"), ("a", 1)], "labels": [1]},
    )
    yield Case(
        "Taxonomy.from_parents", lk.Taxonomy.from_parents, {"parents": parents, "labels": [1]}
    )
    file = w.folder / "taxonomy.json"
    w.taxonomy.to_json(file)
    yield Case("Taxonomy.from_json", lk.Taxonomy.from_json, {"path": file})
    table = w.folder / "edges.csv"
    table.write_text("parent,child\nroot,a\na,b\n")
    yield Case("Taxonomy.from_csv", lk.Taxonomy.from_csv, {"path": table, "labels": ["b"]})
    yield Case("Taxonomy.subset", w.taxonomy.subset, {"labels": [0, 1]})
    yield Case("Taxonomy.node", w.taxonomy.node, {"label": 1})
    yield Case("Taxonomy.ancestors", w.taxonomy.ancestors, {"label": 1, "at_depth": 1})
    yield Case("Taxonomy.depth", w.taxonomy.depth, {"label": 1, "depth": "longest"})
    yield Case("Taxonomy.distance", w.taxonomy.distance, {"a": 1, "b": 2})
    yield Case(
        "Taxonomy.lowest_common_ancestors", w.taxonomy.lowest_common_ancestors, {"a": 1, "b": 2}
    )
    yield Case(
        "taxonomy_distance", lk.taxonomy_distance, {"taxonomy": w.taxonomy, "labels": [0, 1, 2]}
    )
    yield Case(
        "taxonomic_lift",
        lk.taxonomic_lift,
        {
            "neighbors": w.losses,
            "taxonomy": w.taxonomy,
            "label": "label",
            "base": "matched",
            "depth": "shortest",
            "k": 4,
            "largest": True,
            "estimator": "sample",
            "delete_chains": True,
            "replicates": 5,
            "level": 0.9,
            "seed": 0,
            "keep_replicates": False,
            "memory": "64 MiB",
        },
    )
    yield Case(
        "taxonomic_lift",
        lk.taxonomic_lift,
        {"neighbors": w.near, "taxonomy": w.taxonomy, "replicates": 5},
    )
    yield Case(
        "attribute_lift",
        lk.attribute_lift,
        {
            "neighbors": w.near,
            "attribute": LABEL % 2,
            "exclude": "label",
            "blocks": 4,
            "level": 0.9,
            "seed": 0,
        },
    )
    yield Case(
        "correlation_by_distance",
        lk.correlation_by_distance,
        {
            "losses": w.losses,
            "taxonomy": w.taxonomy,
            "label": "label",
            "within": None,
            "kernel": "correlation",
            "center": "pooled",
            "replicates": 5,
            "level": 0.9,
            "seed": 0,
            "memory": "64 MiB",
        },
    )
    yield Case(
        "color_groups",
        lk.color_groups,
        {"images": np.random.default_rng(0).random((9, 4, 4, 3)), "k": 2},
    )
