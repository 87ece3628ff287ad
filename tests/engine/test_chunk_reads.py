import dask.array as da
import numpy as np

import lkarray as lk
from tests.helpers.losses import counting, numpy_correlation, random_losses


def test_source__each_chunk_is_computed_once_when_the_budget_allows(rng):
    losses = random_losses(rng, chains=4, draws=50, samples=600)
    lazy, reads = counting(losses, (1, 50, 150))
    np.testing.assert_allclose(lk.correlation(lazy), numpy_correlation(losses), atol=1e-5)
    assert set(reads.values()) == {1}
    assert len(reads) == 16


def test_source__work_shared_by_chunks_is_walked_once(rng):
    """Forty steps, each of which needs two chunks of the last: 2**40 paths, 160 tasks."""
    losses = random_losses(rng, chains=4, draws=10, samples=8)
    data = da.from_array(losses.values, chunks=(1, 10, 8))
    values = losses.values.astype("f8")
    for _ in range(40):
        data = (data + 0.5 * da.roll(data, 1, axis=0)) / 1.2
        values = (values + 0.5 * np.roll(values, 1, axis=0)) / 1.2
    result = lk.correlation(losses.copy(data=data))
    np.testing.assert_allclose(result, numpy_correlation(losses.copy(data=values)), atol=1e-4)
