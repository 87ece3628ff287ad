"""Where chains start: at w*, or at a draw of the law that they have where the loss is quadratic."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from lkarray.sampling.independent import Laplace
from lkarray.sampling.laplace_law import LaplaceLaw
from lkarray.sampling.randomness import MAX_STEPS, ChainRandomness
from lkarray.sampling.samplers import SGLD, Sampler

CENTER, LAPLACE = "center", "laplace"


def chosen_laws(
    start: str | Laplace | None, control: str | Laplace | None, sampler: Sampler, *, steps: int
) -> tuple[Laplace | None, Laplace | None]:
    """Return the laws of the chains' start and of their control; ``None`` where there is none.

    Parameters
    ----------
    start, control
        As given to `lkarray.sample`.
    sampler, steps
        As for `chosen_start`.

    Raises
    ------
    ValueError
        They do not go together; or as `chosen_start` and `law_of` say.
    """
    if control is None:
        return chosen_start(CENTER if start is None else start, sampler, steps=steps), None
    if isinstance(start, str) and start == CENTER:
        raise ValueError(
            "control= starts its chains in the law of the linear chain, not at w*: leave "
            'start="center" out'
        )
    law = law_of("control", control, sampler)
    if sampler.independent:
        if start is not None:
            chosen_start(start, sampler, steps=steps)  # refuses it
        return None, law
    if isinstance(start, str):
        law_of("start", start, sampler)
    elif start is not None:
        own = law_of("start", start, sampler)
        if not isinstance(control, str) and own != law:
            raise ValueError(
                f"start and control are one law, but start has rank {own.rank} and control "
                f"{law.rank}: give one of them"
            )
        law = own
    return chosen_start(law, sampler, steps=steps), law


def chosen_start(start: str | Laplace, sampler: Sampler, *, steps: int) -> Laplace | None:
    """Return the law that chains start in, with the sampler's step size; ``None`` is w*.

    Parameters
    ----------
    start
        As given to `lkarray.sample`.
    sampler
        How a step moves.
    steps
        Of a whole chain.

    Raises
    ------
    ValueError
        ``start`` is unknown, the sampler has no such law, or the steps leave no noise for it.
    """
    if isinstance(start, str) and start == CENTER:
        return None
    law = law_of("start", start, sampler)
    if sampler.independent:
        raise ValueError(
            f"draws of {type(sampler).__name__} are independent: no chain starts anywhere; leave "
            "start= out"
        )
    if steps >= MAX_STEPS:
        raise ValueError(
            f"chains of {steps} steps leave no noise for their start: at most {MAX_STEPS - 1} "
            'steps with start="laplace"'
        )
    return law


def law_of(what: str, asked: str | Laplace, sampler: Sampler) -> Laplace:
    """Return the law that ``asked`` names, of a sampler's own step size.

    Raises
    ------
    ValueError
        It is unknown, the law of another step size, or the sampler's law is not known.
    """
    if isinstance(asked, str) and asked != LAPLACE:
        known = f"{CENTER!r}, {LAPLACE!r}" if what == "start" else f"None, {LAPLACE!r}"
        raise ValueError(f"{what} must be {known} or lk.Laplace(rank=...), not {asked!r}")
    if isinstance(sampler, Laplace):
        law = sampler if isinstance(asked, str) else asked
        if law != sampler:
            raise ValueError(
                f"{what} is the law of another rank or step size than the sampler's, which draws "
                f"from its own; pass {what}={LAPLACE!r}"
            )
        return law
    if type(sampler) is not SGLD or sampler.schedule is not None:
        raise ValueError(
            f"{what}={LAPLACE!r} needs lk.SGLD with one step size, of which the stationary law is "
            f"known, not {type(sampler).__name__}{' with a schedule' * bool(sampler.schedule)}; "
            f"leave {what}= out"
        )
    law = Laplace() if isinstance(asked, str) else asked
    if law.step_size not in (0.0, sampler.step_size):
        raise ValueError(
            f"{what}: the law has step_size={law.step_size:g}, the sampler {sampler.step_size:g}; "
            "leave that of the law out, the sampler's is taken"
        )
    return replace(law, step_size=sampler.step_size)


def first_offset(law: LaplaceLaw, random: ChainRandomness) -> Tensor:
    """Return ``w - w*`` where a chain starts in the law: ``(param,)``, by seed and chain alone.

    Its noise is that of the step after the last that a chain may have.
    """
    noise = random.noise(MAX_STEPS - 1)
    if law.mask is not None:
        noise = noise * law.mask
    with torch.no_grad():
        return law.root(noise)
