"""The contraction engine: every kernel is a Gram over named dims. Knows nothing of torch.

`numbers` multiplies plain arrays; `operand` reads panels of a labelled variable; `cache`
holds them; `plan` fits tiles to a byte budget; `graph` makes the lazy Dask view and the
top-k sink out of tile tasks.
"""

from lkarray.engine.graph import TOP_K_BYTES, gram_array, top_k_arrays, top_k_held
from lkarray.engine.operand import Operand
from lkarray.engine.plan import Plan, make_plan

__all__ = [
    "TOP_K_BYTES",
    "Operand",
    "Plan",
    "gram_array",
    "make_plan",
    "top_k_arrays",
    "top_k_held",
]
