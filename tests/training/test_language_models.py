"""Gradients of Hugging Face models, tiny and random, against autograd of one example at a time."""

import numpy as np
import pytest
import torch
from torch.nn import functional as F

import lkarray as lk

transformers = pytest.importorskip("transformers")
N = 4


def mean_loss(output, target):
    flat = F.cross_entropy(output.logits[:, :-1].transpose(1, 2), target[:, 1:], reduction="none")
    return flat.mean(1)


def build(name):
    torch.manual_seed(0)
    if name == "gpt2":
        config = transformers.GPT2Config(
            vocab_size=19,
            n_positions=8,
            n_embd=8,
            n_layer=1,
            n_head=2,
            bos_token_id=0,
            eos_token_id=0,
        )
        model = transformers.GPT2LMHeadModel(config)
    else:
        config = transformers.BertConfig(
            vocab_size=19,
            hidden_size=8,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=16,
            max_position_embeddings=8,
        )
        model = transformers.BertForMaskedLM(config)
    ids = torch.randint(1, 19, (N, 6))
    mask = torch.ones_like(ids)
    mask[1, 4:] = 0
    items = [
        {"input_ids": i, "attention_mask": m, "labels": i} for i, m in zip(ids, mask, strict=True)
    ]
    return model.double().eval(), items


@pytest.mark.parametrize("name", ["gpt2", "bert"])
def test_features__of_language_models(name, tmp_path):
    model, items = build(name)
    moving = list(model.parameters())
    rows = []
    for item in items:
        batch = {k: v[None] for k, v in item.items() if k != "labels"}
        total = mean_loss(model(**batch), item["labels"][None]).sum()
        slopes = torch.autograd.grad(total, moving, materialize_grads=True, allow_unused=True)
        rows.append(torch.cat([slope.flatten() for slope in slopes]))
    expected = torch.stack(rows).numpy()
    store = tmp_path / "t"
    trace = lk.snapshot(model, items, loss=mean_loss, store=store)
    G = lk.gradient_features(trace, range(N), [0], store=store, dtype="float64")
    scale = np.abs(expected).max()
    np.testing.assert_allclose(G["gradient"].values[0], expected, rtol=0, atol=1e-9 * scale)
    similar = lk.gradient_similarity(trace, range(N))
    np.testing.assert_allclose(similar, expected @ expected.T, rtol=1e-8, atol=1e-9 * scale**2)
    lk.gradient_factors(trace, range(N), [0], store=store)
