"""Is a step what its trace will say of it? Checks against the model and the optimizer's rule."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lkarray.nn.batches import Batches, MapDataset, fresh
from lkarray.nn.flat import FlatModel
from lkarray.nn.gradients import ExampleGradients
from lkarray.nn.losses import LossFunction, per_example_loss
from lkarray.nn.reference import checkpoints_named
from lkarray.nn.trainable import require_module
from lkarray.training.capture import Capture

#: How far a gradient or an update may be off, relative to its size: rounding, by other kernels.
_TOLERANCE = {torch.float32: 5e-3, torch.float64: 1e-4}

_BATCH_NORMS = nn.modules.batchnorm._BatchNorm
_DROPOUTS = nn.modules.dropout._DropoutNd


class StepCheck:
    """The model, data and loss of a run, checked, with a copy of the model to check steps on.

    Attributes
    ----------
    parameters
        Those that the optimizer moves, by name, in the model's order.
    train, loss, flat
        The data, the per-example loss, and the copy.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        train_set: MapDataset,
        loss: str | LossFunction,
        num_workers: int = 0,
    ) -> None:
        require_module(model)
        self.parameters = _moving(model, optimizer)
        first = next(iter(self.parameters.values()))
        if first.dtype not in _TOLERANCE:
            raise ValueError(f"parameters are {first.dtype}; record a float32 or float64 model")
        others = [*model.parameters(), *model.buffers()]
        if len({p.device for p in others}) > 1:
            devices = sorted({str(p.device) for p in others})
            raise ValueError(f"the model is on several devices, {devices}; move it to one")
        self.flat = FlatModel(model, trainable=[literal(name) for name in self.parameters])
        self.train = Batches(
            train_set, name="train_set", device=first.device, num_workers=num_workers
        )
        self.loss = per_example_loss(loss).per_example
        self._norms = [n for n, m in model.named_modules() if isinstance(m, _BATCH_NORMS)]
        self._drops = [n for n, m in model.named_modules() if isinstance(m, _DROPOUTS) and m.p > 0]
        probe = self.train.take(np.arange(2) % self.train.n)
        with checkpoints_named(), torch.enable_grad():
            inputs, target = fresh(*probe)
            self.loss.check(self.flat(inputs), target, 2)
        ExampleGradients(self.flat, self.loss, probe)  # refuses examples that are not independent

    def refuse_train_mode(self, model: nn.Module, step: int) -> None:
        """Raise if a layer would make the gradient depend on the batch, or on chance."""
        for names, what, why in (
            (self._norms, "BatchNorm", "statistics of the batch tie its examples together"),
            (self._drops, "dropout", "a random mask is not part of a trace"),
        ):
            training = [name for name in names if model.get_submodule(name).training]
            if training:
                raise ValueError(
                    f"step {step}: {what} {training} is in train mode: {why}, so there is no "
                    "gradient per example. Put these layers in eval mode, or take them out"
                )

    def gradient(self, theta: Tensor, applied: Tensor, batch: np.ndarray, step: int) -> float:
        """Raise unless a batch's gradient is the mean of its examples'; return their mean loss.

        Parameters
        ----------
        theta
            Parameters before the step, ``(param,)``.
        applied
            The gradient that the loop's backward pass left, before clipping.
        batch
            Indices of its examples.

        Notes
        -----
        The mean is taken from the two halves of the batch, each alone: what ties examples together
        shows as a difference.
        """
        flat = self.flat
        flat.load(theta)
        expected, sizes, total = torch.zeros_like(applied), [], 0.0
        for half in np.array_split(batch, min(2, len(batch))):
            flat.grad.zero_()
            inputs, target = self.train.take(half)
            with torch.enable_grad():
                losses = self.loss(flat(inputs), target)
                (losses.sum() / len(batch)).backward()
            expected += flat.grad[0]
            sizes.append(float(flat.grad.norm()))
            total += float(losses.detach().sum())
        flat.grad.zero_()
        self._compare(applied, expected, max(sizes), step)
        return total / len(batch)

    def refuse_other_bits(self, theta: Tensor, applied: Tensor, batch: np.ndarray) -> None:
        """Raise unless the loop's backward pass can be repeated to the bit."""
        flat = self.flat
        flat.load(theta)
        flat.grad.zero_()
        inputs, target = self.train.take(batch)
        with torch.enable_grad():
            self.loss(flat(inputs), target).mean().backward()
        same = torch.equal(flat.grad[0], applied)
        flat.grad.zero_()
        if not same:
            raise ValueError(
                "the loop's gradient differs in the last bits from that of the mean of the losses, "
                "so that steps could not be taken again from what every=k keeps; record with "
                "every=1, or let the loop call backward on the mean of the same per-example losses"
            )

    def _compare(self, applied: Tensor, expected: Tensor, size: float, step: int) -> None:
        allowed = _TOLERANCE[applied.dtype]
        norm = float(expected.norm())
        scale = max(norm, 1e-2 * size, 1e-12)
        off = float((applied - expected).norm())
        if off <= allowed * scale:
            return
        ratio = float(applied @ expected) / max(norm**2, 1e-300)
        if float((applied - ratio * expected).norm()) <= allowed * abs(ratio) * scale:
            raise ValueError(
                f"step {step}: the gradient is {ratio:.4g} times the mean of its examples' loss "
                "gradients. Accumulated gradients add up: divide each part's loss by the number of "
                "parts (and weigh a smaller one less); and a scaled loss cannot be recorded"
            )
        raise ValueError(
            f"step {step}: the gradient differs from the mean of its examples' loss gradients by "
            f"{off / scale:.1%}. Either the indices are not those of the batch, or the data were "
            "changed on the way (augmentation), the loss is another one or has a term of the batch "
            "or of the weights (use the optimizer's weight_decay), or gradients were not set to "
            "zero before"
        )

    def update(
        self,
        capture: Capture,
        before: Tensor,
        after: Tensor,
        applied: Tensor,
        coefficients: np.ndarray,
        denominator: Tensor | None,
        step: int,
    ) -> None:
        """Raise unless an update is what the optimizer's rule makes of what it did."""
        s, q, n, coupled, decoupled = (capture.spread(coefficients[:, i]) for i in range(2, 7))
        divides = capture.rule.divides
        if denominator is not None:
            s, q, n = (
                value / denominator if name in divides else value
                for name, value in (("S", s), ("Q", q), ("N", n))
            )
        u = applied + coupled * before
        buffer = capture.buffer()
        b = s * u if buffer is None else buffer
        expected = -q * b - n * u - decoupled * before
        rounding = 8 * torch.finfo(before.dtype).eps * float(before.abs().max())
        size = float(expected.abs().max()) + rounding
        off = float((after - before - expected).abs().max())
        if off > _TOLERANCE[before.dtype] * size + rounding:
            name = type(capture.optimizer).__name__
            raise ValueError(
                f"step {step}: the update differs from {name}'s rule by {off / size:.1%} of its "
                "size; something else changes the parameters inside the step (a hook, a second "
                "optimizer, clamping weights), which a trace cannot tell"
            )


def _moving(model: nn.Module, optimizer: Optimizer) -> dict[str, nn.Parameter]:
    """Return the parameters that the optimizer moves, in the model's order.

    Frozen ones, which it passes over, are left out.
    """
    if any(group.get("maximize") for group in optimizer.param_groups):
        raise ValueError("maximize=True cannot be recorded; minimize the negative of the loss")
    names = {id(p): name for name, p in model.named_parameters()}
    held = [p for group in optimizer.param_groups for p in group["params"]]
    strange = [tuple(p.shape) for p in held if id(p) not in names]
    if strange:
        raise ValueError(
            f"the optimizer has parameters of shapes {strange[:3]} that the model lacks; make it "
            "from model.parameters()"
        )
    wanted = {id(p) for p in held}
    moving = {
        name: p for name, p in model.named_parameters() if id(p) in wanted and p.requires_grad
    }
    if not moving:
        raise ValueError(
            f"none of the optimizer's {len(held)} parameters requires a gradient, so that nothing "
            "is trained; call requires_grad_(True) on those to train"
        )
    return moving


def literal(name: str) -> str:
    """Return a pattern that matches a name and nothing else."""
    return name.replace("[", "[[]")
