"""The contraction engine: every kernel is a Gram over named dims. Knows nothing of torch.

`numbers` multiplies plain arrays; `operand` reads panels of a labelled variable; `cache`
holds them; `plan` fits tiles to a byte budget; `contraction` makes the tiles and their lazy
Dask view; `top_k` is the sink that keeps the best entries of each row, and `search` the same
through low precision.
"""

from lkarray.engine.contraction import Contraction, contraction_of, gram_array
from lkarray.engine.operand import Operand, Piece
from lkarray.engine.plan import Plan, make_plan
from lkarray.engine.search import search_arrays
from lkarray.engine.top_k import TOP_K_BYTES, Ask, top_k_arrays, top_k_held

__all__ = [
    "TOP_K_BYTES",
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
