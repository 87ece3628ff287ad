"""Attribution by other rules than the audit's, from the same recorded run. Loads torch.

`tracin` sums products of gradients, `trak` inverts the kernel of a classifier's margins, and
`influence_functions` inverts the Hessian. What they share is in `scores`. `laplace` needs no run:
of a posterior it gives whitened gradients, whose products are influence functions with the damping
``gamma / nbeta``.
"""

from lkarray.attribution.influence_functions import influence_functions
from lkarray.attribution.laplace_features import laplace
from lkarray.attribution.tracin import gradient_similarity, tracin, tracin_in_run
from lkarray.attribution.trak import trak

__all__ = [
    "gradient_similarity",
    "influence_functions",
    "laplace",
    "tracin",
    "tracin_in_run",
    "trak",
]
