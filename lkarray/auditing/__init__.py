"""Audits: what each training example did to each prediction. Loads torch.

`audit` runs the adjoint pass of design section 6 (`adjoint`, over the tensors' `blocks`) through a
recorded run, panel by panel (`panel`), with what the optimizer did (`realised`) and the states that
it went through (`states`). `baselines`, `influence` and `margins` are what others attribute by,
from the same run.
"""

from lkarray.auditing.baselines import gradient_similarity, tracin, tracin_in_run
from lkarray.auditing.front import audit
from lkarray.auditing.influence import influence_functions
from lkarray.auditing.margins import trak
from lkarray.auditing.reconstruct import reconstruction

__all__ = [
    "audit",
    "gradient_similarity",
    "influence_functions",
    "reconstruction",
    "tracin",
    "tracin_in_run",
    "trak",
]
