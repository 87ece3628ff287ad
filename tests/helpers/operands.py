"""Operands of the engine made of losses."""

import xarray as xr

from lkarray.engine.operand import Operand


def operand(losses: xr.DataArray, **changes) -> Operand:
    options = {"over": ("chain", "draw"), "each": (), "rows": "sample", "center": "pooled"}
    return Operand(losses, **({"cosine": True} | options | changes))
