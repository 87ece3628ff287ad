"""What is no model, no batch or no weights is named."""

import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

import lkarray as lk
from tests.helpers.hard_models import N, adapted
from tests.helpers.recorded_runs import cross_entropy


def test_record__a_loop_that_never_steps(tmp_path):
    model, data = adapted()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    recorder = lk.record(model, optimizer, data, loss=cross_entropy, store=tmp_path / "t")
    with pytest.raises(ValueError, match="never reached trace.step"), recorder:
        pass
    with pytest.raises(KeyError), recorder:  # what the body raised is not hidden
        raise KeyError


@pytest.mark.parametrize("kind", ["tuple", "list", "dict"])
def test_step__given_the_batch_itself(kind, tmp_path):
    model, data = adapted()
    x, y = (part[:2] for part in data.tensors)
    given = {"tuple": (x, y), "list": [x, y], "dict": {"x": x}}[kind]
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    recorder = lk.record(model, optimizer, data, loss=cross_entropy, store=tmp_path / "t")
    with (
        pytest.raises(ValueError, match="pass indices of the batch"),
        recorder as trace,
        trace.step(given),
    ):
        pass


def test_weights__from_files_that_are_no_state_dicts(tmp_path):
    model, data = (
        nn.Sequential(nn.Linear(4, 3)),
        TensorDataset(torch.randn(N, 4), torch.arange(N) % 3),
    )
    (tmp_path / "junk.pt").write_bytes(b"no weights at all")
    torch.save(model, tmp_path / "whole.pt")
    torch.save({"model": model.state_dict(), "epoch": 3}, tmp_path / "nested.pt")
    torch.save(nn.Linear(2, 2).state_dict(), tmp_path / "other.pt")
    torch.save(torch.zeros(3), tmp_path / "tensor.pt")
    posterior = lk.LocalPosterior(model, data)
    for name in ("junk", "whole", "nested", "other", "tensor"):
        path = tmp_path / f"{name}.pt"
        with pytest.raises(ValueError, match=rf"{name}\.pt .*state_dict\(\)"):
            posterior.at(path)
        with pytest.raises(ValueError, match=rf"checkpoints\['a'\]: .*{name}\.pt"):
            lk.sample(
                posterior,
                data,
                sampler=lk.SGLD(1e-6),
                draws=2,
                chains=1,
                store=tmp_path / "s",
                checkpoints={"a": path},
                progress=False,
            )
    assert not (tmp_path / "s").exists()


@pytest.mark.parametrize("given", [{"0.weight": torch.zeros(2)}, "model.pt", None])
def test_traces__of_what_is_no_module(given, tmp_path):
    data = TensorDataset(torch.randn(N, 4), torch.arange(N) % 3)
    for call in (
        lambda: lk.snapshot(given, data, store=tmp_path / "t"),
        lambda: lk.open_trace(tmp_path / "t", given, data),
        lambda: lk.LocalPosterior(given, data),
    ):
        message = "load_state_dict" if given else "must be a torch.nn.Module"
        with pytest.raises(TypeError, match=message):
            call()
