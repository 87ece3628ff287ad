"""Sequence models, dict batches and Hugging Face modules, without adapters."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import Dataset, TensorDataset
from zarr.storage import MemoryStore

import lkarray as lk

VOCABULARY, LENGTH = 20, 12
OPTIONS = {
    "sampler": lk.SGLD(step_size=1e-5),
    "chains": 2,
    "draws": 4,
    "burn_in": 0,
    "batch_size": 4,
    "progress": False,
}


class Sequences(Dataset):
    """Dicts of token ids, the later ones padded at the end."""

    def __init__(self, n=10, *, mask=True, labels=False):
        generator = torch.Generator().manual_seed(0)
        self.ids = torch.randint(0, VOCABULARY, (n, LENGTH), generator=generator)
        lengths = torch.full((n,), LENGTH)
        lengths[n // 2 :] = LENGTH - 4
        self.mask = (torch.arange(LENGTH) < lengths[:, None]).long()
        self._with = mask, labels

    def __len__(self):
        return len(self.ids)

    def __getitem__(self, index):
        mask, labels = self._with
        item = {"input_ids": self.ids[index]}
        if mask:
            item["attention_mask"] = self.mask[index]
        if labels:
            item["labels"] = self.ids[index].masked_fill(self.mask[index] == 0, -100)
        return item


class Bigram(nn.Module):
    """The smallest language model: logits of the next token from the present one."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(1)
        self.embed = nn.Embedding(VOCABULARY, 8)
        self.head = nn.Linear(8, VOCABULARY)

    def forward(self, input_ids, attention_mask=None):
        return self.head(self.embed(input_ids))


@pytest.fixture(scope="module")
def gpt2():
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=VOCABULARY,
        n_positions=LENGTH,
        n_embd=16,
        n_layer=2,
        n_head=2,
        bos_token_id=None,
        eos_token_id=None,
    )
    return transformers.GPT2LMHeadModel(config)


def expected_losses(model, data):
    """Of each token, the long way; NaN where it is padding."""
    with torch.no_grad():
        out = model.eval()(input_ids=data.ids, attention_mask=data.mask)
    scores = getattr(out, "logits", out)
    losses = F.cross_entropy(scores[:, :-1].transpose(1, 2), data.ids[:, 1:], reduction="none")
    return losses.masked_fill(data.mask[:, 1:] == 0, np.nan).numpy()


@pytest.mark.parametrize("labels", [False, True])
def test_next_token__gives_the_loss_of_each_token(labels):
    data, model = Sequences(labels=labels), Bigram()
    posterior = lk.LocalPosterior(model, data, "next_token", gamma=100.0)
    tree = lk.sample(posterior, data, store=MemoryStore(), **OPTIONS)
    loss = tree["losses/loss"]
    assert loss.dims == ("chain", "draw", "sample", "token")
    assert loss.shape == (2, 4, 10, LENGTH - 1)
    expected = expected_losses(model, data)
    center = tree["losses/center_loss"].values
    np.testing.assert_allclose(center, expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(
        np.isnan(loss.values), np.broadcast_to(np.isnan(expected), loss.shape)
    )
    mean = lk.LocalPosterior(model, data, "next_token_mean", gamma=100.0)
    means = lk.sample(mean, data, store=MemoryStore(), **OPTIONS)
    assert means["losses/loss"].dims == ("chain", "draw", "sample")
    np.testing.assert_allclose(means["losses/center_loss"], np.nanmean(expected, axis=1), rtol=1e-5)
    # Both descend the same loss, so the chains are the same.
    np.testing.assert_array_equal(tree["sample_stats/distance"], means["sample_stats/distance"])


@pytest.mark.parametrize("width", [1, 2])
def test_next_token__takes_bare_sequences(width):
    data = Sequences(mask=False)
    bare = TensorDataset(data.ids)
    model = Bigram()
    options = OPTIONS | {"chains_per_device": width}
    a, b = (
        lk.sample(
            lk.LocalPosterior(model, d, "next_token", gamma=100.0),
            d,
            store=MemoryStore(),
            **options,
        )
        for d in (data, bare)
    )
    np.testing.assert_allclose(a["losses/loss"], b["losses/loss"], rtol=1e-6)


def test_hugging_face__models_and_dict_batches_need_no_adapter(tmp_path, gpt2):
    data = Sequences()
    posterior = lk.LocalPosterior(gpt2, data, "next_token", gamma=100.0)
    tree = lk.sample(posterior, data, store=tmp_path / "s", coords=None, **OPTIONS)
    expected = expected_losses(gpt2, data)
    np.testing.assert_allclose(tree["losses/center_loss"], expected, rtol=1e-4, atol=1e-5)
    # The embedding is tied to the output layer: they move as one.
    assert "lm_head.weight" not in posterior.trainable
    assert "transformer.wte.weight" in posterior.trainable
    assert lk.verify(tmp_path / "s") == []
    assert lk.correlation(tree["losses/loss"].mean("token")).shape == (10, 10)
    replay = lk.observe(tree, data)
    np.testing.assert_array_equal(replay["losses/loss"], tree["losses/loss"])


def test_hugging_face__one_head_is_a_component(tmp_path, gpt2):
    data = Sequences()
    head = "transformer.h.0.attn.c_attn.weight[:, {}:{}]"  # queries of a head of 8
    components = {f"head {i}": head.format(8 * i, 8 * i + 8) for i in range(2)}
    posterior = lk.LocalPosterior(gpt2, data, "next_token_mean", gamma=100.0)
    tree = lk.sample(posterior, data, store=tmp_path / "s", components=components, **OPTIONS)
    assert lk.correlation(tree).dims == ("component", "sample", "sample_2")
    assert (tree["sample_stats/distance"] > 0).all()


def test_hugging_face__callables_see_the_output_and_the_labels(gpt2):
    data = Sequences(labels=True)
    seen = []

    def loss(output, target):
        seen.append((type(output).__name__, tuple(target.shape)))
        return output.logits[:, -1].logsumexp(-1)

    tree = lk.sample(
        lk.LocalPosterior(gpt2, data, loss, gamma=100.0), data, store=MemoryStore(), **OPTIONS
    )
    assert tree["losses/loss"].shape == (2, 4, 10)
    assert ("CausalLMOutputWithCrossAttentions", (4, LENGTH)) in seen


def test_autocast__observes_in_low_precision_and_steps_in_float32(gpt2):
    data = Sequences()
    posterior = lk.LocalPosterior(gpt2, data, "next_token_mean", gamma=100.0)
    trees = [
        lk.sample(posterior, data, store=MemoryStore(), autocast=autocast, **OPTIONS)
        for autocast in (None, "bfloat16")
    ]
    np.testing.assert_array_equal(*(t["sample_stats/distance"] for t in trees))
    full, low = (t["losses/loss"].values for t in trees)
    assert low.dtype == np.float32
    assert 0 < abs(low - full).max() < 0.05


def test_bfloat16_models__are_sampled_in_float32():
    data, model = Sequences(), Bigram().bfloat16()
    posterior = lk.LocalPosterior(model, data, "next_token_mean", gamma=100.0)
    wide = lk.LocalPosterior(Bigram().bfloat16().float(), data, "next_token_mean", gamma=100.0)
    low, full = (lk.sample(p, data, store=MemoryStore(), **OPTIONS) for p in (posterior, wide))
    np.testing.assert_array_equal(low["losses/loss"], full["losses/loss"])
    assert model.head.weight.dtype == torch.bfloat16


def test_sequences__bad_ones_are_refused(gpt2):
    class Ragged(Sequences):
        def __getitem__(self, index):
            return {"input_ids": self.ids[index][: LENGTH - index % 2]}

    class Named(Sequences):
        def __getitem__(self, index):
            return {"input_ids": self.ids[index], "text": "hello"}

    for data, message in (
        (Ragged(), "do not make a batch.*padding"),
        (Named(), r"must hold tensors, arrays or numbers, not \{'text': 'str'\}"),
    ):
        with pytest.raises((ValueError, TypeError), match=message):
            lk.sample(
                lk.LocalPosterior(gpt2, data, "next_token"), data, store=MemoryStore(), **OPTIONS
            )
    with pytest.raises(ValueError, match="a next-token loss needs logits"):
        lk.sample(
            lk.LocalPosterior(
                nn.Embedding(VOCABULARY, 3), TensorDataset(torch.arange(9)), "next_token"
            ),
            TensorDataset(torch.arange(9)),
            store=MemoryStore(),
            **OPTIONS,
        )
