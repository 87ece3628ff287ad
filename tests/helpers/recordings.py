"""Optimizers, and what a store holds of the small network's training."""

import torch
from torch import optim
from torch.nn.utils import clip_grad_norm_, clip_grad_value_
from zarr.storage import MemoryStore

import lkarray as lk
from tests.helpers.recorded_runs import cross_entropy, examples, network

OPTIMIZERS = {
    "sgd": lambda p: optim.SGD(p, 0.1, weight_decay=0.01),
    "momentum": lambda p: optim.SGD(p, 0.05, momentum=0.9, dampening=0.3),
    "nesterov": lambda p: optim.SGD(p, 0.05, momentum=0.9, nesterov=True),
    "adam": lambda p: optim.Adam(p, 1e-2, weight_decay=0.02),
    "amsgrad": lambda p: optim.Adam(p, 1e-2, amsgrad=True),
    "adamw": lambda p: optim.AdamW(p, 1e-2, weight_decay=0.1),
    "nadam": lambda p: optim.NAdam(p, 1e-2, weight_decay=0.1, decoupled_weight_decay=True),
    "rmsprop": lambda p: optim.RMSprop(p, 1e-2, centered=True),
    "rmsprop momentum": lambda p: optim.RMSprop(p, 1e-3, momentum=0.9, weight_decay=0.01),
    "adagrad": lambda p: optim.Adagrad(p, 5e-2, lr_decay=0.1),
}
CLIPS = {
    "none": None,
    "norm": lambda parameters: clip_grad_norm_(parameters, 0.15),
    "value": lambda parameters: clip_grad_value_(parameters, 0.02),
}


def flat(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()]).numpy()


def opened(store):
    return lk.open_trace(store, network(), examples(), loss=cross_entropy)


class Own(optim.SGD):
    pass


def step(model, optimizer, data, body, *, indices=(0, 1, 2, 3), **options):
    recorder = lk.record(
        model, optimizer, data, **({"loss": cross_entropy, "store": MemoryStore()} | options)
    )
    with recorder as trace, trace.step(indices):
        body(model, optimizer, *(t[:4] for t in data.tensors))
    return recorder


def usual(model, optimizer, inputs, labels):
    optimizer.zero_grad()
    cross_entropy(model(inputs), labels).mean().backward()
    optimizer.step()
