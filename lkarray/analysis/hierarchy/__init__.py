"""Label hierarchies, and how far a kernel's neighbours agree with them."""

from __future__ import annotations

from lkarray.analysis.hierarchy.attributes import attribute_lift, color_groups
from lkarray.analysis.hierarchy.distance import correlation_by_distance, taxonomy_distance
from lkarray.analysis.hierarchy.lift import taxonomic_lift
from lkarray.analysis.hierarchy.taxonomy import Taxonomy

__all__ = [
    "Taxonomy",
    "attribute_lift",
    "color_groups",
    "correlation_by_distance",
    "taxonomic_lift",
    "taxonomy_distance",
]
