import numpy as np
import pytest
import scipy.sparse.linalg

import lkarray as lk
from tests.helpers.losses import (
    numpy_covariance,
    random_losses,
)


@pytest.mark.parametrize("samples", [20, 100])
def test_operator__drives_scipy(rng, samples):
    losses = random_losses(rng, chains=2, samples=samples).chunk(sample=30)
    kernel = numpy_covariance(losses.compute())
    operator = lk.linear_operator(losses, memory="400 KiB")
    block = rng.normal(size=(samples, 3))
    np.testing.assert_allclose(operator @ block, kernel @ block, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(operator @ block[:, 0], kernel @ block[:, 0], rtol=1e-4, atol=1e-4)
    values = scipy.sparse.linalg.eigsh(operator, 3, tol=1e-5, return_eigenvectors=False)
    np.testing.assert_allclose(np.sort(values), np.linalg.eigvalsh(kernel)[-3:], rtol=1e-4)
