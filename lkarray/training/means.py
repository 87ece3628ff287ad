"""The gradient of the whole training set along a run."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import xarray as xr

from lkarray import progress as bars
from lkarray.arguments import checked
from lkarray.errors import NonFiniteError
from lkarray.nn.batches import MapDataset
from lkarray.nn.modes import with_gradients
from lkarray.nn.reference import Reference
from lkarray.schema import PARAM, TIME
from lkarray.training.choosing import as_examples, as_steps, as_trace
from lkarray.training.recorder import Recorder
from lkarray.training.trace import Trace

_ROWS = 1024


@checked()
@with_gradients
def mean_gradient(
    trace: Trace | Recorder,
    times: str | Iterable[int] = "epoch",
    *,
    examples: MapDataset | Sequence[int] | np.ndarray | None = None,
    progress: bool = False,
) -> xr.DataArray:
    r"""Return the mean gradient of the training losses along a run, computed.

    What gradient descent on all examples would follow. Along a mode it is the mode's drive:

    .. math:: \Lambda_k / M = v_k \cdot \frac{1}{M} \sum_m g_m

    (Anonymous 2026, section 6.3), and it has to be of all M examples: where training has nearly
    converged, the drives of a subset are smaller than their own sampling error, and so are their
    signs. ``modes.assign(drive=M * xr.dot(modes["direction"], mean, dim="param"))``

    Parameters
    ----------
    trace, times
        As for `gradient_features`.
    examples
        Whose mean; all training examples by default.
    progress
        Show a progress bar.

    Returns
    -------
    xarray.DataArray
        ``mean_gradient(time, param)``, float64; gradients of batches of 1,024 are taken in the
        parameters' own precision, and added in float64.

    Raises
    ------
    ValueError
        A time is outside the run, or an example outside the training set.
    NonFiniteError
        A gradient is NaN or infinite; the message names the step.

    Notes
    -----
    One forward and backward pass of the examples at each time, and ``8 T P`` bytes.

    References
    ----------
    - Anonymous 2026, section 6.3: "Path-Integrated Loss-Gradient Kernels".
    """
    source = as_trace(trace)
    steps = as_steps(source, times)
    data = source.train if examples is None else as_examples(source, examples)[0]
    reference = Reference(source.flat, source.loss)
    out = np.zeros((len(steps), source.flat.theta.shape[1]))
    with bars.bar(
        "mean gradients", total=len(steps) * data.n, unit="example", show=progress
    ) as bar:
        for t, (step, theta) in enumerate(source.states(steps.tolist())):
            source.set_parameters(theta)
            for rows, inputs, target in data.numbered(_ROWS):
                slope = reference.total(inputs, target)
                out[t] += slope.double().cpu().numpy()
                bar.update(len(rows))
            if not np.isfinite(out[t]).all():
                raise NonFiniteError(f"the mean gradient before step {step} is not finite")
    return xr.DataArray(
        out / data.n,
        dims=(TIME, PARAM),
        coords={TIME: steps},
        name="mean_gradient",
        attrs={"examples": data.n, "units": "nat"},
    )
