"""Stacks of chains: tried on the run's own steps, measured on a part of them."""

import logging

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset
from zarr.storage import MemoryStore

import lkarray as lk
from lkarray.sampling import stacking
from tests.helpers.networks import classification, small_network

OPTIONS = {
    "sampler": lk.SGLD(1e-4),
    "chains": 3,
    "draws": 4,
    "burn_in": 1,
    "batch_size": 4,
    "progress": False,
}
VOCABULARY, LENGTH = 20, 8


@pytest.fixture(autouse=True)
def every_run_is_long(monkeypatch):
    monkeypatch.setattr(stacking, "WORTH_SECONDS", 0.0)
    monkeypatch.setattr(stacking, "_PART_SECONDS", 1e-3)


def width_of(tree):
    return tree.attrs["lkarray"]["losses"]["chains_per_device"]


class Dicts(torch.utils.data.Dataset):
    def __init__(self, *, mask):
        self.ids = torch.randint(
            0, VOCABULARY, (10, LENGTH), generator=torch.Generator().manual_seed(0)
        )
        self.mask = mask

    def __len__(self):
        return len(self.ids)

    def __getitem__(self, index):
        item = {"input_ids": self.ids[index]}
        if self.mask:
            item["attention_mask"] = (torch.arange(LENGTH) < LENGTH - index % 3).long()
        return item


def gpt2():
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(
        vocab_size=VOCABULARY,
        n_positions=LENGTH,
        n_embd=8,
        n_layer=1,
        n_head=2,
        bos_token_id=None,
        eos_token_id=None,
    )
    return transformers.GPT2LMHeadModel(config)


def llama():
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=LENGTH,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
    )
    return transformers.LlamaForCausalLM(config)


@pytest.mark.parametrize("mask", [False, True])
@pytest.mark.parametrize("make", [gpt2, llama])
def test_auto__hugging_face_models_run(make, mask):
    torch.manual_seed(0)
    data = Dicts(mask=mask)
    posterior = lk.LocalPosterior(make(), data, "next_token", nbeta=5, gamma=10)
    tree = lk.sample(posterior, data, store=MemoryStore(), **OPTIONS)
    alone = lk.sample(posterior, data, store=MemoryStore(), chains_per_device=1, **OPTIONS)
    np.testing.assert_allclose(tree["losses/loss"], alone["losses/loss"], rtol=1e-3, atol=1e-4)


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.rnn, self.out = nn.LSTM(3, 4, batch_first=True), nn.Linear(4, 3)

    def forward(self, x):
        return self.out(self.rnn(x.reshape(len(x), 2, 3))[0][:, -1])


class Looks(nn.Module):
    """Branches on its input: the observed inputs are shared by a stack, minibatches are not."""

    def __init__(self):
        super().__init__()
        self.out = small_network()

    def forward(self, x):
        if bool((x > 1e6).any()):
            x = x.clamp(max=1e6)
        return self.out(x)


class Wrong(nn.Module):
    """Gives other numbers where inputs are batched by torch.func, and no error."""

    def __init__(self):
        super().__init__()
        self.out = small_network()

    def forward(self, x):
        return self.out(x) * (2 if torch._C._functorch.is_batchedtensor(x) else 1)


@pytest.mark.parametrize("module", [Recurrent, Looks, Wrong])
@pytest.mark.parametrize("sampler", [lk.SGLD(1e-4), lk.SGHMC(1e-5)], ids=["SGLD", "SGHMC"])
def test_auto__what_a_stack_cannot_stand_for_runs_alone(module, sampler, caplog):
    torch.manual_seed(0)
    data, net = classification(), module()
    posterior = lk.LocalPosterior(net, data, nbeta=5, gamma=10)
    options = OPTIONS | {"sampler": sampler}
    with caplog.at_level(logging.INFO, "lkarray"):
        tree = lk.sample(posterior, data, store=MemoryStore(), **options)
    assert width_of(tree) == 1
    assert caplog.text.count("cannot be stacked") == 1
    for number in (2, 3):
        with pytest.raises(ValueError, match="cannot be stacked.*use chains_per_device=1"):
            lk.sample(posterior, data, store=MemoryStore(), chains_per_device=number, **options)


def test_auto__curvature_is_tried_too(monkeypatch):
    """Steps of a drift correction differentiate twice, which a stack may fail at alone."""
    from lkarray.sampling.target import Target

    data = classification()
    posterior = lk.LocalPosterior(small_network(), data, nbeta=5, gamma=10)
    whole = Target.curvature

    def curvature(self, rows, signs, **options):
        if self.flat.width > 1:
            raise RuntimeError("vmap: there is no batching rule for this second derivative")
        return whole(self, rows, signs, **options)

    monkeypatch.setattr(Target, "curvature", curvature)
    sampler = lk.RMSpropSGLD(1e-4, drift_correction=True)
    options = OPTIONS | {"sampler": sampler}
    assert width_of(lk.sample(posterior, data, store=MemoryStore(), **options)) == 1
    with pytest.raises(ValueError, match="no batching rule.*use chains_per_device=1"):
        lk.sample(posterior, data, store=MemoryStore(), chains_per_device=2, **options)
    monkeypatch.setattr(Target, "curvature", whole)
    tree = lk.sample(posterior, data, store=MemoryStore(), chains_per_device=2, **options)
    assert width_of(tree) == 2


@pytest.mark.parametrize("batch_size", [4, None])
@pytest.mark.parametrize(
    "sampler",
    [lk.SGLD(1e-3), lk.RMSpropSGLD(1e-3, drift_correction=True), lk.SGHMC(1e-4)],
    ids=["SGLD", "RMSpropSGLD", "SGHMC"],
)
def test_stack__of_a_model_that_can_be_stacked_is_taken(sampler, batch_size):
    data = classification()
    posterior = lk.LocalPosterior(small_network(), data, nbeta=5, gamma=10, trainable="0.*")
    options = OPTIONS | {"sampler": sampler, "batch_size": batch_size}
    tree = lk.sample(posterior, data, store=MemoryStore(), chains_per_device=3, **options)
    assert width_of(tree) == 3


class Counting(nn.Module):
    """Counts the inputs that pass through, of all chains."""

    seen = 0

    def __init__(self):
        super().__init__()
        self.out = small_network()

    def forward(self, x):
        Counting.seen += len(x)
        return self.out(x)


@pytest.mark.parametrize("batch_size", [400, None])
def test_auto__slow_models_are_measured_on_a_few_inputs(batch_size, monkeypatch):
    data = classification(2000)
    monkeypatch.setattr(stacking, "evaluation_rows", lambda *_: 5)

    def timed(target, work):  # a clock on which any pass takes two seconds
        work()
        return 2.0

    monkeypatch.setattr(stacking, "_timed", timed)
    Counting.seen = 0
    posterior = lk.LocalPosterior(Counting(), data)
    from lkarray.sampling.chain import Schedule
    from lkarray.sampling.checking import observed_labels, observed_sets
    from lkarray.sampling.job import Job
    from lkarray.sampling.preparing import prepare

    sets = observed_sets(data)
    job = Job(
        posterior,
        sets,
        observed_labels(data, sets, None),
        lk.SGLD(1e-4),
        Schedule(500, 0, 1),
        batch_size,
        0,
    )
    prepare(job, chains=4)
    # Losses at w* take every input once; trying the model and measuring take few.
    assert 2000 < Counting.seen < 2200


def test_auto__what_a_process_does_once_is_not_taken_for_a_step(monkeypatch):
    """The first pass of a process loads modules: a short run is one all the same, and not stacked.

    Otherwise the first run of a process and the next differ in their last bits.
    """
    taken = iter([3.0])  # a clock on which the first pass takes seconds, and others none

    def timed(target, work):
        work()
        return next(taken, 1e-4)

    monkeypatch.setattr(stacking, "_timed", timed)
    monkeypatch.setattr(stacking, "WORTH_SECONDS", 40.0)
    posterior = lk.LocalPosterior(small_network(), classification(), nbeta=5, gamma=10)
    tree = lk.sample(posterior, classification(), store=MemoryStore(), **OPTIONS)
    assert next(taken, None) is None
    assert width_of(tree) == 1


def test_auto__a_single_tensor_dataset_of_tokens_is_stacked_with_padding():
    """NaN of padding is no difference."""
    torch.manual_seed(0)

    class Bigram(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed = nn.Embedding(VOCABULARY, VOCABULARY)

        def forward(self, ids):
            return self.embed(ids.clamp(min=0))

    ids = torch.randint(0, VOCABULARY, (10, LENGTH))
    ids[::2, 4:] = -100
    data = TensorDataset(ids)
    posterior = lk.LocalPosterior(Bigram(), data, "next_token", nbeta=5, gamma=10)
    tree = lk.sample(posterior, data, store=MemoryStore(), chains_per_device=3, **OPTIONS)
    assert width_of(tree) == 3
    assert tree["losses/loss"].isnull().any("token").sum() == 3 * 4 * 5
