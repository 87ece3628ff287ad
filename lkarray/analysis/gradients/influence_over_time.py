"""Do influences cancel? Their net and gross sums over training examples.

See Anonymous 2026, section 6.3.
"""

from __future__ import annotations

import numpy as np
import xarray as xr

from lkarray import engine
from lkarray.analysis.gradients.path_sums import root_weight
from lkarray.arguments import checked
from lkarray.engine.running import RUNNING_BYTES, running_array
from lkarray.kernels.coords import kernel_coords
from lkarray.kernels.operands import check_shared, free_dim
from lkarray.schema import EXAMPLE, PARAM, TIME, second
from lkarray.tensors import Losses, as_gradients
from lkarray.values import one_of


@checked()
def influence_over_time(
    train_G: Losses,
    audit_G: Losses,
    *,
    weight: str | None = "lr",
    memory: int | str | None = None,
) -> xr.Dataset:
    r"""Return the net and the gross influence of training on other examples, lazily.

    .. math::

        P_{mn}(t) = -\frac{1}{M} \sum_{s \le t} \eta_s\, g_m(s) \cdot g_n(s), \quad
        S_n(t) = \sum_m P_{mn}(t), \quad G_n(t) = \sum_m |P_{mn}(t)|

    S levels off while G grows where influences cancel (Anonymous 2026, section 6.3). This is the
    forward Euler form for full-batch gradient descent that takes one step at each recorded time;
    what a recorded run really did, whatever its batches and optimizer, is the audit's.

    Parameters
    ----------
    train_G
        Gradients ``(time, example, param)`` of the M training examples, with the learning rates.
    audit_G
        Gradients of the examples asked about, at the same times.
    weight
        ``"lr"``; ``None`` leaves the rates out.
    memory
        Byte budget of a process.

    Returns
    -------
    xarray.Dataset
        ``net(time, example_2)``, the change of each loss in nats since the first time, and
        ``gross(time, example_2)``, float64, with the coordinates of ``audit_G`` (``label_2``).
        Entry t includes the step taken at that time. Compute both at once.

    Raises
    ------
    SchemaError
        Dims are missing, times or parameters differ, or rates are missing.

    Notes
    -----
    ``2 T M N P`` operations; a tile of M x N and its running sum at a time, never T of them.

    References
    ----------
    - Anonymous 2026, section 6.3 and eq. 12: "Path-Integrated Loss-Gradient Kernels".

    Examples
    --------
    >>> import xarray as xr, lkarray as lk
    >>> values = [[[3.0, 4.0], [1.0, 0.0]], [[0.0, 2.0], [1.0, 0.0]]]
    >>> G = xr.DataArray(values, dims=("time", "example", "param"))
    >>> G = G.assign_coords(learning_rate=("time", [1.0, 0.5]))
    >>> both = lk.influence_over_time(G, G).compute()
    >>> both["net"].values.tolist()
    [[-14.0, -2.0], [-15.0, -2.25]]
    >>> both["gross"].values.tolist()
    [[14.0, 2.0], [15.0, 2.25]]
    """
    one_of("weight", weight, (None, "lr"))
    x = as_gradients(train_G, name="train_G", need=(TIME, EXAMPLE, PARAM))
    y = as_gradients(audit_G, name="audit_G", need=(TIME, EXAMPLE, PARAM))
    for side, name in ((x, "train_G"), (y, "audit_G")):
        free_dim(side, name, (PARAM,), (TIME,))
    check_shared(x, y, (TIME, PARAM))
    root = root_weight(x, weight)
    rates = 1.0 if root is None else root.values**2
    scale = -np.broadcast_to(rates, (x.sizes[TIME],)) / x.sizes[EXAMPLE]
    left, right = (
        engine.Operand(side, over=(PARAM,), each=(TIME,), rows=EXAMPLE, center=None, cosine=False)
        for side in (x, y)
    )
    plan = engine.make_plan(left, right, memory=memory, sink=RUNNING_BYTES)
    data = running_array(engine.Contraction(left, right, plan), scale)
    coords = kernel_coords(x, y, (TIME,), EXAMPLE, EXAMPLE)
    dims = (TIME, second(EXAMPLE))
    return xr.Dataset(
        {
            "net": (dims, data[0], {"units": "nat", "long_name": "net influence"}),
            "gross": (dims, data[1], {"units": "nat", "long_name": "gross influence"}),
        },
        coords={name: c for name, c in coords.items() if EXAMPLE not in c.dims},
        attrs={"weight": weight or "none", "over": [PARAM]},
    )
