"""A verdict on losses that what is made of them carries on."""

from __future__ import annotations

from typing import Any

import numpy as np
import xarray as xr

from lkarray import schema
from lkarray.analysis.losses.diagnostics import diagnostics
from lkarray.analysis.losses.reliability import reliability
from lkarray.arguments import COUNT, NATURAL, checked
from lkarray.kernels.kinds import JUDGED
from lkarray.schema import CHAIN, DRAW
from lkarray.tensors import Losses, as_losses, losses_node
from lkarray.waiting import computed, workers_awaited


@workers_awaited("computed")
@checked(splits=COUNT, seed=NATURAL)
def judge(
    tree: Losses, *, splits: int = 10, seed: int = 0, memory: int | str | None = None
) -> Losses:
    """Return the losses with attributes that say how far to believe what is made of them.

    A kernel is lazy, and does not look at its chains: with R-hat 3 it answers as quietly as with 1.
    What is made of judged losses carries the verdict on, and says it: `covariance`,
    `correlation`, `neighbors`, `group_mean`, `taxonomic_lift` and `embed` in their attributes,
    figures of maps, kernels and neighbours in small print. Where it is below a floor (reliability
    0.5, R-hat 1.1, acceptance 0.5), the first of them warns and names the remedy
    (`lkarray.errors.UnreliableWarning`).

    Parameters
    ----------
    tree
        A store's tree, or its ``losses``, or losses alone, of which ``acceptance`` is not known.
    splits, seed
        As for `reliability`.
    memory
        Byte budget of a process.

    Returns
    -------
    xarray.DataTree, xarray.Dataset or xarray.DataArray
        What was given, with the attributes ``reliability``, ``rhat`` (the worst of the samples; not
        of one chain), ``acceptance`` (the mean over chains) and ``judged`` (the numbers of chains
        and draws) of the losses. They hold of these draws: of losses from which chains or draws
        are selected nothing is carried on.

    Raises
    ------
    ValueError, SchemaError, NonFiniteError, DivergedError
        As for `diagnostics` and `reliability`.

    Notes
    -----
    The one place where this is computed: a pass for `diagnostics`, and `reliability`.

    Examples
    --------
    >>> import numpy as np, xarray as xr, lkarray as lk
    >>> rng = np.random.default_rng(0)
    >>> signal = rng.normal(size=(4, 100, 3)) @ rng.normal(size=(3, 20))
    >>> losses = lk.judge(xr.DataArray(signal, dims=("chain", "draw", "sample")))
    >>> lk.neighbors(losses, 3).attrs["reliability"] > 0.95
    True
    """
    x = as_losses(tree, name="tree")
    report = diagnostics(tree, memory=memory)
    rho = computed(reliability(x, splits=splits, seed=seed, memory=memory))
    told = {"reliability": float(rho), "rhat": _worst(report["rhat"].values)}
    if "acceptance" in report:
        accepted = report["acceptance"].values
        told["acceptance"] = float(accepted[np.isfinite(accepted)].mean())
    verdict: dict[str, Any] = {name: value for name, value in told.items() if np.isfinite(value)}
    verdict[JUDGED] = [x.sizes[CHAIN], x.sizes[DRAW]]
    if isinstance(tree, xr.DataArray):
        return tree.assign_attrs(verdict)
    node = losses_node(tree).to_dataset() if isinstance(tree, xr.DataTree) else tree
    name = schema.LOSS.name if schema.LOSS.name in node else str(x.name)
    judged = node.assign({name: node[name].assign_attrs(verdict)})
    if isinstance(tree, xr.Dataset):
        return judged
    out = tree.copy()
    losses_node(out).dataset = judged
    return out


def _worst(values: np.ndarray) -> float:
    known = values[np.isfinite(values)]
    return float(known.max()) if len(known) else float("nan")
