"""The contraction engine: every kernel is a Gram over named dims. torch is loaded late, if at all.

`numbers` multiplies plain arrays; `operand` reads panels of a labelled variable; `cache`
holds them; `plan` fits tiles to a byte budget; `contraction` makes the tiles and their lazy
Dask view; `top_k` is the sink that keeps the best entries of each row, and `search` the same
through low precision (`lowprecision`). `strips` passes over the matrix along its longer side,
for what needs no Gram of n rows. `histograms` and `jackknife` reduce tiles. `devices` and
`device_tiles` make products on a GPU.
"""

from lkarray.engine.contraction import Contraction, contraction_of, gram_array
from lkarray.engine.device_tiles import BEST_BYTES
from lkarray.engine.devices import as_device
from lkarray.engine.operand import Operand, Piece
from lkarray.engine.plan import WRITTEN_BYTES, Plan, make_plan
from lkarray.engine.search import SEARCH_BUDGET, search_arrays
from lkarray.engine.series import SERIES_BYTES, Series, table_bytes
from lkarray.engine.top_k import TOP_K_BYTES, Ask, still_array, top_k_arrays, top_k_held

__all__ = [
    "BEST_BYTES",
    "SEARCH_BUDGET",
    "SERIES_BYTES",
    "TOP_K_BYTES",
    "WRITTEN_BYTES",
    "Ask",
    "Contraction",
    "Operand",
    "Piece",
    "Plan",
    "Series",
    "as_device",
    "contraction_of",
    "gram_array",
    "make_plan",
    "search_arrays",
    "still_array",
    "table_bytes",
    "top_k_arrays",
    "top_k_held",
]
