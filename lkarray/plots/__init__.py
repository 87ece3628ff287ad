"""Figures: one function each, returning a Matplotlib ``Figure`` and touching no global state."""

from lkarray.plots.figures import gain_against_loss, kernel_matrix, neighbor_map, top_correlated

__all__ = ["gain_against_loss", "kernel_matrix", "neighbor_map", "top_correlated"]
