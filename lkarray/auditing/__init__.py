"""Audits: what each training example did to each prediction. Loads torch.

`audit` runs the adjoint pass of `docs/methods/adjoint.md` (`adjoint`, over the tensors' `blocks`)
through a recorded run, panel by panel (`panel`), with what the optimizer did (`realised`) and the
states that it went through (`states`). What others attribute by is in `lkarray.attribution`.
"""

from lkarray.auditing.audit import audit
from lkarray.auditing.reconstruct import reconstruction

__all__ = ["audit", "reconstruction"]
