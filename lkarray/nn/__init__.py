"""What every torch half needs: flat parameters, per-example losses, batches.

Knows nothing of Dask, xarray or stores.
"""

from lkarray.nn.batches import Batches
from lkarray.nn.flat import FlatModel
from lkarray.nn.losses import PerExampleLoss, per_example_loss
from lkarray.nn.outcomes import Outcome

__all__ = ["Batches", "FlatModel", "Outcome", "PerExampleLoss", "per_example_loss"]
