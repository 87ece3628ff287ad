"""What other libraries take: ArviZ."""

from __future__ import annotations

from typing import Any

import xarray as xr

from lkarray import schema
from lkarray._version import __version__
from lkarray.arguments import checked
from lkarray.errors import SchemaError
from lkarray.schema import POSTERIOR
from lkarray.tensors import losses_node

OBSERVATION = "observation"


@checked()
def to_arviz(tree: xr.DataTree) -> xr.DataTree:
    """Return a store's tree as ArviZ expects one.

    Parameters
    ----------
    tree
        What `open` or `sample` returned; or one of its nodes with losses, for example
        ``tree["losses_test"]`` of a further observed set.

    Returns
    -------
    xarray.DataTree
        Groups ``posterior``: ``loss(chain, draw, observation)`` in nats, and the observables,
        and the outcomes, if there are any; ``sample_stats``, if there are any, with ``diverging``
        for ``diverged``; ``constant_data``: ``center_loss(observation)``, if it is there.
        Coordinates and attributes are kept, and Dask arrays stay lazy: nothing is read or
        copied. ArviZ reserves the name ``sample`` for draws of all chains together, so the dim
        is called ``observation``.

    Raises
    ------
    TypeError
        ``tree`` is no DataTree.
    SchemaError
        There are no losses, these have no ``chain`` and ``draw``, or ``observation`` is taken.

    Notes
    -----
    ArviZ's functions read all that they are given: select samples first, for example
    ``to_arviz(tree.isel(sample=slice(None, None, 100)))``. They need ``arviz-stats[xarray]``.
    """
    if not isinstance(tree, xr.DataTree):
        raise TypeError(
            f"to_arviz takes a DataTree, not {type(tree).__name__}; open the store with lk.open"
        )
    node = losses_node(tree).to_dataset(inherit=True)
    missing = [dim for dim in POSTERIOR if dim not in node[schema.LOSS.name].dims]
    if missing:
        raise SchemaError(
            f"the losses have dims {node[schema.LOSS.name].dims}, which lack {missing}; ArviZ "
            "needs both, so rename or .expand_dims"
        )
    centers = {schema.at_center(str(name)) for name in node.data_vars}
    constant = [name for name in map(str, node.data_vars) if name in centers]
    posterior = node.drop_vars(constant)
    if schema.OBSERVABLES in tree.children:
        posterior = posterior.merge(tree[schema.OBSERVABLES].to_dataset(), join="exact")
    groups: dict[str, Any] = {"posterior": _renamed(posterior)}
    if schema.SAMPLE_STATS in tree.children:
        stats = tree[schema.SAMPLE_STATS].to_dataset()
        flag = {schema.DIVERGED.name: "diverging"} if schema.DIVERGED.name in stats else {}
        groups[schema.SAMPLE_STATS] = stats.rename(flag)
    if constant:
        groups["constant_data"] = _renamed(node[constant].drop_vars(POSTERIOR, errors="ignore"))
    marks = {"inference_library": "lkarray", "inference_library_version": __version__}
    for ds in groups.values():
        ds.attrs = ds.attrs | marks
    return xr.DataTree.from_dict(groups, name=tree.name)


def _renamed(ds: xr.Dataset) -> xr.Dataset:
    """Return a group in which ``sample``, the dim and its index, is called ``observation``."""
    if OBSERVATION in ds.variables or OBSERVATION in ds.dims:
        raise SchemaError(
            f"the tree has a {OBSERVATION!r} of its own, the name that the samples get in ArviZ; "
            "rename it first, with .rename on the Dataset of each group"
        )
    taken = schema.SAMPLE in ds.variables or schema.SAMPLE in ds.dims
    return ds.rename({schema.SAMPLE: OBSERVATION}) if taken else ds
