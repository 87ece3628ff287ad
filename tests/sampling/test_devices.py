"""The step loop never waits for its device; and what can only be seen on a GPU."""

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from zarr.storage import MemoryStore

import lkarray as lk
from lkarray.sampling.chain import Stack

needs_gpu = pytest.mark.skipif(
    not torch.cuda.is_available(), reason="no GPU here: the CUDA paths were not run"
)
OPTIONS = {"chains": 2, "draws": 60, "burn_in": 3, "batch_size": 16, "progress": False}


class Waits(TorchDispatchMode):
    """Counts the operations that make the host wait for a device."""

    def __init__(self):
        super().__init__()
        self.operations, self.steps = [], 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        if name in ("_local_scalar_dense", "item", "nonzero", "equal", "is_nonzero"):
            self.operations.append(name)
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("width", [1, 2])
@pytest.mark.parametrize(
    "sampler",
    [lk.SGLD(1e-3), lk.RMSpropSGLD(1e-3, drift_correction=True), lk.SGHMC(1e-4)],
    ids=lambda s: type(s).__name__,
)
def test_steps__never_wait_for_the_device(posterior, data, monkeypatch, sampler, width):
    run, waits = Stack.run, Waits()

    def watched(self):
        with waits:
            float(torch.ones(()))  # the watch itself works
            run(self)

    monkeypatch.setattr(Stack, "run", watched)
    lk.sample(
        posterior,
        data,
        sampler=sampler,
        store=MemoryStore(),
        chains_per_device=width,
        observables={"size": lambda m: sum(p.square().sum() for p in m.parameters())},
        **OPTIONS,
    )
    stacks = 2 // width
    assert waits.operations == ["_local_scalar_dense"] * stacks


@needs_gpu
@pytest.mark.parametrize("width", [1, 2])
def test_cuda__gives_the_losses_of_the_cpu(posterior, data, width):
    options = OPTIONS | {"sampler": lk.SGLD(1e-12), "chains_per_device": width}
    here, there = (
        lk.sample(posterior, data, store=MemoryStore(), device=device, **options)
        for device in ("cpu", "cuda")
    )
    np.testing.assert_allclose(there["losses/loss"], here["losses/loss"], rtol=1e-4, atol=1e-5)


@needs_gpu
@pytest.mark.parametrize("width", [1, 2])
def test_cuda__resumes_bit_for_bit(tmp_path, posterior, data, width):
    options = OPTIONS | {"sampler": lk.SGLD(1e-3), "chains_per_device": width, "device": "cuda"}
    lk.sample(posterior, data, store=tmp_path / "s", **options | {"draws": 17})
    grown = lk.sample(posterior, data, store=tmp_path / "s", **options)
    whole = lk.sample(posterior, data, store=MemoryStore(), **options)
    np.testing.assert_array_equal(grown["losses/loss"], whole["losses/loss"])


@needs_gpu
def test_cuda__steps_are_queued_without_a_sync(posterior, data):
    torch.cuda.set_sync_debug_mode("warn")
    try:
        lk.sample(
            posterior,
            data,
            sampler=lk.SGLD(1e-3),
            store=MemoryStore(),
            device="cuda",
            **OPTIONS,
        )
    finally:
        torch.cuda.set_sync_debug_mode("default")
