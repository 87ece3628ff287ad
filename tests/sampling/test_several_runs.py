"""Runs of several components or checkpoints in one store, and runs that are replayed."""

import numpy as np
import pytest
import torch
from zarr.storage import MemoryStore

import lkarray as lk
from lkarray import errors
from tests.helpers.networks import classification, small_network
from tests.helpers.runs import OPTIONS, losses_of


def test_sample__probes_components_into_one_tree(tmp_path, posterior, data):
    asked = {"first": "0.*", "row": "2.weight[1:2, :]"}
    tree = lk.sample(posterior, data, store=tmp_path / "s", components=asked, **OPTIONS)
    assert tree["losses/loss"].dims == ("component", "chain", "draw", "sample")
    assert tree["losses"]["component"].values.tolist() == ["first", "row"]
    for name, patterns in asked.items():
        alone = lk.sample(posterior.moving(patterns), data, store=MemoryStore(), **OPTIONS)
        np.testing.assert_array_equal(losses_of(tree.sel(component=name)), losses_of(alone))
    assert lk.verify(tmp_path / "s") == []
    again = lk.open(tmp_path / "s")
    np.testing.assert_array_equal(losses_of(again), losses_of(tree))
    from lkarray.inspect import describe_store

    said = describe_store(tmp_path / "s")
    assert "component row:" in said
    assert "trainable: ['2.weight[1:2, :]']" in said
    assert float(lk.llc(tree).sel(component="first")) > float(lk.llc(tree).sel(component="row"))
    with pytest.raises(errors.StoreError, match="holds several runs, by component"):
        lk.sample(posterior, data, store=tmp_path / "s", **OPTIONS)


def test_sample__a_part_of_a_tensor_moves_alone(posterior, data):
    from lkarray.nn import FlatModel

    part = posterior.moving(["2.weight[1:2, :]", "2.weight[0:1, 0:2]", "0.bias"])
    assert part.trainable == ["0.bias", "2.weight[1:2, :]", "2.weight[0:1, 0:2]"]
    flat = FlatModel(part.model, trainable=part.trainable)
    assert int(flat.mask.sum()) == 5 + 5 + 2
    moved = {}

    def weights(model):
        moved["weight"] = model[2].weight.detach().clone()
        return 0.0

    lk.sample(part, data, store=MemoryStore(), observables={"w": weights}, **OPTIONS)
    changed = moved["weight"] != posterior.model[2].weight
    expected = torch.zeros(3, 5, dtype=torch.bool)
    expected[1], expected[0, :2] = True, True
    assert torch.equal(changed, expected)
    for bad, message in (("2.weight[9:, 0:1, 3]", "does not index"), ("0.bias[7:]", "no element")):
        with pytest.raises(ValueError, match=message):
            FlatModel(part.model, trainable=bad)


def test_sample__follows_checkpoints_and_their_components(tmp_path, posterior, data):
    torch.manual_seed(5)
    late = small_network()
    with torch.no_grad():
        late[2].weight.mul_(2)
    torch.save(late.state_dict(), tmp_path / "late.pt")
    weights = {0: posterior.model.state_dict(), 100: tmp_path / "late.pt"}
    path = tmp_path / "s"
    tree = lk.sample(posterior, data, store=path, checkpoints=weights, **OPTIONS)
    assert tree["losses/loss"].dims == ("checkpoint", "chain", "draw", "sample")
    alone = lk.sample(posterior.at(late), data, store=MemoryStore(), **OPTIONS)
    np.testing.assert_array_equal(losses_of(tree.sel(checkpoint=100)), losses_of(alone))
    assert lk.loss_gain(tree).dims == ("checkpoint", "sample")
    both = lk.sample(
        posterior,
        data,
        store=tmp_path / "both",
        checkpoints=[posterior.model, late],
        components={"a": "0.*", "b": "2.*"},
        **OPTIONS,
    )
    assert both["losses/loss"].dims == ("checkpoint", "component", "chain", "draw", "sample")
    assert lk.verify(tmp_path / "both") == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"components": {"a": "nothing.*"}}, "matches none of"),
        ({"components": {}}, "components must map names"),
        ({"components": {"a/b": "0.*"}}, "hold a slash"),
        ({"checkpoints": {"a": "missing.pt"}}, "there is no file missing.pt"),
        ({"checkpoints": []}, "checkpoints is empty"),
    ],
)
def test_sample__refuses_bad_parts_before_any_work(tmp_path, posterior, data, options, message):
    with pytest.raises(ValueError, match=message):
        lk.sample(posterior, data, store=tmp_path / "s", **options, **OPTIONS)
    assert not (tmp_path / "s").exists()


@pytest.mark.parametrize("width", [1, 2])
def test_observe__equals_having_observed_at_once(tmp_path, posterior, data, width):
    new = classification(25)
    both = lk.sample(
        posterior,
        {"train": data, "new": new},
        store=tmp_path / "s",
        chains_per_device=width,
        **OPTIONS,
    )
    replay = lk.observe(both, new)
    np.testing.assert_array_equal(losses_of(replay), losses_of(both, "losses_new"))
    assert replay.attrs["replay_error"] == 0
    opened = lk.open(tmp_path / "s").isel(draw=slice(5, 9), chain=[0, 2])
    few = lk.observe(opened, new, posterior=posterior, store=tmp_path / "replay")
    np.testing.assert_array_equal(losses_of(few), losses_of(both, "losses_new")[[0, 2], 5:9])
    assert lk.influence(opened["losses"], few["losses"]).shape == (40, 25)


def test_observe__replays_parts(tmp_path, posterior, data):
    asked = {"first": "0.*", "last": "2.*"}
    tree = lk.sample(posterior, data, store=tmp_path / "s", components=asked, **OPTIONS)
    replay = lk.observe(lk.open(tmp_path / "s"), data, posterior=posterior)
    np.testing.assert_array_equal(losses_of(replay), losses_of(tree))


def test_observe__refuses_another_model(tmp_path, posterior, data, monkeypatch):
    from lkarray.sampling import remembering

    tree = lk.sample(posterior, data, store=tmp_path / "s", **OPTIONS)
    other = lk.LocalPosterior(small_network().requires_grad_(), data, nbeta=10.0, gamma=50.0)
    with torch.no_grad():
        other.model[0].bias[0] += 1
    with pytest.raises(errors.FingerprintError, match="weights"):
        lk.observe(tree, data, posterior=other)
    monkeypatch.setattr(remembering, "_remembered", {})
    with pytest.raises(ValueError, match="not known in this process; pass posterior="):
        lk.observe(tree, data)
    with pytest.raises(ValueError, match="pass the whole tree"):
        lk.observe(tree["losses"], data, posterior=posterior)
    # Chains that are not the stored ones are noticed by their statistics.
    tree["sample_stats"]["distance"][:] = tree["sample_stats"]["distance"] * 1.01
    with pytest.raises(errors.FingerprintError, match="not the stored ones"):
        lk.observe(tree, data, posterior=posterior)
