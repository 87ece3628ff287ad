"""Learning rates and their scheduler, as text, so that a run can go on with them."""

from __future__ import annotations

import json
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from lkarray.errors import StoreError


def schedule_state(optimizer: Optimizer, scheduler: Any, *, whole: bool) -> str:
    """Return the groups' learning rates, and the scheduler's state where it is of plain values.

    ``whole`` says whether the optimizer's state is that after the last recorded step.
    """
    rates = [float(group["lr"]) for group in optimizer.param_groups]
    state = None
    if scheduler is not None:
        state = {k: v for k, v in scheduler.state_dict().items() if not callable(v)}
    try:
        return json.dumps({"lr": rates, "scheduler": state, "whole": whole})
    except TypeError:
        return json.dumps({"lr": rates, "scheduler": None, "whole": whole})


def load_schedule(text: str, optimizer: Optimizer, scheduler: Any) -> None:
    """Set learning rates and scheduler back to what `schedule_state` returned.

    Raises
    ------
    StoreError
        The scheduler's state was not of plain values, or the optimizer's is another step's.
    """
    extra = json.loads(text)
    if not extra["whole"]:
        raise StoreError(
            "the recording ended in the middle of an update, so that the optimizer's state after "
            "the last stored step is lost; run the whole loop again without trace.remaining: "
            "stored steps are compared"
        )
    for group, rate in zip(optimizer.param_groups, extra["lr"], strict=True):
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(rate)
        else:
            group["lr"] = rate
    if scheduler is None:
        return
    if extra["scheduler"] is None:
        raise StoreError(
            "the scheduler's state is not of plain numbers and was not stored; run the whole loop "
            "again without trace.remaining: stored steps are compared"
        )
    scheduler.load_state_dict(scheduler.state_dict() | extra["scheduler"])
