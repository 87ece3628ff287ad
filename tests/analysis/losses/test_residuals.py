import numpy as np
import xarray as xr

import lkarray as lk


def test_residualize__takes_away_what_a_label_shares():
    rng = np.random.default_rng(1)
    chains, draws, n = 3, 400, 40
    labels = np.repeat(np.arange(8), 5)
    label_part = rng.normal(size=(8, chains, draws))
    pair_part = rng.normal(size=(n // 2, chains, draws))  # of i and i + 20, of different labels
    scale = rng.uniform(0.5, 20, n)
    series = 3 * label_part[labels] + np.concatenate([pair_part, pair_part])
    loss = np.moveaxis(series, 0, -1) * scale + 5
    losses = xr.DataArray(
        loss,
        dims=("chain", "draw", "sample"),
        name="loss",
        coords={"sample": np.arange(n), "label": ("sample", labels)},
    )
    left = lk.residualize(losses.chunk(sample=7, draw=150))
    z = (loss - loss.mean((0, 1))).reshape(-1, n)
    z /= np.linalg.norm(z, axis=0)
    for i in (0, 7, 39):
        others = z[:, (labels == labels[i]) & (np.arange(n) != i)].sum(1)
        slope = z[:, i] @ others / (others @ others)
        norm = np.linalg.norm(loss[..., i] - loss[..., i].mean())
        expected = norm * (z[:, i] - slope * others)
        np.testing.assert_allclose(left.values[..., i].ravel(), expected, atol=1e-5 * norm)
    before, after = (lk.correlation(x).values for x in (losses, left))
    i = np.arange(20)
    assert before[i, i + 20].mean() < 0.2
    assert after[i, i + 20].mean() > 0.6
    near = lk.neighbors(left, 1, exclude="label").compute()["neighbor"].values[:, 0]
    assert np.array_equal(near, np.r_[i + 20, i])
    alone = lk.residualize(losses, np.arange(n))
    np.testing.assert_allclose(alone, losses - losses.mean(("chain", "draw")), atol=1e-9)
