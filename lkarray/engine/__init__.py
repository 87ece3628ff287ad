"""The contraction engine: every kernel is a Gram over named dims. Only low precision loads torch.

`numbers` multiplies plain arrays; `operand` reads panels of a labelled variable; `cache`
holds them; `plan` fits tiles to a byte budget; `contraction` makes the tiles and their lazy
Dask view; `top_k` is the sink that keeps the best entries of each row, and `search` the same
through low precision (`lowprecision`). `strips` passes over the matrix along its longer side,
for what needs no Gram of n rows. `histograms` and `jackknife` reduce tiles.
"""

from lkarray.engine.contraction import Contraction, contraction_of, gram_array
from lkarray.engine.operand import Operand, Piece
from lkarray.engine.plan import WRITTEN_BYTES, Plan, make_plan
from lkarray.engine.search import SEARCH_BUDGET, search_arrays
from lkarray.engine.top_k import TOP_K_BYTES, Ask, top_k_arrays, top_k_held

__all__ = [
    "SEARCH_BUDGET",
    "TOP_K_BYTES",
    "WRITTEN_BYTES",
    "Ask",
    "Contraction",
    "Operand",
    "Piece",
    "Plan",
    "contraction_of",
    "gram_array",
    "make_plan",
    "search_arrays",
    "top_k_arrays",
    "top_k_held",
]
